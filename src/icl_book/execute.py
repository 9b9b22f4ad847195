"""Run a notebook once: parameters checked, the result kept under its fingerprint.

papermill executes it, in a fresh kernel of this Python. A finished run is reused
until something that it depends on changes; :func:`inputs` lists these things.
"""

import ast
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
import psutil
from filelock import FileLock, Timeout
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.translators import PythonTranslator

from icl.assets import sha256
from icl_book import store
from icl_book.store import NOTEBOOK, RESULT, ROOT, BookError, table_path

#: Parameters that may be paths.
FILES = {"model", "task"}
#: Of a kernel, and of a build, so that neither depends on a setting of its machine.
KERNEL_ENV = {
    "SOURCE_DATE_EPOCH": "1767225600",  # 2026, for all dates that would be written
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "JUPYTER_PLATFORM_DIRS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


# -- parameters ----------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: ``name: type = literal  # allowed: help``.

    The type is str, int or float. ``a | b | *.jsonl`` allows two words and names that
    end so, ``1..7`` a range; without either, any value of the type is allowed.
    """

    name: str
    default: str | int | float
    allowed: tuple
    help: str

    def check(self, value):
        """A value, or its text, in the parameter's type; ValueError if not allowed."""
        kind = type(self.default)
        with suppress(ValueError):
            found = kind(str(value))
            if not isinstance(value, list | dict) and self._allows(found):
                return found
        choice = (", " if kind is str else "..").join(map(str, self.allowed))
        choice = f"{kind.__name__}, {choice}" if choice else kind.__name__
        raise ValueError(f"{self.name}={value} must be {choice}")

    def _allows(self, value):
        if isinstance(value, str):
            return not self.allowed or any(fnmatchcase(value, a) for a in self.allowed)
        most = sys.float_info.max  # so that it is finite
        low, high = self.allowed or (-most, most)
        return low <= value <= high


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, from its cell tagged ``parameters``."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:  # of nbformat's many kinds
        raise BookError(f"{notebook} is no notebook: {error}") from None
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    return parameters_in(tagged[0], notebook.name) if tagged else {}


def parameters_in(cell, where: str) -> dict[str, Parameter]:
    """The parameters of a cell; BookError if a line has another form."""
    found = {}
    for name, kind, line, text in PythonTranslator.inspect(cell):
        text = text.strip()
        try:
            default = ast.literal_eval(line)
        except (ValueError, SyntaxError):
            default = None
        right = kind in ("str", "int", "float") and kind == type(default).__name__
        if not right or not text:
            raise BookError(
                f"{where}, parameters cell: write {name}: type = literal  "
                f"# help, not {name}: {kind} = {line}  # {text}"
            )
        words = re.match(r"([\w.*-]+(?: \| [\w.*-]+)+): (.*)", text)
        bounds = re.match(r"(-?[\d.e+-]*\d)\.\.(-?[\d.e+-]*\d): (.*)", text)
        allowed = ()
        if words and kind == "str":
            allowed, text = tuple(words[1].split(" | ")), words[2]
        elif bounds and kind != "str":
            allowed = tuple(map(type(default), bounds.groups()[:2]))
            text = bounds[3]
        found[name] = Parameter(name, default, allowed, text)
    return found


def check_values(known: dict[str, Parameter], given: dict, where, base=None) -> dict:
    """Values by name in their parameters' types; BookError if one is not allowed.

    ``where`` names their origin in errors. A path of :data:`FILES` is relative to the
    folder ``base`` if it exists there, else to the repository.
    """
    if strange := given.keys() - known.keys():
        lines = "".join(f"\n  {p.name}={p.default}  {p.help}" for p in known.values())
        names = ", ".join(map(repr, strange))
        raise BookError(f"{where} has no parameter {names}; there are{lines}")
    try:
        values = {name: known[name].check(value) for name, value in given.items()}
    except ValueError as error:
        raise BookError(f"{where}: {error}") from None
    for name in FILES & values.keys() if base is not None else ():
        path = Path(os.path.abspath(base / Path(values[name]).expanduser()))
        there = path.is_file() if name == "task" else path.exists()
        if values[name] and there:
            values[name] = str(path).removeprefix(f"{ROOT}/")
    return values


def parse_parameters(notebook: Path, given: list[str]) -> dict:
    """Values of ``key=value`` strings, by :func:`check_values`.

    A string may have several; a value, which may have blanks, ends at the next key.
    """
    items = re.split(r"\s+(?=[A-Za-z_]\w*=)", " ".join(given).strip())
    if strange := [item for item in items if item and "=" not in item]:
        raise BookError(f"{notebook.stem}: got {strange[0]!r}; write key=value")
    values = dict(item.split("=", 1) for item in items if item)
    return check_values(read_parameters(notebook), values, notebook.stem, Path.cwd())


# -- what a run depends on -----------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A notebook with values for all its parameters, and the folder of its result."""

    notebook: Path
    parameters: dict
    threads: int | None
    fingerprint: str
    folder: Path

    def label(self, names=()) -> str:
        """Parameters by name, in words; left out, all of them."""
        return " ".join(f"{n}={self.parameters[n]}" for n in names or self.parameters)


def named_files(parameters: dict) -> set[str]:
    """What parameters say in :data:`FILES`: paths, or names of models and tasks."""
    return {parameters[name] for name in FILES & parameters.keys()} - {""}


def named_tables(code: str) -> set[str]:
    """The tables in ``results/`` that code reads; "" stands for a variable."""
    reads = r"(?:read_table|rows_of)\((?:\s*[\"'](\w+)[\"'])?"
    return {*re.findall(reads, code)}


def inputs(notebook: Path, files=(), threads=None) -> dict[str, str]:
    """Hashes of all that a run depends on but its parameters, by what each is called.

    Of a notebook the code counts, not the prose; of the tables, those that the code
    reads; of the text, all in ``ICL_DATA``; of ``files``, those that are there.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    packages = (ROOT / "src" / "icl", ROOT / "src" / "icl_book")
    source = [p for own in packages for p in own.rglob("*") if p.suffix != ".pyc"]
    named = named_tables("\n".join(code))
    if "" in named:  # by a variable: any table
        named = [path.stem for path in table_path("x").parent.glob("*.csv")]
    tables = [table_path(n).with_suffix(s) for n in named for s in (".csv", ".json")]
    found = {
        "notebook": _digest(code),
        "package": _of_files(source),
        "versions": _digest([sys.version_info[:2], *map(version, store.PACKAGES)]),
        "tables": _of_files(tables),
        "text": _of_files(Path(data_folder() or os.devnull).glob("*/*")),
        "threads": str(threads),
    }
    for name in files:
        path = ROOT / name
        parts = path.glob("*") if path.is_dir() else [path]
        found[f"file {name}"] = _of_files(parts) if path.exists() else name
    return found


def plan(notebook: Path, parameters: list[dict], folder: Path, threads=None):
    """A list of :class:`Run`, one per dict of the parameters that are not defaults."""
    defaults = {p.name: p.default for p in read_parameters(notebook).values()}
    filled, runs = [defaults | given for given in parameters], []
    shared = inputs(notebook, set().union(*map(named_files, filled)), threads)
    for given in filled:
        own = {f"file {name}" for name in named_files(given)}
        own = {k: v for k, v in shared.items() if k in own or not k.startswith("file ")}
        key = _digest([own, given])
        entry = folder / f"{notebook.stem}-{key}"
        runs.append(Run(notebook, given, threads, key, entry))
    return runs


def _digest(content):
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _of_files(paths):
    marks = []
    for path in sorted({*paths}):
        with suppress(OSError):  # a link that leads nowhere, or to itself
            stat = path.stat()
            if path.is_file():
                marks.append((path, stat.st_size, stat.st_mtime_ns))
    return _digest([(*mark[0].parts[-2:], _of_file(*mark)) for mark in marks])


@lru_cache(4096)
def _of_file(path, size, modified):
    return sha256(path)


# -- a run ---------------------------------------------------------------------------


def data_folder() -> str:
    """``ICL_DATA`` as an absolute path, "" if it is not set."""
    given = os.environ.get("ICL_DATA")
    return os.path.abspath(os.path.expanduser(given)) if given else ""


def kernel_env(threads=None) -> dict[str, str]:
    """The environment of a kernel that computes with so many threads."""
    own = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    found = os.environ | KERNEL_ENV | (own if threads else {})
    if data := data_folder():  # a kernel works in another folder
        found["ICL_DATA"] = data
    # Set by Dask for its workers: they would free and allocate memory at every product
    found.pop("MALLOC_TRIM_THRESHOLD_", None)
    return found


def kernel_manager(folder, threads=None):
    """A class of kernel managers for papermill, of kernels of this Python, whatever
    other kernels there are; sockets are files in ``folder``."""
    environment = kernel_env(threads)

    class Manager(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict(python_arguments=["-P"]))
        peak = 0

        def __init__(self, **options):
            super().__init__(**options, transport="ipc", ip=f"{folder}/socket")
            self.connection_file = f"{folder}/kernel.json"
            Manager.last = self

        async def start_kernel(self, **options):
            await super().start_kernel(**options, env=environment)

        @classmethod
        def watch(cls, **_):
            """Note the most memory that the kernel has had, in bytes."""
            with suppress(psutil.Error, OSError):
                pid = cls.last.provisioner.pid
                cls.peak = max(cls.peak, psutil.Process(pid).memory_info().rss)
                with open(f"/proc/{pid}/status") as status:  # Linux knows the peak
                    peak = next(s.split()[1] for s in status if "VmHWM" in s)
                cls.peak = max(cls.peak, 1024 * int(peak))

    return Manager


@contextmanager
def _scratch(run):
    """Two empty folders, for the notebook and for sockets, removed after the run. Child
    processes left by it are killed, on Linux also those in sessions of their own."""
    _take_orphans(True)
    before = {*psutil.Process().children()}
    try:
        _remove(run)  # what a killed process has left
        for folder in _folders(run):
            folder.mkdir(mode=0o700)
        yield _folders(run)
    finally:
        left = [c for c in psutil.Process().children() if c not in before]
        for child in left:
            with suppress(psutil.Error):
                left += child.children()
                child.kill()
        psutil.wait_procs(left, 5)
        _take_orphans(False)
        _remove(run)


def _take_orphans(whether):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, whether)  # PR_SET_CHILD_SUBREAPER


def _folders(run):
    short = tempfile.gettempdir()  # the path of a socket holds some 100 characters
    short = short if len(short) < 60 else "/tmp"
    own = _digest([os.getuid(), str(run.folder)])
    return run.folder.with_name(f".{run.folder.name}"), Path(short, f"icl-{own}")


def _remove(run):
    for folder in _folders(run):
        shutil.rmtree(folder, ignore_errors=True)


def _lock(run, **options):
    return FileLock(run.folder.with_name(f".{run.folder.name}.lock"), **options)


def remove_scratch(run: Run):
    """Remove the scratch folders of an interrupted run, unless its lock is held."""
    with suppress(Timeout, OSError), _lock(run, blocking=False):
        _remove(run)


def run_once(run: Run, limit=3600, **options) -> dict:
    """Execute a run within ``limit`` seconds, or return its cached result.

    Options are papermill's, such as ``progress_bar`` or ``stdout_file``.

    Returns:
        the record: ``rows``, ``facts`` and ``findings`` that the notebook has entered,
        ``seconds``, ``peak_gb``, ``cached`` (whether the result was there) and more.

    Raises:
        BookError: the notebook failed; the run's folder has it up to there.
        OSError: the result cannot be written.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(run):
        status, record = store.read_run(run.folder)
        if status == "finished":
            return record | {"cached": True}
        with _scratch(run) as (scratch, sockets):
            record = _execute(run, scratch, sockets, limit, options)
            store.save_run(run.folder, scratch, record)
    if record["error"] is not None:
        raise BookError(
            f"{run.notebook.stem}: {record['error']}\nThe run, with its traceback, is "
            f"in {run.folder / NOTEBOOK}"
        )
    return record | {"cached": False}


def _execute(run, scratch, sockets, limit, options):
    started, cell, error = time.perf_counter(), {}, None
    rows, facts, findings = [], {}, []
    manager = kernel_manager(sockets, run.threads)
    braces = {123: "{{", 125: "}}"}  # papermill formats paths: double their braces
    try:
        done = papermill.execute_notebook(
            str(run.notebook).translate(braces),
            str(scratch / NOTEBOOK).translate(braces),
            run.parameters,
            kernel_name="python3",
            language="python",
            cwd=ROOT,
            kernel_manager_class=manager,
            timeout_func=lambda _: max(1, limit - time.perf_counter() + started),
            on_cell_start=lambda cell_index, **now: cell.update(now["cell"]),
            on_cell_executed=manager.watch,
            **{"progress_bar": False} | options,
        )
        rows, facts, findings = entered(done.cells)
    except papermill.PapermillExecutionError as problem:
        where, why = f"In [{problem.exec_count}]", f"{problem.ename}: {problem.evalue}"
        error = f"{where} failed with {why}"
    except (DeadKernelError, CellTimeoutError) as problem:
        late = isinstance(problem, CellTimeoutError)
        why = f"was stopped after {limit} s" if late else "ended its kernel"
        first = cell.get("source", "").strip().split("\n")[0]
        error = f"the cell {first!r} {why}"
    return {
        "fingerprint": run.fingerprint,
        "parameters": run.parameters,
        "error": error,
        "rows": rows,
        "facts": facts,
        "findings": findings,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_gb": round(manager.peak / 2**30, 3),
        "made": store.environment() | {"threads": run.threads},
    }


def entered(cells) -> tuple[list[dict], dict, list[dict]]:
    """Rows, facts and findings that executed cells have entered, by
    :func:`icl_book.page.result` and :func:`icl_book.page.finding`."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    parts = [o["data"][RESULT] for o in outputs if RESULT in o.get("data", ())]
    rows = [{**row} for part in parts for row in part.get("rows", ())]
    facts = [item for part in parts for item in part.get("facts", {}).items()]
    findings = [{**row} for part in parts for row in part.get("findings", ())]
    return rows, dict(facts), findings
