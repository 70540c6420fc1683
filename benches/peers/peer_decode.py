"""transformers' `generate` on prompts of one length, greedily or with beams, no token ending a text."""
import protocol  # noqa: I001 (first: it takes the standard output)

import argparse
import json
import time

import torch
import transformers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--prompts", required=True)
parser.add_argument("--new-tokens", type=int, required=True)
parser.add_argument("--beams", type=int, default=1)
parser.add_argument("--warm-up", type=int, default=1)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--device", default="cpu")
parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
args = parser.parse_args()

torch.set_num_threads(args.threads)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.precision]
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
model.to(args.device).eval()
model.generation_config = transformers.GenerationConfig(
    do_sample=False, num_beams=args.beams, max_new_tokens=args.new_tokens, use_cache=True, eos_token_id=None,
    pad_token_id=0)
with open(args.prompts) as file:
    prompts = torch.tensor(json.load(file), device=args.device)
mask = torch.ones_like(prompts)


def run():
    began = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(prompts, attention_mask=mask)
    protocol.finish(args.device)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "ids": ids[:, prompts.shape[1]:].tolist(), **protocol.held(args.device)}


protocol.serve(run, args.warm_up, torch=torch.__version__, transformers=transformers.__version__)
