"""The commands on a book of one small chapter: what they say, and leave behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import nbformat
import psutil
import pytest

from icl_book import __main__, build, execute, store
from icl_book.__main__ import main
from icl_book.store import NOTEBOOK, ROOT, read_run

BODY = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
with open("pids", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
while os.path.exists("wait"):
    time.sleep(0.05)
assert n != 3 or os.path.exists("mended"), "three"
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    for module in (__main__, build, execute, store):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/01_one\n")
    (tmp_path / "book").mkdir()
    line, tags = "n: int = 1  # 0..9: number", {"tags": ["parameters"]}
    line += '\nscale: str = "laptop"  # smoke | laptop: how much'
    cells = [nbformat.v4.new_markdown_cell("# One")]
    cells += [nbformat.v4.new_code_cell(line, metadata=tags)]
    cells += [nbformat.v4.new_code_cell(BODY.strip())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "book" / "01_one.ipynb")
    return tmp_path


def start(root, *command, **options):
    """``python -m icl_book`` with the small book, a process of its own."""
    code = f"""
        import sys
        from pathlib import Path
        from icl_book import __main__, build, execute, store
        for module in (__main__, build, execute, store):
            module.ROOT = Path({str(root)!r})
        sys.exit(__main__.main({command!r}))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **options)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_chapter_is_run_once_and_says_so(root, capsys):
    assert main(["chapter", "01_one"]) == 0
    assert "unchanged" not in capsys.readouterr().out
    assert main(["chapter", "01_one"]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main(["chapter", "01_one", "n=2"]) == 0
    assert "unchanged" not in capsys.readouterr().out
    runs = [p for p in (root / "_build" / "runs").iterdir() if p.is_dir()]
    assert {read_run(p)[1]["parameters"]["n"] for p in runs} == {1, 2}
    for given in (["n=10"], ["n=1.9"], ["m=1"], ["n"]):
        assert main(["chapter", "01_one", *given]) == 1
    assert main(["chapter", "02_two"]) == 1


@pytest.mark.slow
def test_what_failed_is_deleted_when_it_is_mended(root, capsys):
    assert main(["chapter", "01_one", "n=3"]) == 1
    (failed,) = (root / "_build" / "runs").glob("01_one-*")
    assert str(failed / NOTEBOOK) in capsys.readouterr().err
    path = root / "book" / "01_one.ipynb"
    path.write_text(path.read_text().replace("n != 3", "True"))
    assert main(["chapter", "01_one", "n=3"]) == 0
    (kept,) = (root / "_build" / "runs").glob("01_one-*")
    assert kept != failed
    assert read_run(kept)[0] == "finished"


def test_a_checkout_that_cannot_be_written_to(root, capsys):
    (root / "_build").write_text("a file")
    assert main(["chapter", "01_one"]) == 1
    assert "_build" in capsys.readouterr().err


@pytest.mark.slow
def test_two_builds_at_once_and_pages_in_another_folder(root):
    """``_build`` leads to a second disk where there is one, and so does the folder."""
    disk = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=disk) as other:
        (root / "_build").symlink_to(other)
        shutil.copy(ROOT / "_config.yml", root)
        shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
        for name in ("references.bib", "404.html", "verdicts.svg"):
            shutil.copy(ROOT / "book" / name, root / "book" / name)
        (root / "book" / "claims.toml").write_text("claim = []")
        pages = Path(other) / "pages"
        command = ["book", "--scale", "smoke", "--to", str(pages)]
        with open(root / "said", "w") as said:
            both = [start(root, *command, stderr=said, stdout=said) for _ in range(2)]
        assert [one.wait(300) for one in both] == [0, 0], (root / "said").read_text()
        page = pages / "html" / "book" / "01_one.html"
        assert "<h1>One" in page.read_text()
        assert (root / "said").read_text().count("unchanged") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGHUP", "SIGKILL"])
