"""The documentation is true: its table is the listing's, its links lead somewhere, its code compiles, and its example runs."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import tiny

from tokeff.kv.keep import Keep

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "kernels", "tokeff", "experiments", "notebooks", "configs", "examples", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md") if not page.is_symlink())])
WRITTEN = [page for page in PAGES if page.parent.name == "docs" or page.name == "CONTRIBUTING.md"]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_method_table_is_the_listing():
    generated = load(ROOT / "docs" / "make_methods.py").text()
    committed = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert committed == generated, "run: python docs/make_methods.py"


def test_drafter_table_is_the_listing():
    generated = load(ROOT / "docs" / "make_methods.py").drafters()
    assert (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8") == generated, "run: python docs/make_methods.py"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.findall(prose):
        target = (found[0] or found[1]).split("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "python")], ids=name)
def test_python_blocks_compile(page):
    """Signatures without a body, as the design shows them, are completed by one."""
    for code in blocks(page, "python"):
        stubs = re.sub(r"^( *def [^\n]*?\)(?: -> [^\n#:]+?)?)( *#[^\n]*)?$", r"\1: ...", code, flags=re.MULTILINE)
        stubs = re.sub(r"^(selector\(.*?\) ->.*)$", r"# \1", stubs, flags=re.MULTILINE)
        compile(stubs, f"a block of {name(page)}", "exec")


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_names_in_the_documentation_exist(page):
    """Every `folder/file.py` and `tests/...` that a page names is there."""
    for path in re.findall(r"\b((?:tokeff|tests|docs|configs|kv|sparse|reduce|decode|models|evals)/[\w/]+\.py)\b", page.read_text()):
        if path.endswith("knorm.py"):  # the example of CONTRIBUTING.md
            continue
        assert (ROOT / path).exists() or (ROOT / "tokeff" / path).exists(), f"{name(page)} names {path}"


@pytest.fixture(scope="module")
def example():
    """The blocks of CONTRIBUTING.md, run one after the other in one module, as the page says they work together."""
    module = types.ModuleType("knorm_of_contributing")
    sys.modules[module.__name__] = module
    for code in blocks(ROOT / "CONTRIBUTING.md", "python"):
        exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_example_equals_its_oracle(example):
    tests = [f for n, f in vars(example).items() if n.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_example_is_a_method(example):
    """The listed entry makes a policy that is active, and does nothing at its identity settings."""
    entry = example.ENTRY
    policy = entry.make(budget=0.5)
    assert isinstance(policy, Keep) and policy == entry.make(budget=0.5)
    assert policy.needs() == ()
    same = tiny.text(tiny.decode())
    assert tiny.text(tiny.decode(entry.make(**entry.identity))) == same
    assert tiny.text(tiny.decode(policy)) != same
    assert "devoto2024knorm" in entry.paper.bibtex()
