"""requirements.txt, its lock, the package's own list and what is installed agree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins(name):
    """Versions by package; a package may have one for each of several systems."""
    found = {}
    text = (ROOT / name).read_text(encoding="utf-8")
    for package, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M):
        found.setdefault(canonicalize_name(package), set()).add(version)
    return found


@pytest.mark.parametrize("name", ["requirements", "requirements-lab"])
def test_a_lock_is_of_its_requirements(name):
    locked, named = pins(f"{name}.lock"), pins(f"{name}.txt")
    assert named
    assert "torch" not in locked
    stale = {n: v for n, v in named.items() if n != "torch" and not v <= locked[n]}
    assert not stale, "make lock"


def test_the_locks_agree():
    book, lab = pins("requirements.lock"), pins("requirements-lab.lock")
    assert not {name for name in book.keys() & lab.keys() if book[name] != lab[name]}


@pytest.mark.parametrize("name", ["requirements", "requirements-lab"])
def test_every_pin_has_a_hash(name):
    text = (ROOT / f"{name}.lock").read_text(encoding="utf-8")
    found = re.findall(r"^[\w.-]+==.*(?:\n +--hash=.*)*", text, re.M)
    assert len(found) > 50
    assert all("--hash=sha256:" in pin for pin in found)


def declared():
    """What icl needs, and what icl_book needs beside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lists = (
        project["project"]["dependencies"],
        project["project"]["optional-dependencies"]["book"],
    )
    return [{canonicalize_name(name) for name in names} for names in lists]


def test_what_the_package_needs_is_pinned():
    science, book = declared()
    assert science <= set(pins("requirements.txt"))
    assert book <= set(pins("requirements.lock"))


def imported(package):
    """Distributions of other packages that the modules of one import."""
    names = set()
    for path in (ROOT / "src" / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    tops = {name.split(".")[0] for name in names} - {"icl", "icl_book"}
    known = packages_distributions()
    return {canonicalize_name(known[n][0]) for n in tops - sys.stdlib_module_names}


def test_what_is_imported_is_declared():
    science, book = declared()
    assert imported("icl") <= science
    assert imported("icl_book") <= science | book


ALONE = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError(f"{{name}} is absent")

sys.meta_path.insert(0, Absent)
import icl
for module in pkgutil.walk_packages(icl.__path__, "icl."):
    importlib.import_module(module.name)
print(icl.__file__)
"""


@pytest.mark.slow
def test_a_wheel_has_the_science_without_the_book(tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    leave = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", clone / "src", ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, clone], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert not (tmp_path / "site" / "icl_book").exists()  # of use in a checkout
    refused = {"icl_book", "papermill", "distributed", "dask", "sphinx", "myst_nb"}
    refused |= {"IPython", "ipykernel", "nbformat", "matplotlib", "seaborn"}
    run = [sys.executable, "-c", ALONE.format(refused=refused)]
    alone = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path / "site")}}
    done = subprocess.run(run, **alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))


def test_what_is_installed_fits_together():
    check = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
