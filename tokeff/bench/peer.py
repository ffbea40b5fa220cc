"""transformers beside tokeff: the same weights in another process, which takes its turns in the same interleaved runs."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from tokeff.models.layout import stored_shape
from tokeff.models.load import Model

SCRIPT = Path(__file__).with_name("peer_process.py")
SETTLE = 0.3  # seconds: worker threads of the other library spin for a while after they are done
BLOCK = {
    "attn_norm_D": "input_layernorm",
    "q_NHD": "self_attn.q_proj",
    "k_KHD": "self_attn.k_proj",
    "v_KHD": "self_attn.v_proj",
    "o_DNH": "self_attn.o_proj",
    "ffn_norm_D": "post_attention_layernorm",
    "gate_FD": "mlp.gate_proj",
    "up_FD": "mlp.up_proj",
    "down_DF": "mlp.down_proj",
}


def peers_python() -> Path | None:
    """The python of the environment that has torch and transformers, if there is one."""
    named = os.environ.get("TOKEFF_PEERS_PYTHON")
    path = Path(named) if named else Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
    return path if path.exists() else None


def is_llama(m: Model) -> bool:
    """Whether transformers' Llama computes this model."""
    cfg, block = m.cfg, m.params.blocks[0]
    extra = (block.q_bias_NH, block.q_norm_H, block.post_attn_norm_D, block.post_ffn_norm_D)
    plain = cfg.rope.kind == "none" and cfg.act == "silu" and not cfg.softcap and not cfg.final_softcap and cfg.embed_scale == 1
    return plain and set(cfg.windows) == {None} and all(x is None for x in extra)


def export(m: Model, folder: Path) -> Path:
    """Write a Llama-like model as a Hugging Face folder in float32."""
    cfg, p = m.cfg, m.params
    arrays = {"model.embed_tokens.weight": p.embed_VD, "model.norm.weight": p.norm_D}
    if p.head_VD is not None:
        arrays["lm_head.weight"] = p.head_VD
    for i, block in enumerate(p.blocks):
        for field, name in BLOCK.items():
            arrays[f"model.layers.{i}.{name}.weight"] = getattr(block, field).reshape(stored_shape(field, cfg))
    save_file({n: np.asarray(x, np.float32) for n, x in arrays.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.V, "hidden_size": cfg.D,
        "intermediate_size": cfg.F, "num_hidden_layers": cfg.L, "num_attention_heads": cfg.N, "num_key_value_heads": cfg.K,
        "head_dim": cfg.H, "max_position_embeddings": cfg.max_len, "rms_norm_eps": cfg.eps, "rope_theta": cfg.rope.base,
        "tie_word_embeddings": cfg.tied, "eos_token_id": list(cfg.eos), "bos_token_id": cfg.bos, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Peer:
    """A running peer process. Its methods return seconds."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.versions = self._line()

    def _line(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peers' python ended with code {self.process.wait()}; what it said is above")
        return json.loads(line)

    def ask(self, **request) -> float:
        """Send one request and wait for its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        seconds = self._line()["seconds"]
        time.sleep(SETTLE)
        return seconds

    def prefill(self, context: int) -> float:
        return self.ask(do="prefill", context=context)

    def decode(self, context: int, tokens: int) -> float:
        return self.ask(do="decode", context=context, tokens=tokens)


@contextmanager
def peer(m: Model, wanted: bool = True, script: Path = SCRIPT):
    """A Peer that runs `script` on this model's weights and as many threads as this process may use; None where there is no such thing."""
    python = peers_python()
    if not wanted or python is None or jax.default_backend() != "cpu" or not is_llama(m):
        yield None
        return
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory(prefix="tokeff-peer-") as folder:
        command = [str(python), str(script), str(export(m, Path(folder))), str(threads)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        env.pop("PYTHONPATH", None)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        try:
            yield Peer(process)
        finally:
            process.kill()
            process.wait()
