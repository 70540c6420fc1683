"""torch's rate of multiplying square matrices, the best of five."""
import protocol  # noqa: I001 (first: it takes the standard output)

import argparse
import time

import torch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--device", default="cpu")
parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
parser.add_argument("--size", type=int, default=2048)
args = parser.parse_args()

torch.set_num_threads(args.threads)
dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
a, b, out = (torch.randn(args.size, args.size, device=args.device, dtype=dtype) for _ in range(3))


def seconds():
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    protocol.finish(args.device)
    return time.perf_counter() - began


def run():
    return {"gemm_gflops": 2 * args.size**3 / min(seconds() for _ in range(5)) / 1e9}


protocol.serve(run, 1, torch=torch.__version__)
