"""Ops with a kernel of their own, each with one public function. See kernels/README.md."""

from tokeff.kernels.bipartite_match import bipartite_match
from tokeff.kernels.block_sparse_prefill import block_sparse_prefill
from tokeff.kernels.column_mass import column_mass
from tokeff.kernels.compact_rows import compact_rows
from tokeff.kernels.decode_attention import decode_attention, merge
from tokeff.kernels.flash_prefill import flash_prefill
from tokeff.kernels.k_centre import k_centre
from tokeff.kernels.lowrank_scores import lowrank_scores
from tokeff.kernels.page_scores import page_scores
from tokeff.kernels.quant_decode import quant_decode
from tokeff.kernels.shared_prefix import shared_prefix
from tokeff.kernels.tree_attention import tree_attention

__all__ = [
    "bipartite_match", "block_sparse_prefill", "column_mass", "compact_rows", "decode_attention", "flash_prefill", "k_centre",
    "lowrank_scores", "merge", "page_scores", "quant_decode", "shared_prefix", "tree_attention",
]  # fmt: skip
