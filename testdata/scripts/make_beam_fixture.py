#!/usr/bin/env python3
"""Make testdata/search: transformers' beam search on a model that is a table.

    python testdata/scripts/make_beam_fixture.py

Needs torch and transformers (versions: testdata/README.md). CPU only. The model's logits are rows of a seeded table,
picked by the number of tokens and the last of them; the table is written with the results. Scores are those of a run
in which every computation is in double; in float32 the sequences are the same.
"""
import itertools, json, os, random

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

SINGLE = torch.float32, torch.float
OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "search")
# More lengths than any case reaches: paths that pass the same rows in another order would tie.
VOCAB, LENGTHS = 13, 16
EOS, SECOND_EOS, PAD = 2, 5, 0


class TableConfig(PretrainedConfig):
    model_type = "table"


class TableModel(PreTrainedModel, GenerationMixin):
    config_class = TableConfig
    _supports_cache_class = False

    def __init__(self, table):
        super().__init__(TableConfig(vocab_size=VOCAB, pad_token_id=PAD, num_hidden_layers=1, is_decoder=True))
        self.table = torch.nn.Parameter(torch.tensor(table))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids=None, return_dict=True, **kwargs):
        logits = self.table[input_ids.shape[1] % LENGTHS, input_ids[:, -1]]
        return CausalLMOutput(logits=logits[:, None, :])


def make_table(seed, spread, end):
    """Normal logits; those of the end tokens are moved by `end`."""
    rng = random.Random(seed)
    table = [[[round(rng.gauss(0, spread), 3) for _ in range(VOCAB)] for _ in range(VOCAB)] for _ in range(LENGTHS)]
    for row in itertools.chain.from_iterable(table):
        for token in (EOS, SECOND_EOS):
            row[token] = round(row[token] + end, 3)
    return table


def precision(double):
    """transformers names float32 where it adds up scores; with the name bound to double it adds in double."""
    torch.float32, torch.float = (torch.float64, torch.float64) if double else SINGLE
    torch.set_default_dtype(torch.float64 if double else SINGLE[0])


def run(table, case, double):
    precision(double)
    model = TableModel(table).eval()
    out = model.generate(
        torch.tensor([case["prompt"]]),
        do_sample=False,
        use_cache=False,
        num_beams=case["width"],
        num_return_sequences=case["width"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        max_new_tokens=case["max_new_tokens"],
        min_new_tokens=case["min_new_tokens"] or None,
        suppress_tokens=case["banned"] or None,
        eos_token_id=case["eos"] or None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = []
    for row in out.sequences.tolist():
        tokens = row[len(case["prompt"]):]
        ends = [t for t, token in enumerate(tokens) if token in case["eos"]]
        sequences.append(tokens[: ends[0] + 1] if ends else tokens)
    return {"sequences": sequences, "scores": out.sequences_scores.tolist()}


def cases():
    base = {"prompt": [1, 7], "eos": [EOS], "max_new_tokens": 8, "min_new_tokens": 0, "banned": []}
    grid = itertools.product([2, 3, 5], [0.0, 1.0], [False, True, "never"])
    for width, penalty, early in grid:
        rule = {"width": width, "length_penalty": penalty, "early_stopping": early}
        yield {**base, **rule}
        yield {**base, **rule, "eos": [EOS, SECOND_EOS], "prompt": [4]}
        yield {**base, **rule, "eos": []}
        yield {**base, **rule, "max_new_tokens": 12, "prompt": [9, 1, 3]}
        yield {**base, **rule, "min_new_tokens": 4, "banned": [6, 11]}
    for penalty, early in itertools.product([-1.0, 0.5, 2.0], [False, True, "never"]):
        yield {**base, "width": 4, "length_penalty": penalty, "early_stopping": early, "max_new_tokens": 12}


def main():
    torch.manual_seed(0)
    tables = {"sharp": make_table(61, 2.0, 0.5), "flat": make_table(62, 0.7, 0.0), "short": make_table(63, 1.0, 1.5)}
    results = []
    for name, table in tables.items():
        for case in cases():
            single, double = (run(table, case, double) for double in (False, True))
            assert single["sequences"] == double["sequences"], case
            assert max(abs(a - b) for a, b in zip(single["scores"], double["scores"])) < 1e-5, case
            results.append({"table": name, **case, **double})
    precision(False)
    os.makedirs(OUT, exist_ok=True)
    about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
             "vocab": VOCAB, "lengths": LENGTHS}
    lines = [json.dumps(case) for case in results]
    rows = ",\n".join(f'  "{name}": {json.dumps(table)}' for name, table in tables.items())
    with open(os.path.join(OUT, "beam.json"), "w") as file:
        file.write('{"about": ' + json.dumps(about) + ',\n"tables": {\n' + rows + '\n},\n"cases": [\n')
        file.write(",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main()
