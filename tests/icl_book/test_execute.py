"""Runs of a small notebook, in a small repository that each test makes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from icl_book import execute, store
from icl_book.execute import (
    inputs,
    parse_parameters,
    plan,
    read_parameters,
    run_once,
)
from icl_book.store import NOTEBOOK, BookError, read_run

PARAMETERS = """
scale: str = "laptop"  # smoke | laptop | paper: how much
steps: int = 3  # 1..9: how many
rate: float = 0.5  # 0..1: of learning
words: str = "a"  # any
loud: int = 0  # 0..1: shout
"""
BODY = """
with open("ran.txt", "a") as log:
    log.write(f"{scale} {steps} {rate} {words} {loud}\\n")
if loud:
    raise RuntimeError("too loud")
"""


def write(path, parameters=PARAMETERS, body=BODY):
    cells = [
        nbformat.v4.new_markdown_cell("# A notebook"),
        nbformat.v4.new_code_cell(
            parameters.strip(), metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell(body.strip()),
    ]
    for n, cell in enumerate(cells):
        cell.id = f"cell-{n}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    path.write_text(nbformat.writes(notebook))
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.delenv("ICL_DATA", raising=False)
    for file in ("src/icl/attention/masks.py", "src/icl_book/page.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("one = 1\n")
    (tmp_path / "results").mkdir()
    for file in ("read.csv", "read.json", "other.csv"):
        (tmp_path / "results" / file).write_text("a\n1\n")
    return tmp_path


@pytest.fixture
def notebook(root):
    return write(root / "one.ipynb")


def ran(root):
    log = root / "ran.txt"
    return log.read_text().splitlines() if log.exists() else []


def run(notebook, limit=60, **parameters):
    (one,) = plan(notebook, [parameters], notebook.parent / "runs")
    return run_once(one, limit)


# -- parameters ----------------------------------------------------------------------


def test_values_get_their_type(notebook):
    given = ["scale=smoke", "steps=007", "rate=1e-3", "words=b, c", "loud=1"]
    assert parse_parameters(notebook, given) == {
        "scale": "smoke",
        "steps": 7,
        "rate": 1e-3,
        "words": "b, c",
        "loud": 1,
    }


def test_values_with_blanks_end_at_the_next_key(notebook):
    given = ["words=Review: {text} Mood: scale=smoke", "steps=2 rate=.5"]
    assert parse_parameters(notebook, given) == {
        "words": "Review: {text} Mood:",
        "scale": "smoke",
        "steps": 2,
        "rate": 0.5,
    }
    assert parse_parameters(notebook, [""]) == {}


def test_a_name_that_may_be_a_file(root):
    line = 'task: str = "mr"  # mr | *.jsonl: text'
    notebook = write(root / "one.ipynb", parameters=line, body="1")
    (root / "mine.jsonl").write_text("{}\n")
    assert parse_parameters(notebook, [f"task={root}/mine.jsonl"]) == {
        "task": "mine.jsonl"
    }
    with pytest.raises(BookError, match=r"task=cb must be str, mr, \*\.jsonl"):
        parse_parameters(notebook, ["task=cb"])
    names = [{"task": "mine.jsonl"}, {"task": "mr"}]
    first, other = (run.fingerprint for run in plan(notebook, names, root))
    (root / "mine.jsonl").write_text("{}\n{}\n")
    again, same = (run.fingerprint for run in plan(notebook, names, root))
    assert again != first
    assert same == other


@pytest.mark.parametrize(
    ("item", "allowed"),
    [
        ("scale=huge", "smoke, laptop, paper"),
        ("steps=10", r"1\.\.9"),
        ("steps=2.5", "int"),
        ("steps=many", "int"),
        ("steps=true", "int"),
        ("steps=0x3", "int"),
        ("steps=1:3", "int"),
        ("steps=0.9", "int"),
        ("rate=fast", "float"),
        ("rate=true", "float"),
        ("rate=1.5", r"0\.0\.\.1\.0"),
        ("rate=nan", "float"),
        ("rate=inf", "float"),
        ("loud=true", "int"),
        ("colour=red", "scale=laptop"),
        ("steps", "key=value"),
    ],
)
def test_a_value_that_is_not_allowed_names_it_and_what_is(item, allowed, notebook):
    with pytest.raises(BookError, match=rf"(?s){item.partition('=')[0]}.*{allowed}"):
        parse_parameters(notebook, [item])
    assert ran(notebook.parent) == []


@pytest.mark.parametrize(
    "line",
    [
        "steps = 3  # untyped",
        "steps: int = 3",
        "steps: int = 2 + 1  # not a literal",
        'steps: int = "3"  # of another type',
        "steps: list = [3]  # several",
    ],
)
def test_a_parameters_cell_is_strict(line, root):
    with pytest.raises(BookError, match="steps: type = literal"):
        read_parameters(write(root / "one.ipynb", parameters=line))


def test_ranges_of_floats_and_negative_numbers(root):
    lines = "a: float = -0.5  # -1e-1..2.5e3: wide\nb: int = -3  # -5..-1: low"
    known = read_parameters(write(root / "one.ipynb", parameters=lines))
    assert known["a"].allowed == (-0.1, 2500.0)
    assert known["b"].allowed == (-5, -1)
    assert (known["a"].help, known["b"].help) == ("wide", "low")


def test_without_a_range_a_number_is_finite(root):
    known = read_parameters(
        write(root / "one.ipynb", parameters="a: float = 1.0  # any")
    )
    assert known["a"].check(-1e300) == -1e300
    for wrong in ("nan", "-inf", "1e999", float("inf"), [1.0]):
        with pytest.raises(ValueError, match="must be float"):
            known["a"].check(wrong)


def test_a_path_counts_from_where_it_is_given(root, monkeypatch):
    line = 'model: str = "hub/id"  # name'
    notebook = write(root / "one.ipynb", parameters=line)
    folders = root / "models" / "tiny", root / "home" / "mine"
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.chdir(root / "models")
    outside = root.parent / f"{root.name}-outside"
    outside.mkdir()
    for given, found in {
        "tiny": "models/tiny",
        "../models/tiny": "models/tiny",
        "~/mine": "home/mine",
        f"../../{outside.name}": str(outside),
        "models/tiny": "models/tiny",  # from the repository
        "hub/other": "hub/other",
    }.items():
        assert parse_parameters(notebook, [f"model={given}"]) == {"model": found}
    monkeypatch.setenv("ICL_DATA", "tiny")
    assert execute.kernel_env()["ICL_DATA"] == str(folders[0])
    monkeypatch.setenv("ICL_DATA", "~/mine")
    assert execute.kernel_env()["ICL_DATA"] == str(folders[1])
    assert "model" in read_parameters(notebook)


@pytest.mark.parametrize("content", ["{", "[]", '{"cells": 3}', "\xff"])
def test_what_is_no_notebook_is_refused(content, tmp_path):
    (tmp_path / "one.ipynb").write_text(content, encoding="latin-1")
    with pytest.raises(BookError, match="one.ipynb"):
        read_parameters(tmp_path / "one.ipynb")


# -- what a run depends on -----------------------------------------------------------


def test_each_input_changes_the_fingerprint_and_nothing_else_does(root, monkeypatch):
    """In a sub-package, in a table that is read; not in one that is not, or prose."""
    notebook = root / "one.ipynb"
    body = 'from icl_book.store import read_table\nread_table("read")'

    def edit(file, text="two = 2\n"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)

    def fingerprint(threads=1, **given):
        (one,) = plan(notebook, [given], root / "runs", threads)
        return one.fingerprint

    write(notebook, body=body)
    seen = {"at first": fingerprint()}
    assert fingerprint(steps=3, rate=0.5) == seen["at first"]  # the defaults, named
    for file in ("results/other.csv", "results/made.py", "benchmarks/speed.py"):
        edit(file)
        assert fingerprint() == seen["at first"], file
    write(notebook, body=body).write_text(
        notebook.read_text().replace("# A notebook", "# Another title")
    )
    assert fingerprint() == seen["at first"]
    for file in (
        "src/icl/attention/masks.py",
        "src/icl/online/new.py",
        "src/icl_book/page.py",
        "results/read.csv",
        "results/read.json",
    ):
        edit(file)
        seen[file] = fingerprint()
    seen["parameter"] = fingerprint(steps=4)
    seen["threads"] = fingerprint(threads=2)
    write(notebook, body=body + "\n1 + 1")
    seen["code"] = fingerprint()
    write(notebook, body=body + "\nname = 'other'\nread_table(name)")
    seen["any table"] = fingerprint()
    edit("results/other.csv", "a\n3\n")
    seen["that table"] = fingerprint()
    edit("data/mr/train.jsonl")
    monkeypatch.setenv("ICL_DATA", str(root / "data"))
    seen["text"] = fingerprint()
    edit("data/mr/train.jsonl", "three = 3\n")
    seen["text changed"] = fingerprint()
    edit("data/tinyshakespeare/input.txt")
    seen["text of another kind"] = fingerprint()
    edit("data/tinyshakespeare/input.txt", "three = 3\n")
    seen["that text changed"] = fingerprint()
    for name, target in [("nowhere", "none"), ("loop", "loop"), ("cb", "cb")]:
        (root / "data" / name).symlink_to(root / "data" / target)
        (root / "data" / "mr" / name).symlink_to(root / "data" / "mr" / target)
    assert fingerprint() == seen["that text changed"]
    monkeypatch.setenv("ICL_DATA", str(root / "data" / "loop"))
    fingerprint()
    assert len({*seen.values()}) == len(seen), seen


def test_models_count_by_their_files(root):
    line = 'model: str = ""  # name'
    notebook = write(root / "one.ipynb", parameters=line, body="1")
    (root / "models").mkdir()
    weights = root / "models" / "weights.safetensors"
    weights.write_bytes(b"one")
    found = inputs(notebook, ["models", "hub/id"])
    assert found["file hub/id"] == "hub/id"
    names = [{"model": "models"}, {"model": "hub/id"}]
    first, hub = (one.fingerprint for one in plan(notebook, names, root))
    weights.write_bytes(b"two")
    again, same = (one.fingerprint for one in plan(notebook, names, root))
    assert again != first
    assert same == hub


# -- a run ---------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_once_until_something_changes(root, notebook):
    assert not run(notebook, steps=5)["cached"]
    record = run(notebook, steps=5)
    assert record["cached"]
    assert ran(root) == ["laptop 5 0.5 a 0"]
    assert 0.01 < record["peak_gb"] < 2
    assert record["seconds"] > 0.5
    (root / "src" / "icl" / "attention" / "masks.py").write_text("two = 2\n")
    assert not run(notebook, steps=5)["cached"]
    assert not run(notebook, steps=6, words="x")["cached"]
    assert ran(root)[1:] == ["laptop 5 0.5 a 0", "laptop 6 0.5 x 0"]


@pytest.mark.slow
def test_a_failed_run_keeps_its_notebook_and_the_good_ones(root, notebook):
    run(notebook)
    (good,) = plan(notebook, [{}], root / "runs")
    (bad,) = plan(notebook, [{"loud": 1}], root / "runs")
    with pytest.raises(BookError, match=r"In \[3\] .*RuntimeError: too loud") as error:
        run_once(bad)
    assert str(bad.folder / NOTEBOOK) in str(error.value)
    assert "too loud" in (bad.folder / NOTEBOOK).read_text()
    assert read_run(bad.folder)[0] == "failed"
    assert read_run(good.folder)[0] == "finished"


@pytest.mark.slow
def test_what_hangs_is_stopped_and_what_ends_is_named(root):
    body = "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True:\n    pass"
    with pytest.raises(BookError, match="'import signal' was stopped after 6 s"):
        run(write(root / "one.ipynb", body=body), limit=6)
    with pytest.raises(BookError, match="'import os' ended its kernel"):
        run(write(root / "one.ipynb", body="import os\nos._exit(3)"))
    assert not psutil.Process().children(recursive=True)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_half_written(root):
    body = BODY + "\nimport os, time\ntime.sleep(0 if os.path.exists('go') else 600)"
    notebook = write(root / "one.ipynb", body=body)
    code = f"""
        from pathlib import Path
        from icl_book import execute, store
        execute.ROOT = store.ROOT = root = Path({str(root)!r})
        execute.run_once(*execute.plan(root / "one.ipynb", [{{}}], root / "runs"))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not ran(root) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(ran(root)) == 1
    assert not list((root / "runs").glob("one*"))
    (root / "go").touch()
    assert not run(notebook)["cached"]
    assert len(ran(root)) == 2


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_and_a_foreign_kernel(
    root, notebook, monkeypatch
):
    long = root / ("long" * 20)
    kernel = long / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["/bin/false"], "display_name": "", "language": "x"}')
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("JUPYTER_PATH", str(long))
    assert not run(notebook)["cached"]


