"""The runner, on a small repository of one chapter that each test makes."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest

from icl import runner
from icl.runner import ChapterError, parse_parameters, read_parameters, run_chapter

PARAMETERS = """
scale: str = "laptop"  # smoke | laptop
#                        | paper: how much
steps: int = 3  # 1..9: how many
rate: float = 0.5  # of learning
words: list = ["a"]  # any
loud: bool = False  # shout
"""
BODY = """
from pathlib import Path
with open(Path("ran.txt"), "a") as log:
    log.write(f"{scale} {steps} {rate} {words} {loud}\\n")
if loud:
    raise RuntimeError("too loud")
"""


def notebook(parameters=PARAMETERS, body=BODY):
    cells = [
        nbformat.v4.new_markdown_cell("# A chapter"),
        nbformat.v4.new_code_cell(
            parameters.strip(), metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell(body.strip()),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.delenv("ICL_DATA", raising=False)
    (tmp_path / "_toc.yml").write_text(
        "root: book/intro\nchapters:\n- file: book/one\n"
    )
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "intro.md").write_text("# Intro\n")
    nbformat.write(notebook(), tmp_path / "book" / "one.ipynb")
    for name in ("requirements.txt", "requirements.lock"):
        (tmp_path / name).write_text("")
    return tmp_path


def ran(repository):
    log = repository / "ran.txt"
    return log.read_text().splitlines() if log.exists() else []


def test_values_get_their_type(repository):
    given = ["scale=smoke", "steps=7", "rate=1e-3", "words=[b, c]", "loud=true"]
    assert parse_parameters("one", given) == {
        "scale": "smoke",
        "steps": 7,
        "rate": 1e-3,
        "words": ["b", "c"],
        "loud": True,
    }


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("scale=huge", "scale=huge is not one of smoke, laptop, paper"),
        ("steps=10", "steps=10 is outside 1..9"),
        ("steps=2.5", r"steps=2.5 is not of type int \(default 3\)"),
        ("steps=many", "steps=many is not of type int"),
        ("steps=true", "steps=true is not of type int"),
        ("rate=fast", "rate=fast is not of type float"),
        ("rate=true", "rate=true is not of type float"),
        ("words=b", "words=b is not of type list"),
        ("loud=3", "loud=3 is not of type bool"),
        ("colour=red", "has no parameter 'colour'; write key=value with"),
        ("steps", "'steps' is not key=value"),
    ],
)
def test_bad_values_say_what_is_allowed(item, message, repository):
    with pytest.raises(ChapterError, match=message):
        parse_parameters("one", [item])
    assert ran(repository) == []


def test_unknown_chapter(repository):
    with pytest.raises(ChapterError, match="no chapter 'two'; there are one"):
        parse_parameters("two", [])


@pytest.mark.parametrize(
    "line",
    ["steps = 3  # untyped", "steps: int = 3", "steps: int = 2 + 1  # not a literal"],
)
def test_parameters_cell_is_strict(line):
    with pytest.raises(ChapterError, match="write name: type = literal"):
        read_parameters(notebook(parameters=line))


def test_runs_once_until_something_changes(repository):
    folder = repository / "runs"
    assert run_chapter("one", {"steps": 5}, folder)["again"]
    assert not run_chapter("one", {"steps": 5}, folder)["again"]
    assert ran(repository) == ["laptop 5 0.5 ['a'] False"]
    assert run_chapter("one", {"steps": 6, "words": ["x"]}, folder)["again"]
    assert ran(repository)[1:] == ["laptop 6 0.5 ['x'] False"]
    (repository / "results").mkdir()
    (repository / "results" / "table.csv").write_text("a\n1\n")
    assert run_chapter("one", {"steps": 6, "words": ["x"]}, folder)["again"]
    record = json.loads((folder / "one.json").read_text())
    # what a process held before it became another counts too: here, this one's
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    assert 0.01 < record["peak_gb"] < max(2, 1.01 * inherited)
    assert record["seconds"] > 0.5


def test_a_failed_run_keeps_the_last_good_one(repository):
    folder = repository / "runs"
    run_chapter("one", {}, folder)
    good = (folder / "one.ipynb").read_bytes()
    message = r"^one: In \[3\] failed with RuntimeError: too loud\nThe run, .*failed"
    with pytest.raises(ChapterError, match=message):
        run_chapter("one", {"loud": True}, folder)
    assert (folder / "one.ipynb").read_bytes() == good
    assert (folder / "one.failed.ipynb").exists()


def test_a_killed_run_leaves_nothing_half_written(repository):
    body = BODY + "\nimport time\ntime.sleep(0 if Path('go').exists() else 600)"
    nbformat.write(notebook(body=body), repository / "book" / "one.ipynb")
    code = f"""
        from pathlib import Path
        from icl import runner
        runner.ROOT = Path({str(repository)!r})
        runner.run_chapter("one", {{}}, runner.ROOT / "runs")
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not ran(repository) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert len(ran(repository)) == 1
    assert not (repository / "runs" / "one.ipynb").exists()
    (repository / "go").touch()
    assert run_chapter("one", {}, repository / "runs")["again"]
    assert len(ran(repository)) == 2


def test_an_old_picture_of_verdicts_is_named(repository, tmp_path, capsys):
    (tmp_path / "book").mkdir(exist_ok=True)
    (tmp_path / "book" / "verdicts.svg").write_text("<svg>old</svg>")
    new = tmp_path / "verdicts.svg"
    for content, said in [("<svg>old</svg>", ""), ("<svg>new</svg>", str(new))]:
        new.write_text(content)
        runner._compare_picture(new)
        printed = capsys.readouterr().out
        assert said in printed
        assert bool(said) == bool(printed)


def test_command_line_refuses_before_any_kernel(repository, capsys):
    assert runner.main(["book", "--scale", "galactic"]) == 1
    assert (
        "scale=galactic is not one of smoke, laptop, paper" in capsys.readouterr().err
    )
    assert ran(repository) == []
