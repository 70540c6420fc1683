#!/usr/bin/env python3
"""Run r2q and its peers in turns on the same weights and data, and print tables of ratios.

    peer/bin/python benches/peers/compare.py [decode] [train] [--model DIR ...] [--json FILE]

README.md, beside this file, says what is measured and how. Programs of this folder are started with the interpreter
that runs this one; the driver itself imports nothing but the standard library, so that it stays small.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

BESIDE = ["loop", "apart", "trl"]
SHAPES = {
    "small": dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
                  intermediate_size=688, vocab_size=4096, tie_word_embeddings=False),
    "large": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
                  intermediate_size=1376, vocab_size=8192, tie_word_embeddings=False),
    "smollm2-135m": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True),
}
EOS = 2
BETA = 0.1
LEARNING_RATE = 1e-5

# Decoding.
PROMPT, NEW_TOKENS, BATCH, BEAMS = 32, 128, 16, 5
SIMULATIONS, TREE_TOKENS = 64, 16

# Between two turns, so that threads that spin for a while after their work are asleep by then.
PAUSE = 0.3


class Program:
    """A program of the protocol: started once, it runs when it is asked to and sleeps otherwise."""

    def __init__(self, command, env):
        self.command = [str(part) for part in command]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.facts = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.command)}: ended early with status {self.process.wait()}")
        return json.loads(line)

    def run(self):
        time.sleep(PAUSE)
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        """The most bytes that were resident at once."""
        self.process.stdin.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.process.stdout.close()
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Bench:
    """What all cases have in common: programs, settings and the ceilings that run in every round."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.r2q_program = args.program or build(args.device)
        threads = str(args.threads)
        self.env = os.environ | {
            "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
            "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        if args.device == "cpu":
            self.env["CUDA_VISIBLE_DEVICES"] = ""
        self.ceilings = {
            "r2q": self.start(self.r2q("ceilings", "--threads", args.threads, *self.precision())),
            "torch": self.start(self.python("peer_gemm.py", *self.precision())),
        }
        self.cases = []

    def r2q(self, *arguments):
        return [self.r2q_program, *arguments, "--device", self.args.device]

    def python(self, script, *arguments):
        return [sys.executable, HERE / script, *arguments, "--threads", self.args.threads, "--device", self.args.device]

    def precision(self):
        return ["--precision", self.args.precision]

    def start(self, command):
        return Program(command, self.env)

    def write(self, name, value):
        path = self.folder / name
        path.write_text(json.dumps(value))
        return path

    def model(self, shape):
        """The folder of a model of that shape with random weights."""
        folder = self.folder / shape
        if not folder.exists():
            command = [sys.executable, HERE / "make_model.py", folder, "--shape", json.dumps(SHAPES[shape])]
            subprocess.run(command, check=True, env=self.env, stdout=sys.stderr)
        return folder

    def case(self, suite, model, name, commands, **facts):
        """Runs programs in turns, and the ceilings after them in each round."""
        print(f"{suite}, {model}: {name}", file=sys.stderr)
        programs = {who: self.start(command) for who, command in commands.items()}
        rounds = []
        for _ in range(self.args.repetitions):
            answers = {who: program.run() for who, program in programs.items()}
            ceilings = {who: program.run() for who, program in self.ceilings.items()}
            rounds.append({"programs": answers, "ceilings": ceilings})
        # Texts are compared and not kept.
        texts = {who: answer.pop("ids") for who, answer in rounds[0]["programs"].items() if "ids" in answer}
        for answers in rounds:
            for answer in answers["programs"].values():
                answer.pop("ids", None)
        self.cases.append({
            "suite": suite, "model": str(model), "case": name, **facts,
            "programs": {who: program.facts | {"peak_bytes": program.close()} for who, program in programs.items()},
            "first_difference": first_differences(texts), "rounds": rounds})

    def decode(self, model, folder):
        rng = random.Random(0)
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        prompts = [[rng.randrange(3, vocab) for _ in range(PROMPT)] for _ in range(BATCH)]
        for name, n_prompts, beams in [("greedy", 1, 1), ("greedy", BATCH, 1), (f"{BEAMS} beams", 1, BEAMS)]:
            file = self.write("prompts.json", prompts[:n_prompts])
            task = ["--model", folder, "--prompts", file, "--new-tokens", NEW_TOKENS, "--beams", beams]
            task += self.precision()
            commands = {"r2q": self.r2q("decode", *task), "transformers": self.python("peer_decode.py", *task)}
            self.case("decode", model, f"{name}, batch {n_prompts}", commands, tokens=n_prompts * NEW_TOKENS)
        file = self.write("prompts.json", prompts[:1])
        task = ["--model", folder, "--prompts", file, "--new-tokens", TREE_TOKENS, "--simulations", SIMULATIONS]
        task += self.precision()
        name = f"tree search, {SIMULATIONS} simulations a token"
        self.case("decode", model, name, {"r2q": self.r2q("mcts", *task)}, tokens=TREE_TOKENS)

    def train(self, shape):
        args, rng = self.args, random.Random(0)

        def ids(n):
            return [rng.randrange(3, SHAPES[shape]["vocab_size"]) for _ in range(n)]

        pairs = [[ids(args.prompt), *(ids(args.completion - 1) + [EOS] for _ in range(2))] for _ in range(args.pairs)]
        task = ["--model", self.model(shape), "--pairs", self.write("pairs.json", pairs), "--beta", BETA,
                "--learning-rate", LEARNING_RATE, "--warm-up", 2, *self.precision()]
        r2q = self.r2q("train", *task, "--workers", args.workers, "--parts", args.parts)
        beside = {"loop": ("PyTorch loop", self.python("peer_train.py", "loop", *task)),
                  "apart": ("r2q, prompts apart", [*r2q, "--unshared"]),
                  "trl": ("TRL", self.python("peer_train.py", "trl", *task))}
        commands = {"r2q": r2q, **dict(command for who, command in beside.items() if who in args.beside)}
        name = f"{args.pairs} pairs of {args.prompt} + {args.completion} tokens"
        shared = {"r2q"}
        flops = {who: useful_flops(SHAPES[shape], args, who in shared) for who in commands}
        pair_tokens = 2 * (args.prompt + args.completion)
        self.case("train", shape, name, commands, pairs=args.pairs, pair_tokens=pair_tokens, useful_flops=flops)


def build(device):
    command = ["cargo", "build", "--release", "--locked", "--package", "benches", "--example", "peer",
               "--message-format", "json-render-diagnostics"]
    if device != "cpu":
        command += ["--features", f"trainer/{device}"]
    messages = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    built = (json.loads(line) for line in messages.splitlines())
    return next(found["executable"] for found in built if found.get("executable"))


def first_differences(texts):
    """For each prompt, at which token two programs part; None where they never do."""
    if len(texts) != 2:
        return None
    return [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), None) for pair in zip(*texts.values())]


