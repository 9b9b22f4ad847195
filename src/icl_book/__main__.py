"""The commands ``python -m icl_book book``, ``chapter``, ``report`` and ``sweep``."""

import argparse
import logging
import signal
import sys
import time
from pathlib import Path

from icl.assets import AssetError
from icl_book import build
from icl_book.execute import parse_parameters
from icl_book.store import NOTEBOOK, ROOT, BookError, table_path
from icl_book.sweep import make_table


def book(scale, to):
    print(build.build_book(scale, to.resolve()) / "index.html")


def chapter(name, parameters):
    if name not in build.chapters():
        there = ", ".join(build.chapters())
        raise BookError(f"there is no chapter {name!r}; there are {there}")
    path = build.chapter_path(name)
    values = parse_parameters(path, parameters)
    run, record = build.run_page(path, values, progress_bar=sys.stderr.isatty())
    print(f"{run.folder / NOTEBOOK}: {build.costs(record)}")


def report(parameters):
    notebook = ROOT / "experiments" / "report.ipynb"
    values = parse_parameters(notebook, parameters)
    print(build.write_report(values, stdout_file=sys.stdout))


def sweep(grid, to, dry, committed, **options):
    table = table_path(grid.stem) if committed else None
    return make_table(grid, to, table, dry=dry, **options)


def main(arguments=None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m icl_book", description=__doc__)
    commands = parser.add_subparsers(required=True)
    own = commands.add_parser("book", help="run every chapter, build the pages")
    own.add_argument("--scale", default="laptop", choices=("smoke", "laptop", "paper"))
    own.add_argument("--to", type=Path, default=ROOT / "_build" / "book")
    own.set_defaults(command=book)
    own = commands.add_parser("chapter", help="run one chapter")
    own.add_argument("name")
    own.add_argument("parameters", nargs="*", metavar="key=value")
    own.set_defaults(command=chapter)
    own = commands.add_parser("report", help="one model on one task: a page, a record")
    own.add_argument("parameters", nargs="*", metavar="key=value")
    own.set_defaults(command=report)
    own = commands.add_parser("sweep", help="run a grid, and collect its table")
    own.add_argument("grid", type=Path, help="as those in experiments/")
    own.add_argument("--to", type=Path, help="folder; default _build/sweeps/GRID")
    own.add_argument("--scheduler", help="tcp://HOST:PORT; default this machine")
    own.add_argument("--scheduler-file", type=Path)
    own.add_argument("--workers", type=int, help="local; default one per GPU or core")
    own.add_argument("--timeout", type=float, default=30, help="seconds to connect")
    own.add_argument("--retry-failed", action="store_true")
    own.add_argument("--dry-run", action="store_true", dest="dry", help="print runs")
    own.add_argument("--committed", action="store_true", help="collect into results/")
    own.add_argument("--only-missing", action="store_true", help="not in the table")
    own.set_defaults(command=sweep)
    options = vars(parser.parse_args(arguments))
    start = time.perf_counter()
    for stop in (signal.SIGTERM, signal.SIGHUP):  # as control-C: nothing is left behind
        if signal.getsignal(stop) is signal.SIG_DFL:  # nohup has another
            signal.signal(stop, signal.default_int_handler)
    try:
        done = options.pop("command")(**options)
    except (BookError, AssetError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logging.disable()  # asyncio's, of the cell that did not end
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    print(f"after {time.perf_counter() - start:.0f} s")
    return int(done is False)  # a sweep some of whose runs have failed


if __name__ == "__main__":
    sys.exit(main())
