"""All Triton kernels on one GPU: correctness first, then speed against torch and, where installed, other libraries.

    python scripts/bench/gpu [--only int8|mla|attention|shared|dictionary] [--runs 5]

Takes minutes, most of them compilation. Candidates run in turn and medians are compared; each is timed over repeated
calls between two CUDA events, its inputs larger than the cache where the shape is. `--small` uses tiny shapes, for a
look at the script itself: with TRITON_INTERPRET=1 it runs on a CPU, and its times then mean nothing.
"""

import argparse
import sys

import torch
from attention import bench_attention
from dictionary import bench_dictionary
from int8 import bench_int8
from mla import bench_mla
from shared import bench_shared
from timing import Bench

KERNELS = {
    "int8": bench_int8,
    "mla": bench_mla,
    "attention": bench_attention,
    "shared": bench_shared,
    "dictionary": bench_dictionary,
}


def main() -> None:
    """Parse, check, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(KERNELS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("torch finds no GPU here (--small with TRITON_INTERPRET=1 tries the script out)")
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU: times mean nothing"
    print(card, f"torch {torch.__version__}")
    bench = Bench(device, options.runs)
    with torch.inference_mode():
        for name in (options.only,) if options.only else KERNELS:
            KERNELS[name](bench, options.small)


if __name__ == "__main__":
    sys.exit(main())
