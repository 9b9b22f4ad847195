"""Result tables: written whole or not at all, and read with their origin."""

import os

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
