"""Decode speed of every cache policy at 12.5%: next to dense decoding, next to the bandwidth floor, and from which length on it pays.

Command:   tokeff run configs/leaderboard/kv_speed.py      (resumes where it stopped)
Hardware:  2 CPU cores, float32, nothing else running
Expected:  methods that hold 12.5% pay at every length; methods that select pay from a few thousand rows on
"""

from tokeff.evals.crossover import Crossover
from tokeff.evals.leaderboard import entries
from tokeff.listing import methods


def experiment() -> Crossover:
    return Crossover(name="kv-speed", rows=entries([m for m in methods() if m.part == "kv"], (0.125,)))
