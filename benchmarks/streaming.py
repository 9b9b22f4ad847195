"""Causal attention three ways, up to 32k tokens: time and peak memory of one head.

- streaming: ``icl.kernels.streaming_attention``, running sums of positive random
  features, an approximation whose error is printed too;
- fused: ``torch.nn.functional.scaled_dot_product_attention(is_causal=True)``, exact
  and without a matrix of ``T × T``;
- explicit: ``softmax(mask(Q Kᵀ)) V``, exact, with the matrix.

Every measurement is a process of its own, so that its peak memory is its own; the
peak counts what a call adds to inputs and libraries. All run on the same threads.
Prints the table, the growth of time with ``T``, and the ratios at ``--at`` tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from icl.kernels import gaussian_projection, streaming_attention

METHODS = ("streaming", "fused", "explicit")
NORM = 1.0  # of queries and keys, the queries with their factor 1/√d


def main(d, d_r, longest, at, explicit, threads):
    lengths = [2**n for n in range(10, longest.bit_length())]
    print(f"one head, d = {d}, d_r = {d_r}, float32, {threads} threads")
    print(f"{'T':>6} {'method':>10} {'seconds':>8} {'MB':>8} {'T × T, MB':>10}")
    rows = {}
    for T in lengths:
        for method in METHODS:
            if method == "explicit" and explicit < T:
                continue
            row = rows[method, T] = apart(method, T, d, d_r, threads)
            print(f"{T:6} {method:>10} {row['seconds']:8.3f} {row['mb']:8.1f}", end=" ")
            print(f"{matrix_mb(T):10.1f}", flush=True)
    for method in METHODS:
        T = [t for t in lengths if (method, t) in rows][-4:]
        seconds = [rows[method, t]["seconds"] for t in T]
        slope = np.polyfit(np.log(T), np.log(seconds), 1)[0]
        print(f"{method}: time grows as T^{slope:.2f} from {T[0]} to {T[-1]} tokens")
    ours, fused = rows["streaming", at], rows["fused", at]
    error = f"{ours['error']:.2f}"
    print(f"streaming, median relative error at norm {NORM}, {at} tokens: {error}")
    print(f"ratio 1, fused over streaming, seconds: {ratio(fused, ours):.1f} x")
    share = ours["mb"] / matrix_mb(at)
    print(f"ratio 2, streaming over one T × T matrix, memory: {share:.3f}")
    if ("explicit", at) in rows:
        theirs = rows["explicit", at]
        print(f"ratio 3, explicit over streaming, seconds: {ratio(theirs, ours):.1f} x")
        print(
            f"ratio 4, streaming over explicit, memory: {ours['mb'] / theirs['mb']:.3f}"
        )


def ratio(a, b):
    """Seconds over seconds."""
    return a["seconds"] / b["seconds"]


def matrix_mb(T):
    """Megabytes of one ``T × T`` matrix in float32."""
    return 4 * T**2 / 1e6


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
    W = gaussian_projection(d_r, d, generator=g)

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
