"""Runs and tables on disk.

A *run* is a folder ``NOTEBOOK-FINGERPRINT``: the executed notebook and a sealed record
of what it entered and what made it. A *table* is ``results/NAME.csv``, collected from
runs, beside ``NAME.json``, which says what made its rows.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import uuid
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock

from icl.assets import sha256

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "datasets", "numpy")
COSTS = ("seconds", "peak_gb", "fingerprint")  # columns of a sweep's table
#: Facts of every table's record.
MADE = {"command", "runs", "commit", "python", "machine", "threads", *PACKAGES}
#: The type of a notebook's output that holds rows for a table, or findings.
RESULT = "application/vnd.icl.result+json"
NOTEBOOK, RECORD = "run.ipynb", "record.json"
TEXT = {"predictions": str, "calibrated": str}  # columns of digits that are no numbers


class BookError(RuntimeError):
    """What a reader can mend: a name, a value, a folder, a failed run."""


def write_atomically(path: Path, content: str | bytes):
    """Write a file so that a reader sees the old or the new one, whole.

    It is on the disk before it has its name, so this holds after a power cut too.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def commit() -> str:
    """The checkout's commit, "-dirty" after it if code differs, or "unknown"."""
    code = ["src", "experiments", "book/*.ipynb"]
    stray = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR"}
    own = {name: value for name, value in os.environ.items() if name not in stray}

    def git(*what):
        command = ["git", "-C", str(ROOT), *what]
        options = {"capture_output": True, "text": True, "check": True, "env": own}
        return subprocess.run(command, **options).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix"):  # ROOT lies inside of another checkout
            return "unknown"
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Commit, versions and machine of this process, for records."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{package: version(package) for package in PACKAGES},
    }


# -- runs ----------------------------------------------------------------------------


def _seal(record):
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def save_run(folder: Path, scratch: Path, record: dict):
    """Give a scratch folder with an executed notebook its record and its name.

    What a failed or damaged run left in ``folder`` is replaced.
    """
    record = record | {"notebook": sha256(scratch / NOTEBOOK)}
    record = json.loads(json.dumps(record, allow_nan=False))
    text = json.dumps({"sha256": _seal(record), **record}, indent=1)
    write_atomically(scratch / RECORD, text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def read_run(folder: Path) -> tuple[str, dict]:
    """``(status, record)``: "finished", "failed", "corrupt" or "missing"."""
    if not folder.exists():
        return "missing", {}
    try:
        record = json.loads((folder / RECORD).read_bytes())
        whole = record.pop("sha256") == _seal(record)
        whole &= sha256(folder / NOTEBOOK) == record["notebook"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        return "corrupt", {}
    return ("finished" if record["error"] is None else "failed"), record


# -- tables --------------------------------------------------------------------------


def table_path(name: str) -> Path:
    """Where the table ``name`` lies: ``results/NAME.csv`` of the repository."""
    return ROOT / "results" / f"{name}.csv"


def read_table(name: str | Path, words=()) -> tuple[pd.DataFrame, dict]:
    """A table and what made it, ``{}`` if unrecorded.

    Args:
        name: of a table in ``results/``, or the path of the CSV file of a sweep.
        words: columns to read as text.

    Raises:
        ValueError: there is no such table.
    """
    path = Path(name) if str(name).endswith(".csv") else table_path(str(name))
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv"))) or "none"
        raise ValueError(f"no table {str(name)!r} in {path.parent}; there are: {there}")
    about = path.with_suffix(".json")
    origin = json.loads(about.read_text()) if about.exists() else {}
    # only an empty entry is missing; NA and None are words
    blank = {"keep_default_na": False, "na_values": [""]}
    return pd.read_csv(path, dtype=TEXT | dict.fromkeys(words, str), **blank), origin


def collect(runs, key: list[str], path: Path, command: str, costs=False):
    """Put the rows of finished runs into a table, in place of those with their key.

    Rows of other keys stay. Several processes may collect into one table.

    Args:
        key: parameters that are columns of the table and tell runs apart. A row may
            give one of them another value.
        path: of the CSV file.
        command: that made the runs, for the record.
        costs: add columns of seconds, memory and fingerprints.
    """
    rows, parts = [], {}
    for status, record in (read_run(run.folder) for run in runs):
        if status == "finished":
            named = {name: short_name(record["parameters"][name]) for name in key}
            facts = json.dumps([record["made"], record["facts"]], sort_keys=True)
            parts.setdefault(facts, []).append(key_of(named, key))
            paid = {name: record[name] for name in COSTS} if costs else {}
            rows += [named | row | paid for row in record["rows"]]
    if not rows:
        return read_table(path)[0] if path.is_file() else pd.DataFrame()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):
        added = pd.DataFrame(rows)
        words = [c for c in added if added[c].map(type).isin([str]).all()]
        table, origin = read_table(path, words) if path.is_file() else (added[:0], {})
        for column in added:  # a CSV file has no lists but as JSON
            if added[column].map(type).isin([list, dict]).any():
                added[column] = added[column].map(json.dumps)
        made = {key_of(row, key) for row in rows}
        kept = [key_of(row, key) not in made for row in table.to_dict("records")]
        table = pd.concat([table[kept], added]) if any(kept) else added
        for facts, keys in parts.items():
            made, told = json.loads(facts)
            about = {"command": command, **made, **told}
            part = f"{made['commit']}/{_seal(facts)[:8]}"
            known = origin.get(part, {}).get("runs", [])
            origin[part] = about | {"runs": sorted({*known, *keys})}
        write_atomically(path, table.to_csv(index=False))
        write_atomically(path.with_suffix(".json"), json.dumps(origin, indent=2) + "\n")
    return table.reset_index(drop=True)


def keys_in(path: Path, key: list[str]) -> set[str]:
    """The keys of the runs whose rows a table has; none if there is no table."""
    if not path.is_file():
        return set()
    table, origin = read_table(path)
    told = {run for part in origin.values() for run in part.get("runs", ())}
    return told | {key_of(row, key) for row in table.to_dict("records")}


def key_of(row: dict, key: list[str]) -> str:
    """The values that tell a run apart, equal however a CSV file has written them."""
    values = ["" if v is None or v != v else v for v in map(row.get, key)]
    values = [int(v) if isinstance(v, float) and v % 1 == 0 else v for v in values]
    values = [json.dumps(v) if isinstance(v, list) else v for v in values]
    return ", ".join(str(short_name(v)) for v in values)


def short_name(value):
    """A value as a table has it: of a file of weights the name, of another whole path
    the last two parts."""
    if isinstance(value, str) and value.endswith(".gguf"):
        return Path(value).stem
    if isinstance(value, str) and value.startswith("/"):
        return "/".join(value.split("/")[-2:])
    return value
