"""Run a notebook over a grid of parameters, on the cores of a machine or on a cluster.

A grid file expands to runs (:mod:`icl_book.execute`), which Dask distributed deals out
to this machine's cores or GPUs, or to the workers of any scheduler. Finished
runs are cached, so an interrupted sweep resumes with the same command.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path

import distributed
import yaml
from dask.system import CPU_COUNT
from distributed.comm import CommClosedError

from icl_book import execute, store
from icl_book.execute import Parameter, Run, check_values, inputs, named_files, plan
from icl_book.store import ROOT, BookError, read_run

RETRIES = 2  # by Dask, of a run that raised, as when its kernel did not start
REFUSED = "icl-refused"  # Dask's topic of workers that differ
log = partial(print, flush=True)  # progress, seen at once
#: What a grid says of its runs, beside lists of parameters.
OPTIONS = {
    "notebook": Parameter("notebook", "", (), "a path beside the grid"),
    "threads": Parameter("threads", 1, (1, 4096), "of a run"),
    "limit": Parameter("limit", 24 * 3600, (1, 10**9), "seconds that a run may take"),
}
GRID = {*OPTIONS, "key", "fixed", "vary", "exclude"}


# -- the grid ------------------------------------------------------------------------


def read_grid(path: Path) -> dict:
    """A grid file, checked: ``notebook, runs, varied, key, threads, limit``.

    ``runs`` are the parameters of each run; ``varied`` the names of those that differ.
    """
    try:
        grid = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # as text
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BookError(f"{path} cannot be read: {error}") from None
    if not isinstance(grid, dict) or grid.keys() - GRID or "notebook" not in grid:
        strange = ", ".join(grid) if isinstance(grid, dict) else repr(grid)
        known = ", ".join(sorted(GRID))
        raise BookError(f"{path} has {strange}; a grid has a notebook, of {known}")
    given = {name: value for name, value in grid.items() if name in OPTIONS}
    options = {p.name: p.default for p in OPTIONS.values()}
    options |= check_values(OPTIONS, given, path)
    notebook = path.parent / options["notebook"]
    known, runs = execute.read_parameters(notebook), {}
    excluded = [_lists(known, rule, path) for rule in _listed(grid.get("exclude", []))]
    for block in _listed(grid.get("vary", {})):
        lists = _lists(known, grid.get("fixed", {}), path)
        lists |= _lists(known, block, path)
        for values in itertools.product(*lists.values()):
            run = {name: p.default for name, p in known.items()}
            run |= dict(zip(lists, values, strict=True))
            if not any(all(run[n] in some for n, some in r.items()) for r in excluded):
                runs[json.dumps(run)] = run
    runs, key = list(runs.values()), grid.get("key", list(known))
    if strange := [name for name in key if str(name) not in known]:
        raise BookError(f"{path}: key has {strange[0]}, which is no parameter")
    if not runs or len({store.key_of(run, key) for run in runs}) < len(runs):
        raise BookError(f"{path}: no run, or key {key} does not tell all runs apart")
    varied = [n for n in known if any(run[n] != runs[0][n] for run in runs)]
    found = {"notebook": notebook, "runs": runs, "key": key}
    return options | found | {"varied": varied or list(known)}


def _listed(part):
    return part if isinstance(part, list) else [part]


def _lists(known, part, path):
    """The values of each parameter as a list, checked against the notebook's cell."""
    if not isinstance(part, dict):
        raise BookError(f"{path}: {part!r} is no list of parameters")
    lists = {}
    for name, values in part.items():
        whole = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", str(values))
        values = range(int(whole[1]), int(whole[2]) + 1) if whole else _listed(values)
        found = [check_values(known, {name: v}, path, path.parent) for v in values]
        lists[name] = [given[name] for given in found]
    return lists


def expand(grid: dict, folder: Path) -> list[Run]:
    """The runs of a grid from :func:`read_grid`, with results in ``folder``."""
    return plan(grid["notebook"], grid["runs"], folder / "runs", grid["threads"])


def dry_run(grid: dict, folder: Path, workers: int, skip=()):
    """Print the runs of a grid, and how long they would take by those finished."""
    runs = _wanted(expand(grid, folder), grid, skip)
    found = [(run, *read_run(run.folder)) for run in runs]
    for run, status, _ in found:
        log(f"{status}: {run.label(grid['varied'])}")
    log(f"{len(found)} runs: {_count(status for _, status, _ in found)}")
    seconds = [r["seconds"] for _, status, r in found if status == "finished"]
    if seconds:
        left = sum(seconds) / len(seconds) * (len(found) - len(seconds)) / workers
        log(f"about {left / 60:.0f} min by {workers} workers")
    else:
        log("how long they take is not known before one is finished")


