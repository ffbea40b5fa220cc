"""The public names in use: what importing them costs, what they give, and what they say to bad input."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import tokeff
from tokeff.context import Compressed, digest, file_digest
from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets")

def words(cfg) -> Tokenizer:
    """A tokenizer of single words w0, w1, ..."""
    raw = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(cfg.V)}, unk_token="w0"))
    raw.pre_tokenizer = Whitespace()
    return Tokenizer(raw, cfg.V)


@cache
def model(seed: int = 0) -> Model:
    """The tiny model of the shared tests, with a tokenizer; another `seed` gives other weights."""
    params = tiny.params() if seed == 0 else jax.tree.map(lambda x: 1.5 * x, tiny.params())
    return Model(tiny.CFG, params, words(tiny.CFG), Precision(), "tiny")


def text(n: int, first: int = 1) -> str:
    rng = np.random.default_rng(first)
    return " ".join(f"w{i}" for i in rng.integers(1, tiny.CFG.V, n))


def python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter that finds this checkout and its tests."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- imports


def test_import_costs_nothing():
    loaded = python("import sys, tokeff; print(*sys.modules)").split()
    for name in (*HEAVY, "jax", "jaxlib", "flax", "numpy", "matplotlib"):
        assert name not in loaded


def test_generating_imports_no_other_framework():
    code = (
        "import sys, test_api, tokeff; m = test_api.model(); tokeff.generate(m, [test_api.text(40)], max_new=2);"
        "tokeff.methods(); tokeff.evaluate; print(*sys.modules)"
    )
    loaded = python(code).split()
    assert "jax" in loaded
    for name in HEAVY:
        assert name not in loaded


def test_example_lifts_one_policy():
    out = python((ROOT / "examples" / "lift_one_policy.py").read_text())
    assert "kept 24 of 96 rows" in out and "rows now 25" in out


# -- use


def test_generate_takes_text_texts_or_ids():
    m, one = model(), text(40)
    ids = m.tok.encode(one)
    made = [tokeff.generate(m, given, max_new=4).tokens[0] for given in (one, [one], [ids])]
    assert made[0] == made[1] == made[2] and len(made[0]) == 4


def test_stream_says_what_generate_says():
    m = model()
    whole = tokeff.generate(m, text(40), max_new=12).texts[0]
    pieces = list(tokeff.stream(m, text(40), max_new=12))
    assert "".join(pieces) == whole and len(pieces) > 1


POLICIES = {
    "Full": lambda: tokeff.kv.full(),
    "H2O": lambda: tokeff.kv.h2o(0.5),
    "AdaKV": lambda: tokeff.kv.adakv(0.5, window=6, page=4),
    "ShadowKV": lambda: tokeff.kv.shadowkv(0.5),
    "TidalDecode": lambda: tokeff.sparse.tidaldecode(0.5, dense=(0,), select=(1,), recent=8),
}


def test_saved_contexts_answer_the_same_in_another_process(tmp_path):
    m, questions, here = model(), [text(5, 2), text(3, 3)], {}
    for name, make in POLICIES.items():
        context = tokeff.compress(m, text(64), make(), room=24)
        context.save(tmp_path / name)
        here[name] = [tokeff.generate(m, questions, cache=context, max_new=12).tokens, context.bytes, repr(context.setup)]
    code = (
        "import sys, json, pathlib, test_api, tokeff; from tokeff.context import Compressed; m = test_api.model();"
        "questions = [test_api.text(5, 2), test_api.text(3, 3)];"
        "contexts = {p.name: Compressed.load(m, p) for p in pathlib.Path(sys.argv[1]).iterdir()};"
        "print(json.dumps({name: [tokeff.generate(m, questions, cache=c, max_new=12).tokens, c.bytes, repr(c.setup)]"
        " for name, c in contexts.items()}))"
    )
    assert json.loads(python(code, str(tmp_path))) == here


def test_context_is_asked_again_without_trace():
    """A question does not change the context: the second answer to it equals the first."""
    m = model()
    context = tokeff.compress(m, text(64), tokeff.kv.h2o(0.5), room=24)
    first = tokeff.generate(m, text(5, 2), cache=context, max_new=8).tokens
    tokeff.generate(m, text(9, 4), cache=context, max_new=8)
    assert tokeff.generate(m, text(5, 2), cache=context, max_new=8).tokens == first


def test_one_model_call_serves_many_drafted_answers(tmp_path):
    m = model()
    context = tokeff.compress(m, text(64), decode=tokeff.decode.token_recycling(tiny.TREE), room=24)
    context.save(tmp_path / "c")
    again = Compressed.load(m, tmp_path / "c")
    plain = tokeff.compress(m, text(64), room=24)
    question = [text(5, 2), text(3, 3)]
    assert tokeff.generate(m, question, cache=again, max_new=8).tokens == tokeff.generate(m, question, cache=plain, max_new=8).tokens


def test_a_cache_that_cannot_be_saved_says_so_and_answers(tmp_path):
    """LazyLLM's rows come back for the questions too."""
    m, parts = model(), tokeff.decode.revived(tokeff.reduce.lazyllm(0.5, at=(1,)))
    context = tokeff.compress(m, text(64), room=24, **parts)
    assert len(tokeff.generate(m, [text(5, 2), text(3, 3)], cache=context, max_new=4).tokens[1]) == 4
    with pytest.raises(UserError, match="LazyRows cannot be saved; keep the context in memory"):
        context.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


