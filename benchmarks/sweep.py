"""Sweeps: what a run costs beside its cells, two workers against one, and planning.

For a notebook that loads SmolLM2 and one that only computes:

1. seconds of a run over those of its cells, when its worker has begun: in a kernel
   forked from a warm process, and in one that starts from nothing;
2. seconds of a grid by one worker over seconds by two, a thread each, from the first
   run begun to the last result written;
3. seconds to plan 1,000 runs and to find that all of them are finished.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import nbformat
import yaml
from measure import record, save, timed

from icl_book.execute import Provisioner, inputs, plan, run_once
from icl_book.forkserver import ForkServer, modules_of
from icl_book.store import NOTEBOOK, read_run, save_run
from icl_book.sweep import connect, expand, read_grid, run_one

PARAMETERS = """
n: int = 0  # 0..999: number
rounds: int = 30  # 1..100000: of work
model: str = "smollm2-135m"  # read by the notebook
"""
LOAD = """
import matplotlib.pyplot as plt
import torch
from icl_book import page
from icl.models import load_model

lm, tokenizer = load_model(model)
"""
WORK = """
import numpy as np

x = np.full((400, 400), 1 / 400, dtype=np.float32)
for _ in range(rounds):
    x = np.tanh(x @ x) + 1 / 400
"""


def write(folder, body, **grid):
    """A grid of a notebook of two cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    tags = {"tags": ["parameters"]}
    cells = [nbformat.v4.new_code_cell(PARAMETERS.strip(), metadata=tags)]
    cells.append(nbformat.v4.new_code_cell(body.strip()))
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "one.ipynb")
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"notebook": "one.ipynb"} | grid))
    return path


def overhead(notebook, folder, repeats):
    """Seconds of a run beside its cells, by what its kernel starts from."""
    start = time.perf_counter()
    server = ForkServer(modules_of(notebook), ["smollm2-135m", "auto"], 1)
    record("the warm process is ready after", time.perf_counter() - start, "s")
    starts = {"warm": server.provisioner(), "from nothing": Provisioner}
    found = {kind: [] for kind in starts}
    for n in range(repeats):
        for kind, provisioner in starts.items():
            (run,) = plan(notebook, [{"n": n}], folder / kind, threads=1)
            took, _ = timed(run_once, run, provisioner=provisioner)
            done = nbformat.read(run.folder / NOTEBOOK, as_version=4)
            cells = sum(cell.metadata.papermill.duration or 0 for cell in done.cells)
            found[kind].append((took, cells))
    server.close()
    for kind, times in found.items():
        took, cells = map(statistics.median, zip(*times, strict=True))
        most = 3 if kind == "warm" else None
        name = f"a run in a kernel {kind}, beside its cells"
        record(name, took - cells, "s", at_most=most)


def efficiency(folder, runs, seconds):
    """A CPU-bound grid by one and by two workers."""
    start, rounds = time.perf_counter(), 0
    scope = {"rounds": 20}
    while time.perf_counter() - start < 2:  # how many rounds fill the time
        exec(WORK, scope)
        rounds += 20
    rounds = int(rounds * seconds / (time.perf_counter() - start))
    took = {}
    for workers in (1, 2):
        own = folder / str(workers)
        (own / "runs").mkdir(parents=True)
        fixed = {"rounds": rounds, "model": ""}
        path = write(own, WORK, vary={"n": f"0..{runs - 1}"}, fixed=fixed)
        grid = read_grid(path)
        wanted = inputs(grid["notebook"], threads=grid["threads"])
        options = {"limit": grid["limit"], "wanted": wanted}
        with connect(workers=workers) as client:
            client.wait_for_workers(workers)
            start = time.perf_counter()
            futures = client.map(run_one, expand(grid, own), **options)
            states = {outcome["status"] for outcome in client.gather(futures)}
            took[workers] = time.perf_counter() - start
        assert states == {"finished"}
    name = f"one worker over two, {runs} runs of about {seconds:g} s, seconds"
    record(name, took[1] / took[2], "x", at_least=1.8)


def planning(folder):
    """1,000 runs, all of them finished."""
    path = write(folder, WORK, vary={"n": "0..999"}, fixed={"model": ""})
    scratch = folder / "scratch"
    (folder / "runs").mkdir()
    for run in expand(read_grid(path), folder):
        scratch.mkdir()
        (scratch / NOTEBOOK).write_text("{}")
        save_run(run.folder, scratch, {"error": None})
    start = time.perf_counter()
    states = [read_run(run.folder)[0] for run in expand(read_grid(path), folder)]
    took = time.perf_counter() - start
    assert states == ["finished"] * 1000
    record("1,000 runs planned and checked", took, "s", at_most=5)


def main(repeats, runs, seconds):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        planning(folder)
        path = write(folder, LOAD)
        overhead(path.with_name("one.ipynb"), folder, repeats)
        efficiency(folder, runs, seconds)
    save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5, help="of a run")
    options = parser.parse_args()
    main(options.repeats, options.runs, options.seconds)
