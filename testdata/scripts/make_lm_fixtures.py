#!/usr/bin/env python3
"""Make the tiny model folders under testdata/lm and their golden values with transformers.

    python testdata/scripts/make_lm_fixtures.py [--out testdata/lm] [NAME ...]

Needs torch, transformers and safetensors (versions: testdata/README.md). CPU only, fixed seeds.

`float32` values are what transformers gives at f32 with eager attention. `float64` values come from
the same weights and the same library code with every computation in double: `torch.float32` is
aliased to `torch.float64`, `Tensor.float` to `Tensor.double`, and the rotary frequencies are rebuilt
in double.
"""
import argparse, contextlib, copy, json, os, shutil

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
from safetensors.torch import load_file, save_file
from transformers import (GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

VOCAB, HIDDEN, MLP, MAX_POS = 128, 32, 56, 128
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=MAX_POS,
             initializer_range=0.16, **IDS)


def rope(theta, **more):
    return {"rope_theta": theta, "rope_type": "default", **more}


# name: (seed, model class, config, stored dtype, shards)
CASES = {
    "llama_tied": (201, LlamaForCausalLM, LlamaConfig(**LLAMA, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=rope(1e4)), torch.float32, 1),
    "llama_untied": (202, LlamaForCausalLM, LlamaConfig(**LLAMA, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=rope(1e4)), torch.float32, 3),
    "mistral": (203, MistralForCausalLM, MistralConfig(**LLAMA, rms_norm_eps=1e-5, sliding_window=None, head_dim=8, tie_word_embeddings=False, rope_parameters=rope(1e6)), torch.float16, 1),
    "qwen2": (204, Qwen2ForCausalLM, Qwen2Config(**LLAMA, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=rope(1e6)), torch.bfloat16, 1),
    "qwen3": (205, Qwen3ForCausalLM, Qwen3Config(**LLAMA, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=rope(1e6)), torch.float32, 1),
    # Two heads of 16: a rotary factor of 0.25 then turns 4 of them, more than the trivial pair.
    "gpt_neox": (206, GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=MAX_POS, initializer_range=0.16, use_parallel_residual=True, tie_word_embeddings=False, rope_parameters=rope(1e4, partial_rotary_factor=0.25), **IDS), torch.float32, 1),
    "gpt2": (207, GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_inner=MLP, n_layer=2, n_head=4, n_positions=MAX_POS, initializer_range=0.16, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **IDS), torch.float32, 1),
}


@contextlib.contextmanager
def everything_in_double():
    """Within it, library code that asks for float32 gets float64."""
    saved = torch.float32, torch.Tensor.float, torch.get_default_dtype()
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = saved[0], saved[1]
        torch.set_default_dtype(saved[2])


