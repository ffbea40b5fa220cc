"""`load`: what it accepts, what it says otherwise, and what it does not import."""

import subprocess
import sys

import pytest
from files import FAMILIES, FLOAT32, random_params, write_hf

from tokeff.models import load as module
from tokeff.models.load import load

pytestmark = pytest.mark.core
CFG, _ = FAMILIES["llama"]


def test_default_precision_is_float32_on_cpu(tmp_path):
    model = load(write_hf(tmp_path / "tiny", CFG, random_params(CFG, ())))
    assert model.precision == FLOAT32
    assert "tiny" in repr(model)


def test_repo_id_goes_through_the_hub(tmp_path, monkeypatch):
    folder = write_hf(tmp_path / "snapshot", CFG, random_params(CFG, ()))
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, allow_patterns: str(folder))
    model = load("someone/tiny", FLOAT32)
    assert (model.name, model.cfg.name) == ("someone/tiny", "someone/tiny")


def test_no_network_for_a_repo_id(monkeypatch, one_line):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with one_line("someone/tiny", "could not be downloaded", "smollm2-135m"):
        load("someone/tiny", FLOAT32)


def test_missing_preset_is_fetched_with_a_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path))
    monkeypatch.setattr("tokeff.models.fetch.fetch", lambda name: tmp_path / name)
    assert module.preset_file("smollm2-135m") == tmp_path / "smollm2-135m"
    assert "fetching smollm2-135m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("smollm2-135", ["did you mean 'smollm2-135m'"]),
        ("nowhere/at/all", ["no such file or folder"]),
        ("models/gone.gguf", ["no such file or folder"]),
        ("a prompt instead of a model " * 20, ["name too long"]),
        ("weights.pt", ["pickle"]),
        ("pytorch_model.bin", ["pickle"]),
        ("model.safetensors", ["folder"]),
    ],
)
def test_what_it_says_otherwise(source, words, one_line):
    with one_line(*words):
        load(source, FLOAT32)


def test_folder_without_config(tmp_path, one_line):
    with one_line("no config.json"):
        load(tmp_path, FLOAT32)


def test_heavy_packages_stay_out():
    code = "import sys, tokeff.models.load, tokeff.models.hf, tokeff.models.gguf_file, tokeff.models.checkpoint\n"
    code += "heavy = {'torch', 'tensorflow', 'transformers', 'huggingface_hub', 'orbax', 'tensorflow_datasets'}\n"
    code += "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
