"""DPO steps on the same pairs over and over, the reference's logps computed before: TRL's trainer, or a loop as short
as PyTorch allows."""
import protocol  # noqa: I001 (first: it takes the standard output)

import argparse
import json
import tempfile
import time

import torch
import torch.nn.functional as F
import transformers

EOS, PAD = 2, 0


def run_loop(model, pairs, args):
    """Chosen and rejected completions in one batch; the head runs on the positions before completion tokens alone."""
    prompts, chosen, rejected = (torch.tensor(part, device=args.device) for part in zip(*pairs))
    completions = torch.cat([chosen, rejected])
    ids = torch.cat([prompts.repeat(2, 1), completions], dim=1)
    before = slice(prompts.shape[1] - 1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)

    def log_ratios():
        """log π(chosen) - log π(rejected) of each pair."""
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state[:, before])
        logps = -F.cross_entropy(logits.flatten(0, 1).float(), completions.flatten(), reduction="none")
        chosen, rejected = logps.view_as(completions).sum(1).chunk(2)
        return chosen - rejected

    with torch.no_grad():
        reference = log_ratios()

    def run():
        began = time.perf_counter()
        loss = -F.logsigmoid(args.beta * (log_ratios() - reference)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        protocol.finish(args.device)
        return {"seconds": time.perf_counter() - began, "loss": loss, **protocol.held(args.device)}

    protocol.serve(run, args.warm_up, torch=torch.__version__)


def run_trl(model, pairs, args):
    """TRL's trainer with its defaults, but without gradient checkpointing, which would cost it time, and in bf16 only where
    that is asked for."""
    import datasets
    import tokenizers
    import trl
    datasets.disable_progress_bars()

    # A word for each id, so that text becomes the very tokens of the pairs.
    words = [str(i) for i in range(model.config.vocab_size)]
    words[EOS], words[PAD] = "</s>", "<pad>"
    ids = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")

    def text(ids):
        return "".join(f" {words[i]}" for i in ids)

    rows = [{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, c, r in pairs]
    # Eight steps an epoch, so that beginning one is not what is measured.
    data = datasets.Dataset.from_list(rows * 8)

    class Turns(transformers.TrainerCallback):
        """From log to log is a whole step with everything that belongs to it; between them the driver has its turn."""

        def on_log(self, _args, state, control, logs=None, **_):
            protocol.finish(args.device)
            now = time.perf_counter()
            step = state.global_step - args.warm_up
            if "loss" not in logs or step < 0:
                return
            if step == 0:
                protocol.answer(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__)
            else:
                protocol.answer(seconds=now - self.began, loss=logs["loss"], **protocol.held(args.device))
            control.should_training_stop = not protocol.asked()
            self.began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(pairs), max_steps=100_000, beta=args.beta,
            learning_rate=args.learning_rate, lr_scheduler_type="constant", precompute_ref_log_probs=True,
            gradient_checkpointing=False, bf16=args.precision == "bf16", max_length=None, train_sampling_strategy="sequential",
            use_cpu=args.device == "cpu", dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True)
        trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Turns()])
        for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, pairs):
            assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (prompt, chosen, rejected)
        trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=["loop", "trl"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa")
    model.to(args.device).train()
    with open(args.pairs) as file:
        {"loop": run_loop, "trl": run_trl}[args.trainer](model, json.load(file), args)
