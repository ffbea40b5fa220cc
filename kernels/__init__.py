"""Ops with a kernel of their own, each with one public function. See kernels/README.md."""

from tokeff.kernels.column_mass import column_mass
from tokeff.kernels.decode_attention import decode_attention, merge

__all__ = ["column_mass", "decode_attention", "merge"]
