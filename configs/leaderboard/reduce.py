"""Token reduction of text, sound, pictures and clips at equal mean tokens a layer: 66, 33, 22 and 11% of them.

Command:   tokeff run configs/leaderboard/reduce.py --suite smoke      (a first look: some rows of each kind at a third)
           tokeff run configs/leaderboard/reduce.py --suite full       (every method; resumes where it stopped)
           tokeff run configs/leaderboard/reduce.py --suite pictures   (of that, one kind; also text, sound, labels, clips)
Hardware:  2 CPU cores, float32, nothing else running
Time:      smoke 4 min; text 27, pictures 13, sound 5, labels 2 min on an AMD EPYC with nothing compiled before; clips 16 on a slower one
Expected:  what looks beats what does not from a third down; sound and pictures lose little at two thirds; a prefill gains about what its
           operations say, less what scores cost
"""

from tokeff.errors import UserError
from tokeff.evals.leaderboard import Batch
from tokeff.evals.reduction import KINDS, Reduction, entries

SHARES = (0.66, 0.33, 0.22, 0.11)
FEW = {
    "text": ("PromptDistill", "Truncated", "Random", "Pooled"),
    "sound": ("ToMe", "Pooled"),
    "labels": ("ToMe", "Random"),
    "pictures": ("FasterVLM", "RandomPatches", "PyramidDrop"),
    "clips": ("HoliTom", "RandomPatches"),
}
TEXTS = (Batch("single_needle", 960), Batch("single_needle", 960, seed=4))


def experiment(suite: str = "full") -> Reduction:
    """`full`: every method of every kind at four shares, on 8 texts of 960 tokens, all windows of sound, 100 pictures a task and 50 clips
    a task. A kind's name: that kind alone, into the same folder. `smoke`: some methods at a third, on two texts of 384 tokens, two
    windows, 25 pictures and 10 clips a task."""
    if suite not in ("smoke", "full", *KINDS):
        raise UserError(f"no suite {suite!r}; use --suite smoke, full or one of {', '.join(KINDS)}")
    if suite == "smoke":
        rows = tuple(row for kind in KINDS for row in entries(kind, (0.33,), FEW[kind]))
        return Reduction(
            "reduce-smoke", rows, batches=(Batch("single_needle", 384, n=2, ahead=16),), timed=512, rounds=2, windows=2, tasks=("where",),
            pictures=25, clips=10,
        )  # fmt: skip
    rows = tuple(row for kind in KINDS if suite in ("full", kind) for row in entries(kind, SHARES))
    return Reduction("reduce", rows, batches=TEXTS, timed=1536, rounds=2)
