#!/usr/bin/env python3
"""Make the adapters under testdata/lora with PEFT, on the models of testdata/lm, and their logits.

    python testdata/scripts/make_lora_fixture.py [--out testdata/lora] [NAME ...]

Needs torch, transformers, peft and safetensors (versions: testdata/README.md). CPU only, fixed seeds.
"""
import argparse, json, os, shutil, warnings

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
import peft
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
# PEFT says that it turns fan_in_fan_out on for GPT-2; it is right to.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")

HERE = os.path.dirname(os.path.abspath(__file__))

# name: (seed, base model, LoraConfig's arguments)
CASES = {
    "llama": (301, "llama_tied", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    # A full suffix in the list reaches one block alone; the scale is alpha over the rank's root.
    "llama_rslora": (302, "llama_untied", dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "layers.1.mlp.down_proj"])),
    "gpt_neox": (303, "gpt_neox", dict(r=3, lora_alpha=6, target_modules="all-linear")),
    # `c_proj` names two matrices of each block.
    "gpt2": (304, "gpt2", dict(r=2, lora_alpha=5, target_modules=["c_attn", "c_proj"])),
}


def load(base):
    folder = os.path.join(HERE, "..", "lm", base)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def make(name, out):
    seed, base, arguments = CASES[name]
    model = load(base)
    torch.manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (2, 12))
    plain = logits_of(model, ids)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments)).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.15)
    logits = logits_of(adapted, ids)
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    path = os.path.join(folder, "adapter_config.json")
    with open(path) as f:
        config = json.load(f)
    config["base_model_name_or_path"] = f"testdata/lm/{base}"
    # A set, whose order differs from run to run.
    config["target_modules"].sort()
    with open(path, "w") as f:
        json.dump(config, f, indent=1, sort_keys=True)

    again = logits_of(PeftModel.from_pretrained(load(base), folder).eval(), ids)
    assert torch.equal(again, logits), "reloading changed the logits"
    moved = (logits - plain).abs().max().item()
    assert moved > 0.5, moved
    positions = [(0, 0), (0, 5), (0, 11), (1, 7)]
    golden = {
        "base": base, "seed": seed, "peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
        "n_trainable": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "input_ids": ids.tolist(),
        "logits_positions": {
            "description": "logits at (row, position), all vocabulary entries",
            "entries": [{"row": r, "position": t, "logits_float32": [float(f"{v:.9g}") for v in logits[r, t].tolist()]} for r, t in positions]},
    }
    with open(os.path.join(folder, "golden.json"), "w") as f:
        json.dump(golden, f)
    print(f"{name}: {golden['n_trainable']} trainable parameters, the adapter moves logits by up to {moved:.2f}")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("names", nargs="*")
    p.add_argument("--out", default=os.path.join(HERE, "..", "lora"))
    a = p.parse_args()
    torch.set_num_threads(1)
    for name in a.names or CASES:
        make(name, a.out)


main()
