"""What several benchmarks measure with, and how their figures get into the table.

A script records its figures with :func:`record` and :func:`record_curve`, which print
them, and ends with :func:`save`, which puts them into ``results/benchmarks.csv`` in
place of those it saved before. ``book/benchmarks.ipynb`` is the page of that table.
"""

import json
import os
import platform
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative

import numpy as np
import pandas as pd
import psutil
import torch
from filelock import FileLock
from torch.profiler import ProfilerActivity, profile

from icl_book.store import (
    environment,
    read_table,
    table_path,
    write_atomically,
)

TABLE = "benchmarks"  # in results/
PEERS = ("lm_eval", "papermill", "distributed")
SEED, DEMONSTRATIONS = 5, 32
ROWS = []


def format_value(value, unit=""):
    """Three digits, without powers of ten where it can be, and the unit."""
    return f"{float(f'{value:.3g}'):,.9g} {unit}".rstrip()


def format_target(at_least=None, at_most=None):
    """The bounds of a figure in words, empty if it has none."""
    bounds = [("at least", at_least), ("at most", at_most)]
    given = [(how, bound) for how, bound in bounds if bound is not None]
    return ", ".join(f"{how} {format_value(bound)}" for how, bound in given)


def record(what, value, unit="", at=None, of=None, at_least=None, at_most=None):
    """Print a figure, and keep it for the table.

    Args:
        what: name of the figure, in words.
        value, unit: the figure.
        at, of: for a point of a curve, its place, and what is counted there.
        at_least, at_most: the target, if there is one.
    """
    row = {"benchmark": Path(sys.argv[0]).stem, "what": what, "at": at, "of": of}
    row |= {"value": float(value), "unit": unit}
    row |= {"at_least": at_least, "at_most": at_most}
    ROWS.append(row)
    place = "" if at is None else f", {at:,} {of}"
    target = format_target(at_least, at_most)
    target = f" (target: {target})" if target else ""
    print(f"{what}{place}: {format_value(row['value'], unit)}{target}", flush=True)


def record_curve(what, of, points, unit="s", last=5, at_most=None):
    """Record a curve, and the power by which its ``last`` points grow.

    Args:
        what: name of the curve, in words.
        of: what is counted along the curve.
        points: the figure at each count.
        at_most: the target of the power.
    """
    for at, value in points.items():
        record(what, value, unit, at, of)
    fitted = sorted(points)[-last:]
    power = np.polyfit(np.log(fitted), np.log([points[at] for at in fitted]), 1)[0]
    kind = "memory" if unit == "MB" else "time"
    name = f"{what}, {kind} grows as a power of {of} ({fitted[0]:,} to {fitted[-1]:,})"
    record(name, power, at_most=at_most)


def save(task=None, seed=0):
    """Put the recorded figures into the table, in place of this script's older rows.

    Args:
        task: whose text was read; left out, all numbers were drawn from ``seed``.
    """
    name, facts = ROWS[0]["benchmark"], {"seeds": [seed], "data": "drawn from the seed"}
    if task is not None:
        facts = {"seeds": [SEED], "model": "smollm2-135m", "task": task.name}
        facts |= {"data_sha256": task.digest(), "data_source": task.source}
    facts = {
        "command": " ".join(["python", *sys.argv]),
        **facts,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - psutil.Process().create_time()),
        "peers": {peer: version(peer) for peer in PEERS},
        **environment(),
    }
    path, new = table_path(TABLE), pd.DataFrame(ROWS)
    with FileLock(path.with_name(f".{TABLE}.lock")):
        table, about = read_table(TABLE) if path.is_file() else (new[:0], {})
        new = pd.concat([table[table["benchmark"] != name], new])
        new = new.sort_values("benchmark", kind="stable")
        about = dict(sorted((about | {name: facts}).items()))
        write_atomically(path, new.to_csv(index=False))
        about = json.dumps(about, indent=2) + "\n"
        write_atomically(path.with_suffix(".json"), about)


def processor():
    """The CPU's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def smollm2_on_mr():
    """The model, its tokenizer, the task, and its demonstrations."""
    from icl.models import load_model  # not where a process's memory is measured
    from icl.tasks import load_task

    model, tokenizer = load_model(device="cpu", dtype=torch.float32)
    task = load_task("mr")
    return model, tokenizer, task, task.sample(DEMONSTRATIONS, SEED)


def timed(function, *arguments, **options):
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def fastest(*runs, repeats=7):
    """The least seconds of each, the runs taking turns."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for n, run in enumerate(runs):
            best[n] = min(best[n], timed(run)[0])
    return best


def peak_rate(sizes=(1024, 2048, 4096)):
    """Most floating-point operations per second of products of square matrices.

    In float32, on torch's threads: the best that was measured on this machine.
    """
    pairs = [torch.randn(2, size, size) for size in sizes]
    return max(product_rate([pair]) for pair in pairs)


def product_rate(pairs):
    """Operations per second of products ``x Wᵀ``, by the faster of two libraries."""
    from icl.models import onednn_product

    libraries = [torch.nn.functional.linear]
    if torch.backends.mkldnn.is_available():
        libraries.append(onednn_product)

    def by(library):
        for x, weight in pairs:
            library(x, weight)

    ways = [partial(by, library) for library in libraries]
    work = sum(2 * len(x) * weight.numel() for x, weight in pairs)
    return work / min(fastest(*ways, repeats=5))


def peak(run):
    """Most bytes that were allocated at one time while it ran, and not before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