# -- bad input


LONG = tiny.CFG.max_len + 1
BAD = {
    "empty text": lambda m: tokeff.generate(m, ""),
    "one of several empty": lambda m: tokeff.generate(m, [text(9), ""]),
    "empty ids": lambda m: tokeff.generate(m, [[]]),
    "no prompts": lambda m: tokeff.generate(m, []),
    "empty stream": lambda m: list(tokeff.stream(m, "")),
    "empty context": lambda m: tokeff.compress(m, ""),
    "too long": lambda m: tokeff.generate(m, text(LONG)),
    "too long with what is wanted": lambda m: tokeff.generate(m, text(200), max_new=100),
    "context too long": lambda m: tokeff.compress(m, text(200), room=100),
    "nothing wanted": lambda m: tokeff.generate(m, text(9), max_new=0),
    "budget 0": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.snapkv(0, window=4)),
    "budget 0.0": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.h2o(0.0)),
    "budget 1.5": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.recent_rows(1.5)),
    "budget above the context": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.random_rows(65)),
    "budget 0 of a pass": lambda m: tokeff.generate(m, text(64), cut=tokeff.reduce.gemfilter(0.0, layer=1)),
    "budget 0 of a selection": lambda m: tokeff.generate(m, text(64), kv=tokeff.sparse.tidaldecode(0)),
    "budget all protected": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.snapkv(0.1, window=16)),
    "no such layer": lambda m: tokeff.generate(m, text(64), cut=tokeff.reduce.promptdistill(0.5, layer=13)),
    "chunks and a pass": lambda m: tokeff.generate(m, text(64), cut=tokeff.reduce.promptdistill(0.5, layer=1), chunk=16),
    "drafts and per-step eviction": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.h2o(0.5), decode=tokeff.decode.prompt_lookup()),
    "negative temperature": lambda m: tokeff.generate(m, text(9), sampling=tokeff.Sampling(temperature=-1.0)),
    "two temperatures, one prompt": lambda m: tokeff.generate(m, text(9), sampling=tokeff.Sampling(temperature=(0.5, 1.0))),
    "tree without parents": lambda m: tokeff.decode.token_recycling(((0, 0),)),
    "no text to measure": lambda m: tokeff.evaluate(m, n=0),
    "unknown task": lambda m: tokeff.evaluate(m, task="needl", length=64),
    "unknown model": lambda m: tokeff.load("smollm2-135n"),
    "pickle": lambda m: tokeff.load("weights.pt"),
    "no such context": lambda m: Compressed.load(m, "/nonexistent/context"),
    "an id beyond the vocabulary": lambda m: tokeff.generate(m, [[1, tiny.CFG.V]], max_new=2),
    "a negative id": lambda m: tokeff.generate(m, [[1, -5]], max_new=2),
    "a method's name for the method": lambda m: tokeff.generate(m, text(9), kv="snapkv"),
    "a method that was not called": lambda m: tokeff.generate(m, text(9), kv=tokeff.kv.snapkv),
    "a drafter for a policy": lambda m: tokeff.generate(m, text(9), kv=tokeff.decode.prompt_lookup()),
    "chunks of no tokens": lambda m: tokeff.generate(m, text(9), chunk=-1),
    "negative eviction": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.h2o(0.5, evict=-1)),
    "unknown pooling": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.snapkv(0.5, window=4, pool="mean")),
    "rank above 1": lambda m: tokeff.generate(m, text(64), kv=tokeff.kv.shadowkv(0.5, rank=2.0)),
    "a tree without nodes": lambda m: tokeff.generate(m, text(64), decode=tokeff.decode.token_recycling(())),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    with pytest.raises(UserError) as e:
        BAD[name](model())
    said = str(e.value)
    assert "\n" not in said and 20 < len(said) < 300


