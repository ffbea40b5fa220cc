"""Greedy continuations by transformers, plain and with its own prompt lookup. Run with the peers' python.

    python generate.py FOLDER NEW    FOLDER holds a model and prompts.json (a list of lists of ids); writes generated.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers as tf


def continued(model, ids, new, **more):
    """New token ids of one prompt, and for each the distance of the two best logits. Prompt lookup may go beyond `new`: cut."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip
    best = torch.stack([x[0] for x in out.logits[:new]]).topk(2).values
    return {"tokens": out.sequences[0, len(ids) :][:new].tolist(), "margins": (best[:, 0] - best[:, 1]).tolist()}


@torch.inference_mode()
def main(folder, new):
    torch.set_num_threads(1)  # tests run side by side, and waiting threads spin
    tf.utils.logging.disable_progress_bar()
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    prompts = json.loads((Path(folder) / "prompts.json").read_text())
    found = {
        "plain": [continued(model, ids, int(new)) for ids in prompts],
        "lookup": [continued(model, ids, int(new), prompt_lookup_num_tokens=10) for ids in prompts],
    }
    (Path(folder) / "generated.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
