"""Image towers, and models of images and text, equal transformers' on random tiny weights."""

import numpy as np
import pytest
from dense import Causal

from tokeff.kv.prefill import enter, entering
from tokeff.models.config import Precision
from tokeff.models.llava import Pixels, mixed, picture_rows
from tokeff.models.llava_hf import load_llava
from tokeff.models.transformer import stack, unembed
from tokeff.models.vit import Taps, classify, encode, finish, pool
from tokeff.models.vit_hf import load_vit

CLOSE = {"atol": 1e-4, "rtol": 0}
SIZES = {"llava_next": [(40, 31), (17, 60)], "llava_onevision": [(40, 31), (50, 60)]}  # as in peers/make_vision.py


@pytest.fixture(scope="session")
def made(peers, tmp_path_factory):
    """Folders that transformers wrote, with its results."""
    folder = tmp_path_factory.mktemp("vision")
    peers("make_vision.py", folder)
    return folder


@pytest.mark.peers
def test_every_tower_equals_transformers(made, subtests):
    """Hidden rows of every layer, attention of the class row and attention received, rows handed out, pooled rows, labels."""
    for name in ("vit", "vit_no_bias", "clip", "siglip", "siglip_no_head"):
        with subtests.test(name):
            folder, m = made / name, load_vit(made / name, Precision())
            known = {file.stem: np.load(file) for file in folder.glob("*.npy")}
            every = tuple(range(m.cfg.L))
            taps = Taps(x=every, cls=every if m.cfg.cls else (), received=every)
            out = encode(m.params, m.cfg, known["pixels"], taps=taps)
            for i in every:
                np.testing.assert_allclose(out.seen.x_BSD[i], known["hidden"][i + 1], **CLOSE)
                np.testing.assert_allclose(out.seen.received_BS[i], known["attention"][i].mean(axis=(1, 2)), **CLOSE)
                if m.cfg.cls:
                    np.testing.assert_allclose(out.seen.cls_BNS[i], known["attention"][i][:, :, 0], **CLOSE)
            rows = finish(m.params, m.cfg, out.x_BSD)
            np.testing.assert_allclose(rows, known["rows"], **CLOSE)
            if "pooled" in known:
                np.testing.assert_allclose(pool(m.params, m.cfg, rows), known["pooled"], **CLOSE)
            if "logits" in known:
                np.testing.assert_allclose(classify(m.params, pool(m.params, m.cfg, rows)), known["logits"], **CLOSE)


@pytest.mark.peers
def test_every_llava_equals_transformers(made, subtests):
    """A picture's rows in the decoder's space and the logits of every row: one crop, thumbnail and crops with their lines, frames."""
    for name in ("llava", "llava_layers", "llava_siglip", "llava_next", "llava_onevision"):
        with subtests.test(name):
            v = load_llava(made / name, Precision())
            for i in (0, 1):
                known = {file.stem[:-1]: np.load(file) for file in (made / name).glob(f"*{i}.npy")}
                pixels = Pixels(known["pixels"], SIZES[name][i] if name in SIZES else None)
                seen = picture_rows(v, pixels)
                np.testing.assert_allclose(seen.x_MD, known["features"], **CLOSE)
                np.testing.assert_allclose(logits(v, known["tokens"][0], seen), known["logits"][0], **CLOSE)
    v, folder = load_llava(made / "llava_onevision", Precision()), made / "llava_onevision"
    seen = picture_rows(v, Pixels(np.load(folder / "frames.npy"), video=True))
    np.testing.assert_allclose(logits(v, np.load(folder / "video_tokens.npy")[0], seen), np.load(folder / "video_logits.npy")[0], **CLOSE)


def logits(v, tokens_T, seen):
    """Logits of every row of a text in which image tokens are spelled out. The model's prompts have one of them a picture."""
    marks = np.isin(tokens_T, (v.cfg.image, v.cfg.video))
    assert marks.sum() == len(seen.x_MD)
    once = tokens_T[~marks | (np.cumsum(marks) == 1)]
    (text,), tokens, length, embeds = mixed(v, [once.tolist()], [[seen]])
    assert text == tokens_T.tolist()
    flow = enter(v.text.params, v.text.cfg, *entering(tokens, length, embeds))
    flow, *_ = stack(v.text.params, v.text.cfg, flow, (None,) * v.text.cfg.L, policy=Causal())
    return unembed(v.text.params, v.text.cfg, flow.x_BTD)[0, : len(tokens_T)]
