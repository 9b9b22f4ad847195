"""Small tables of heavy runs, kept with what made them.

A table is a CSV file in ``results/``; beside it, under the same name, a JSON
file says which command, commit, model, data and versions its rows come from.
Both are written to a temporary name and moved into place, so a killed run
leaves the last whole state.
"""

import json
import os
import platform
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1  # of the tables; raised when a column changes its meaning
#: The type of a notebook's output that holds what it enters into a sweep's table.
RESULT = "application/vnd.icl.result+json"
PACKAGES = ("torch", "transformers", "datasets", "numpy")


def table_path(name: str) -> Path:
    """Where the table ``name`` lies: ``results/NAME.csv`` of the repository."""
    return ROOT / "results" / f"{name}.csv"


def read_table(name: str) -> tuple[pd.DataFrame, dict]:
    """The table ``results/NAME.csv`` and what made it, ``{}`` if unrecorded.

    Raises:
        ValueError: there is no such table (the message lists those there are), or
            it is of another format than this version reads.
    """
    path = table_path(name)
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv")))
        raise ValueError(f"no table {name!r} in {path.parent}; there are: {there}")
    about = path.with_suffix(".json")
    origin = json.loads(about.read_text()) if about.exists() else {}
    for part, facts in origin.items():
        found = facts.get("format", 1) if isinstance(facts, dict) else 1
        if found != FORMAT:
            raise ValueError(
                f"{about.name}: {part} is of format {found}, but this version of the "
                f"book reads format {FORMAT}; take the version that made it (commit "
                f"{facts.get('commit', 'unknown')}), or make the table again"
            )
    text = {"predictions": str, "calibrated": str}
    return pd.read_csv(path, dtype=text), origin


def read_sweep(folder) -> pd.DataFrame:
    """What a sweep has gathered (icl.sweep): a row for each finished run.

    Args:
        folder: of the sweep, or the name of its grid file, without ``.yaml``, for the
            folder that it has where none is given.

    Returns:
        columns: the parameters, what the notebook entered by
        :func:`icl.chapter.result`, then ``seconds, peak_gb, key`` and versions.

    Raises:
        ValueError: nothing has been gathered there.
    """
    path = Path(folder) / "results.parquet"
    if not path.is_file():
        path = ROOT / "_build" / "sweeps" / folder / "results.parquet"
    if not path.is_file():
        raise ValueError(f"no sweep {str(folder)!r}: neither it nor {path} is there")
    return pd.read_parquet(path)


def add_rows(name: str, rows: list[dict], key: list[str], part: str, facts: dict):
    """Put rows into a table, in place of those with the same key; atomic.

    Several processes may add to one table at once.

    Args:
        name: of the table, which need not exist.
        rows: the new ones.
        key: the columns that tell rows apart.
        part: what the rows belong to, a key of the table's record of origins.
        facts: where they come from (:func:`provenance`). If the part is on
            record already, the record stays, and must agree on model, data and
            demonstrations.

    Raises:
        ValueError: it does not agree, or the table is of another format.
    """
    path = table_path(name)
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_name(f".{name}.lock")):
        table, about = read_table(name) if path.is_file() else (pd.DataFrame(), {})
        check_origin(name, about, part, facts)
        added = pd.DataFrame(rows)
        if len(table):
            new = set(added[key].itertuples(index=False, name=None))
            old = table[key].itertuples(index=False, name=None)
            table = table[[row not in new for row in old]]
            added = pd.concat([table, added], ignore_index=True)
        write_table(name, added, {part: facts, **about})


def rows_made(name: str, columns: list[str], part: str, facts: dict, **where):
    """What a table has already, so that a killed run makes the rest alone.

    Args:
        name: of the table, which need not exist.
        columns: those wanted.
        part, facts: as in :func:`add_rows`.
        where: values of other columns that tell the rows of ``part`` apart.

    Returns:
        ``pandas.DataFrame`` of these rows and columns, empty if there are none.

    Raises:
        ValueError: as :func:`add_rows`.
    """
    if not table_path(name).is_file():
        return pd.DataFrame(columns=columns)
    table, about = read_table(name)
    check_origin(name, about, part, facts)
    mine = (table[[*where]] == [*where.values()]).all(axis=1)
    return table.loc[mine].reindex(columns=columns)


def check_origin(name: str, about: dict, part: str, facts: dict):
    """Raise ``ValueError`` if rows of ``part`` were made from something else."""
    known = about.get(part, {})
    for fact in ("model", "model_sha256", "data_sha256", "demonstrations"):
        if known.get(fact, facts.get(fact)) != facts.get(fact):
            raise ValueError(
                f"table {name!r} holds rows of {part} with {fact} {known[fact]!r} "
                f"(from commit {known.get('commit', 'unknown')}), but this run has "
                f"{facts.get(fact)!r}; they must not mix: move the table away, or "
                f"give the same {fact}"
            )


def write_table(name: str, rows, about: dict) -> Path:
    """Write ``rows`` and ``about`` atomically; returns the table's path."""
    path = table_path(name)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False))
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    return path


def write_atomically(path: Path, content: str | bytes):
    """Write a file so that a reader sees the old or the new one, whole.

    It is on the disk before it has its name, so that this holds after a power cut too.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(scratch, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def provenance(**facts) -> dict:
    """Command, commit and versions of this run, with the given ``facts``."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "format": FORMAT,
        **facts,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{package: version(package) for package in PACKAGES},
    }


def commit() -> str:
    """The checkout's commit, "-dirty" after it if code differs, or "unknown"."""

    def git(*args):
        run = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True
        )
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except OSError:
        head = None
    if head is None:
        return "unknown"
    return head + ("-dirty" if git("status", "--porcelain", "--", "src") else "")
