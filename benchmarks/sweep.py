"""Sweeps: what a run costs beside its cells, two workers against one, and planning.

For a notebook that loads SmolLM2 and one that only computes:

1. seconds of a run over those of its cells, and those of the cell that imports the
   package and loads the model;
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

from icl_book.execute import inputs, plan, run_once
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
    """Seconds of a run beside its cells, and of the cell that imports and loads."""
    beside, loading = [], []
    for n in range(repeats):
        (run,) = plan(notebook, [{"n": n}], folder, threads=1)
        took, _ = timed(run_once, run)
        done = nbformat.read(run.folder / NOTEBOOK, as_version=4)
        cells = [cell.metadata.papermill.duration or 0 for cell in done.cells]
        beside.append(took - sum(cells))
        loading.append(cells[-1])
    record("a run, beside its cells", statistics.median(beside), "s")
    record("its imports, and the model", statistics.median(loading), "s")


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
