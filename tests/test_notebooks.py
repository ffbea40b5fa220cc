"""Every notebook runs from top to bottom, on a shorter text (TOKEFF_NOTEBOOK_FAST), and draws what it promises."""

import base64
import os
import re
import tarfile
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 1 << 20  # of a committed notebook, pictures included


def images(notebook) -> list[bytes]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def output_text(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def each() -> list:
    """Test parameters, grouped so that one worker runs all tests of a notebook."""
    return [pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem)) for path in NOTEBOOKS]


@cache
def executed(name: str):
    """The notebook with its outputs; the kernel finds this checkout, whether tokeff is installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEFF_NOTEBOOK_FAST", "1")
        patch.delenv("XLA_FLAGS", raising=False)  # those of the tests compile fast and run slowly
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
        return notebook


def lacking(path: Path) -> list[str]:
    """The models that a notebook reads out of this repository and that are not there."""
    return [name for name in re.findall(r"\.\./checkpoints/([\w-]+)", path.read_text()) if not (ROOT / "checkpoints" / name).is_dir()]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_small_and_clean(path):
    """No outputs but pictures, and nothing that was left running."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.execution_count is None and all("image/png" in o.get("data", {}) for o in cell.outputs))


def first_cells() -> dict[str, str]:
    """{the first code cell: the name of a notebook that begins so}."""
    cells = {}
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        cells.setdefault(next(cell for cell in notebook.cells if cell.cell_type == "code").source, path.stem)
    return cells


COLAB = """
import os, shlex, shutil, sys, tarfile, types

HERE, installed = os.getcwd(), []

def upload():
    shutil.copy("elsewhere/tokeff.tar.gz", "tokeff.tar.gz")  # Colab writes it beside the notebook
    return {"tokeff.tar.gz": b""}

def pip(line):
    command, *options, source = shlex.split(line)
    assert command == "install", line
    installed.append(source)
    assert "://" in source or tarfile.is_tarfile(source) if not os.path.isdir(source) else os.path.exists(source + "/setup.py")

google, colab, files = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.files"))
google.colab, colab.files, files.upload = colab, files, upload
sys.modules.update({module.__name__: module for module in (google, colab, files)})
get_ipython().register_magic_function(pip)
"""
GIT = "#!/bin/sh\nmkdir tokeff && tar -xf elsewhere/tokeff.tar.gz -C tokeff && echo $* > tokeff/cloned\n"


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A folder with an archive of this repository elsewhere, and a `git` that needs no network."""
    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(tmp_path / "elsewhere" / "tokeff.tar.gz", "w:gz") as archive:
        for name in ("setup.py", "pyproject.toml", "notebooks"):
            archive.add(ROOT / name, name)
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(GIT)
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("cell", [pytest.param(cell, id=name) for cell, name in first_cells().items()])
def test_first_cell_gets_tokeff_on_colab(cell, colab):
    """From an uploaded archive, from one on a mounted Drive, and from an address: pip is given what holds this library. A notebook that
    needs what lies beside it goes on in a copy of the repository. An upload that was called off says what to do."""
    whole = "tokeff/notebooks" in cell
    address = "https://example.org/tokeff" if whole else "git+https://example.org/tokeff"
    sources = {"": "tokeff.tar.gz", "elsewhere/tokeff.tar.gz": "elsewhere/tokeff.tar.gz", address: address}
    steps = [COLAB]
    for source, given in sources.items():
        steps += [cell.replace('SOURCE = ""', f'SOURCE = "{source}"'), f"assert {whole} or installed[-1] == {given!r}"]
        if whole:
            steps.append("assert installed[-1] == './tokeff' and os.getcwd() == os.path.join(HERE, 'tokeff', 'notebooks')")
            steps.append(f"assert os.path.exists('../setup.py') and os.path.exists('../cloned') == {'://' in source}")
            steps.append("os.chdir(HERE); shutil.rmtree('tokeff')")
    steps.append("files.upload = dict")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(step) for step in [*steps, cell]])
    with pytest.raises(CellExecutionError, match="no file was uploaded; run this cell again"):
        NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(colab)}}).execute()
    assert all(not any(o.output_type == "error" for o in step.outputs) for step in notebook.cells[:-1])


@pytest.mark.parametrize("path", each())
def test_notebook_runs_and_draws(path):
    if names := lacking(path):
        pytest.skip(f"checkpoints/{names[0]} is not there; make it, see experiments/train_vit.py and train_vlm.py")
    notebook = executed(path.stem)
    pictures = images(notebook)
    assert pictures, "no cell drew a picture"
    assert all(p.startswith(b"\x89PNG") and len(p) > 5000 for p in pictures)


@pytest.mark.xdist_group("01_which_tokens_survive")
def test_full_cache_answers_the_needle():
    """The last table: one line a budget, of which the full cache's says the right number under every method."""
    text = output_text(executed("01_which_tokens_survive"))
    right = text.split("the right answer is")[1].split()[0]
    full = text.split(f"(right:  {right})")[1].splitlines()[1].split()
    assert full[0] == "100%" and all(answer.rstrip(".") == right for answer in full[1:])


@pytest.mark.xdist_group("04_which_patches_go_on")
def test_every_kind_of_input_is_drawn():
    """Three pictures of a picture, one of a clip, of a sound and of a text."""
    if names := lacking(ROOT / "notebooks" / "04_which_patches_go_on.ipynb"):
        pytest.skip(f"checkpoints/{names[0]} is not there; make it, see experiments/train_vit.py and train_vlm.py")
    assert len(images(executed("04_which_patches_go_on"))) == 6
