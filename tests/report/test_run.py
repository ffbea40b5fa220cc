"""Run folders: what is written, resumed and refused."""

import dataclasses
import json
import os

import numpy as np
import pytest
from fakes import Fake, FakeRow, Plain, Policy, fake

from tokeff.errors import UserError
from tokeff.experiment import Config, config_json, config_text
from tokeff.report import kept
from tokeff.report.folder import RunFolder, first_difference, slug
from tokeff.report.run import run

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Stopping(Plain):
    """Stops with an error before it measures a method."""

    def measure(self, context, key):
        """Measure, or stop."""
        if key.startswith(os.environ.get("STOP_AT", "nothing")):
            raise KeyboardInterrupt
        return super().measure(context, key)


def stopping(config):
    """Return the config with an experiment that stops where STOP_AT says."""
    fields = {f.name: getattr(config.experiment, f.name) for f in dataclasses.fields(config.experiment)}
    return dataclasses.replace(config, experiment=Stopping(**fields))


def test_a_run_leaves_everything(finished):
    """Every promised file is there, and nothing temporary."""
    names = {str(p.relative_to(finished.path)) for p in finished.path.rglob("*") if p.is_file()} - {".lock"}
    expected = {
        "config.txt",
        "config.json",
        "environment.json",
        "results.jsonl",
        "table.md",
        "table.txt",
        "report.html",
    }
    assert expected < names
    assert {"plots/kl-held.png", "plots/decode_tok_s-context.svg", "plots/kept-tokens.png"} < names
    assert f"kept/{slug('snapkv/64')}.npz" in names
    assert not [name for name in names if "tmp" in name]
    environment = finished.environment()
    assert environment["command"] == "tokeff run x"
    assert {"commit", "dirty", "python", "jax", "jaxlib", "numpy", "cpu", "cores", "devices"} <= set(environment)


def test_resume_after_a_crash_measures_only_what_is_missing(config, tmp_path, monkeypatch):
    """Finished rows stay as they are; a half-written last line is dropped and measured again."""
    config = stopping(config)
    monkeypatch.setenv("STOP_AT", "snapkv/64")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    results = tmp_path / "results.jsonl"
    before = results.read_bytes()
    assert len(before.splitlines()) == 5 and not (tmp_path / "report.html").exists()
    results.write_bytes(before + b'{"key": "snapkv/64", "method": "sna')
    monkeypatch.delenv("STOP_AT")
    folder = run(config, tmp_path)
    assert results.read_bytes().startswith(before)
    keys = [row["key"] for row in folder.rows()]
    assert keys == list(config.experiment.keys())
    assert (tmp_path / "report.html").exists()


def test_a_finished_run_is_not_measured_again(config, tmp_path, monkeypatch):
    """Rerunning loads nothing and leaves the rows alone."""
    run(config, tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(Fake, "prepare", lambda self: pytest.fail("loaded a model for nothing"))
    run(config, tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(config, tmp_path):
    """The refusal names the field and the way out; --fresh replaces the run."""
    run(config, tmp_path)
    rows = tuple(
        dataclasses.replace(r, kv=Policy(recent=9)) if r.method == "h2o" else r for r in config.experiment.rows
    )
    other = dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, rows=rows))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"rows\.4\.kv\.recent: 8 and 9.*--out.*--fresh"):
        run(other, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "mine.txt").write_text("not ours")
    assert run(other, tmp_path, fresh=True).config_text() == config_text(other.experiment)
    assert (tmp_path / "mine.txt").exists()


