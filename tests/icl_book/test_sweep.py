"""Sweeps: grids, keys, rows; and what may go wrong, with real processes on loopback."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from conftest import tiny_model, word_tokenizer

from icl_book.__main__ import main
from icl_book.execute import _folders
from icl_book.store import NOTEBOOK, RECORD, ROOT, BookError, read_run, read_table
from icl_book.sweep import expand, make_table, read_grid

pytestmark = pytest.mark.slow

PARAMETERS = """
n: int = 1  # 0..99: number
kind: str = "plain"  # plain | other: which
rate: float = 0.5  # of nothing
words: str = "a"  # any
model: str = ""  # none
log: str = ""  # file that a line is added to when a run starts
"""
START = """
import os, time
from pathlib import Path
from IPython.display import display
with open(log, "a") as file:
    file.write(f"{n} {os.getpid()}\\n")
here = Path(log).parent
"""
RESULT = """
display(
    {
        "application/vnd.icl.result+json": {"rows": [{"square": n * n}], "facts": {}},
        "text/plain": "",
    },
    raw=True,
)
"""
SLEEP = f"time.sleep(.3)\n{RESULT}"
#: Waits, but in run 0 alone, until a test lets it go on.
HOLD = f"while n == 0 and not (here / 'go').exists():\n    time.sleep(.05)\n{RESULT}"


def write_grid(folder, body=RESULT, start=START, **grid):
    """A grid of the notebook whose second cell is ``body``; runs log themselves."""
    cells = [nbformat.v4.new_markdown_cell("# A notebook")]
    tags = {"tags": ["parameters"]}
    cells.append(nbformat.v4.new_code_cell(PARAMETERS.strip(), metadata=tags))
    cells += [nbformat.v4.new_code_cell(text.strip()) for text in (start, body)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "one.ipynb")
    fixed = {"log": str(folder / "log"), **grid.pop("fixed", {})}
    grid = {"notebook": "one.ipynb", "vary": {"n": "0..3"}, "fixed": fixed} | grid
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder / "grid.yaml"


def kernel(folder):
    """The process that makes run 0."""
    lines = (folder / "log").read_text().splitlines()
    return psutil.Process(next(int(s.split()[1]) for s in lines if s.startswith("0 ")))


def started(folder):
    """``n`` of every run that was begun, in order."""
    log = folder / "log"
    return (
        [int(s.split()[0]) for s in log.read_text().splitlines()]
        if log.exists()
        else []
    )


def table_of(folder):
    return read_table(folder / "out" / "grid.csv")[0]


def runs_of(grid, folder):
    return expand(read_grid(grid), folder)


def rows(folder):
    table = table_of(folder)
    return dict(zip(table.n.tolist(), table.square.tolist(), strict=True))


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*command, output=subprocess.DEVNULL, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=ENVIRONMENT | environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def client(tmp_path):
    """Starts ``python -m icl_book sweep``; what it says is in ``client.txt``."""
    made = []

    def begin(grid, *options, **environment):
        command = ["icl_book", "sweep", grid, "--to", grid.parent / "out", *options]
        with open(tmp_path / "client.txt", "a") as output:
            made.append(start(*command, output=output, **environment))
        return made[-1]

    yield begin
    for process in made:
        kill(process)


def start_worker(address, *options, **environment):
    options = [address, "--host", "127.0.0.1", "--no-dashboard", *options]
    return start("distributed.cli.dask_worker", *options, **environment)


def kill(process):
    """A process and all below it, as a machine that fails would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
    process.wait()


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, workers=2, port=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = port or free.getsockname()[1]
        self.port, self.address = port, f"tcp://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", port, "--no-dashboard"]
        command = ["distributed.cli.dask_scheduler", *options, "--no-show"]
        self.scheduler = start(*command)
        options = ["--nworkers", workers, "--nthreads", 1]
        self.workers = start_worker(self.address, *options)

    def close(self):
        kill(self.workers)
        kill(self.scheduler)


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.close()


