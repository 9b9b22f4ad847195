"""Build the book from what its chapters gave, each run once."""

import filecmp
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
from filelock import FileLock
from nbconvert import HTMLExporter

from icl.assets import ASSETS, cache_dir, fetch, sha256
from icl_book import execute, scoreboard
from icl_book.execute import entered, read_parameters
from icl_book.store import NOTEBOOK, RESULT, ROOT, BookError, read_run, write_atomically
from icl_book.sweep import log
from icl_book.web import lighten

#: Of MathJax, the parts that all formulas need, and files for some.
MATHJAX = (
    "core",
    "input/tex",
    "output/chtml",
    "output/chtml/fonts/tex",
    "a11y/assistive-mml",
)
MATHJAX_FILES = re.compile(
    r".*/static/mathjax/(output/chtml/fonts/woff-v2/.*\.woff"
    r"|input/tex/extensions/.*\.js)$"
)

#: What nbconvert writes of a picture in SVG.
NO_ALT = 'alt="No description has been provided for this image"'
#: Of a report: pictures fit on a phone, lines are no longer than one reads.
REPORT_STYLE = """body { max-width: 56rem; margin: auto; }
.jp-OutputArea :is(svg, img) { max-width: 100%; height: auto; }"""


def notebooks() -> list[str]:
    """Names of the pages that run, in the order of ``_toc.yml``."""
    toc = (ROOT / "_toc.yml").read_text()
    names = re.findall(r"(?:file|root): *book/(\S+)", toc)
    return [name for name in names if chapter_path(name).is_file()]


def chapters() -> list[str]:
    """Names of the numbered pages, the chapters, in order."""
    return [name for name in notebooks() if name[0].isdigit()]


def chapter_path(name: str) -> Path:
    """The notebook of a page."""
    return ROOT / "book" / f"{name}.ipynb"


def run_page(path: Path, given: dict, **options):
    """``(run, record)`` of a page; failed runs with the same parameters are deleted."""
    (run,) = execute.plan(path, [given], ROOT / "_build" / "runs")
    record = execute.run_once(run, **options)
    for folder in run.folder.parent.glob(f"{path.stem}-*"):
        status, old = read_run(folder)
        if status == "failed" and old["parameters"] == run.parameters:
            shutil.rmtree(folder, ignore_errors=True)
    return run, record


def costs(record: dict) -> str:
    """What a run took, in words."""
    again = ", unchanged since its last run" if record["cached"] else ""
    return f"{record['seconds']:.0f} s, {record['peak_gb']:.1f} GB{again}"


def write_report(values: dict, **options) -> Path:
    """Run ``experiments/report.ipynb`` with these parameters; its page.

    The page, without code and whole in one file, and beside it the run's record lie in
    ``_build/reports``, named after the model, the task and the run's fingerprint.
    Options are those of :func:`icl_book.execute.run_once`.
    """
    source = ROOT / "experiments" / "report.ipynb"
    run, record = run_page(source, values, **options)
    notebook = executed_page(source, run.folder / NOTEBOOK)
    title, *rest = notebook.cells
    rest.sort(key=lambda cell: "first" not in cell.metadata.get("tags", ()))
    notebook.cells = [title, *rest]  # the answer before what it is made of
    hidden = ("input", "input_prompt", "output_prompt")
    exporter = HTMLExporter(**{f"exclude_{part}": True for part in hidden})
    page, _ = exporter.from_notebook_node(notebook)
    for cell in notebook.cells:
        if text := cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            page = page.replace(NO_ALT, f'alt="{html.escape(text)}"', 1)
    # for diagrams and formulas, of which there are none: these ask other servers
    page = re.sub("<script.*?</script>", "", page, flags=re.S)
    page = page.replace("</head>", f"<style>{REPORT_STYLE}</style></head>", 1)
    names = [Path(run.parameters[name]).name for name in ("model", "task")]
    names = [re.sub(r"\.(gguf|jsonl)$", "", name) for name in names]
    name = "-".join([*names, run.fingerprint[:6]])
    path = ROOT / "_build" / "reports" / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=1))
    write_atomically(path, page)
    return path