def in_double(model, config):
    """A copy of the model whose weights and rotary frequencies are float64."""
    double = type(model)(config).eval()
    double.load_state_dict(model.state_dict())
    double = double.double()
    for module in double.modules():
        if hasattr(module, "inv_freq"):
            params = config.rope_parameters
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            dim = int(head * params.get("partial_rotary_factor", 1.0))
            freq = 1.0 / params["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            assert module.inv_freq.shape == freq.shape
            module.inv_freq = freq
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = freq.clone()
    return double


def perturb(model, dtype):
    """Moves norms and biases off their initial ones and zeros, and rounds to the stored dtype."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.25 * torch.randn_like(p))
            p.copy_(p.to(dtype).to(torch.float32))


def logits_of(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def greedy(model, prompt, new, eos):
    """Greedy continuation by full recomputation: tokens, their logps and the least top-2 gap."""
    ids, tokens, logps, gap = list(prompt), [], [], float("inf")
    for _ in range(new):
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        top = row.topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        token = int(top.indices[0])
        ids.append(token)
        tokens.append(token)
        logps.append(float(row.log_softmax(-1)[token]))
        if token == eos:
            break
    return {"tokens": tokens, "token_logprobs": logps, "min_top2_logit_gap": gap}


def beams(model, prompt, new, eos_hit):
    results = []
    for eos_name, eos in (("no_eos", None), ("eos_hit", eos_hit)):
        for length_penalty in (0.0, 1.0):
            for early in (False, True, "never"):
                model.generation_config.eos_token_id = eos
                with torch.no_grad():
                    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                         num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=new,
                                         eos_token_id=eos, pad_token_id=0, length_penalty=length_penalty, early_stopping=early,
                                         return_dict_in_generate=True, output_scores=True)
                sequences = []
                for row in out.sequences.tolist():
                    row = row[len(prompt):]
                    if eos is not None and eos in row:
                        row = row[:row.index(eos) + 1]
                    sequences.append(row)
                results.append({"eos": eos_name, "eos_id": eos, "length_penalty": length_penalty, "early_stopping": early, "num_beams": 4,
                                "max_new_tokens": new, "float32": {"sequences": sequences, "sequences_scores": out.sequences_scores.tolist()}})
    return results


def older_style(config, dtype):
    """The same config as transformers 4 wrote it."""
    old = dict(config)
    old.pop("dtype", None)
    old["torch_dtype"] = str(dtype).removeprefix("torch.")
    old["transformers_version"] = "4.46.0"
    params = old.pop("rope_parameters", None)
    if params:
        if old["model_type"] == "gpt_neox":
            old["rotary_emb_base"], old["rotary_pct"] = params["rope_theta"], params["partial_rotary_factor"]
        else:
            old["rope_theta"] = params["rope_theta"]
        old["rope_scaling"] = None
    old.pop("layer_types", None)
    return old


def rounded(values, digits):
    return [float(f"{v:.{digits}g}") for v in values]


def save_shards(folder, n_shards):
    whole = os.path.join(folder, "model.safetensors")
    tensors = load_file(whole)
    os.remove(whole)
    names = sorted(tensors)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::n_shards]}
        save_file(part, os.path.join(folder, file), metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, f, indent=1)


def make(name, out):
    seed, cls, config, dtype, n_shards = CASES[name]
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = cls(config).eval()
    perturb(model, dtype)
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    # A copy is cast for saving: casting the model itself would round its rotary buffers too.
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        os.remove(os.path.join(folder, "generation_config.json"))
    with open(os.path.join(folder, "config.json")) as f:
        new = json.load(f)
    if name == "mistral":
        new["sliding_window"] = None
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(new, f, indent=1)
    with open(os.path.join(folder, "config_v4.json"), "w") as f:
        json.dump(older_style(new, dtype), f, indent=1)
    if n_shards > 1:
        save_shards(folder, n_shards)

    lengths = [20, 13, 7]
    g = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(3, VOCAB, (3, lengths[0]), generator=g)
    mask = torch.zeros_like(ids)
    for r, n in enumerate(lengths):
        mask[r, :n] = 1
        ids[r, n:] = 0
    double = in_double(model, config)
    logits32 = logits_of(model, ids, mask)
    with everything_in_double():
        logits64 = logits_of(double, ids, mask)
    assert str(logits64.dtype) == "torch.float64"
    real = mask.bool()
    difference = (logits32.double() - logits64).abs()[real].max().item()
    assert difference < 1e-4, difference

    # Reloaded from the folder, in both config styles, the logits must be the same bits.
    reloaded = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert torch.equal(logits_of(reloaded, ids, mask), logits32), "reloading changed the logits"
    kept = os.path.join(folder, "config.json")
    text = open(kept).read()
    shutil.copy(os.path.join(folder, "config_v4.json"), kept)
    reloaded = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    open(kept, "w").write(text)
    assert torch.equal(logits_of(reloaded, ids, mask), logits32), "the older config style changed the logits"

    def token_logprobs(logits):
        logps = logits.log_softmax(-1)
        return [[float(logps[r, t, ids[r, t + 1]]) for t in range(n - 1)] for r, n in enumerate(lengths)]

    prompt, new_tokens = ids[0, :6].tolist(), 16
    eos = IDS["eos_token_id"]
    results = {"float32": {"no_eos": greedy(model, prompt, new_tokens, None), "eos": greedy(model, prompt, new_tokens, eos)}}
    with everything_in_double():
        results["float64"] = {"no_eos": greedy(double, prompt, new_tokens, None), "eos": greedy(double, prompt, new_tokens, eos)}
    tokens = results["float32"]["no_eos"]["tokens"]
    assert tokens == results["float64"]["no_eos"]["tokens"]
    # Stops at the first token that is new from the fifth on, so that the end is not at once.
    hit = next((t for i, t in enumerate(tokens) if i >= 4 and t not in tokens[:i]), tokens[-1])
    hit_tokens = greedy(model, prompt, new_tokens, hit)["tokens"]
    library = reloaded.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                do_sample=False, max_new_tokens=new_tokens, eos_token_id=hit, pad_token_id=0)
    assert library[0, len(prompt):].tolist() == hit_tokens, "generate() and the loop differ"

    positions = [(0, 0), (0, 9), (0, 19), (1, 12), (2, 3), (2, 6)]
    golden = {
        "model": name, "seed": seed, "n_params": sum(p.numel() for p in model.parameters()),
        "stored_dtype": str(dtype).removeprefix("torch."),
        "transformers": transformers.__version__, "torch": torch.__version__,
        "input_ids": ids.tolist(), "attention_mask": mask.tolist(), "row_lengths": lengths,
        "logits_positions": {
            "description": "logits at (row, position), all vocabulary entries",
            "entries": [{"row": r, "position": t, "logits_float32": rounded(logits32[r, t].tolist(), 9),
                         "logits_float64": rounded(logits64[r, t].tolist(), 12)} for r, t in positions]},
        "token_logprobs": {"description": "log p(ids[t+1] | ids[..t]), a list per row of length row_length - 1",
                           "float32": token_logprobs(logits32), "float64": token_logprobs(logits64)},
        "max_abs_diff": {"logits_f32_vs_f64": difference},
        "logits_std": logits32[real].std().item(),
        "greedy": {"prompt": prompt, "max_new_tokens": new_tokens, "eos_id": eos, "results": results},
        "greedy_eos_hit": {"prompt": prompt, "max_new_tokens": new_tokens, "eos_id": hit,
                           "description": "eos_id is a token of the greedy continuation, so that it stops early; it is kept",
                           "tokens": {"float32": hit_tokens}},
        "beam": {"prompt": prompt, "description": "new tokens only; eos kept, padding removed; best first",
                 "results": beams(reloaded, prompt, new_tokens, hit)},
    }
    with open(os.path.join(folder, "golden.json"), "w") as f:
        json.dump(golden, f)
    size = sum(os.path.getsize(os.path.join(folder, x)) for x in os.listdir(folder))
    gap = results["float32"]["no_eos"]["min_top2_logit_gap"]
    print(f"{name}: {golden['n_params']} parameters, {size / 1024:.0f} KiB, f32 against f64 {difference:.1e}, logits std {golden['logits_std']:.2f}, least greedy gap {gap:.1e}, greedy {tokens}")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("names", nargs="*")
    p.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "..", "lm"))
    a = p.parse_args()
    torch.set_num_threads(1)
    for name in a.names or CASES:
        make(name, a.out)


main()
