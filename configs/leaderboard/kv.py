"""Every listed method that keeps, reads or drops prompt rows, at four budgets, on real prose with hidden sentences.

Command:   tokeff run configs/leaderboard/kv.py --suite smoke      (a first look: two short texts, one budget)
           tokeff run configs/leaderboard/kv.py --suite full       (16 texts, four budgets; resumes where it stopped)
Hardware:  2 CPU cores, float32
Expected:  KL to the full cache falls with the budget; query-agnostic methods below Random are marked
"""

from tokeff.errors import UserError
from tokeff.evals.leaderboard import Batch, Leaderboard, entries
from tokeff.listing import methods

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
SPEEDS = "experiments/results/kv_speed"  # of configs/leaderboard/kv_speed.py, at a budget of 12.5%
# Texts of 2,048 tokens: three needles of different kinds, each asked for, in the second four texts in turns too; look-alike needles, of
# which one is asked for; and chains of names. Then longer ones. SmolLM2 follows no chain: there the log-probability of the right answer
# ranks.
FULL = (
    Batch("multi_question", 2048), Batch("multi_question", 2048, seed=4, turns=True), Batch("multi_key", 2048, n=2),
    Batch("variable_tracking", 2048, n=2), Batch("multi_question", 4096),
)  # fmt: skip


def experiment(suite: str = "full") -> Leaderboard:
    """`full`: 12 texts of 2,048 tokens and 4 of 4,096 at four budgets. `smoke`: two texts of 384 at one."""
    if suite not in ("smoke", "full"):
        raise UserError(f"no suite {suite!r}; use --suite smoke or --suite full")
    idle = ("KVShare",)  # shares nothing until it is given an earlier prompt
    listed = [m for m in methods() if m.part != "decode" and (m.name == "Full" or not m.lossless) and m.name not in idle]
    if suite == "smoke":
        return Leaderboard(name="kv-smoke", rows=entries(listed, (0.25,)), batches=(Batch("single_needle", 384, n=2, ahead=16),))
    return Leaderboard(name="kv", rows=entries(listed, BUDGETS), batches=FULL, own=(0.25, 0.0625), speeds=SPEEDS)