def useful_flops(shape, args, shared):
    """Operations that a step cannot do without: two for each weight of a matrix and each token that is multiplied with
    it, and four times the width for each token that a token attends to; all of it once forward and twice backward. The
    head counts for completion tokens alone, as does all of the last block but its keys and values; a shared prompt
    once; and a completion's last token not at all, since it predicts nothing."""
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    kv_width = hidden // heads * shape["num_key_value_heads"]
    keys_and_values = 2 * hidden * kv_width
    rest = 2 * hidden * hidden + 3 * hidden * shape["intermediate_size"]
    prompt, completion = args.prompt, args.completion
    prompts = 1 if shared else 2
    read, behind = 2 * completion, 2 * (completion - 1)
    tokens = prompts * prompt + behind
    attended = (layers - 1) * (prompts * prompt * (prompt + 1) / 2) + prompts * prompt
    attended += layers * behind * (prompt + completion / 2)
    forward = 2 * layers * keys_and_values * tokens + 2 * rest * ((layers - 1) * tokens + read)
    forward += 4 * hidden * attended
    forward += 2 * hidden * shape["vocab_size"] * read
    return 3 * forward * args.pairs


def machine(args):
    def first_line(path, start):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                if line.startswith(start):
                    return line.split(":", 1)[1].strip()
        return None

    def output(*command):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        return None

    flags = (first_line("/proc/cpuinfo", "flags") or "").split()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "vector_units": [flag for flag in ("avx2", "fma", "avx512f") if flag in flags],
        "card": output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        if args.device == "cuda" else None,
        "cores": os.cpu_count(), "threads": args.threads, "load_before": os.getloadavg()[0],
        "system": platform.platform(), "python": platform.python_version(),
        "rustc": output("rustc", "--version"), "commit": output("git", "describe", "--always", "--dirty"),
    }


