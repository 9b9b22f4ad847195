"""requirements.txt, its lock, the package's own list and what is installed agree."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins(name):
    """Versions by package; a package may have one for each of several systems."""
    found = {}
    text = (ROOT / name).read_text(encoding="utf-8")
    for package, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M):
        found.setdefault(canonicalize_name(package), set()).add(version)
    return found


def test_the_lock_is_of_the_requirements():
    locked = pins("requirements.lock")
    named = pins("requirements.txt")
    assert "torch" in named
    assert "torch" not in locked
    stale = {n: v for n, v in named.items() if n != "torch" and not v <= locked[n]}
    assert not stale, "make lock"


def test_every_pin_has_a_hash():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = re.findall(r"^[\w.-]+==.*(?:\n +--hash=.*)*", text, re.M)
    assert len(found) > 100
    assert all("--hash=sha256:" in pin for pin in found)


def test_what_the_package_needs_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {canonicalize_name(n) for n in project["project"]["dependencies"]}
    assert needed <= set(pins("requirements.txt"))


def test_what_is_installed_fits_together():
    check = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