def _wanted(runs, grid, skip):
    return [r for r in runs if store.key_of(r.parameters, grid["key"]) not in skip]


# -- one run, on a worker ------------------------------------------------------------


def run_one(run: Run, limit: float, wanted: dict) -> dict:
    """Make one run, a task of Dask's, unless its result is there by now.

    A worker that differs from where the sweep was started (it may have joined later)
    leaves the cluster, and Dask reschedules the run.
    """
    worker = distributed.get_worker()
    if differs := differences(run, wanted):
        worker.log_event(REFUSED, f"{worker.address} leaves: another {differs}")
        worker.loop.add_callback(worker.close, executor_wait=False, reason=differs)
        raise distributed.Reschedule
    try:
        execute.run_once(run, limit)
    except BookError as error:
        return {"status": "failed", "error": str(error)}
    except OSError as error:
        return {"status": "unwritable", "error": f"{type(error).__name__}: {error}"}
    return {"status": "finished", "error": None}


def differences(run: Run, wanted: dict, dask_worker=None) -> str:
    """Which inputs of a run are others on this worker, "" if none are."""
    if not os.access(run.folder.parent, os.W_OK):
        return f"view of {run.folder.parent}: it cannot write there"
    found = inputs(run.notebook, named_files(run.parameters), run.threads)
    differs = [name for name, value in found.items() if wanted.get(name) != value]
    if dask_worker and dask_worker.state.nthreads != 1:
        differs.append(f"number of threads ({dask_worker.state.nthreads}, not 1)")
    return ", ".join(differs)


def check_workers(client, runs: list[Run], wanted: dict, timeout=30):
    """Compare every worker with this process, before the first run; BookError names
    those that differ, have several threads or cannot write to the folder."""
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError:
        raise BookError(f"the scheduler has no worker after {timeout} s") from None
    problems = set()
    for run in {frozenset(named_files(run.parameters)): run for run in runs}.values():
        found = client.run(differences, run, wanted, on_error="return")
        problems |= {f"\n  {a}: another {d}" for a, d in found.items() if d != ""}
    if problems:
        raise BookError("workers that cannot take part:" + "".join(sorted(problems)))


# -- the sweep -----------------------------------------------------------------------


@contextlib.contextmanager
def connect(scheduler=None, scheduler_file=None, workers=None, threads=1, timeout=30):
    """A Dask client: of the given scheduler, else of a cluster on this machine.

    Args:
        scheduler, scheduler_file: address of a Dask scheduler, or the file it writes.
        workers: processes on this machine; default one for each GPU, or for each
            ``threads`` cores.
        timeout: seconds that the scheduler has to answer.
    """
    if scheduler_file is not None:  # Dask would wait for one that is not there
        try:
            scheduler = json.loads(Path(scheduler_file).read_text())["address"]
        except (OSError, ValueError, KeyError) as error:
            raise BookError(f"{scheduler_file} names no scheduler: {error}") from None
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            scheduler = stack.enter_context(_local_cluster(workers, threads))
        try:
            client = distributed.Client(scheduler, timeout=timeout)
        except (OSError, TimeoutError, ValueError) as error:
            why = f"within {timeout} s ({type(error).__name__})"
            raise BookError(f"no Dask scheduler answers at {scheduler} {why}") from None
        yield stack.enter_context(client)