def build_book(scale: str, folder: Path) -> Path:
    """Run every chapter at ``scale`` and build the HTML, warnings as errors; the folder
    with the pages."""
    paths = {name: chapter_path(name) for name in notebooks()}
    known = {name: read_parameters(path) for name, path in paths.items()}
    download_assets()
    records = {}
    for name, path in paths.items():
        log(f"{name} ...", end=" ")
        run, record = run_page(path, {"scale": scale} if "scale" in known[name] else {})
        records[name] = record | {"folder": run.folder}
        log(costs(record))
    folder.mkdir(parents=True, exist_ok=True)
    pages, mark = folder / "html", folder / ".made-of"
    with FileLock(folder / ".lock"):  # another build may be at it
        tools, made_of = _made_of(records, scale)
        before = mark.read_text().split() if mark.is_file() else []
        if pages.is_dir() and before == [tools, made_of]:
            log("the pages are as they were")
        else:
            _build_pages(records, scale, folder, before[:1] == [tools])
            mark.write_text(f"{tools}\n{made_of}\n")
    old, new = (path / "book" / "verdicts.svg" for path in (ROOT, folder / "source"))
    if scale == "laptop" and new.read_bytes() != old.read_bytes():
        log(f"the README's picture has other verdicts: cp {new} book/")
    return pages


def _made_of(records, scale):
    """Hashes of what all pages are made with, and of that and what each is made of."""
    book, lock = [*(ROOT / "book").rglob("*")], ROOT.glob("requirements.lock")
    tools = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.jinja")]
    tools += [*ROOT.glob("_*.yml"), *lock]
    tools += [path for path in book if path.suffix not in (".md", ".ipynb")]
    files = [*tools, *book, *ROOT.glob("README.md")]
    files += [record["folder"] / NOTEBOOK for record in records.values()]
    parts = [scale, str(os.cpu_count())]
    parts += [record["fingerprint"] for record in records.values()]
    return _digest([], tools), _digest(parts, files)


def _digest(parts, files):
    marks = [*parts, *(f"{p} {sha256(p)}" for p in sorted(files) if p.is_file())]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def _build_pages(records, scale, folder, again):
    """Build the pages; ``again`` if what all are made with is as it was, and the last
    build was finished: then those alone whose sources have changed."""
    if not again:
        shutil.rmtree(folder / "_build", ignore_errors=True)
    new, source = folder / "new", folder / "source"
    _assemble(records, scale, new)
    (folder / ".made-of").unlink(missing_ok=True)
    replace_changed(new, source)
    log("building the pages ...", end=" ")
    start = time.perf_counter()
    run_sphinx(folder)
    pages = folder / "html"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(folder / "_build" / "html", pages)
    lighten(pages)
    log(f"{time.perf_counter() - start:.0f} s")


def replace_changed(new: Path, folder: Path):
    """Give ``folder`` the files of ``new``, which goes. Those alike keep their times,
    the others are of now: by these Sphinx knows what has changed."""
    for path in [p for p in new.rglob("*") if p.is_file()]:
        old = folder / path.relative_to(new)
        if old.is_file() and filecmp.cmp(old, path, shallow=False):
            shutil.copystat(old, path)
        else:
            os.utime(path)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def run_sphinx(folder: Path):
    """Build ``folder/_build/html`` from ``folder/source``, warnings as errors."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build"]
    command += [folder / "source", "--path-output", folder]
    command += ["-W", "-n", "--keep-going", "-q"]
    own = execute.kernel_env()
    run = subprocess.run(command, capture_output=True, text=True, env=own)
    if run.returncode:
        problems = [s for s in run.stderr.splitlines() if "WARN" in s or "ERR" in s]
        tail = problems[-30:] or (run.stdout + run.stderr).splitlines()[-30:]
        raise BookError("\n".join(tail) + "\n\nthe pages could not be built")


def download_assets():
    """Fetch and convert all that chapters read, before any of them is timed."""
    from icl.models import built_in  # torch and transformers: not for every command

    start = time.perf_counter()
    log("model, text and MathJax ...", end=" ")
    for name in ASSETS:
        fetch(name)
    built_in()
    log(f"{time.perf_counter() - start:.0f} s, in {cache_dir()}")


def _assemble(records, scale, source):
    """A copy of the book's sources, with its chapters executed."""
    shutil.rmtree(source, ignore_errors=True)
    left_out = shutil.ignore_patterns("*.ipynb", "*.toml", ".*")
    shutil.copytree(ROOT / "book", source / "book", ignore=left_out)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, source / name)
    executions, found, texts = [], {}, {}
    for name, record in records.items():
        page = executed_page(chapter_path(name), record["folder"] / NOTEBOOK)
        if name in chapters():
            seconds, memory = f"{record['seconds']:.0f}", f"{record['peak_gb']:.1f}"
            executions.append([f"{{doc}}`{name}`", scale, seconds, memory])
            found[name] = record["findings"]
            facts = [f"{seconds} s", f"{memory} GB", f"{os.cpu_count()} cores"]
            badges = " ".join(f"{{bdg-primary-line}}`{fact}`" for fact in facts)
            title, *rest = page.cells[0].source.split("\n", 1)
            page.cells[0].source = "\n\n".join([title, badges, *rest])
        else:
            told = [c.source for c in page.cells if c.cell_type == "markdown"]
            texts[name] = "\n".join(told)
        nbformat.write(page, source / "book" / f"{name}.ipynb")
    claims = scoreboard.read_claims(ROOT / "book" / "claims.toml")
    cards = scoreboard.judge(claims, found)
    pages = [*ROOT.glob("README.md"), *(ROOT / "book").glob("*.md")]
    texts |= {path.name: path.read_text("utf-8") for path in pages}
    scoreboard.check_numbers(cards, texts)
    (source / "book" / "claims.md").write_text(scoreboard.markdown(cards), "utf-8")
    scoreboard.picture(cards, source / "book" / "verdicts.svg")
    rows = pd.DataFrame(row for card in cards for row in card["found"])
    rows = rows.drop(columns="published", errors="ignore").round(6)
    rows.to_csv(source / "book" / "findings.csv", index=False)
    data = json.dumps(cards, indent=1, ensure_ascii=False)
    (source / "book" / "findings.json").write_text(data, encoding="utf-8")
    columns = ["chapter", "scale", "seconds", "peak memory, GB"]
    table = pd.DataFrame(executions, columns=columns)
    table.to_csv(source / "book" / "execution.csv", index=False)
    _unpack_mathjax(source / "_mathjax" / "mathjax")