@pytest.mark.slow
def test_a_checkout_anywhere(root, monkeypatch):
    checkout = root / "Grün {braces} {steps}"
    checkout.mkdir()
    for folder in ("src", "results"):
        (root / folder).rename(checkout / folder)
    monkeypatch.setattr(execute, "ROOT", checkout)
    monkeypatch.setattr(store, "ROOT", checkout)
    assert not run(write(checkout / "one.ipynb"))["cached"]
    assert len(ran(checkout)) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_process_in_a_session_of_its_own_ends_with_the_run(root):
    body = """
import os, subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
script = "import os; os.fork() and os._exit(0); os.setsid(); "
script += "os.execlp('sleep', 'sleep', '601')"
subprocess.run(["python3", "-c", script], check=True)
if loud:
    os._exit(1)
"""
    notebook = write(root / "one.ipynb", body=body)
    others = {p.pid for p in psutil.process_iter()}
    run(notebook)
    with pytest.raises(BookError):
        run(notebook, loud=1)
    left = [p for p in psutil.process_iter() if p.pid not in others]
    asleep = [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
    asleep = [p.cmdline() for p in asleep if p.name() == "sleep"]
    assert ["sleep", "600"] not in asleep
    assert ["sleep", "601"] not in asleep


@pytest.mark.slow
def test_a_run_may_lie_on_another_disk(root, notebook):
    """Behind a link, as ``_build`` does where the checkout's own disk is small."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == root.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        (root / "runs").symlink_to(folder)
        assert not run(notebook)["cached"]
        assert run(notebook)["cached"]
        (kept,) = [p.name for p in Path(folder).iterdir() if p.name[0] != "."]
        assert kept.startswith("one-")


@pytest.mark.slow
def test_an_executed_notebook_is_json_whatever_it_shows(root):
    body = 'from IPython.display import display\nnan = float("nan")\n'
    body += 'display({"application/json": {"a": [nan, -nan, 1e400]}}, raw=True)'
    notebook = write(root / "one.ipynb", body=body)
    run(notebook)
    (one,) = plan(notebook, [{}], root / "runs")
    json.loads((one.folder / NOTEBOOK).read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
def test_a_notebook_of_an_old_format_without_a_kernel(root):
    cell = {"cell_type": "code", "input": "steps: int = 3  # 1..9: how many"}
    cell |= {"language": "python", "outputs": [], "metadata": {"tags": ["parameters"]}}
    sheet = {"cells": [cell], "metadata": {}}
    old = {"metadata": {"name": ""}, "nbformat": 3, "nbformat_minor": 0}
    (root / "old.ipynb").write_text(json.dumps(old | {"worksheets": [sheet]}))
    assert run(root / "old.ipynb", steps=4)["parameters"] == {"steps": 4}
