"""Causal attention three ways, up to 32k tokens: time and peak memory of one head.

- streaming: ``icl.kernels.streaming_attention``, running sums of positive random
  features, an approximation whose error is printed too;
- fused: ``torch.nn.functional.scaled_dot_product_attention(is_causal=True)``, exact
  and without a matrix of ``T × T``;
- explicit: ``softmax(mask(Q Kᵀ)) V``, exact, with the matrix.

Every measurement is a process of its own, so that its peak memory is its own; the
peak counts what a call adds to inputs and libraries. All run on the same threads.
The ratios are those at ``--at`` tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from icl.kernels import streaming_attention

#: Methods, with the target of the exponent by which their time grows.
METHODS = {"streaming": 1.1, "fused": None, "explicit": None}
NORM = 1.0  # of queries and keys, the queries with their factor 1/√d


def main(d, d_r, longest, at, explicit, threads):
    lengths = [2**n for n in range(10, longest.bit_length())]
    found = {}
    for method in METHODS:
        upto = [T for T in lengths if explicit >= T or method != "explicit"]
        found[method] = {T: apart(method, T, d, d_r, threads) for T in upto}
    # Not before: a process begins with the peak of the one that has started it.
    from measure import record, record_curve, save

    for method, rows in found.items():
        seconds = {T: row["seconds"] for T, row in rows.items()}
        record_curve(
            f"{method} attention", "tokens", seconds, last=4, at_most=METHODS[method]
        )
    ours, fused, theirs = (rows[at] for rows in found.values())
    size = f"{at:,} tokens"
    ratio = fused["seconds"] / ours["seconds"]
    record(f"fused over streaming, {size}, seconds", ratio, "x", at_least=1)
    ratio = theirs["seconds"] / ours["seconds"]
    record(f"explicit over streaming, {size}, seconds", ratio, "x", at_least=1)
    share = ours["mb"] / (4 * at**2 / 1e6)
    record(f"streaming over one T × T matrix, {size}, memory", share, at_most=0.1)
    share = ours["mb"] / theirs["mb"]
    record(f"streaming over explicit, {size}, memory", share)
    name = f"median relative error of streaming at norm {NORM:g}, {size}"
    record(name, ours["error"])
    save()


def apart(method, T, d, d_r, threads):
    """One measurement in a new process: seconds, MB, and the error of streaming."""
    call = [sys.executable, __file__, "--one", method, str(T)]
    call += ["--d", str(d), "--d-r", str(d_r), "--threads", str(threads)]
    run = subprocess.run(call, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{method} at {T} tokens failed:\n{run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout)


def one(method, T, d, d_r):
    """The measurement itself."""
    g = torch.Generator().manual_seed(0)
    # Four dimensions: with fewer, PyTorch does not take its fused kernel.
    q, k, v = (torch.randn(1, 1, T, d, generator=g) for _ in range(3))
    q, k = (NORM * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    W = torch.randn(d_r, d, generator=g)

    def streaming(q, k, v):
        return streaming_attention(q, k, v, W)

    def fused(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    def explicit(q, k, v):
        ahead = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill_(ahead, -torch.inf).softmax(-1) @ v

    function = {"streaming": streaming, "fused": fused, "explicit": explicit}[method]
    with torch.inference_mode():
        function(*(x[..., :512, :] for x in (q, k, v)))  # libraries load on first use
        before = peak_mb()
        times = []
        while len(times) < 2 or (len(times) < 5 and sum(times) < 2):
            start = time.perf_counter()
            output = function(q, k, v)
            times.append(time.perf_counter() - start)
        used = peak_mb() - before
        difference = output - fused(q, k, v)
    error = (difference.norm(dim=-1) / fused(q, k, v).norm(dim=-1)).median()
    return {"seconds": min(times), "mb": used, "error": error.item()}


def peak_mb():
    """This process's largest memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--d-r", type=int, default=256)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--at", type=int, default=16384, help="length of the ratios")
    parser.add_argument(
        "--explicit", type=int, default=16384, help="longest T × T (3 GB at 16384)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        method, T = options.one
        print(json.dumps(one(method, int(T), options.d, options.d_r)))
    else:
        sizes = options.d, options.d_r, options.longest, options.at
        main(*sizes, options.explicit, options.threads)