def _unpack_mathjax(folder):
    """MathJax without its menu, which makes each formula a stop of the tab key."""
    with zipfile.ZipFile(fetch("mathjax")) as wheel:
        for member in wheel.namelist():
            if match := MATHJAX_FILES.match(member):
                path = folder / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(wheel.read(member))
        within = "sphinx-mathjax-offline/static/mathjax"
        parts = [wheel.read(f"{within}/{n}.js") for n in ("startup", *MATHJAX)]
    parts.append(f"MathJax.loader.preLoad(...{json.dumps(MATHJAX)});".encode())
    (folder / "tex-chtml.js").write_bytes(b"\n".join(parts))


def executed_page(source: Path, run: Path):
    """A notebook with its prose as it stands and the outputs of its run.

    Only code decides whether a notebook runs again, so its prose may be newer. The
    first cell that enters a finding of a claim gets an anchor before it.
    """
    page, done = (nbformat.read(path, as_version=4) for path in (source, run))
    outputs, cells = [c for c in done.cells if c.cell_type == "code"], []
    linked = set()
    for cell in page.cells:
        if cell.cell_type != "code":
            cells.append(cell)
            continue
        ran = outputs.pop(0)
        ran.metadata = cell.metadata
        *_, findings = entered([ran])
        claims = {finding["claim"] for finding in findings} - linked
        linked |= claims
        if claims:
            spans = "".join(f'<span id="claim-{n}"></span>' for n in sorted(claims))
            anchors = nbformat.v4.new_markdown_cell(spans, id=f"claims-{min(claims)}")
            cells.append(anchors)
        # what is entered is nothing to read
        ran.outputs = [o for o in ran.outputs if RESULT not in o.get("data", ())]
        cells.append(ran)
        tags = outputs[0].metadata.get("tags", ()) if outputs else ()
        if "injected-parameters" in tags:
            cells.append(outputs.pop(0))
    done.metadata.pop("papermill", None)  # paths of this machine
    _fold(cells)
    page.cells, page.metadata = cells, done.metadata
    return page


def _fold(cells):
    """Tag cells as MyST-NB folds them: all code but the argument and solutions, and
    the tables of checks and of how the page was made."""
    solution = False
    for cell in cells:
        if cell.cell_type != "code":
            solution |= "{solution-start}" in cell.source
            solution &= "{solution-end}" not in cell.source
            continue
        tags = [*cell.metadata.get("tags", ())]
        if re.search(r"^page\.(checks|end)\(", cell.source, re.M):
            tags.append("hide-cell")
            mystnb = cell.metadata.get("mystnb", {})
            cell.metadata["mystnb"] = mystnb | {"code_prompt_show": "Show the table"}
        elif "argument" not in tags and not solution:
            tags.append("hide-input")
        cell.metadata["tags"] = tags
