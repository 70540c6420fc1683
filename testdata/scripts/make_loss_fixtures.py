#!/usr/bin/env python3
"""Make testdata/losses: what TRL's loss code gives on small tables of log-probabilities, and its gradients.

    python testdata/scripts/make_loss_fixtures.py

Needs torch, transformers, trl (versions: testdata/README.md). CPU only. No model: a stub returns random tables as
the outputs of policy and reference, and TRL's own methods compute the losses from them, in double throughout.
"""
import json, os, random
from types import SimpleNamespace as Space

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import torch
import transformers
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "losses")
SEED = 31
# TRL converts to float32 in places; with the name bound to double it stays in double.
torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
torch.set_default_dtype(torch.float64)

ACCELERATOR = Space(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


class Anything(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def make_batch(rng, counts, spread):
    """Chosen rows, then rejected rows; each row has two prompt tokens, then its completion, then padding."""
    length = 2 + max(counts)
    rows = len(counts)
    mask = torch.zeros(rows, length, dtype=torch.long)
    tables = {name: torch.zeros(rows, length - 1) for name in ("policy", "reference", "log_sum_sq_probs")}
    for row, n in enumerate(counts):
        mask[row, 2:2 + n] = 1
        for t in range(1, 1 + n):
            policy = -round(rng.uniform(0.2, 3.0), 4)
            tables["policy"][row, t] = policy
            tables["reference"][row, t] = min(-0.05, round(policy + rng.gauss(0, spread), 4))
            tables["log_sum_sq_probs"][row, t] = -round(rng.uniform(0.2, 2.0), 4)
    return Space(mask=mask, counts=counts, **tables)


class Stub(torch.nn.Module):
    """Stands for a model whose fused head returns these tables."""

    is_gradient_checkpointing = False

    def __init__(self, table, batch):
        super().__init__()
        self.table, self.batch = table, batch

    def forward(self, **kwargs):
        zeros = torch.zeros_like(self.table)
        return Space(log_probs=self.table, log_sum_sq_probs=self.batch.log_sum_sq_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def dpo(batch, case):
    policy = batch.policy.clone().requires_grad_(True)
    losses = case["loss"]
    trainer = Space(
        accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=case.get("ld_alpha"), precompute_ref_logps=False, ref_model=Stub(batch.reference, batch),
        model=Stub(policy, batch), args=Space(gradient_checkpointing_kwargs=None, discopop_tau=case.get("discopop_tau", 0.05)),
        f_divergence_type=case.get("f_divergence_type", "reverse_kl"), f_alpha_divergence_coef=case.get("f_alpha_divergence_coef", 0.5),
        loss_types=losses, loss_weights=case.get("loss_weights") or [1.0] * len(losses), beta=case["beta"], label_smoothing=case.get("label_smoothing", 0.0),
        use_weighting=case.get("use_weighting", False), _metrics={"train": Anything()}, _total_train_tokens=0, _tp_size=1)
    inputs = {"input_ids": torch.ones_like(batch.mask), "attention_mask": torch.ones_like(batch.mask), "completion_mask": batch.mask}
    loss = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    if "hinge" in losses and trainer.use_weighting:
        # TRL weighs in place what its backward pass of relu still needs; the loss is right, a gradient there is not.
        return float(loss.detach()), None
    loss.backward()
    return float(loss.detach()), policy.grad


def halves(policy, batch):
    mask = batch.mask[:, 1:]
    return policy.sum(1).chunk(2), (policy.sum(1) / mask.sum(1)).chunk(2), mask


def cpo(batch, case):
    """TRL's trainer adds cpo_alpha times the token mean over chosen completions; only simpo averages."""
    policy = batch.policy.clone().requires_grad_(True)
    simpo = case["loss"] == ["simpo"]
    trainer = Space(alpha=0.0, accelerator=ACCELERATOR, loss_type="simpo" if simpo else "sigmoid", simpo_gamma=case.get("simpo_gamma", 0.5), beta=case["beta"],
                    label_smoothing=case.get("label_smoothing", 0.0))
    sums, means, mask = halves(policy, batch)
    loss = CPOTrainer.cpo_loss(trainer, *(means if simpo else sums))[0].mean()
    if not simpo:
        n = len(batch.counts) // 2
        loss = loss - case.get("cpo_alpha", 1.0) * policy[:n][mask[:n].bool()].mean()
    loss.backward()
    return float(loss.detach()), policy.grad


def orpo(batch, case):
    """The fine-tuning term is over the completion here, as in the paper, and over the prompt as well in TRL's trainer."""
    policy = batch.policy.clone().requires_grad_(True)
    _, means, mask = halves(policy, batch)
    n = len(batch.counts) // 2
    ratio = ORPOTrainer.odds_ratio_loss(Space(beta=case["beta"], accelerator=ACCELERATOR), *means)[0]
    loss = -policy[:n][mask[:n].bool()].mean() - ratio.mean()
    loss.backward()
    return float(loss.detach()), policy.grad


def kto(batch, case):
    policy = batch.policy.clone().requires_grad_(True)
    kl = torch.tensor(case["policy_kl_logps"]), torch.tensor(case["reference_kl_logps"])
    trainer = Space(accelerator=ACCELERATOR, aux_loss_enabled=False, precompute_ref_logps=False, ref_model=Stub(batch.reference, batch), model=Stub(policy, batch),
                    args=Space(gradient_checkpointing_kwargs=None), beta=case["beta"], loss_type=case["loss"][0], calculate_KL=case["loss"] == ["kto"],
                    desirable_weight=case.get("desirable_weight", 1.0), undesirable_weight=case.get("undesirable_weight", 1.0), _metrics={"train": Anything()},
                    _total_train_tokens=0, _tp_size=1)
    trainer._compute_kl_logps = lambda model, _: kl[1] if model is trainer.ref_model else kl[0]
    inputs = {"input_ids": torch.ones_like(batch.mask), "attention_mask": torch.ones_like(batch.mask), "completion_mask": batch.mask, "label": torch.tensor(case["desirable"])}
    loss = KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    loss.backward()
    return float(loss.detach()), policy.grad


LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
DIVERGENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


def cases():
    for beta in (0.1, 0.7):
        for loss in LOSSES:
            yield dpo, {"loss": [loss], "beta": beta, "label_smoothing": 0.1}
            if loss != "exo_pair" and beta == 0.7:
                yield dpo, {"loss": [loss], "beta": beta}
    for loss in DIVERGENT:
        for divergence, alpha in (("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.5), ("alpha_divergence", 1.5), ("alpha_divergence", 1.0)):
            if loss == "sigmoid" or alpha == 0.5:
                yield dpo, {"loss": [loss], "beta": 0.3, "label_smoothing": 0.05, "f_divergence_type": divergence, "f_alpha_divergence_coef": alpha}
    for loss in LOSSES:
        yield dpo, {"loss": [loss], "beta": 0.4, "label_smoothing": 0.1, "ld_alpha": 0.3}
        if loss not in ("aot", "aot_unpaired", "sft"):
            yield dpo, {"loss": [loss], "beta": 0.4, "label_smoothing": 0.1, "use_weighting": True}
    yield dpo, {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1}
    yield dpo, {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1}
    yield dpo, {"loss": ["hinge", "robust"], "loss_weights": [0.5, 2.0], "beta": 0.3, "label_smoothing": 0.2, "ld_alpha": 0.5, "use_weighting": True}
    yield dpo, {"loss": ["discopop"], "beta": 0.5, "discopop_tau": 0.5}
    yield cpo, {"loss": ["simpo"], "beta": 2.0, "simpo_gamma": 0.9}
    yield cpo, {"loss": ["simpo"], "beta": 2.0, "simpo_gamma": 0.9, "label_smoothing": 0.1}
    yield cpo, {"loss": ["cpo"], "beta": 0.1}
    yield cpo, {"loss": ["cpo"], "beta": 0.3, "cpo_alpha": 0.5, "label_smoothing": 0.1}
    yield orpo, {"loss": ["orpo"], "beta": 0.1}


def numbers(tensor):
    return [float(f"{x:.13g}") for x in tensor.tolist()]


def main():
    torch.set_num_threads(1)
    os.makedirs(OUT, exist_ok=True)
    rng = random.Random(SEED)
    # Margins of the second batch are sorted in another order than the reference's; lengths are equal there.
    batches = {"ragged": make_batch(rng, [4, 1, 3, 2, 5, 4], 0.8), "equal": make_batch(rng, [3] * 8, 2.0)}
    golden = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}, "batches": {}, "cases": [], "unpaired": []}
    for name, batch in batches.items():
        # Completions alone: from the second column of the shifted tables on.
        golden["batches"][name] = {"counts": batch.counts, **{key: [numbers(getattr(batch, key)[row, 1:1 + n]) for row, n in enumerate(batch.counts)]
                                                              for key in ("policy", "reference", "log_sum_sq_probs")}}
    for function, case in cases():
        for name, batch in batches.items():
            if name == "equal" and not (function is dpo and "aot" in case["loss"][0]):
                continue
            loss, gradient = function(batch, case)
            rows = gradient if gradient is None else [numbers(gradient[row, 1:1 + n]) for row, n in enumerate(batch.counts)]
            golden["cases"].append({"batch": name, "config": case, "loss": float(f"{loss:.15g}"), "gradient": rows})
    batch = batches["ragged"]
    kls = {"policy_kl_logps": [-3.0, -5.0, -2.5, -4.0, -1.0, -6.0], "reference_kl_logps": [-3.5, -5.25, -3.0, -4.5, -0.5, -7.0], "desirable": [True, False, True, True, False, False]}
    for case in ({"loss": ["kto"], "beta": 0.5}, {"loss": ["kto"], "beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 0.5},
                 {"loss": ["kto"], "beta": 0.5, "policy_kl_logps": [-9.0] * 6}, {"loss": ["apo_zero_unpaired"], "beta": 0.5}):
        case = {**kls, **case}
        loss, gradient = kto(batch, case)
        rows = [numbers(gradient[row, 1:1 + n]) for row, n in enumerate(batch.counts)]
        golden["unpaired"].append({"batch": "ragged", "config": case, "loss": float(f"{loss:.15g}"), "gradient": rows})
    # The fixture must show what it is for: sorting changes the loss of the batch named `equal`.
    by = {(c["config"]["loss"][0], c["config"]["beta"], c["config"].get("label_smoothing", 0.0)): c["loss"] for c in golden["cases"] if c["batch"] == "equal" and "ld_alpha" not in c["config"]}
    for loss in ("aot", "aot_unpaired"):
        plain, _ = dpo(batches["equal"], {"loss": ["sigmoid"], "beta": 0.7})
        print(loss, "sorted", by[(loss, 0.7, 0.0)], "unsorted", plain)
        assert abs(by[(loss, 0.7, 0.0)] - plain) > 1e-3
    with open(os.path.join(OUT, "golden.json"), "w") as f:
        f.write("{\n")
        f.write(f' "versions": {json.dumps(golden["versions"])},\n "batches": {json.dumps(golden["batches"])},\n "cases": [\n')
        f.write(",\n".join("  " + json.dumps(case) for case in golden["cases"]))
        f.write('\n ],\n "unpaired": [\n' + ",\n".join("  " + json.dumps(case) for case in golden["unpaired"]) + "\n ]\n}\n")
    print(len(golden["cases"]), "cases")


main()
