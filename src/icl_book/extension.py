"""A Sphinx extension for the book's pages: which chapter uses a function, what a term
means, what a page is about and who cites what, a chapter's notebook and script, and
buttons that lead to a public repository."""

import ast
import html
import json
import re
import shutil
import textwrap
from functools import lru_cache
from pathlib import Path

import nbformat
from docutils import nodes
from nbconvert import PythonExporter
from sphinx import addnodes

from icl_book.build import chapter_path, chapters
from icl_book.execute import named_tables
from icl_book.store import table_path


def used_names(tree: ast.AST) -> set[str]:
    """Full names of what code takes from the package, ``icl.module.name``."""
    known, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"icl\b", node.module or ""):
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "icl":
                    known[name.asname or "icl"] = name.name if name.asname else "icl"
    names.update(known.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base, _, rest = ast.unparse(node).partition(".")
            if base in known:
                names.add(f"{known[base]}.{rest}")
    return names


@lru_cache(1)
def users() -> dict[str, list[str]]:
    """Chapters by the full name of what they use, in the order of the book."""
    found = {}
    for chapter in chapters():
        cells = nbformat.read(chapter_path(chapter), as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        for name in used_names(ast.parse("\n".join(code))):
            found.setdefault(name, []).append(chapter)
    return found


def _say_where(app, what, name, obj, options, lines):
    where = users().get(name)
    if where and what in ("function", "class"):
        pages = ", ".join(f":doc:`/book/{chapter}`" for chapter in where)
        lines += ["", f"*Used in* {pages}.", ""]


def _made_from(app, name, source):
    """A chapter's page depends on its notebook, too, which is offered beside it."""
    if (notebook := chapter_path(name.removeprefix("book/"))).is_file():
        app.env.note_dependency(str(notebook))


def _purge(app, env, docnames):
    """Forget all pages that are read again before the first is: a label may move."""
    for name in docnames:
        app.emit("env-purge-doc", env, name)
        env.clear_doc(name)


def _outdated(app, env, added, changed, removed):
    """The page of the package, if chapters use other functions of it."""
    known, env.icl_users = getattr(env, "icl_users", None), users()
    return [] if known == env.icl_users else {"book/api"} & env.found_docs


def _shown_elsewhere(app, env):
    """All pages, if what they show of each other has changed; Sphinx would leave old
    titles and meanings on those whose own sources are as they were."""
    std, math = env.domaindata["std"], env.domaindata["math"]
    cited = env.get_domain("cite")
    cites = {(r.docname, t.key) for r in cited.citation_refs for t in r.targets}
    shown = [
        {name: str(title) for name, title in env.titles.items()},
        [env.toc_secnumbers, env.toc_fignumbers, math["objects"]],
        env.domaindata["py"]["objects"],
        [std["labels"], std["anonlabels"], std["terms"], sorted(cites)],
        [env.get_doctree(n).astext() for n in env.found_docs if n.endswith("glossary")],
    ]
    shown = json.dumps(shown, sort_keys=True, default=str)
    known, env.icl_shown = getattr(env, "icl_shown", None), shown
    # Sphinx forgets the entries in the search's index of pages that are not written
    entries = env.domaindata["index"]["entries"]
    return [n for n in entries if entries[n]] if known == shown else env.found_docs


def _skip(app, what, name, obj, skip, options):
    # fields of a named tuple are among its attributes already
    return skip or type(obj).__name__ == "_tuplegetter"


def _meanings(app, doctree, name):
    """Show what a term means when a link to the glossary is pointed at."""
    if "book/glossary" not in app.env.found_docs:
        return
    glossary = app.env.get_doctree("book/glossary")
    terms = glossary.findall(addnodes.glossary)
    items = [i for t in terms for i in t.findall(nodes.definition_list_item)]
    meaning = {i: item[-1] for item in items for t in item[:-1] for i in t["ids"]}
    for link in doctree.findall(nodes.reference):
        term = link.get("refuri", "").partition("glossary.html#")[2]
        if term in meaning:
            link["reftitle"] = " ".join(meaning[term].astext().split())


def _citing(app, doctree, name):
    """Say behind each entry of the bibliography which pages cite it."""
    domain, pages = app.env.get_domain("cite"), {}
    for cited in domain.citation_refs:
        for target in cited.targets:
            pages.setdefault(target.key, set()).add(cited.docname)
    keys = {citation.citation_id: citation.key for citation in domain.citations}
    for entry in doctree.findall(nodes.citation):
        where = nodes.inline(classes=["cited-in"])
        for page in sorted(pages.get(keys.get(entry["ids"][0]), ())):
            to = app.builder.get_relative_uri(name, page)
            title = app.env.titles[page].astext()
            link = nodes.reference("", title, refuri=to, internal=True)
            where += [nodes.Text(", " if len(where) else " Cited in "), link]
        entry.next_node(nodes.paragraph).append(where)


def _describe(app, name, template, context, doctree):
    """Add what searches and links from elsewhere show of a page: its first words."""
    if doctree is None:
        return
    plain = (p for p in doctree.findall(nodes.paragraph) if not p.next_node(nodes.math))
    texts = (" ".join(p.astext().split()) for p in plain)
    text = textwrap.shorten(next((t for t in texts if len(t) > 60), ""), 200)
    title = doctree.next_node(nodes.title).astext()
    facts = {
        'name="description"': text,
        'property="og:description"': text,
        'property="og:title"': title,
        'property="og:site_name"': app.config.html_title,
        'property="og:type"': "article",
        'name="twitter:card"': "summary",
    }
    for key, value in facts.items():
        context["metatags"] += f'<meta {key} content="{html.escape(value)}">\n'


#: The first cell of a notebook that is downloaded, and what follows if the address of
#: the public repository is known, and if it is not.
NEEDS = "# Needs the book's packages and tables: 3 GB of disk, and 4 GB of memory.\n"
HERE = "# Give it the kernel of `.venv`, which `make setup` makes in the book's folder."
HOSTED = """# Where they are missing, as in a hosted notebook, they are installed here.
import importlib.util
import sys

if not importlib.util.find_spec("icl_book"):
    !git clone --quiet --depth 1 {url} icl-book
    %pip install --quiet --editable "icl-book[book]"
    sys.path.insert(0, "icl-book/src")"""


def _downloads(app, name, template, context, doctree):
    """Offer a chapter as a notebook without outputs, as a script, and its tables; where
    the book is published, the whole of it as a PDF."""
    url = app.config.html_theme_options.get("repository_url")
    menus = {button.get("label"): button for button in context["header_buttons"]}
    if doctree is not None and url:
        pdf = {"type": "link", "url": context["pathto"]("book.pdf", 1)}
        pdf |= {
            "icon": "fas fa-book",
            "text": "whole book, .pdf",
            "tooltip": "Download",
        }
        menus["download-buttons"]["buttons"].append(pdf | {"label": "download-book"})
    chapter = name.removeprefix("book/")
    if doctree is None or chapter not in chapters():
        return
    to = Path(app.outdir, "notebooks", chapter)
    to.parent.mkdir(exist_ok=True)
    notebook = nbformat.read(chapter_path(chapter), as_version=4)
    script, _ = PythonExporter(exclude_input_prompt=True).from_notebook_node(notebook)
    to.with_suffix(".py").write_text(script, encoding="utf-8")
    first = NEEDS + (HOSTED.format(url=url) if url else HERE)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first, id="needs"))
    nbformat.write(notebook, to.with_suffix(".ipynb"))
    for button in menus.get("launch-buttons", {"buttons": ()})["buttons"]:
        button["tooltip"] += ", at smoke scale: it has 2 GB of memory"
    menu = menus["download-buttons"]
    menu["buttons"][0]["text"] = ".ipynb, with outputs"
    files = {chapter + ".py": "script", chapter + ".ipynb": "notebook"}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for table in sorted(named_tables("\n".join(code)) - {""}):
        files[f"{table}.csv"] = "table"
        shutil.copy(table_path(table), to.parent)
    for file, kind in files.items():
        address = context["pathto"](f"notebooks/{file}", 1)
        text = file.removeprefix(chapter)
        button = {"type": "link", "url": address, "icon": "fas fa-code", "text": text}
        button |= {"tooltip": f"Download {kind}", "label": f"download-{kind}-button"}
        menu["buttons"].insert(len(menu["buttons"]) if kind == "table" else 1, button)


def _buttons(app, config):
    options = config.html_theme_options
    there = bool(options.get("repository_url"))
    for what in ("repository", "issues", "edit_page"):
        options[f"use_{what}_button"] = there
    options["use_fullscreen_button"] = False  # browsers have one
    hub = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org"}
    options["launch_buttons"] = hub if there else {}


def setup(app):
    app.connect("config-inited", _buttons)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _say_where)
    app.connect("doctree-resolved", _meanings)
    app.connect("doctree-resolved", _citing)
    app.connect("env-get-outdated", _outdated)
    app.connect("env-before-read-docs", _purge)
    app.connect("source-read", _made_from)
    app.connect("env-get-updated", _shown_elsewhere, priority=900)  # of numbers
    app.connect("html-page-context", _describe)
    app.connect("html-page-context", _downloads, priority=900)  # after the theme's
    return {"parallel_read_safe": True, "parallel_write_safe": True}
