"""Write a Llama with random weights as a Hugging Face folder."""
import argparse
import json

import torch
import transformers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--shape", required=True, help="fields of LlamaConfig, as JSON")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
config = transformers.LlamaConfig(
    **json.loads(args.shape), max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
transformers.LlamaForCausalLM(config).save_pretrained(args.folder)
