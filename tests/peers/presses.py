"""What kvpress keeps: presses on random tiny models, all in one process. Run with the peers' python; imports no tokeff.

    python presses.py FOLDER    FOLDER holds cases.json; every model of it gets a folder NAME and a file NAME.npz

cases.json: {"rows": S, "models": [names of MODELS], "cases": {name: press}, "ask": ids, "places": p}.
A press is [class, {argument: value or press}]. NAME.npz has for every case what applies of `score` (L, K, S), `kept` (L, K, S),
`channel` (L, K, H) and `key` (L, K, n, H), and `reach` (L, K), the on-the-fly score of DuoAttention's heads. tokens.npy is the prompt.
"""

import json
import sys
from pathlib import Path

import kvpress
import numpy as np
import torch
import transformers as tf
from kvpress.presses import duo_attention_press, kvzip_press
from make_tiny import randomise

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 1024}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": (tf.LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 32}),
}
PROMPT = "the words before what is told again"


class Duo(kvpress.DuoAttentionPress):
    """DuoAttention with heads given, instead of fetched or measured."""

    def __init__(self, heads, sinks, recent):
        super().__init__(head_compression_ratio=0.5)
        self.given, self.sink_size, self.recent_size = heads, sinks, recent

    def post_init_from_model(self, model):
        cfg = model.config
        self.streaming_mask = torch.ones(cfg.num_hidden_layers, cfg.num_key_value_heads, dtype=torch.bool)
        for layer, heads in enumerate(self.given):
            self.streaming_mask[layer, heads] = False


class KVzip(kvpress.KVzipPress):
    """KVzip that leaves its scores behind."""

    def compress_post(self, model):
        self.found = self.score_val[:, 0].clone()
        super().compress_post(model)


class Words:
    """A tokenizer of no language: ids are given."""

    chat_template = None

    def __init__(self, ask, text):
        self.ask, self.text = ask, text

    def encode(self, text, return_tensors, add_special_tokens):
        """Nothing for the empty text and the line break behind a question; the ids given for a question."""
        return torch.tensor([self.ask if text.strip() else []], dtype=torch.long)

    def __call__(self, text, return_tensors):
        return tf.BatchEncoding({"input_ids": self.text})


class Books:
    """A data set of one text."""

    def to_pandas(self):
        return self

    def sample(self, count, random_state):
        return self

    def __getitem__(self, column):
        return np.array([PROMPT], object)


def without_network(ask, text):
    """From now on kvpress takes tokenizers and texts from here."""
    source = type("Source", (), {"from_pretrained": staticmethod(lambda name: Words(ask, text))})
    kvzip_press.AutoTokenizer = duo_attention_press.AutoTokenizer = source
    duo_attention_press.load_dataset = lambda *args, **kwargs: Books()


def build(spec):
    """A press from [class, arguments]."""
    name, args = spec
    own = {"Duo": Duo, "KVzip": KVzip}
    nested = {k: build(v) if isinstance(v, list) and v and isinstance(v[0], str) else v for k, v in args.items()}
    return (own.get(name) or getattr(kvpress, name))(**nested)


def record(press, scores):
    """Have the innermost press note the scores of each layer."""
    while hasattr(press, "press"):
        press = press.press
    if not hasattr(press, "score"):
        return
    score = press.score

    def noted(module, *args, **kwargs):
        found = score(module, *args, **kwargs)
        scores[module.layer_idx] = found[0].float().clone()
        return found

    press.score = noted


def run(model, tokens, press=None):
    """The cache after a prompt."""
    cache = tf.DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    if press is None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return cache
    with press(model):
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return cache


def kept_rows(model, keys, dense):
    """kept_LKS: rows that are in the cache and not masked. keys: of the cache, dense: of all rows, (K, n, H) and (K, S, H) a layer."""
    found = []
    for layer, (some, every) in enumerate(zip(keys, dense)):
        apart = torch.cdist(some, every, compute_mode="donot_use_mm_for_euclid_dist")
        assert apart.min(dim=2).values.max() < 1e-4
        kept = torch.zeros(every.shape[:2], dtype=torch.bool).scatter_(1, apart.argmin(dim=2), True)
        masked = getattr(model.model.layers[layer].self_attn, "masked_key_indices", None)
        if masked is not None:
            kept[masked[1], masked[2]] = False
        found.append(kept)
    return torch.stack(found)


def case(model, tokens, spec, dense):
    """What applies of score, kept, channel and key."""
    press, scores = build(spec), {}
    record(press, scores)
    keys = [layer.keys[0].clone() for layer in run(model, tokens, press).layers]
    found = {}
    if scores:
        found["score"] = torch.stack([scores[i] for i in sorted(scores)])
    if hasattr(press, "found"):
        found["score"] = press.found
    if spec[0] == "ThinKPress":
        found["channel"] = torch.stack([(k != 0).any(dim=1) for k in keys])
    elif spec[0] == "KeyRerotationPress":
        found["key"] = torch.stack(keys)
    else:
        found["kept"] = kept_rows(model, keys, dense)
    return {name: x.numpy() for name, x in found.items()}


def make(folder, name):
    """Write a random model and open it twice: with and without eager attention."""
    kind, more = MODELS[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(kind(**{**SIZES, **more}), attn_implementation="eager").float()
    randomise(model)
    model.save_pretrained(folder / name)
    load = tf.AutoModelForCausalLM.from_pretrained
    return {how: load(folder / name, attn_implementation=how, dtype=torch.float32).eval() for how in ("sdpa", "eager")}


@torch.inference_mode()
def main(folder):
    torch.set_num_threads(1)  # tests run side by side, and waiting threads spin
    tf.utils.logging.disable_progress_bar()
    folder = Path(folder)
    asked = json.loads((folder / "cases.json").read_text())
    # No token twice: in the first layer equal tokens have keys of one length, and ties are broken by how the rotation was rounded.
    tokens = torch.from_numpy(np.random.default_rng(1).permutation(SIZES["vocab_size"])[None, : asked["rows"]])
    np.save(folder / "tokens.npy", tokens.numpy())
    for name in asked["models"]:
        models, found = make(folder, name), {}
        dense = {how: [layer.keys[0] for layer in run(model, tokens).layers] for how, model in models.items()}
        without_network(asked["ask"], tokens)
        for label, spec in asked["cases"].items():
            how = "eager" if spec[0] == "ObservedAttentionPress" else "sdpa"
            found |= {f"{label}/{part}": x for part, x in case(models[how], tokens, spec, dense[how]).items()}
        found["reach"] = duo_attention_press.duo_attention_on_the_fly(models["sdpa"], num_samples=1, q_len=asked["places"])
        np.savez(folder / f"{name}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