def spread(values, digits=None):
    """Median, least and most."""
    middle = statistics.median(values)
    if digits is None:
        digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    show = [f"{value:,.{digits}f}" for value in (middle, min(values), max(values))]
    return f"{show[0]} ({show[1]} to {show[2]})"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(case, who):
    return [answers["programs"][who]["seconds"] for answers in case["rounds"]]


def ceiling(case, who, key):
    return [answers["ceilings"][who][key] for answers in case["rounds"]]


def megabytes(case, who):
    """Peak memory of the process; on a card, of the card where the program tells it."""
    on_card = [answers["programs"][who].get("device_bytes") for answers in case["rounds"]]
    most = max((held for held in on_card if held is not None), default=case["programs"][who]["peak_bytes"])
    return f"{most / 1e6:,.0f}"


def decode_tables(cases):
    rows, reading, searching = [], [], []
    for case in cases:
        ours = [case["tokens"] / s for s in seconds(case, "r2q")]
        if "transformers" not in case["programs"]:
            outside = [100 * answers["programs"]["r2q"]["share_outside"] for answers in case["rounds"]]
            searching.append([case["model"], case["case"], spread(ours), spread(outside)])
            continue
        theirs = [case["tokens"] / s for s in seconds(case, "transformers")]
        differences = case["first_difference"]
        same = f"{differences.count(None)} of {len(differences)}"
        parted = [at for at in differences if at is not None]
        if parted:
            same += f", else from token {min(parted)} on"
        rows.append([case["model"], case["case"], spread(ours), spread(theirs),
                     spread([a / b for a, b in zip(ours, theirs)]), same, megabytes(case, "r2q"),
                     megabytes(case, "transformers")])
        if case["case"].startswith("greedy, batch 1") and case["tokens"] == NEW_TOKENS:
            facts = case["programs"]["r2q"]
            memory = ceiling(case, "r2q", "read_gb_per_s")
            for who, rates, read in (("r2q", ours, facts["bytes_per_token"]),
                                     ("transformers", theirs, 4 * facts["weights_per_token"])):
                shares = [100 * rate * read / 1e9 / limit for rate, limit in zip(rates, memory)]
                reading.append([case["model"], who, f"{read / 1e6:,.1f}", spread(memory), spread(shares)])
    yield table(["model", "case", "r2q, tokens/s", "transformers, tokens/s", "ratio", "same texts", "r2q, peak MB",
                 "transformers, peak MB"], rows)
    yield table(["greedy, batch 1", "program", "weights read per token, MB", "memory read, GB/s",
                 "share of it, %"], reading)
    yield table(["model", "case", "r2q, tokens/s", "time outside the model, %"], searching)


def train_tables(cases):
    for case in cases:
        yield f"`{case['model']}`, {case['case']}:"
        best_gemm = [max(pair) for pair in zip(ceiling(case, "r2q", "gemm_gflops"),
                                               ceiling(case, "torch", "gemm_gflops"))]
        rows = []
        tokens = case["pairs"] * case["pair_tokens"]
        ours = seconds(case, "r2q")
        first = [answers["programs"]["r2q"]["loss"] for answers in case["rounds"]]
        for who in case["programs"]:
            theirs = seconds(case, who)
            useful = [case["useful_flops"][who] / s / 1e9 for s in theirs]
            losses = [answers["programs"][who]["loss"] for answers in case["rounds"]]
            off = max(abs(a - b) / abs(a) for a, b in zip(first, losses))
            rows.append([who, spread([case["pairs"] / s for s in theirs]), spread([tokens / s for s in theirs]),
                         "" if who == "r2q" else spread([b / a for a, b in zip(ours, theirs)], 2), megabytes(case, who),
                         spread(useful), spread([100 * a / b for a, b in zip(useful, best_gemm)]), f"{off:.0e}"])
        yield table(["trainer", "pairs/s", "tokens/s", "r2q is faster by", "peak MB", "useful GFLOP/s", "of the gemm rate, %",
                     "loss differs by, relative"], rows)


