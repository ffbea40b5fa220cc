"""transformers on the same weights, as a process that is asked for one timing at a time. Run with the peers' python; imports no tokeff.

    python peer_process.py FOLDER THREADS

Reads one JSON object a line: {"do": "prefill", "context": n} or {"do": "decode", "context": n, "tokens": t}. Answers each with
{"seconds": s}. Decoding runs after a real prefill of n random ids, which is kept and cut back to n before every timing.
"""

import json
import sys
import time

import torch
import transformers


def ids(model, context):
    """Random prompt of one context, the same every time."""
    torch.manual_seed(context)
    return torch.randint(0, model.config.vocab_size, (1, context))


def prefill(model, context):
    """(seconds, cache, last token) of one prompt in one pass, with the logits of its last row only."""
    cache = transformers.DynamicCache()
    start = time.perf_counter()
    out = model(ids(model, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = out.logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start, cache, last


def decode(model, cache, token, context, tokens):
    """Seconds of so many greedy tokens after the prompt."""
    cache.crop(context)
    start = time.perf_counter()
    for _ in range(tokens):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start


def answer(model, kept, ask):
    """Seconds of one request."""
    context = ask["context"]
    if ask["do"] == "prefill":
        return prefill(model, context)[0]
    if context not in kept:
        kept.clear()  # one context at a time
        kept[context] = prefill(model, context)[1:]
    cache, token = kept[context]
    return decode(model, cache, token, context, ask["tokens"])


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