def test_settings_are_refused_before_anything_is_written(config, tmp_path):
    """check() comes first."""
    bad = dataclasses.replace(config, experiment=dataclasses.replace(config.experiment, budget=0.0))
    with pytest.raises(UserError, match="budget"):
        run(bad, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_used_are_refused(config, tmp_path):
    """A path under a file, and a folder that holds something else."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write.*--out"):
        run(config, tmp_path / "file" / "run")
    with pytest.raises(UserError, match="not empty.*--out"):
        run(config, tmp_path)
    with pytest.raises(UserError, match="cannot write.*--out"):
        run(config, "/proc/tokeff")


def test_two_processes_cannot_share_a_folder(config, tmp_path):
    """The second is refused at once."""
    with RunFolder(tmp_path).alone(), pytest.raises(UserError, match="another process"):
        run(config, tmp_path)


def test_keys_must_be_unique_and_some(config, tmp_path):
    """Two rows of one method and setting would overwrite each other."""
    twice = dataclasses.replace(config.experiment, rows=(FakeRow("full"), FakeRow("full")))
    with pytest.raises(UserError, match="twice"):
        run(dataclasses.replace(config, experiment=twice), tmp_path)
    with pytest.raises(UserError, match="nothing to measure"):
        run(dataclasses.replace(config, experiment=dataclasses.replace(twice, rows=())), tmp_path)


def test_rows_are_plain_json(tmp_path):
    """Numpy values become numbers, infinities become text, and every line is strict JSON."""
    folder = RunFolder(tmp_path)
    with folder.appending() as appender:
        appender.add(
            "a", {"method": "m", "kl": np.float32(0.5), "loss": float("inf"), "x": np.float32("nan"), "k": np.arange(2)}
        )
    line = (tmp_path / "results.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "key": "a", "method": "m", "kl": 0.5, "loss": "inf", "x": "nan", "k": [0, 1],
    }  # fmt: skip
    with folder.appending() as appender, pytest.raises(TypeError, match="object"):
        appender.add("b", {"method": object()})
    assert (tmp_path / "results.jsonl").read_text() == line


def test_damage_in_the_middle_is_said(tmp_path):
    """Only the last line may be half-written."""
    (tmp_path / "results.jsonl").write_text('{"key": "a", "method": "m"}\nrubbish\n{"key": "b", "method": "m"}\n')
    with pytest.raises(UserError, match="line 2"):
        RunFolder(tmp_path).rows()


def test_reading_a_run_runs_nothing(tmp_path):
    """Pickles in a kept file are refused, and a row cannot point outside its folder."""
    (tmp_path / "kept").mkdir()
    np.savez(tmp_path / "kept" / "bad.npz", text=np.array([object()], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        RunFolder(tmp_path).kept({"kept": "kept/bad.npz"})
    for name in ("../kept/bad.npz", "/etc/passwd", "kept/../../x.npz", 3, "kept/a/b.npz"):
        assert RunFolder(tmp_path).kept({"kept": name}) is None


def test_kept_tokens_round_trip(tmp_path):
    """Layers and heads may hold different numbers of rows."""
    orders = [np.array([[0, 1, -1], [0, 2, 3]]), np.array([[3], [9]])]
    whole = kept.Kept(orders, ("a", "b", " <c>", "\n"), ((1, 2),))
    (tmp_path / "k.npz").write_bytes(kept.to_bytes(whole))
    back = kept.read(tmp_path / "k.npz")
    assert back.tokens == whole.tokens and back.needles == whole.needles
    np.testing.assert_array_equal(back.share_LS(), [[1, 0.5, 0.5, 0.5], [0, 0, 0, 0.5]])


def test_windows_cover_ends_and_needles():
    """Long texts are cut between the places worth seeing; short ones are not cut."""
    assert kept.windows(100, ()) == [(0, 100)]
    assert kept.windows(2048, [(1000, 1010)]) == [(0, 96), (952, 1058), (1952, 2048)]
    tokens = tuple(f" {i}" for i in range(2048))
    shown = kept.pieces(kept.Kept([np.arange(0, 8)[None]], tokens, ((1000, 1010),)))
    assert sum(p.skipped + len(p.text.split()) for p in shown) == 2048
    assert [p.text for p in shown if p.needle] == ["".join(tokens[1000:1010])]
    assert shown[0].level == 10 and shown[1].level == 0


def test_unlike_keys_have_unlike_files():
    """Characters that a file name cannot hold do not make two keys one."""
    keys = ["a/b", "a_b", "a b", "../a", "", "x" * 300 + "1", "x" * 300 + "2"]
    assert len({slug(key) for key in keys}) == len(keys)
    assert all("/" not in slug(key) and not slug(key).startswith(".") and len(slug(key)) < 120 for key in keys)


def test_config_text_must_be_stable():
    """An object that prints its address would never equal itself in the next process."""
    with pytest.raises(UserError, match="frozen dataclass"):
        config_text(dataclasses.replace(fake(), model=object()))
    assert config_json(Policy()) == {"type": "Policy", "budget": 0.125, "recent": 8}
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a.1.b: 2 and 3"
    assert isinstance(Config(fake(), None, "").experiment, Fake)
