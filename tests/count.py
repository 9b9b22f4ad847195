"""What the packages hold, in numbers, and the public names of ``icl`` that nobody uses.

``python tests/count.py`` prints both. A public name is a function, a class or a
constant at the top of a module of ``icl``, without a leading underscore. It is used if

- a chapter, an experiment, a benchmark, ``icl_book`` or another module of ``icl`` takes
  it (``from icl.models import load_model``, or ``models.load_model``); an
  ``__init__.py`` only passes names on;
- a text of the project has it: code in a Python block, or its full name,
  ``icl.models.load_model``. ``python -m icl.training`` is ``icl.training.main``;
- something that is used, in the same module, has it as an annotation or a default;
- it is an exception, and raised, or a class that its statement registers under a name
  (``class Mine(Base, kind="mine")``).

Tests do not count, nor do docstrings and the pages of the API.
"""

import ast
import json
import re
from pathlib import Path

from icl_book.extension import used_names

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"icl": 5000, "icl_book": 1300}  # lines with docstrings
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def modules(package: str) -> dict[str, Path]:
    """Files of a package in ``src`` by the full names of their modules."""
    found = {}
    for path in sorted((ROOT / "src" / package).rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Public functions, classes and constants at the top of a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, DEFINED):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in [t for whole in targets for t in ast.walk(whole)]:
                if isinstance(target, ast.Name):
                    found[target.id] = node
    return {name: node for name, node in found.items() if not name.startswith("_")}


def taken_by_text(text: str) -> set[str]:
    """The same of Markdown: its Python blocks, and full names wherever they stand."""
    names = set(re.findall(r"\bicl(?:\.\w+)+", text))
    names |= {f"{name}.main" for name in re.findall(r"-m (icl(?:\.\w+)+)", text)}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return names | used_names(ast.parse("\n".join(blocks)))


def taken_by_notebook(path: Path) -> set[str]:
    """The same of a notebook, of its code and its text."""
    parts = {"code": [], "markdown": [], "raw": []}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        parts[cell["cell_type"]].append("".join(cell["source"]))
    code, text = ("\n".join(parts[kind]) for kind in ("code", "markdown"))
    return used_names(ast.parse(code)) | taken_by_text(text)


def callers() -> set[str]:
    """Full names that chapters, experiments, benchmarks, texts and packages take."""
    names = set()
    for folder in ("book", "experiments"):
        for path in sorted((ROOT / folder).glob("*.ipynb")):
            names |= taken_by_notebook(path)
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    package = [p for p in modules("icl").values() if p.name != "__init__.py"]
    for path in [*scripts, *package, *modules("icl_book").values()]:
        names |= used_names(ast.parse(path.read_text(encoding="utf-8")))
    pages = [p for p in (ROOT / "book").glob("*.md") if p.name != "api.md"]
    for path in [*pages, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        names |= taken_by_text(path.read_text(encoding="utf-8"))
    return names


def mentioned(node: ast.stmt) -> set[str]:
    """Names in the annotations and defaults of a function, or of a class."""
    parts = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.arguments):
            parts += [*inner.defaults, *filter(None, inner.kw_defaults)]
        elif isinstance(inner, ast.AnnAssign):
            parts += [inner.annotation, *filter(None, [inner.value])]
        elif isinstance(inner, ast.arg) and inner.annotation:
            parts.append(inner.annotation)
        elif isinstance(inner, ast.FunctionDef) and inner.returns:
            parts.append(inner.returns)
    if isinstance(node, ast.ClassDef):
        parts += node.bases
    inside = [inner for part in parts for inner in ast.walk(part)]
    names = {inner.id for inner in inside if isinstance(inner, ast.Name)}
    quoted = [inner.value for inner in inside if isinstance(inner, ast.Constant)]
    return names | {value for value in quoted if isinstance(value, str)}


def public_names() -> dict[str, bool]:
    """Full names of what ``icl`` makes public, and whether each is used."""
    defined, passed_on, found = {}, {}, callers()
    for module, path in modules("icl").items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in definitions(tree).items():
            defined[f"{module}.{name}"] = node
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found.add(f"{module}.{ast.unparse(node.exc.func)}")
            if isinstance(node, ast.ClassDef) and node.keywords:
                found.add(f"{module}.{node.name}")
        if path.name == "__init__.py":
            for node in tree.body:
                if isinstance(node, ast.ImportFrom):
                    for name in node.names:
                        short = f"{module}.{name.asname or name.name}"
                        passed_on[short] = f"{node.module}.{name.name}"
    used = set()
    while found:
        found = {passed_on.get(name, name) for name in found} & set(defined) - used
        used |= found
        found = {
            f"{name.rpartition('.')[0]}.{other}"
            for name in found
            for other in mentioned(defined[name])
        }
    names = [name for name in sorted(defined) if not name.endswith(".__all__")]
    return {name: name in used for name in names}


def size(package: str) -> tuple[int, int, int]:
    """Lines of a package, lines of code among them, and its guards.

    A guard is an ``if`` that only raises. Lines of code are those without docstrings,
    comments and blanks.
    """
    lines = code = guards = 0
    for path in modules(package).values():
        text = path.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        held = [bool(re.match(r"\s*[^\s#]", line)) for line in text.splitlines()]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, *DEFINED)) and ast.get_docstring(node):
                first = node.body[0]
                span = range(first.lineno - 1, first.end_lineno)
                held = [there and i not in span for i, there in enumerate(held)]
            if isinstance(node, ast.If) and not node.orelse:
                guards += isinstance(node.body[0], ast.Raise)
        code += sum(held)
    return lines, code, guards


def main():
    for package, target in TARGETS.items():
        lines, code, guards = size(package)
        print(
            f"{package}: {lines} lines of {target}, {code} of code, {guards} guards, "
            f"{100 * guards / code:.1f} in 100 lines of code"
        )
    names = public_names()
    unused = [name for name, used in names.items() if not used]
    print(f"icl: {len(names)} public names, {len(unused)} used by nobody", *unused)


if __name__ == "__main__":
    main()
