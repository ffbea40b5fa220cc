"""Token reduction at equal mean tokens a layer: text under passes, sound and pictures in encoders, pictures before and inside a decoder.

A row is a method at a share: that of the rows which the layers work on in the mean (`tokeff.evals.mean_rows`), so that cutting early and
cutting late compare fairly. The five kinds stand on one page, each with a row `Full` and with baselines that do not look:

    text      SmolLM2 under every listed pass: answers, loss and divergence on real text          tokeff.evals.reading
    sound     Whisper, rows merged in its encoder: word errors                                    tokeff.evals.hearing
    labels    a tower that names digits, rows merged inside it                                    tokeff.evals.seeing
    pictures  a LLaVA behind every listed method for single pictures, and under passes            tokeff.evals.seeing
    clips     the same behind the methods for frames of a video                                   tokeff.evals.watching

Seconds are those of two programs that take turns, the method's and that of all rows; a speed-up is the median of the ratios within rounds.
`beats` says whether a method is better than every baseline of its kind at its share, example by example, at 95%.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokeff.compat import forget_programs
from tokeff.data.canvases import TASKS, make
from tokeff.data.digits import material
from tokeff.errors import UserError, nearest
from tokeff.evals import hearing, reading, seeing, watching
from tokeff.evals.comparison import BASE, compile_cache
from tokeff.evals.hearing import Hearing
from tokeff.evals.leaderboard import Batch, over_texts
from tokeff.evals.mean_rows import check_share, mean_share
from tokeff.evals.reading import Reading
from tokeff.evals.seeing import Answering, Labelling
from tokeff.evals.stats import paired_difference
from tokeff.evals.watching import Watching
from tokeff.experiment import Experiment, Row
from tokeff.generation import Setup
from tokeff.models.fetch import cache_dir
from tokeff.models.llava_hf import load_llava
from tokeff.models.load import load
from tokeff.models.presets import IMAGES
from tokeff.models.vit_hf import load_vit
from tokeff.report.figures import Curves, Figure

KINDS = ("text", "sound", "labels", "pictures", "clips")
TIME, ALL = "time", "all"  # parts of a text row's measurements, and the one part of every other's
SINGLE = tuple(name for name, task in TASKS.items() if task.pictures == 1 and task.side == TASKS["name"].side)
SEED = 4242  # of the pictures


@dataclass(frozen=True)
class AtShare(Row):
    """One method of one kind at a share of its rows; `Full` at 1."""

    kind: str = "text"
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.method}@{self.share:g}"


def known(kind: str) -> tuple[str, ...]:
    """The methods of a kind, without `Full`. UserError for a kind that is none."""
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r} of rows; {nearest(kind, KINDS)}")
    text = tuple(f.name for f in reading.families())
    return {"text": text, "pictures": seeing.METHODS, "clips": watching.METHODS}.get(kind, hearing.METHODS)


def baselines(kind: str) -> tuple[str, ...]:
    """What a method of a kind has to beat."""
    text = tuple(f.name for f in reading.families() if f.baseline)
    return {"text": text, "pictures": seeing.BASELINES, "clips": watching.BASELINES}.get(kind, hearing.BASELINES)


def entries(kind: str, shares: Sequence[float], methods: Sequence[str] | None = None) -> tuple[AtShare, ...]:
    """`Full`, and every method of a kind (or those named) at every share."""
    return (AtShare(BASE, kind), *(AtShare(name, kind, share) for share in shares for name in methods or known(kind)))


@dataclass(frozen=True)
class Reduction(Experiment):
    """Every row, its parts measured one by one. Rows may be added later: what was measured with the same settings stays."""

    rows: tuple[AtShare, ...]  # type: ignore[assignment]
    model: str = "smollm2-135m"
    """The text model: a preset, a folder, a repo id or a .gguf file."""
    tower: str = "checkpoints/canvas-vit"
    """Folder of the tower that names digits (experiments/train_vit.py)."""
    llava: str = "checkpoints/canvas-llava"
    """Folder of the model of pictures (experiments/train_vlm.py)."""
    batches: tuple[Batch, ...] = (Batch("single_needle", 960, n=4, ahead=64),)
    """Texts that are read."""
    timed: int = 2048
    """Tokens of the prompt whose prefill is timed."""
    rounds: int = 3
    """How often programs take turns."""
    windows: int | None = None
    """How many windows of sound are heard; None for all."""
    tasks: tuple[str, ...] = ("where", "row")
    """Questions that pictures are asked."""
    pictures: int = 100
    """Pictures of each task."""
    clips: int = 50
    """Clips of each task about clips."""

    def settled(self) -> Reduction:
        """Without the kinds whose models or examples are not there, and without picture methods that fit no share."""
        llava, rows = self.unseen(self.llava), self.rows
        lack = {"sound": hearing.missing(), "labels": self.unseen(self.tower), "pictures": llava, "clips": llava}
        for kind, reason in lack.items():
            if reason is not None and any(row.kind == kind for row in rows):
                print(f"left out: {kind}: {reason}", file=sys.stderr)
                rows = tuple(row for row in rows if row.kind != kind)
        return replace(self, rows=rows)

    def unseen(self, folder: str) -> str | None:
        """None, or what pictures need that is not there."""
        for name, preset in IMAGES.items():
            if not all((cache_dir() / preset.folder / member.name).exists() for member in preset.members):
                return f"{name} is not in the cache; run `tokeff fetch {name}`"
        return None if Path(folder).is_dir() else f"there is no model in {folder}; train it, see experiments/train_vit.py and train_vlm.py"

    def check(self) -> None:
        if not self.rows:
            raise UserError("nothing of what is to be measured is there; add rows of kind 'text', or fetch what stderr names")
        for row in self.rows:
            if row.method != BASE and row.method not in (names := known(row.kind)):
                raise UserError(f"no method {row.method!r} of kind {row.kind!r}; {nearest(row.method, names)}")
            check_share(row.share)
        if lacking := sorted({row.kind for row in self.rows} - {row.kind for row in self.rows if row.method == BASE}):
            raise UserError(f"rows of kind {lacking[0]!r} need the row {BASE!r} to compare with; add AtShare({BASE!r}, {lacking[0]!r})")
        if wrong := [task for task in self.tasks if task not in SINGLE]:
            raise UserError(f"task {wrong[0]!r} is not about one picture of the tower's size; give some of {', '.join(SINGLE)}")
        for name in ("timed", "rounds", "pictures", "clips"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} measures nothing; give 1 or more")

    def identity(self) -> Reduction:
        return replace(self, rows=())

    def stands(self, measured: dict[str, Any]) -> bool:
        return any(measured.get("settings") == repr(row) for row in self.rows)

    def keys(self) -> list[str]:
        """Texts batch by batch, so that each is read once; then every row's seconds, and the other kinds row by row."""
        text = [row for row in self.rows if row.kind == "text"]
        found = [f"{row.name}/{i}" for i in range(len(self.batches)) for row in text] + [f"{row.name}/{TIME}" for row in text]
        return found + [f"{row.name}/{ALL}" for row in self.rows if row.kind != "text"]

    def prepare(self) -> Parts:
        """Text rows are checked against the model here; the others load when the first of them is measured."""
        compile_cache()
        parts = Parts(self)
        if any(row.kind == "text" for row in self.rows):
            m, longest = parts.reading.m, max(self.timed, *(batch.length + batch.ahead for batch in self.batches))
            for row in self.rows:
                placed = parts.reading.placed(row.method, row.share) if row.kind == "text" else None
                Setup(cut=None if placed is None else placed.cut).check(m, [longest], 1)
        return parts

    def measure(self, context: Parts, key: str) -> dict[str, Any]:
        forget_programs()
        name, part = key.rsplit("/", 1)
        row = next(row for row in self.rows if row.name == name)
        about = {"method": row.method, "kind": row.kind, "target": row.share, "part": part, "settings": repr(row)}
        try:
            return about | context.figures(row, part)
        except UserError as error:
            if row.kind == "text":
                raise
            return about | {"note": f"left out: {error}"}

    def summary(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A line a row, kind by kind, with what was counted and measured of its parts."""
        groups: dict[tuple[str, float, str], dict[str, dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["kind"], row["target"], row["method"]), {})[row["part"]] = row
        order = sorted(groups, key=lambda g: (KINDS.index(g[0]), -g[1]))
        return [averaged(groups[g], [groups[o] for o in order if o[:2] == g[:2] and o[2] in baselines(g[0])]) for g in order]

    def report(self) -> tuple[Figure, ...]:
        return (
            Curves("share", "kl", "Text: distance from the full model against rows a layer works on", log_y=True),
            Curves("share", "answer_logprob", "Text: log-likelihood of the right answer", high=True),
            Curves("share", "wer", "Sound: word errors against rows a layer of the encoder works on"),
            Curves("share", "labelled", "Pictures: digits named by the tower", high=True),
            Curves("share", "accuracy", "Pictures: right answers", high=True),
            Curves("share", "watched", "Clips: right answers", high=True),
            Curves("share", "speedup", "Text: speed of a prefill, the dense one = 1", high=True),
            Curves("share", "encoder_speedup", "Sound: speed of the encoder, over all rows = 1", high=True),
            Curves("share", "picture_speedup", "Pictures: speed of a batch, with all rows = 1", high=True),
            Curves("share", "clip_speedup", "Clips: speed of a batch, with all rows = 1", high=True),
        )


@dataclass(eq=False)
class Parts:
    """What the kinds measure with; each is loaded when it is first asked for."""

    experiment: Reduction
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def reading(self) -> Reading:
        e = self.experiment
        return self.once("text", lambda: Reading(load(e.model), e.batches, e.timed, e.rounds))

    def figures(self, row: AtShare, part: str) -> dict[str, Any]:
        """One part of one row."""
        e = self.experiment
        if row.kind == "text":
            placed = self.reading.placed(row.method, row.share)
            cut = None if placed is None else placed.cut
            told = {} if placed is None else {"top": placed.budget, "layers": list(placed.layers), "moved": placed.moved}
            told |= {"share": mean_share(cut, self.reading.m.cfg, e.timed)}
            return told | (self.reading.speed(cut) if part == TIME else self.reading.quality(cut, int(part)))
        if row.kind == "sound":
            return self.once("sound", lambda: Hearing.load(e.windows, e.rounds)).figures(row.method, row.share)
        if row.kind == "labels":
            made = lambda: Labelling(load_vit(e.tower), make("name", material("test"), e.pictures, SEED), e.rounds)  # noqa: E731
            return self.once("labels", made).figures(row.method, row.share)
        made = self.watching if row.kind == "clips" else self.answering
        return self.once(row.kind, made).figures(row.method, row.share)

    def answering(self) -> Answering:
        e, stuff = self.experiment, material("test")
        return Answering(load_llava(e.llava), {task: make(task, stuff, e.pictures, SEED) for task in e.tasks}, e.rounds)

    def watching(self) -> Watching:
        e, stuff = self.experiment, material("test")
        given = {task: make(task, stuff, e.clips, SEED) for task in watching.TASKS}
        return Watching(load_llava(e.llava), given, make(watching.TASKS[0], stuff, watching.BATCH, SEED + 1), e.rounds)


SHOWN = (
    "prefill_s", "first_token_s", "first_token_speedup", "speedup", "encoder_speedup", "picture_speedup", "decoder_speedup", "clip_speedup",
    "tflops", "flops", "held", "kv_mib", "top", "layers", "rows_left", "measured_at", "commit", "dirty", "note",
)  # fmt: skip


def averaged(parts: dict[str, dict[str, Any]], against: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The parts of one row as one line. against: those of the baselines at its share."""
    some = next(iter(parts.values()))
    found = {name: some[name] for name in ("method", "kind", "target")} | {"share": some.get("share"), "family": family(some)}
    for part in parts.values():
        found |= {name: part[name] for name in SHOWN if name in part}
    found["measured_s"] = sum(part.get("measured_s") or 0 for part in parts.values())
    if some.get("moved"):
        found["note"] = f"chooses from layer {some['layers'][0]} on, lower than listed"
    if "share" in some:
        match some["kind"]:
            case "text":
                found |= reading.averaged(list(parts.values()), over_texts)
            case "sound":
                found |= hearing.averaged(some)
            case kind:
                found |= seeing.averaged(some, {"labels": "labelled", "clips": "watched"}.get(kind, "accuracy"))
    fitting = [theirs for theirs in against if any("paired" in part for part in theirs.values())]  # the others fit no such share
    if found["family"] != "baseline" and (won := [beats(parts, theirs) for theirs in fitting]) and None not in won:
        found["beats"] = all(won)
    return found


def family(row: dict[str, Any]) -> str:
    """'baseline' for what every other row of its kind is held against."""
    return "baseline" if row["method"] in (BASE, *baselines(row["kind"])) else "reduce"


def beats(mine: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> bool | None:
    """Whether the examples that both measured are better under `mine`, by the 95% interval of their differences; None where too few are."""
    both = [name for name in mine if "paired" in mine[name] and "paired" in theirs.get(name, {})]
    ours, other = ([x for name in both for x in of[name]["paired"]] for of in (mine, theirs))
    if len(ours) < 2 or len(ours) != len(other):
        return None
    return paired_difference(ours, other).low > 0
