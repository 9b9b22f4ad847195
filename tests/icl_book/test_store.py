"""Runs and tables: written whole or not at all, and read with what made them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest

from icl_book import store
from icl_book.store import (
    NOTEBOOK,
    RECORD,
    collect,
    keys_in,
    read_run,
    read_table,
    save_run,
)

MADE = {"commit": "c0ffee", "torch": "2.0"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path


def made(folder, parameters, rows, error=None, **facts):
    """A run with these rows, as :func:`icl_book.execute.run_once` leaves it."""
    scratch = folder.with_name(f".{folder.name}")
    scratch.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(), scratch / NOTEBOOK)
    record = {"parameters": parameters, "rows": rows, "facts": facts, "made": MADE}
    costs = {"seconds": 1.5, "peak_gb": 0.5, "fingerprint": folder.name}
    save_run(folder, scratch, record | costs | {"error": error})
    return SimpleNamespace(folder=folder)


def test_a_run_is_whole_failed_damaged_or_missing(tmp_path):
    folder = tmp_path / "one"
    assert read_run(folder) == ("missing", {})
    made(folder, {"a": 1}, [{"b": 2}])
    status, record = read_run(folder)
    assert status == "finished"
    assert record["rows"] == [{"b": 2}]
    text = (folder / RECORD).read_text()
    for damaged in (text.replace('"b": 2', '"b": 3'), text[:50], "[]", ""):
        (folder / RECORD).write_text(damaged)
        assert read_run(folder)[0] == "corrupt"
    (folder / RECORD).unlink()
    assert read_run(folder)[0] == "corrupt"
    made(folder, {"a": 1}, [])
    shown = (folder / NOTEBOOK).read_text()
    (folder / NOTEBOOK).write_text(shown[:-2] + " }")  # of the same size
    assert read_run(folder)[0] == "corrupt"
    made(folder, {"a": 1}, [], error="In [3] failed")
    assert read_run(folder)[0] == "failed"
    made(folder, {"a": 1}, [])
    os.truncate(folder / NOTEBOOK, 10)
    assert read_run(folder)[0] == "corrupt"


def test_a_record_has_no_numbers_that_json_has_not(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        made(tmp_path / "one", {}, [{"a": float("nan")}])
    assert not (tmp_path / "one").exists()


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    store.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_text() == "old"


def test_a_commit_is_of_this_checkout_or_unknown(tmp_path, monkeypatch):
    """Not of the repository around it, nor of the one that a stray variable names."""

    def git(folder, *command):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", folder, *names, *command], check=True)

    inner = tmp_path / "inner"
    (inner / "book").mkdir(parents=True)
    (inner / "book" / "one.ipynb").write_text("{}")
    monkeypatch.setattr(store, "ROOT", inner)
    assert store.commit() == "unknown"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "outer")
    assert store.commit() == "unknown"
    git(inner, "init", "-q")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "inner")
    own = store.commit()
    assert len(own) == 12
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert store.commit() == own
    (inner / "notes.md").write_text("of no code")
    assert store.commit() == own
    (inner / "book" / "one.ipynb").write_text("[]")
    assert store.commit() == f"{own}-dirty"
    monkeypatch.setenv("PATH", "")
    assert store.commit() == "unknown"


def test_unknown_table_lists_those_there_are(root):
    (root / "results" / "small.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"no table 'large' .* there are: small"):
        read_table("large")


def test_rows_replace_those_with_their_key(tmp_path):
    """However a CSV file has written the key; rows of other runs stay."""
    path, key = tmp_path / "t.csv", ["task", "seed", "rate", "words"]
    runs = []
    for task, seed in [("mr", 1), ("mr", 2), ("cb", 1)]:
        given = {"task": task, "seed": seed, "rate": 0.0, "words": ["a"], "of": "no"}
        rows = [{"measure": m, "value": seed / 7} for m in ("x", "y")]
        runs.append(made(tmp_path / f"{task}{seed}", given, rows, data=task))
    first = collect(runs, key, path, "make")
    assert list(first) == [*key, "measure", "value"]
    assert len(first) == 6
    text = path.read_text()
    assert collect(runs, key, path, "make").shape == first.shape
    assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())
    again = {"task": "mr", "seed": 2, "rate": 0.0, "words": ["a"]}
    anew = made(tmp_path / "again", again, [{"measure": "x", "value": 0.9}])
    collect([anew], key, path, "make")
    table, origin = read_table(path)
    kept = table.set_index(["task", "seed", "measure"])["value"].to_dict()
    assert len(table) == 5
    assert kept["mr", 1, "y"] == 1 / 7
    assert kept["mr", 2, "x"] == 0.9
    assert ("mr", 2, "y") not in kept
    assert {part.get("data") for part in origin.values()} == {"mr", "cb", None}
    assert all(part["torch"] == "2.0" for part in origin.values())
    known = store.keys_in(path, key)
    assert known == {'mr, 1, 0, ["a"]', 'mr, 2, 0, ["a"]', 'cb, 1, 0, ["a"]'}


def test_a_row_may_override_the_key_and_failed_runs_give_none(tmp_path):
    rows = [{"value": 1}, {"task": "labels", "value": 2}]
    runs = [
        made(tmp_path / "a", {"task": "mr"}, rows),
        made(tmp_path / "b", {"task": "cb"}, rows, error="no"),
        SimpleNamespace(folder=tmp_path / "none"),
    ]
    table = collect(runs, ["task"], tmp_path / "t.csv", "make")
    assert table.to_dict("list") == {"task": ["mr", "labels"], "value": [1, 2]}


def test_a_table_names_no_folder_of_the_machine(tmp_path):
    names = ["/home/me/a/500", "/home/me/b/500", "models/x.gguf", "/me/y.gguf"]
    names += ["org/llama-3.2", "/home/d/mr.jsonl", "mr"]
    rows = [{"value": 1}]
    runs = [made(tmp_path / f"{k}", {"model": n}, rows) for k, n in enumerate(names)]
    table = collect(runs, ["model"], tmp_path / "t.csv", "make")
    short = ["a/500", "b/500", "x", "y", "org/llama-3.2", "d/mr.jsonl", "mr"]
    assert [*table.model] == short
    assert store.keys_in(tmp_path / "t.csv", ["model"]) == {*table.model}


@pytest.mark.parametrize(
    "values",
    [[1, "one", None], [2**70, -1, 0], [0.5, True, "x"], [[1, 2], "a", None]],
    ids=str,
)
def test_a_column_of_mixed_kinds_or_huge_numbers_is_written(values, tmp_path):
    runs = [
        made(tmp_path / str(n), {"n": n}, [{"value": value}])
        for n, value in enumerate(values)
    ]
    collect(runs, ["n"], tmp_path / "t.csv", "make")
    assert len(read_table(tmp_path / "t.csv")[0]) == len(values)


def test_committed_tables_come_out_as_they_were(tmp_path):
    """Reading and writing changes no digit, so that rows added change no other."""
    for path in sorted(store.table_path("x").parent.glob("*.csv")):
        table, _ = read_table(path)
        written = table.to_csv(index=False).splitlines()
        for old, new in zip(path.read_text().splitlines(), written, strict=True):
            if old != new:
                pairs = zip(old.split(","), new.split(","), strict=True)
                assert all(float(a) == float(b) for a, b in pairs if a != b), old


@pytest.mark.slow
def test_two_processes_collect_into_one_table(tmp_path):
    """Rows from two processes at once: none is lost."""
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from icl_book.store import collect\n"
        "for folder in sorted(Path(sys.argv[1]).glob(sys.argv[2] + '-*')):\n"
        "    run = SimpleNamespace(folder=folder)\n"
        "    collect([run], ['who', 'n'], Path(sys.argv[1]) / 't.csv', 'make')\n"
    )
    for who in "ab":
        for n in range(10):
            made(tmp_path / f"{who}-{n}", {"who": who, "n": n}, [{"v": n}])
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen([*command, who]) for who in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    table, _ = read_table(tmp_path / "t.csv")
    assert sorted(table.itertuples(index=False, name=None)) == [
        (who, n, n) for who in "ab" for n in range(10)
    ]


def test_committed_tables_say_what_made_them():
    tables = sorted(store.table_path("x").parent.glob("*.csv"))
    assert tables
    for path in tables:
        table, origin = read_table(path)
        assert origin, f"{path.name} has no record of its origin"
        runs = [] if "source" in origin else origin.values()
        for run in runs:
            assert {"command", "commit", "torch"} <= {*run}
            drawn = run.get("data") == "drawn from the seed"
            assert drawn or {"model", "data_sha256"} <= {*run, *table}
            assert "dirty" not in run["commit"], f"{path.name} is of no commit"


def test_words_that_look_like_numbers(tmp_path):
    """Every collect leaves the rows that are there as they are."""
    every = ["v1", "v1.0", "007", "7", "NA", "None", "1e3", "0110"]
    for words in (every, ["007", "7"]):
        path = tmp_path / f"{len(words)}.csv"
        for n in range(2):
            for word in words:
                folder = tmp_path / f"{len(words)}-{word}-{n}"
                run = made(folder, {"w": word}, [{"found": word}])
                table = collect([run], ["w"], path, "command")
        assert table.w.tolist() == table.found.tolist() == words
        assert keys_in(path, ["w"]) >= {*words}