@cache
def saved() -> Compressed:
    return tokeff.compress(model(), text(64), tokeff.kv.snapkv(0.5, window=6), room=24)


CONTEXT_USE = {
    "question beyond the room": lambda m, c: tokeff.generate(m, text(30), cache=c, max_new=4),
    "answer beyond the room": lambda m, c: tokeff.generate(m, text(5), cache=c, max_new=20),
    "empty question": lambda m, c: tokeff.generate(m, "", cache=c, max_new=4),
    "another policy": lambda m, c: tokeff.generate(m, text(5), kv=tokeff.kv.full(), cache=c, max_new=4),
    "another model": lambda m, c: tokeff.generate(model(1), text(5), cache=c, max_new=4),
    "nothing wanted": lambda m, c: tokeff.generate(m, text(5), cache=c, max_new=0),
}


@pytest.mark.parametrize("name", CONTEXT_USE)
def test_context_that_cannot_serve(name):
    with pytest.raises(UserError) as e:
        CONTEXT_USE[name](model(), saved())
    assert "\n" not in str(e.value)


def test_saving_twice_is_refused_and_leaves_the_first(tmp_path):
    saved().save(tmp_path / "c")
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    with pytest.raises(UserError, match="exists"):
        saved().save(tmp_path / "c")
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        saved().save(tmp_path / "file" / "c")


def test_context_of_another_model(tmp_path):
    saved().save(tmp_path / "c")
    with pytest.raises(UserError, match="another model") as e:
        Compressed.load(model(1), tmp_path / "c")
    assert "\n" not in str(e.value)


def change(**fields):
    def edit(folder: Path):
        about = json.loads((folder / "context.json").read_text())
        (folder / "context.json").write_text(json.dumps(about | fields))

    return edit


def in_policy(**fields):
    def edit(folder: Path):
        about = json.loads((folder / "context.json").read_text())
        about["setup"]["kv"] |= fields
        (folder / "context.json").write_text(json.dumps(about))

    return edit


def without(name: str):
    def edit(folder: Path):
        about = json.loads((folder / "context.json").read_text())
        del about[name]
        (folder / "context.json").write_text(json.dumps(about))

    return edit


def cut_short(folder: Path):
    whole = (folder / "cache.safetensors").read_bytes()
    (folder / "cache.safetensors").write_bytes(whole[: len(whole) // 2])


def seal(folder: Path):
    """What a writer of such a file would note of it."""
    try:
        about = json.loads((folder / "context.json").read_text())
        about |= {"seal": {"about": digest(about), "arrays": file_digest(folder / "cache.safetensors")}}
        (folder / "context.json").write_text(json.dumps(about))
    except (OSError, ValueError, AttributeError, TypeError):
        pass  # nothing that could be sealed


DAMAGE = {
    "unknown class": in_policy(type="Evil"),
    "unknown field": in_policy(colour="red"),
    "other budget": in_policy(budget=0.75),
    "other room": change(room=1000),
    "not JSON": lambda folder: (folder / "context.json").write_text("{"),
    "truncated arrays": cut_short,
    "no arrays": lambda folder: (folder / "cache.safetensors").unlink(),
    "no model": without("model"),
    "no setup": without("setup"),
    "setup is another class": change(setup={"type": "Full"}),
    "a list": lambda folder: (folder / "context.json").write_text("[]"),
}

@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_context(name, sealed, tmp_path):
    """Also where the file says that it was written so; tests/test_saved.py has damage that only its seal tells."""
    saved().save(tmp_path / "c")
    DAMAGE[name](tmp_path / "c")
    if sealed:
        seal(tmp_path / "c")
    with pytest.raises(UserError) as e:
        Compressed.load(model(), tmp_path / "c")
    assert "\n" not in str(e.value)
