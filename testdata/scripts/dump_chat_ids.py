#!/usr/bin/env python3
"""Write transformers' token ids of a model's own chats, for the test that reads R2Q_CHAT_GOLDEN.

    python testdata/scripts/dump_chat_ids.py MODEL_DIR PAIRS.jsonl OUT.json [--rows 50]
    R2Q_CHAT_GOLDEN=OUT.json cargo test -p lm --test data_golden -- --nocapture real_model

Rows with a content that is no string are left out, since transformers fails on them; empty ones are kept.
The ids are those of TRL's rule: apply_chat_template of the prompt with the generation prompt and of the
whole conversations, split at the common start. Conversational and text rows both work.
"""
import argparse, json, os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
from transformers import AutoTokenizer
from trl.data_utils import common_prefix_length

p = argparse.ArgumentParser()
p.add_argument("model"), p.add_argument("data"), p.add_argument("out")
p.add_argument("--rows", type=int, default=50)
a = p.parse_args()
tokenizer = AutoTokenizer.from_pretrained(a.model)


def encode(content, **options):
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]
    return tokenizer.apply_chat_template(content, return_dict=True, **options)["input_ids"]


rows = []
with open(a.data) as f:
    for index, line in enumerate(f):
        row = json.loads(line)
        contents = [m["content"] for k in ("prompt", "chosen", "rejected") if isinstance(row[k], list) for m in row[k]]
        if len(rows) == a.rows or not all(isinstance(c, str) for c in contents):
            continue
        prompt = encode(row["prompt"], add_generation_prompt=True)
        end = "" if not isinstance(row["prompt"], str) else tokenizer.eos_token
        sides = {}
        for side in ("chosen", "rejected"):
            text = row[side] + end if isinstance(row[side], str) and not row[side].endswith(end) else row[side]
            sides[side] = encode(row["prompt"] + text)
        n = min(common_prefix_length(prompt, s) for s in sides.values())
        rows.append({"row": index, "prompt_ids": prompt[:n], "chosen_ids": sides["chosen"][n:], "rejected_ids": sides["rejected"][n:]})
json.dump({"model": os.path.abspath(a.model), "data": os.path.abspath(a.data), "rows": rows}, open(a.out, "w"))
print(len(rows), "rows")