def run(grid, cluster, **options):
    options = {"scheduler": cluster.address, "timeout": 60} | options
    return make_table(grid, grid.parent / "out", **options)


# -- what a sweep does ---------------------------------------------------------------


def test_every_run_once_and_a_row_for_each(tmp_path, cluster, capsys):
    grid = write_grid(tmp_path, vary={"n": [1, 2], "kind": ["plain", "other"]})
    assert run(grid, cluster)
    assert sorted(started(tmp_path)) == [1, 1, 2, 2]
    table = table_of(tmp_path)
    assert (table.square == table.n**2).all()
    assert table[["n", "kind"]].drop_duplicates().shape == (4, 2)
    assert set(table.rate) == {0.5}
    assert (table.seconds > 0).all()
    assert table.peak_gb.between(0.01, 4).all()
    assert table.fingerprint.is_unique
    _, origin = read_table(tmp_path / "out" / "grid.csv")
    assert {"torch", "commit", "python"} <= set(*map(set, origin.values()))
    said = capsys.readouterr().out
    assert "4 finished; 0 min left\n" in said  # without a terminal, too
    assert f"4 rows: icl_book.store.read_table('{tmp_path}/out/grid.csv')" in said
    assert run(grid, cluster)
    assert len(started(tmp_path)) == 4
    assert "4 runs: 4 finished" in capsys.readouterr().out
    more = write_grid(tmp_path, vary={"n": "1..3", "kind": ["plain", "other"]})
    assert run(more, cluster)
    assert sorted(started(tmp_path)[4:]) == [3, 3]


def test_failed_runs_are_listed_and_retried_alone(tmp_path, cluster, capsys):
    body = RESULT + "assert n != 2 or (here / 'mended').exists(), 'two'\n"
    grid = write_grid(tmp_path, body, vary={"n": [2, 3]})
    assert not run(grid, cluster)
    out = capsys.readouterr().out
    assert "failed: n=2: In [4] failed with AssertionError: two" in out
    assert rows(tmp_path) == {3: 9}
    shown = Path(re.search(r"n=2: .*\((/.*)\)", out)[1])
    assert "AssertionError" in (shown / NOTEBOOK).read_text()
    assert not run(grid, cluster)
    assert len(started(tmp_path)) == 2
    assert "failed: n=2" in capsys.readouterr().out
    (tmp_path / "mended").touch()
    assert run(grid, cluster, retry_failed=True)
    assert started(tmp_path)[2:] == [2]
    assert rows(tmp_path)[2] == 4
    assert read_run(shown)[0] == "finished"


def test_dry_run_says_what_and_how_long(tmp_path, cluster, capsys):
    assert run(write_grid(tmp_path, SLEEP, vary={"n": [0, 1]}), cluster)
    grid = write_grid(tmp_path, SLEEP, vary={"n": "0..99"})
    capsys.readouterr()
    options = ["--to", str(tmp_path / "out"), "--dry-run", "--workers", "1"]
    assert main(["sweep", str(grid), *options[2:]]) == 0
    assert "not known" in capsys.readouterr().out
    assert main(["sweep", str(grid), *options]) == 0
    out = capsys.readouterr().out
    assert "finished: n=1\nmissing: n=2\n" in out
    assert "100 runs: 2 finished, 98 missing" in out
    made = [read_run(run.folder)[1] for run in runs_of(grid, tmp_path / "out")[:2]]
    minutes = int(re.search(r"about (\d+) min by 1 worker", out)[1])
    left = 98 * sum(record["seconds"] for record in made) / 2
    assert minutes == round(left / 60)
    assert len(started(tmp_path)) == 2
    assert main(["sweep", str(grid), *options, "--only-missing"]) == 0
    assert "98 runs: 98 missing" in capsys.readouterr().out


