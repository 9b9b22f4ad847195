"""Result tables: written whole or not at all, and read with their origin."""

import os
import subprocess
import sys

import pytest

from icl import results


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path


def test_round_trip(root):
    rows = [{"task": "mr", "accuracy": 0.5}, {"task": "cb", "accuracy": 0.25}]
    results.write_table("small", rows, {"seed": 3})
    table, origin = results.read_table("small")
    assert table.to_dict("records") == rows
    assert origin == {"seed": 3}


def test_interrupted_write_keeps_the_old_table(root, monkeypatch):
    results.write_table("small", [{"a": 1}], {})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write_table("small", [{"a": 2}], {})
    assert results.read_table("small")[0].a.tolist() == [1]


def test_unknown_table_lists_those_there_are(root):
    results.write_table("small", [{"a": 1}], {})
    with pytest.raises(ValueError, match=r"no table 'large' .* there are: small"):
        results.read_table("large")


FACTS = {"model": "m", "data_sha256": "12ab", "demonstrations": 4, "commit": "c0"}


def test_added_rows_replace_those_with_the_same_key(root):
    key = ["task", "seed"]
    first = [
        {"task": "mr", "seed": s, "mean": s / 7, "layers": "0.1 0.2"} for s in (1, 2)
    ]
    results.add_rows("t", first, key, "m/mr", FACTS)
    results.add_rows("t", [{"task": "cb", "seed": 1, "mean": 0.3}], key, "m/cb", FACTS)
    results.add_rows("t", [{"task": "mr", "seed": 2, "mean": 0.9}], key, "m/mr", FACTS)
    table, origin = results.read_table("t")
    assert len(table) == 3
    means = table.set_index(key)["mean"].to_dict()
    assert means == {("mr", 1): 1 / 7, ("mr", 2): 0.9, ("cb", 1): 0.3}
    assert set(origin) == {"m/mr", "m/cb"}


def test_rows_of_other_data_do_not_mix(root):
    results.add_rows("t", [{"a": 1}], ["a"], "m/mr", FACTS)
    for fact, value in [("data_sha256", "34cd"), ("model", "n"), ("demonstrations", 8)]:
        with pytest.raises(ValueError, match=rf"m/mr with {fact} .* they must not mix"):
            results.add_rows("t", [{"a": 2}], ["a"], "m/mr", FACTS | {fact: value})
    assert results.read_table("t")[0].a.tolist() == [1]


def test_rows_that_are_there_are_found(root):
    columns = ["seed", "mean", "note"]
    assert results.rows_made("t", columns, "m/mr", FACTS, task="mr").empty
    for task, seed in [("mr", 1), ("mr", 2), ("cb", 1)]:
        row = {"task": task, "seed": seed, "mean": seed / 7}
        results.add_rows("t", [row], ["task", "seed"], f"m/{task}", FACTS)
    made = results.rows_made("t", columns, "m/mr", FACTS, task="mr")
    assert made[["seed", "mean"]].to_numpy().tolist() == [[1, 1 / 7], [2, 2 / 7]]
    assert made.note.isna().all()
    with pytest.raises(ValueError, match=r"m/mr with model .* must not mix"):
        results.rows_made("t", columns, "m/mr", FACTS | {"model": "n"}, task="mr")


def test_table_of_another_format_is_refused(root):
    made = {"m/mr": results.provenance(**FACTS) | {"format": 99, "commit": "c0ffee"}}
    results.write_table("t", [{"a": 1}], made)
    with pytest.raises(ValueError, match="format 99, but .* format 1; .*c0ffee"):
        results.read_table("t")


def test_two_processes_add_to_one_table(root):
    """Rows from two processes at once: none is lost."""
    code = (
        "import sys; from pathlib import Path; from icl import results\n"
        "results.ROOT = Path(sys.argv[1])\n"
        "for n in range(20):\n"
        "    row = {'who': sys.argv[2], 'n': n}\n"
        "    results.add_rows('t', [row], ['who', 'n'], 'p', {})\n"
    )
    arguments = [sys.executable, "-c", code, str(root)]
    both = [subprocess.Popen([*arguments, who]) for who in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    table, _ = results.read_table("t")
    assert sorted(table.itertuples(index=False, name=None)) == [
        (who, n) for who in "ab" for n in range(20)
    ]


def test_committed_tables_say_what_made_them():
    tables = sorted(results.table_path("x").parent.glob("*.csv"))
    assert tables
    for path in tables:
        _, origin = results.read_table(path.stem)
        assert origin, f"{path.name} has no record of its origin"
        runs = [] if "source" in origin else origin.values()
        for run in runs:
            assert {"command", "commit", "seeds", "torch"} <= {*run}
            drawn = run.get("data") == "drawn from the seed"
            assert drawn or {"model", "data_sha256"} <= {*run}
            assert "dirty" not in run["commit"], f"{path.name} is of no commit"
