"""What all programs of this comparison speak: a line of facts once they are ready, then a line of JSON for each line
`run` that they read, until their input ends. Import it first: from then on only answers go to the standard output."""
import json
import os
import sys

# Libraries print as they like; what they print goes to the standard error.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(**facts):
    print(json.dumps(facts), file=_answers, flush=True)


def asked():
    """Waits for the next `run`; False once there is none."""
    line = sys.stdin.readline()
    if line not in ("run\n", ""):
        sys.exit(f"expected a line `run`, got {line!r}")
    return line == "run\n"


def finish(device):
    """Waits until a card has done what it was given."""
    if device != "cpu":
        import torch
        torch.cuda.synchronize()


def held(device):
    """The most bytes that torch has held on a card."""
    if device == "cpu":
        return {}
    import torch
    return {"device_bytes": torch.cuda.max_memory_reserved()}


def serve(run, warm_up, **facts):
    for _ in range(warm_up):
        run()
    answer(**facts)
    while asked():
        answer(**run())