def test_what_a_table_has_is_left_out(tmp_path, cluster):
    grid = write_grid(tmp_path, key=["n"])
    table = tmp_path / "committed.csv"
    table.write_text("n,square\n1,-1\n2,4\n9,81\n")
    assert run(grid, cluster, table=table, only_missing=True)
    assert sorted(started(tmp_path)) == [0, 3]
    found, origin = read_table(table)
    assert found.to_dict("list") == {"n": [1, 2, 9, 0, 3], "square": [-1, 4, 81, 0, 9]}
    (made,) = origin.values()
    assert made["runs"] == ["0", "3"]
    assert run(grid, cluster, table=table)  # and now all of them
    found = dict(read_table(table)[0].itertuples(index=False, name=None))
    assert found == {0: 0, 1: 1, 2: 4, 3: 9, 9: 81}


def test_numbers_do_not_depend_on_worker_order_or_cluster(tmp_path, cluster):
    """float32, bit for bit; the second time backwards, by one worker of its own."""
    body = """
import torch
torch.manual_seed(n)
x = torch.randn(300, 300)
for _ in range(20):
    x = torch.nn.functional.layer_norm(torch.tanh(x @ x.T / 17), (300,))
row = {"x": x[:3].flatten().tolist(), "count": torch.get_num_threads()}
display({"application/vnd.icl.result+json": {"rows": [row], "facts": {}},
    "text/plain": ""}, raw=True)
"""
    found = []
    for name, order in [("two", [0, 1]), ("one", [1, 0])]:
        (tmp_path / name).mkdir()
        grid = write_grid(tmp_path / name, body, vary={"n": order}, threads=2)
        where = {"scheduler": cluster.address if name == "two" else None, "workers": 1}
        assert run(grid, cluster, **where)
        table = table_of(tmp_path / name).set_index("n").sort_index()
        assert set(table["count"]) == {2}
        found.append(list(table.x))
    assert found[0] == found[1]


COMPARISON = ROOT / "experiments" / "icl_vs_finetuning.ipynb"