def test_a_stopped_chapter_leaves_nothing(stop, root):
    """After SIGKILL its kernel ends; the next run of the chapter clears the rest."""
    (run,) = execute.plan(root / "book" / "01_one.ipynb", [{}], root / "_build/runs")
    (root / "wait").touch()
    with open(root / "said", "w") as said:
        process = start(root, "chapter", "01_one", stderr=said)
    until(lambda: (root / "pids").exists() and (root / "pids").read_text())
    kernel, child = map(int, (root / "pids").read_text().split())
    folders = execute._folders(run)
    assert all(folder.is_dir() for folder in folders)
    process.send_signal(signal.Signals[stop])
    process.wait(60)
    until(lambda: not psutil.pid_exists(kernel), 10)
    if stop == "SIGKILL":
        os.kill(child, signal.SIGKILL)
        (root / "wait").unlink()
        assert main(["chapter", "01_one"]) == 0
    else:
        assert not psutil.pid_exists(child)
        assert (root / "said").read_text().splitlines()[0].endswith("resumes")
        assert not list((root / "_build" / "runs").glob("01_one*"))
    assert not any(folder.exists() for folder in folders)


# -- make ----------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A checkout with an environment whose commands print their arguments."""
    for name in ("Makefile", "requirements.txt", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "ruff", "codespell", "nbstripout"):
        path = tmp_path / ".venv" / "bin" / name
        path.write_text('#!/bin/sh\nfor word; do printf "<%s>" "$word"; done\n')
        path.chmod(0o755)
    (tmp_path / ".venv" / ".ready").touch()

    def make(*arguments, **variables):
        command, env = ["make", *arguments], os.environ | variables
        for name in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS"):  # of a make around this
            env.pop(name, None)
        options = {"cwd": tmp_path, "env": env, "text": True}
        return subprocess.run(command, capture_output=True, check=True, **options)

    make.folder = tmp_path
    return make


CODE = "a; touch HACK $(shell touch HACK) `touch HACK` $$(touch HACK) '\" * & |"


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("chapter", "P"),
        ("chapter", "NAME"),
        ("table", "NAME"),
        ("table", "OPTIONS"),
        ("sweep", "GRID"),
        ("sweep", "OPTIONS"),
    ],
)
def test_make_runs_nothing_of_a_value(target, name, by, checkout):
    before = sorted(checkout.folder.iterdir())
    given = [f"{name}={CODE}"] if by == "argument" else []
    said = checkout(target, *given, **({} if given else {name: CODE})).stdout
    assert sorted(checkout.folder.iterdir()) == before
    assert "touch" in said
    assert "*" in said


def test_make_passes_on_what_it_is_given(checkout):
    said = checkout("chapter", "NAME=05_one", "P=task=mr words=[a,b]").stdout
    assert said == "<-m><icl_book><chapter><05_one><task=mr words=[a,b]>"
    said = checkout("sweep", "GRID=my grids/a.yaml", "OPTIONS=--to x").stdout
    assert said == "<-m><icl_book><sweep><my grids/a.yaml><--to><x>"


def test_make_clean_spares_the_runs_of_sweeps(checkout):
    for name in ("sweeps/one", "runs/one", "book"):
        (checkout.folder / "_build" / name).mkdir(parents=True)
    checkout("clean")
    assert [p.name for p in (checkout.folder / "_build").iterdir()] == ["sweeps"]
    assert (checkout.folder / "_build" / "sweeps" / "one").is_dir()


def test_make_lint_leaves_a_readers_notebook_alone(checkout):
    for name in ("mine.ipynb", "README.md"):
        (checkout.folder / name).touch()
    said = checkout("lint").stdout
    assert "README.md" in said
    assert "mine.ipynb" not in said
    assert "<.>" not in said


@pytest.mark.slow
def test_lab_opens_this_environment_to_this_machine_alone(tmp_path):
    """The notebooks' kernel is this Python; nobody gets in without the token."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = f"OPTIONS=--no-browser --allow-root --port={port}"
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path)}
    options |= {"start_new_session": True}
    with subprocess.Popen(["make", "lab", given], **options) as lab:
        try:
            pattern = re.compile(r"(http://localhost:\d+)/lab\?(token=\w+)")
            found = next(filter(None, map(pattern.search, lab.stderr)))
            specs = f"{found[1]}/api/kernelspecs"
            for _ in range(300):  # it says so a little before it listens
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.1)
            with pytest.raises(HTTPError, match="403"):
                urlopen(specs)
            with urlopen(f"{specs}?{found[2]}") as answer:
                kernels = json.load(answer)["kernelspecs"]
        finally:
            os.killpg(lab.pid, signal.SIGTERM)
            lab.stderr.close()
    python = kernels["python3"]["spec"]["argv"][0]
    assert Path(python) == ROOT / ".venv" / "bin" / "python"
    assert kernels["python3"]["spec"]["display_name"].startswith("In-context")
