"""Greedy continuations by transformers: plain, with its own prompt lookup, and with an assistant model. Run with the peers' python.

    python generate.py FOLDER NEW [ASSISTANT]    FOLDER holds a model and prompts.json (a list of lists of ids); writes generated.json

ASSISTANT is the folder of the assistant model, which drafts 4 tokens a pass, whatever became of the last ones and however sure it is.
"""

import json
import sys
from pathlib import Path

import torch
import transformers as tf


def continued(model, ids, new, **more):
    """New token ids of one prompt, for each the distance of the two best logits, and how often the model ran. Prompt lookup may go beyond
    `new`: cut."""
    given, passes = torch.tensor([ids]), []
    counts = model.register_forward_hook(lambda *_: passes.append(1))
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip
    counts.remove()
    best = torch.stack([x[0] for x in out.logits[:new]]).topk(2).values
    return {"tokens": out.sequences[0, len(ids) :][:new].tolist(), "margins": (best[:, 0] - best[:, 1]).tolist(), "passes": len(passes)}


def loaded(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def drafting(folder):
    """An assistant whose drafts are as long as they are said to be."""
    model = loaded(folder)
    model.generation_config.update(num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0)
    return model


@torch.inference_mode()
def main(folder, new, assistant=None):
    torch.set_num_threads(1)  # tests run side by side, and waiting threads spin
    tf.utils.logging.disable_progress_bar()
    model = loaded(folder)
    prompts = json.loads((Path(folder) / "prompts.json").read_text())
    found = {
        "plain": [continued(model, ids, int(new)) for ids in prompts],
        "lookup": [continued(model, ids, int(new), prompt_lookup_num_tokens=10) for ids in prompts],
    }
    if assistant is not None:
        small = drafting(assistant)
        found["assisted"] = [continued(model, ids, int(new), assistant_model=small) for ids in prompts]
    (Path(folder) / "generated.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
