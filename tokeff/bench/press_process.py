"""kvpress in a process of its own, run with the peers' python; imports no tokeff.

    python press_process.py FOLDER THREADS

Reads one JSON object a line: {"do": "prefill" or "decode", "press": [class, arguments], "context": n, "tokens": t}. Answers each with
{"seconds": s}. A prefill is one of n random ids and the compression behind it; decoding goes on from it, one token at a time, at the places
that the text has, from the same compressed cache every time.
"""

import json
import sys
import time

import kvpress
import torch
import transformers
from peer_process import ids


def prefill(model, press, context):
    """(seconds, cache, last token) of one prompt and its compression."""
    name, settings = press
    made, cache = getattr(kvpress, name)(**settings), transformers.DynamicCache()
    start = time.perf_counter()
    with made(model):
        out = model(input_ids=ids(model, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = out.logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start, cache, last


def decode(model, cache, token, rows, context, tokens):
    """Seconds of so many greedy tokens behind a compressed prompt, of which each layer holds so many rows."""
    for layer, n in zip(cache.layers, rows, strict=True):
        layer.crop(n)
    start = time.perf_counter()
    for place in range(context, context + tokens):
        at = torch.tensor([[place]])
        logits = model(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start


def answer(model, kept, ask):
    """Seconds of one request."""
    press, context = ask["press"], ask["context"]
    if ask["do"] == "prefill":
        return prefill(model, press, context)[0]
    key = json.dumps([press, context])
    if key not in kept:
        _, cache, token = prefill(model, press, context)
        kept[key] = cache, token, [layer.get_seq_length() for layer in cache.layers]
    cache, token, rows = kept[key]
    return decode(model, cache, token, rows, context, ask["tokens"])


@torch.inference_mode()
def main(folder, threads):
    """Answer requests until the input ends."""
    torch.set_num_threads(int(threads))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    kept = {}
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": answer(model, kept, json.loads(line))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
