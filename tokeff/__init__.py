"""Token efficiency in JAX. Names are imported when first used, so that `import tokeff` costs nothing.

    m = tokeff.load("smollm2-135m")
    tokeff.generate(m, prompts, kv=tokeff.kv.snapkv(0.1), decode=tokeff.decode.token_recycling())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokeff import decode, kv, reduce, sparse
    from tokeff.context import compress
    from tokeff.decode.sample import Sampling
    from tokeff.evals.api import evaluate
    from tokeff.generation import generate, stream
    from tokeff.listing import methods
    from tokeff.models.config import Precision
    from tokeff.models.load import load

__version__ = "0.1.0"

_HOME = {
    "Precision": "tokeff.models.config",
    "Sampling": "tokeff.decode.sample",
    "compress": "tokeff.context",
    "evaluate": "tokeff.evals.api",
    "generate": "tokeff.generation",
    "load": "tokeff.models.load",
    "methods": "tokeff.listing",
    "stream": "tokeff.generation",
}
_MODULES = ("decode", "kv", "reduce", "sparse")

__all__ = [
    "Precision", "Sampling", "compress", "decode", "evaluate", "generate", "kv", "load", "methods", "reduce", "sparse", "stream",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tokeff.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokeff' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
