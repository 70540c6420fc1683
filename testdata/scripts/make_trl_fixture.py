#!/usr/bin/env python3
"""Make testdata/trl: text preferences, a tokenizer for them, and what TRL's DPOTrainer does with both.

    python testdata/scripts/make_trl_fixture.py

Needs torch, transformers, trl, datasets, tokenizers (versions: testdata/README.md). CPU only; policy and
reference start from testdata/lm/llama_untied. Everything is recorded at full precision, in f32 and, for
run `main`, with every computation in double as well.
"""
import contextlib, copy, json, os, random, tempfile

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

transformers.utils.logging.disable_progress_bar()
HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "trl")
MODEL = os.path.join(HERE, "..", "lm", "llama_untied")
PAIRS, SEED = 40, 11


def make_pairs():
    """Small sums, sorting and recall; every ninth pair starts its completions within a word."""
    rng = random.Random(SEED)
    names = ["Ann", "Bo", "Cy", "Di", "Ed"]
    things = ["red tea", "a map", "two nets", "the den"]
    pairs = []
    for i in range(PAIRS):
        kind = i % 4
        if kind == 0:
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            pair = (f"{a} and {b} is", f" {a + b}", f" {a + b + rng.choice([1, 2])} or so")
        elif kind == 1:
            name, thing = rng.choice(names), rng.choice(things)
            pair = (f"{name} sent {thing}. Who sent it?", f" {name}.", " No one did, I said.")
        elif kind == 2:
            letters = [rng.choice("abcd") for _ in range(3)]
            pair = (f"sort {' '.join(letters)}:", " " + " ".join(sorted(letters)), " " + " ".join(letters[::-1]) + " end")
        else:
            name, thing = rng.choice(names), rng.choice(things)
            pair = (f"Say that {name} is in.\n", f"{name} is in, and so is {thing}.", f"{thing}")
        prompt, chosen, rejected = pair
        if i % 9 == 4:  # The tokenizer merges across this boundary.
            prompt, chosen, rejected = prompt + " th", "e answer is" + chosen, "at is it"
        if i % 13 == 5:  # An end of sequence that is already there is not appended again.
            chosen += "</s>"
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": i})
    return pairs


def make_tokenizer(pairs):
    """Byte-level BPE of 128 entries over the characters that occur."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [p["prompt"] + p[side].replace("</s>", "") for p in pairs for side in ("chosen", "rejected")]
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789"), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == 128
    return tokenizer


@contextlib.contextmanager
def everything_in_double():
    saved = torch.float32, torch.Tensor.float, torch.get_default_dtype()
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = saved[0], saved[1]
        torch.set_default_dtype(saved[2])


BASE = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=10, learning_rate=1e-3, lr_scheduler_type="constant",
            warmup_steps=0, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, optim="adamw_torch", max_grad_norm=1.0,
            beta=0.1, loss_type="sigmoid", max_length=1024, seed=42, train_sampling_strategy="sequential", disable_tqdm=True, dataloader_pin_memory=False)
RUNS = {
    "main": {},
    "clip_off": dict(max_grad_norm=0.0, max_steps=5),
    "ipo_warmup_linear_wd_accum": dict(loss_type="ipo", gradient_accumulation_steps=2, lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5, max_steps=5),
    "cosine_mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], lr_scheduler_type="cosine", warmup_steps=2, max_steps=8),
    "max_length_16_keep_start": dict(max_length=16, max_steps=5),
    "max_length_drop": dict(max_length=8, max_steps=3),
    "sync_ref": dict(sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.6, max_steps=8),
}


class Keep(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append({**logs, "step": state.global_step})


def load(double):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    if double:
        model = model.double()
        params = model.config.rope_parameters
        head = model.config.hidden_size // model.config.num_attention_heads
        freq = 1.0 / params["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = freq
                module.original_inv_freq = freq.clone()
    return model


def run(overrides, pairs, tokenizer, models=None):
    config = {**BASE, **overrides}
    with tempfile.TemporaryDirectory() as tmp:
        args = DPOConfig(output_dir=tmp, **copy.deepcopy(config))
        keep = Keep()
        policy, reference = models or (load(False), load(False))
        trainer = DPOTrainer(model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, callbacks=[keep])
        micro = []
        inner = trainer.compute_loss

        def compute_loss(*a, **k):
            out = inner(*a, **k)
            micro.append(float(out[0] if isinstance(out, tuple) else out))
            return out

        trainer.compute_loss = compute_loss
        data = trainer.train_dataset
        tokenized = [{k: list(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in data]
        kept = [row["id"] for row in data] if "id" in data.column_names else None
        trainer.train()
        norms = {n: float(p.detach().double().norm()) for n, p in trainer.model.named_parameters()}
    return {"config": config, "steps": keep.steps, "compute_loss": micro, "final_parameter_l2_norms": norms}, tokenized, kept


def main():
    torch.set_num_threads(1)
    os.makedirs(OUT, exist_ok=True)
    pairs = make_pairs()
    tokenizer = make_tokenizer(pairs)
    tokenizer.save(os.path.join(OUT, "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    with open(os.path.join(OUT, "tokenizer_config.json"), "w") as f:
        json.dump(config, f, indent=1)
    with open(os.path.join(OUT, "pairs.jsonl"), "w") as f:
        for pair in pairs:
            f.write(json.dumps(pair) + "\n")
    fast = PreTrainedTokenizerFast(tokenizer_file=os.path.join(OUT, "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    golden = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
              "initial_weights": "lm/llama_untied", "reference": "frozen copy of the initial weights", "dataset": "pairs.jsonl in file order, again from the start when used up",
              "notes": ["metrics of a step are computed before its update", "grad_norm is the global L2 norm before clipping", "learning_rate is the one used in that step",
                        "compute_loss: what the trainer's compute_loss returned for each micro-batch",
                        "main_float64: run main with every computation in double"],
              "runs": {}}
    for name, overrides in RUNS.items():
        result, tokenized, kept = run(overrides, pairs, fast)
        if name == "main":
            golden["tokenized_pairs"] = tokenized
            whole = [fast(p["prompt"])["input_ids"] for p in pairs]
            golden["boundary_merged_rows"] = [i for i, (w, t) in enumerate(zip(whole, tokenized)) if len(t["prompt_ids"]) < len(w)]
        if name == "max_length_drop":
            result["kept_pair_indices"] = kept if kept is not None else [golden["tokenized_pairs"].index(t) for t in tokenized]
        golden["runs"][name] = result
        print(name, len(tokenized), "pairs,", result["steps"][0]["loss"], "to", result["steps"][-1]["loss"])
    loaded = load(True), load(True)
    with everything_in_double():
        golden["runs"]["main_float64"] = run({}, pairs, fast, loaded)[0]
    a, b = golden["runs"]["main"]["steps"], golden["runs"]["main_float64"]["steps"]
    worst = max(abs(x[k] - y[k]) / (1e-3 + abs(y[k])) for x, y in zip(a, b) for k in ("loss", "grad_norm", "rewards/margins", "logps/chosen"))
    golden["float32_against_float64_relative"] = worst
    print("main, float32 against float64:", worst, "merged rows:", golden["boundary_merged_rows"])
    with open(os.path.join(OUT, "trajectory.json"), "w") as f:
        json.dump(golden, f)


main()
