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
from importlib.metadata import version
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "datasets", "numpy")


def table_path(name: str) -> Path:
    """Where the table ``name`` lies: ``results/NAME.csv`` of the repository."""
    return ROOT / "results" / f"{name}.csv"


def read_table(name: str) -> tuple[pd.DataFrame, dict]:
    """The table ``results/NAME.csv`` and what made it, ``{}`` if unrecorded.

    Raises:
        ValueError: there is no such table; the message lists those there are.
    """
    path = table_path(name)
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv")))
        raise ValueError(f"no table {name!r} in {path.parent}; there are: {there}")
    about = path.with_suffix(".json")
    origin = json.loads(about.read_text()) if about.exists() else {}
    return pd.read_csv(path, dtype={"predictions": str}), origin


def write_table(name: str, rows: list[dict], about: dict) -> Path:
    """Write ``rows`` and ``about`` atomically; returns the table's path."""
    path = table_path(name)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False))
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    return path


def write_atomically(path: Path, text: str):
    """Write a text file so that a reader sees the old or the new one, whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def provenance(**facts) -> dict:
    """Command, commit and versions of this run, with the given ``facts``."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
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
