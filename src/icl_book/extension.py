"""A Sphinx extension for the book's pages: which chapter uses a function, and buttons
that lead to a public repository where there is one."""

import ast
import json
from functools import lru_cache

from icl_book.build import chapter_path, chapters


def used_names(notebook: dict) -> set[str]:
    """Full names of what a notebook takes from the package, ``icl.module.name``.

    Args:
        notebook: as in its file; only code cells are read.
    """
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    trees = [ast.parse("".join(cell["source"])) for cell in cells]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    taken, modules = set(), {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "icl":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                taken.add(whole)
                modules[name.asname or name.name] = whole
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            taken.add(f"{modules.get(node.value.id, node.value.id)}.{node.attr}")
    return {name for name in taken if name.startswith("icl.")}


@lru_cache(1)
def users() -> dict[str, list[str]]:
    """Chapters by the full name of what they use, in the order of the book."""
    found = {}
    for chapter in chapters():
        notebook = json.loads(chapter_path(chapter).read_text(encoding="utf-8"))
        for name in used_names(notebook):
            found.setdefault(name, []).append(chapter)
    return found


def _say_where(app, what, name, obj, options, lines):
    where = users().get(name)
    if where and what in ("function", "class"):
        pages = ", ".join(f":doc:`/book/{chapter}`" for chapter in where)
        lines += ["", f"*Used in* {pages}.", ""]


def _skip(app, what, name, obj, skip, options):
    # fields of a named tuple are among its attributes already
    return skip or type(obj).__name__ == "_tuplegetter"


def _buttons(app, config):
    options = config.html_theme_options
    there = bool(options.get("repository_url"))
    for what in ("repository", "issues", "edit_page"):
        options[f"use_{what}_button"] = there
    options["use_fullscreen_button"] = False  # browsers have one
    interface = {"notebook_interface": "jupyterlab"}
    hub = {"binderhub_url": "https://mybinder.org"} if there else {}
    options["launch_buttons"] = interface | hub


def setup(app):
    app.connect("config-inited", _buttons)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _say_where)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
