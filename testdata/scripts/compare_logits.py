#!/usr/bin/env python3
"""Compare logits printed by lm's `logits` example with transformers' on the same folder.

    python compare_logits.py MODEL ours.json [ADAPTER]

With the folder of a LoRA adapter, PEFT puts it on the model first.
"""
import json
import sys

import torch
from transformers import AutoModelForCausalLM

folder, ours, *adapter = sys.argv[1:]
ours = json.load(open(ours))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
if adapter:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, adapter[0]).eval()
with torch.no_grad():
    logits = model(torch.tensor([ours["ids"]])).logits[0]
difference = (logits - torch.tensor(ours["logits"]).reshape(logits.shape)).abs().max().item()
print(f"{len(ours['ids'])} positions, largest logit difference {difference:.2e}")
sys.exit(difference > 1e-4)
