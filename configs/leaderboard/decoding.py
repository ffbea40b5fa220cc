"""Parallel decoding: every listed drafter on five classes of prompts, at published tree sizes too, and in batches.

Command:   tokeff run configs/leaderboard/decoding.py --suite smoke      (a first look: three drafters, two prompts of two classes)
           tokeff run configs/leaderboard/decoding.py --suite full       (resumes where it stopped; --draft FOLDER takes another draft)
Hardware:  2 CPU cores, float32, nothing else running
Expected:  MAT grows with the tree, and so does T(n)/T(1): on two cores drafting pays on prompts that are copied, with few drafts, and large
           trees lose; where a pass is bound by reading weights (H200, TPU v5e, by arithmetic) they gain on every class
"""

from dataclasses import replace

from tokeff.decode.recycling import TREE_80
from tokeff.errors import UserError
from tokeff.evals.drafting import Drafted, Drafting, drafted, entries
from tokeff.listing import methods

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 81)
IN_BATCHES = ("PromptLookup", "TokenRecycling", "Lookahead (Alipay)", "EarlyExit")
FEW = Drafted("", prompts=2, classes=("copy-heavy", "code", "prose"))  # for rows whose passes are slow
DRAFT = "checkpoints/smollm2-135m-draft"  # of experiments/distill_draft.py
SIZES = (4, 8, 15, 31)  # of cuts of the published tree; all on the same prompts, as the published one of 80


def experiment(suite: str = "full") -> Drafting:
    """`full`: every listed drafter on 6 prompts a class, published trees on 2 of three classes, and batches of 4 and 16 for four drafters.
    `smoke`: three drafters on two prompts. On a quiet machine one turn of the decoders on each prompt is enough; `--rounds 3` takes three.
    """
    if suite not in ("smoke", "full"):
        raise UserError(f"no suite {suite!r}; use --suite smoke or --suite full")
    if suite == "smoke":
        two = Drafted("", classes=("copy-heavy", "chat"))
        rows = (
            drafted("PromptLookup", row=replace(two, batches=(1, 4))), drafted("TokenRecycling", row=two),
            drafted("TokenRecycling", "paper", name="TokenRecycling 80", row=replace(two, classes=("chat",), prompts=1)),
        )  # fmt: skip
        return Drafting("decoding-smoke", rows, prompts=2, new=24, rounds=1, passes=4)
    listed = [m for m in methods() if m.part == "decode"]
    alone = [replace(row, batches=(1, 4, 16)) if row.method in IN_BATCHES else row for row in entries(listed)]
    exact = drafted("RAPID", name="RAPID, eta 0", eta=0.0, row=FEW)  # which keeps the law; the listed default does not
    searching = drafted("SWIFT", name="SWIFT, searching", row=replace(FEW, calibrated=False))  # as it goes; SWIFT drafts as calibrated
    trees = [drafted("TokenRecycling", name=f"TokenRecycling {n}", tree=cut(n), row=FEW) for n in SIZES]
    rows = (*alone, exact, searching, *trees, *entries(listed, "paper", FEW))
    return Drafting("decoding", rows, draft=DRAFT, widths=WIDTHS, prompts=6, rounds=1)


def cut(n: int) -> tuple[tuple[int, ...], ...]:
    """The n nodes of the published tree that are most often right if every further rank, and every level, halves the odds."""
    return tuple(sorted(sorted(TREE_80, key=lambda path: sum(rank + 1 for rank in path))[:n], key=len))