def _local_cluster(workers, threads):
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None and shutil.which("nvidia-smi"):
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        gpus = ",".join(map(str, range(len(re.findall("(?m)^GPU ", found.stdout)))))
    gpus = gpus.split(",") if gpus else []
    quiet = {"silence_logs": logging.WARNING}
    options = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", **quiet}
    spec = {}
    for n in range(workers or len(gpus) or max(1, CPU_COUNT // threads)):
        own = {"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}
        spec[n] = {"cls": distributed.Nanny, "options": options | {"env": own}}
    listens = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": distributed.Scheduler, "options": listens}
    return distributed.SpecCluster(spec, scheduler, **quiet)


def sweep(grid, folder: Path, retry_failed=False, skip=(), timeout=30, **options):
    """Execute the missing runs of a grid; returns whether all are finished.

    Args:
        grid: from :func:`read_grid`.
        folder: of the results.
        retry_failed: rerun failed runs too.
        skip: keys of runs that are not wanted (:func:`icl_book.store.key_of`).
        timeout, options: as for :func:`connect`.
    """
    runs = expand(grid, folder)
    source = folder / f"{grid['notebook'].stem}.{runs[0].fingerprint}.ipynb"
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    store.write_atomically(source, grid["notebook"].read_bytes())
    runs = [replace(run, notebook=source) for run in runs]
    runs = _wanted(runs, grid, skip)
    found = [(run, read_run(run.folder)[0]) for run in runs]
    log(f"{len(runs)} runs: {_count(status for _, status in found)}; in {folder}")
    for run, status in found:
        if status == "corrupt":
            log(f"{run.folder} is not what was written: {run.label()} runs again")
    again = {"missing", "corrupt"} | ({"failed"} if retry_failed else set())
    todo = [run for run, status in found if status in again]
    files = set().union(*(named_files(run.parameters) for run in todo))
    wanted, begun = inputs(source, files, grid["threads"]), todo
    given = {"limit": grid["limit"], "wanted": wanted}
    try:
        while todo:
            with connect(threads=grid["threads"], timeout=timeout, **options) as client:
                check_workers(client, todo, wanted, timeout)
                client.subscribe_topic(REFUSED, lambda event: log(event[1]))
                log(f"{client.scheduler.address}, dashboard {client.dashboard_link}")
                todo = _carry_out(client, todo, given)
            if todo:
                log("the scheduler has gone; waiting for it to come back")
    finally:  # what workers had begun when they were killed
        for run in begun:
            execute.remove_scratch(run)
    found = [(run, *read_run(run.folder)) for run in runs]
    failed = [(run, record) for run, status, record in found if status != "finished"]
    for run, record in failed:
        why = f"{record.get('error', 'no result')} ({run.folder})"
        log(f"failed: {run.label(grid['varied'])}: {why}")
    if failed:
        log(f"{len(failed)} failed; --retry-failed reruns them")
    return not failed


def _carry_out(client, todo, options):
    """Execute runs; returns those left when the scheduler stopped."""
    start = told = time.perf_counter()
    count, lost = Counter(), []
    names = [f"run-{start}-{n:06}" for n in range(len(todo))]
    futures = client.map(run_one, todo, key=names, retries=RETRIES, **options)
    waiting = dict(zip(futures, todo, strict=True))
    for future in distributed.as_completed(futures):
        run = waiting.pop(future)
        try:
            outcome = future.result()
        except (CancelledError, CommClosedError):
            lost.append(run)
            continue
        except Exception as error:  # of this run alone
            outcome = {"status": "failed", "error": str(error)}
            log(f"{run.label()}: {type(error).__name__}: {error}")
        if outcome["status"] == "unwritable":
            raise BookError(
                f"a result cannot be written: {outcome['error']}. Make room, and give "
                "the same command: what is finished stays"
            )
        count[outcome["status"]] += 1
        future.release()
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        left = (now - start) / count.total() * len(waiting)
        line = f"{_count(count.elements())}; {left / 60:.0f} min left"
        if terminal or not waiting or now - told > 60:
            end = "" if terminal and waiting else "\n"
            log(f"\r{line}  " if terminal else line, end=end)
            told = now
    return lost


def _count(states):
    return ", ".join(f"{n} {name}" for name, n in Counter(states).items()) or "none"


def make_table(
    path: Path, folder=None, table=None, only_missing=False, dry=False, **options
):
    """Sweep a grid and collect the rows of its runs; whether all are finished.

    Args:
        path: of the grid.
        folder: of the results; default ``_build/sweeps/NAME``.
        table: path of the CSV file; default ``NAME.csv`` in that folder, where rows
            have their costs too.
        only_missing: skip runs whose rows are in the table.
        dry: execute none, only list them (:func:`dry_run`).
        options: as for :func:`sweep`.
    """
    grid = read_grid(path)
    folder = (folder or ROOT / "_build" / "sweeps" / path.stem).resolve()
    target = table or folder / f"{path.stem}.csv"
    skip = store.keys_in(target, grid["key"]) if only_missing else ()
    if dry:
        workers = options["workers"] or max(1, CPU_COUNT // grid["threads"])
        dry_run(grid, folder, workers, skip)
        return True
    runs, command = expand(grid, folder), f"python -m icl_book sweep {path}"
    try:
        return sweep(grid, folder, skip=skip, **options)
    finally:
        rows = store.collect(runs, grid["key"], target, command, costs=table is None)
        log(f"{len(rows)} rows: icl_book.store.read_table({str(target)!r})")