def test_the_comparison_is_what_the_library_gives(tmp_path, monkeypatch):
    """Its notebook, with a model that is read once and held for all runs."""
    from icl.comparison import Evaluator, run_scores
    from icl.tasks import load_task

    words = ["good film", "dull story", "bright actors", "boring plot", "moving"]
    examples = [
        {"premise": text, "hypothesis": f"a {text}", "label": n % 3}
        for n, text in enumerate(words)
    ]
    (tmp_path / "data" / "cb").mkdir(parents=True)
    lines = "\n".join(map(json.dumps, examples))
    for split in ("train", "validation"):
        (tmp_path / "data" / "cb" / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("ICL_DATA", str(tmp_path / "data"))
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    grid = {
        "notebook": str(COMPARISON),
        "fixed": {"model": str(folder), "task": "cb", "k": 3},
        "vary": [
            {"setting": "ICL", "seed": 1},
            {"setting": "FT", "seed": 2, "learning_rate": 0.1},
        ],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert make_table(tmp_path / "grid.yaml", tmp_path / "out", workers=1)
    evaluator = Evaluator(tiny_model("llama"), word_tokenizer(), load_task("cb"))
    table = table_of(tmp_path)
    for row in table.to_dict("records"):
        wanted = [row[name] for name in ("setting", "seed", "learning_rate", "k")]
        scores = run_scores(evaluator, *wanted)
        assert row["predictions"] == "".join(map(str, scores.argmax(1)))
        scores = scores - scores.mean(0)
        assert row["calibrated"] == "".join(map(str, scores.argmax(1)))
    assert len(table) == 2


# -- faults --------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_of_a_run(tmp_path, cluster, client):
    grid = write_grid(tmp_path, HOLD, vary={"n": "0..5"})
    sweep = client(grid, "--scheduler", cluster.address)
    until(lambda: len(started(tmp_path)) == 6)  # five are done, and run 0 waits
    run = kernel(tmp_path)
    run.parent().kill()
    until(lambda: not run.is_running(), 5)
    until(lambda: started(tmp_path).count(0) == 2)
    (tmp_path / "go").touch()
    assert sweep.wait(60) == 0
    assert sorted(started(tmp_path)) == [0, 0, 1, 2, 3, 4, 5]
    assert rows(tmp_path) == {n: n * n for n in range(6)}


def test_the_scheduler_restarted(tmp_path, client):
    """Its workers go with it; what they had finished stays, the client goes on."""
    cluster = Cluster()
    grid = write_grid(tmp_path, HOLD)
    sweep = client(grid, "--scheduler", cluster.address)
    try:
        until(lambda: len(started(tmp_path)) == 4)
        until(lambda: len(list(tmp_path.glob(f"out/runs/[!.]*/{RECORD}"))) == 3)
        kill(cluster.scheduler)
        kill(cluster.workers)
        (tmp_path / "go").touch()
        again = Cluster(port=cluster.port)
        try:
            assert sweep.wait(60) == 0
        finally:
            again.close()
    finally:
        cluster.close()
    assert "the scheduler has gone" in (tmp_path / "client.txt").read_text()
    assert sorted(started(tmp_path)) == [0, 0, 1, 2, 3]
    assert rows(tmp_path) == {n: n * n for n in range(4)}


@pytest.mark.parametrize("local", [True, False], ids=["own workers", "a cluster"])
def test_the_client_killed_and_started_again(tmp_path, cluster, client, local):
    """Its own workers end with it; those of a cluster finish what they are at."""
    grid = write_grid(tmp_path, HOLD)
    options = ["--workers", 1] if local else ["--scheduler", cluster.address]
    sweep = client(grid, *options)
    until(lambda: 0 in started(tmp_path))
    run = kernel(tmp_path)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    if local:
        until(lambda: not run.is_running(), 10)
    sweep = client(grid, *options)
    until(lambda: (tmp_path / "client.txt").read_text().count("dashboard") == 2)
    (tmp_path / "go").touch()
    assert sweep.wait(60) == 0
    assert sorted(started(tmp_path)) == [0, *([0] if local else []), 1, 2, 3]
    assert rows(tmp_path) == {n: n * n for n in range(4)}


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("a file system of 160 kB cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(tmp_path, small_disk, cluster):
    grid = write_grid(tmp_path, f"print('x' * 9000)\n{RESULT}", vary={"n": "0..9"})
    with pytest.raises((BookError, OSError), match="No space left"):
        run(grid, cluster)
    runs = runs_of(grid, small_disk)
    states = {one.folder: read_run(one.folder)[0] for one in runs}
    assert {*states.values()} == {"finished", "missing"}
    done = [one for one in runs if states[one.folder] == "finished"]
    before = started(tmp_path)
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    time.sleep(0.5)  # a run that was under way may still be
    assert run(grid, cluster)
    assert rows(tmp_path) == {n: n * n for n in range(10)}
    again = started(tmp_path)[len(before) :]
    assert not {one.parameters["n"] for one in done} & set(again)


def test_a_notebook_that_hangs_is_stopped_and_one_that_ends_has_failed(
    tmp_path, cluster, capsys
):
    body = f"""# a cell
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
while n == 1:
    pass
if n == 2:
    os._exit(3)
{RESULT}"""
    grid = write_grid(tmp_path, body, vary={"n": "0..2"}, limit=8)
    assert not run(grid, cluster)
    out = capsys.readouterr().out
    assert "n=1: the cell '# a cell' was stopped after 8 s" in out
    assert "n=2: the cell '# a cell' ended its kernel" in out
    assert rows(tmp_path) == {0: 0}
    kernels = [int(s.split()[1]) for s in (tmp_path / "log").read_text().splitlines()]
    assert not any(map(psutil.pid_exists, kernels))


def test_an_error_that_nobody_foresaw_is_of_its_run_alone(tmp_path, cluster, capsys):
    """Here what a notebook has entered is no row."""
    body = RESULT.replace("[{", "[n == 1 and 'no row' or {")
    assert not run(write_grid(tmp_path, body, vary={"n": [1, 2]}), cluster)
    out = capsys.readouterr().out
    assert re.search("n=1 .*TypeError", out)
    assert "failed: n=1" in out
    assert rows(tmp_path) == {2: 4}


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_processes_that_a_notebook_starts_end_with_its_run(tmp_path, cluster):
    """Those in sessions of their own, too; the cluster goes on."""
    body = f"""
import subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
with open(here / f"child-{{n}}", "w") as file:
    file.write(str(child.pid))
{RESULT}"""
    assert run(write_grid(tmp_path, body, vary={"n": [0, 1]}), cluster)
    children = [int(path.read_text()) for path in tmp_path.glob("child-*")]
    assert len(children) == 2
    assert not any(map(psutil.pid_exists, children))


def test_a_stopped_sweep_leaves_nothing(tmp_path, client):
    """No process, no socket and no scratch folder, though a temporary folder's path is
    longer than a socket's may be."""
    long = tmp_path / ("scratch-of-a-cluster-job-" * 5)
    long.mkdir()
    grid = write_grid(tmp_path, HOLD)
    sweep = client(grid, "--workers", 2, TMPDIR=str(long))
    until(lambda: len(started(tmp_path)) == 4)
    until(lambda: len(list(tmp_path.glob(f"out/runs/[!.]*/{RECORD}"))) == 3)
    folders = _folders(runs_of(grid, tmp_path / "out")[0])
    assert all(folder.is_dir() for folder in folders)
    below = psutil.Process(sweep.pid).children(recursive=True)
    assert any("ipykernel_launcher" in process.cmdline() for process in below)
    sweep.send_signal(signal.SIGTERM)  # by others a chapter is stopped: test_commands
    assert sweep.wait(60) == 130
    until(lambda: not any(process.is_running() for process in below), 10)
    assert not any(folder.exists() for folder in folders)
    assert rows(tmp_path) == {1: 1, 2: 4, 3: 9}


def test_a_cluster_does_not_hold_on_to_a_model_that_changed(tmp_path, cluster):
    """Its workers outlive the sweep, with the weights of before in their memory."""
    import torch

    folder, found = tmp_path / "model", []
    body = """
from icl.models import load_model
weights = [w.double().sum().item() for w in load_model(model)[0].parameters()]
display({"application/vnd.icl.result+json": {"rows": [{"sum": sum(weights)}], "facts":
    {}}, "text/plain": ""}, raw=True)
"""
    model = tiny_model("gpt2")
    word_tokenizer().save_pretrained(folder)
    for shift in (0.0, 1.0):
        with torch.no_grad():
            for weight in model.parameters():
                weight += shift
        model.save_pretrained(folder)
        given = {"vary": {"n": [0, 1]}, "fixed": {"model": str(folder)}}
        assert run(write_grid(tmp_path, body, **given), cluster)
        table = table_of(tmp_path)
        found.append(set(table["sum"].tolist()[-2:]))
        wanted = sum(w.double().sum().item() for w in model.parameters())
        assert all(value == pytest.approx(wanted) for value in found[-1])


def test_two_sweeps_over_one_folder_at_once(tmp_path, cluster, client):
    grid = write_grid(tmp_path, SLEEP, vary={"n": "0..7"})
    both = [
        client(grid, "--workers", 2),
        client(grid, "--scheduler", cluster.address),
    ]
    assert [one.wait(90) for one in both] == [0, 0]
    assert sorted(started(tmp_path)) == list(range(8))
    assert rows(tmp_path) == {n: n * n for n in range(8)}


def test_a_corrupt_result_is_told_and_made_again(tmp_path, cluster, capsys):
    grid = write_grid(tmp_path)
    assert run(grid, cluster)
    first, second, third, _ = (r.folder for r in runs_of(grid, tmp_path / "out"))
    text = (first / RECORD).read_text()
    assert '"square": 0' in text
    (first / RECORD).write_text(text.replace('"square": 0', '"square": 1'))
    (second / RECORD).write_text(text[:100])
    os.truncate(third / NOTEBOOK, 100)
    capsys.readouterr()
    assert run(grid, cluster)
    assert sorted(started(tmp_path)[4:]) == [0, 1, 2]
    assert capsys.readouterr().out.count("is not what was written") == 3
    assert rows(tmp_path) == {n: n * n for n in range(4)}


# -- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"vary": {"m": [1]}}, "(?s)no parameter 'm'.*kind=plain"),
        ({"vary": {"n": [1, 100]}}, r"n=100 must be int, 0\.\.99"),
        ({"vary": {"kind": ["odd"]}}, "kind=odd must be str, plain, other"),
        ({"fixed": {"n": 1.5}}, "n=1.5 must be int"),
        ({"fixed": {"rate": "fast"}}, "rate=fast must be float"),
        ({"vary": {"words": [["b"]]}}, "words=.*b.* must be str"),
        ({"vary": {"n": []}}, "no run"),
        ({"exclude": [{"n": "0..3"}]}, "no run"),
        ({"exclude": [{"m": 1}]}, "no parameter 'm'"),
        ({"vary": 3}, "'3' is no list of parameters"),
        ({"sweep": 3}, "sweep"),
        ({"key": ["m"]}, "key has m"),
        ({"notebook": "two.ipynb"}, "two.ipynb is no notebook"),
        ({"threads": 0}, "threads=0 must be int"),
        ({"fixed": {"rate": float("nan")}}, "rate=.nan"),
        ({"threads": "two"}, "threads"),
        ({"limit": float("inf")}, "limit"),
        ({"exclude": 3}, "'3' is no list of parameters"),
        ({"key": "kind"}, "key"),
        ({"key": [["n"]]}, "key"),
        ({"key": ["kind"]}, "does not tell all runs apart"),
        ({"notebook": 3}, "notebook"),
    ],
)
def test_a_grid_that_cannot_be_run_says_why(tmp_path, grid, message):
    fixed = {"log": str(tmp_path / "log")} | grid.pop("fixed", {})
    with pytest.raises(BookError, match=message):
        read_grid(write_grid(tmp_path, fixed=fixed, **grid))


@pytest.mark.parametrize("value", ["1:30", "0x10"])
def test_numbers_of_old_yaml_are_none(value, tmp_path):
    """YAML 1.1 would take them for 90 and 16, and 010 for 8."""
    grid = write_grid(tmp_path, vary={"n": 5})
    grid.write_text(grid.read_text().replace("n: 5", f"n: {value}"))
    with pytest.raises(BookError, match=f"n={value} must be int"):
        read_grid(grid)
    grid.write_text(grid.read_text().replace(f"n: {value}", "n: 010"))
    assert [run["n"] for run in read_grid(grid)["runs"]] == [10]


def test_numbers_of_json_are_some(tmp_path):
    grid = write_grid(tmp_path, vary={"rate": 5})
    grid.write_text(grid.read_text().replace("rate: 5", "rate: [1e-3, 1, .5, -2.5E+1]"))
    found = [run["rate"] for run in read_grid(grid)["runs"]]
    assert found == [1e-3, 1.0, 0.5, -25.0]


def test_a_grid_in_another_encoding(tmp_path):
    grid = write_grid(tmp_path)
    grid.write_bytes(b"# Gr\xfcn\n" + grid.read_bytes())
    with pytest.raises(BookError, match="grid.yaml"):
        read_grid(grid)


def test_a_path_of_a_model_counts_from_the_grid(tmp_path):
    (tmp_path / "tiny").mkdir()
    (run, *_) = read_grid(write_grid(tmp_path, fixed={"model": "tiny"}))["runs"]
    assert run["model"] == str(tmp_path / "tiny")


def test_a_grid_that_is_not_there(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err


def test_lists_ranges_blocks_and_exclusions(tmp_path):
    vary = [
        {"n": "1..3", "kind": ["plain", "other"]},
        {"n": [3, 4], "rate": ["1e-3", 1], "words": "a, b"},
    ]
    exclude = [{"n": [1, 2], "kind": "other"}]
    grid = read_grid(write_grid(tmp_path, vary=vary, exclude=exclude))
    found = [(r["n"], r["kind"], r["rate"], r["words"]) for r in grid["runs"]]
    assert found == [
        (1, "plain", 0.5, "a"),
        (2, "plain", 0.5, "a"),
        (3, "plain", 0.5, "a"),
        (3, "other", 0.5, "a"),
        (3, "plain", 0.001, "a, b"),
        (3, "plain", 1.0, "a, b"),
        (4, "plain", 0.001, "a, b"),
        (4, "plain", 1.0, "a, b"),
    ]
    assert grid["varied"] == ["n", "kind", "rate", "words"]


def test_a_scheduler_that_does_not_answer(tmp_path, cluster):
    grid = write_grid(tmp_path)
    with pytest.raises(BookError, match=r"no Dask scheduler answers at tcp://127.*:9 "):
        run(grid, cluster, scheduler="tcp://127.0.0.1:9", timeout=1)
    with pytest.raises(BookError, match="none.json"):
        run(grid, cluster, scheduler_file=tmp_path / "none.json")
    assert started(tmp_path) == []


def test_a_folder_that_cannot_be_written_to(tmp_path, cluster):
    grid = write_grid(tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="Not a directory.*out"):
        run(grid, cluster)


def changed(tmp_path):
    """The environment of a worker whose package differs by a comment."""
    for folder in ("src", "results"):
        shutil.copytree(ROOT / folder, tmp_path / "changed" / folder)
    with open(tmp_path / "changed" / "src" / "icl" / "tasks.py", "a") as file:
        file.write("# changed\n")
    return {"PYTHONPATH": str(tmp_path / "changed" / "src")}


def test_workers_with_another_version_are_refused(tmp_path):
    """And those with several threads; before the first run."""
    cluster = Cluster(workers=1)
    path = changed(tmp_path)
    other = start_worker(cluster.address, "--nthreads", 2, **path)
    try:
        from distributed import Client

        with Client(cluster.address, timeout=30) as client:
            client.wait_for_workers(2, timeout=60)
            threads = client.nthreads()
        with pytest.raises(BookError) as error:
            run(write_grid(tmp_path), cluster)
    finally:
        kill(other)
        cluster.close()
    (strange,) = [address for address, count in threads.items() if count == 2]
    (good,) = [address for address, count in threads.items() if count == 1]
    assert f"{strange}: another package" in str(error.value)
    assert "number of threads (2, not 1)" in str(error.value)
    assert good not in str(error.value)
    assert started(tmp_path) == []


def test_workers_that_join_late_are_refused_alike(tmp_path, client):
    """With other code, or other text: they leave, and the sweep goes on without."""
    cluster = Cluster(workers=1)
    grid = write_grid(tmp_path, HOLD, vary={"n": "0..5"})
    (tmp_path / "text" / "mr").mkdir(parents=True)
    (tmp_path / "text" / "mr" / "train.jsonl").write_text("{}\n")
    text = {"ICL_DATA": str(tmp_path / "text")}
    late = []
    try:
        sweep = client(grid, "--scheduler", cluster.address)
        until(lambda: started(tmp_path) == [0])  # and the only worker waits in it
        late += [start_worker(cluster.address, **e) for e in (changed(tmp_path), text)]
        for process in late:
            process.wait(60)  # the nanny too: it does not come back
        assert started(tmp_path) == [0]
        (tmp_path / "go").touch()
        assert sweep.wait(60) == 0
    finally:
        for process in late:
            kill(process)
        cluster.close()
    said = (tmp_path / "client.txt").read_text()
    for what in ("package", "text"):
        assert re.search(rf"tcp://\S+ leaves: another {what}", said)
    assert sorted(started(tmp_path)) == list(range(6))
    assert rows(tmp_path) == {n: n * n for n in range(6)}
