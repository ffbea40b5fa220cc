"""Which tokens go on through the network."""

from tokeff.reduce.methods import gemfilter, promptdistill

__all__ = ["gemfilter", "promptdistill"]