def tables(results):
    """Markdown of what was measured."""
    about, cases = results["machine"], results["cases"]
    versions = {name: value for case in cases for facts in case["programs"].values()
                for name, value in facts.items() if name in ("torch", "transformers", "trl")}
    precision = results.get("precision", "f32")
    card = f"{about['card']}, " if about.get("card") else ""
    yield (f"{card}{about['processor']} ({', '.join(about['vector_units'])}), {about['threads']} threads of "
           f"{about['cores']} cores, load before {about['load_before']:.1f}, {about['date']}, commit "
           f"{about['commit']}, {about['rustc']}, " + ", ".join(f"{n} {v}" for n, v in versions.items())
           + f". Products in {precision}. Medians of {results['repetitions']} rounds (least to most).")
    rounds = {"cases": cases, "rounds": [answers for case in cases for answers in case["rounds"]]}
    yield table(["ceiling, over all rounds", "rate"], [
        [f"{precision} gemm of 2048³, torch, GFLOP/s", spread(ceiling(rounds, "torch", "gemm_gflops"))],
        [f"{precision} gemm of 2048³, r2q, GFLOP/s", spread(ceiling(rounds, "r2q", "gemm_gflops"))],
        ["memory read, GB/s", spread(ceiling(rounds, "r2q", "read_gb_per_s"))]])
    by_suite = {name: [case for case in cases if case["suite"] == name] for name in ("decode", "train")}
    if by_suite["decode"]:
        yield from decode_tables(by_suite["decode"])
    if by_suite["train"]:
        yield from train_tables(by_suite["train"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="decode|train", help="default: both")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32",
                        help="what every program computes matrix products in")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where every program computes")
    parser.add_argument("--model", type=Path, action="append", default=[],
                        help="decode with the model of this Hugging Face folder too")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "large"], help="shapes to train")
    parser.add_argument("--beside", nargs="+", choices=BESIDE, default=BESIDE,
                        help="what trains beside r2q; all are in memory at once")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a training step")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a pair's prompt")
    parser.add_argument("--completion", type=int, default=96, help="tokens of each completion of a pair")
    parser.add_argument("--workers", type=int,
                        help="parts of a step that r2q computes side by side (the recipes' key `workers`); on a CPU one "
                             "for each thread, if the pairs can be divided so")
    parser.add_argument("--parts", type=int,
                        help="parts of a step in all, as the recipes' key `accumulation`: more than workers take less memory")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="only print the tables of such a file")
    parser.add_argument("--program", help="r2q's side, if it is not to be built")
    args = parser.parse_args()
    if unknown := set(args.suites) - {"decode", "train"}:
        parser.error(f"unknown suite `{unknown.pop()}`; there are decode and train")
    if args.workers is None:
        args.workers = math.gcd(args.threads, args.pairs) if args.device == "cpu" else 1
    args.parts = args.parts or args.workers
    suites = args.suites or ["decode", "train"]
    if args.tables:
        results = json.loads(args.tables.read_text())
    else:
        about = machine(args)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(args, Path(folder))
            results = {"machine": about, "repetitions": args.repetitions, "precision": args.precision,
                       "cases": bench.cases}
            if "decode" in suites:
                bench.decode("small", bench.model("small"))
                for model in args.model:
                    bench.decode(model.resolve().name, model.resolve())
            if "train" in suites:
                for shape in args.shapes:
                    bench.train(shape)
            for program in bench.ceilings.values():
                program.close()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(tables(results)))


if __name__ == "__main__":
    main()
