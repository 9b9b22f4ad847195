"""What built pages load: one style sheet, one script, and icons of a few kilobytes.

The theme and its extensions give each page a dozen style sheets, as many scripts, and
two thousand icons in a script of 1.5 MB.
"""

import base64
import hashlib
import io
import re
from pathlib import Path

from fontTools import subset

STYLE = re.compile(r'\s*<link (?=[^>]*rel="stylesheet")[^>]*href="([^"?]+)[^>]*>')
SCRIPT = re.compile(r'\s*<script [^>]*src="([^"?]+)[^>]*></script>')
#: Scripts of the search and of formulas, which not every page loads ...
APART = {"searchtools.js", "language_data.js", "searchindex.js", "tex-chtml.js"}
#: ... and those that none does: icons (a font has them), and tabs that follow others.
LEFT_OUT = {"fontawesome.js", "design-tabs.js"}


def lighten(html: Path):
    """Rewrite the pages in a folder so that each loads little, and delete the rest."""
    paths = [p for p in html.rglob("*.html") if "_static" not in p.parts]
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(paths)}
    pages = {path: text for path, text in pages.items() if STYLE.search(text)}
    styles = _files(pages, STYLE)
    scripts = [p for p in _files(pages, SCRIPT) if p.name not in APART | LEFT_OUT]
    script = "\n;".join(path.read_text(encoding="utf-8") for path in scripts)
    script = re.sub(r"^//# sourceMappingURL.*$", "", script, flags=re.M)
    used = {*re.findall(r"[A-Za-z_][\w-]*", "".join(pages.values()) + script)}
    style = _with_icons(_pruned("".join(map(_style, styles)), used), styles)
    names = {}
    for suffix, text in {"css": style, "js": script}.items():
        path = html / "_static" / "styles" / f"book.{suffix}"
        path.write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        names[suffix] = f"_static/styles/{path.name}?v={digest}"
    for path, text in pages.items():
        root = "../" * (len(path.relative_to(html).parts) - 1)
        path.write_text(_light(text, root, names), encoding="utf-8")
    for path in [*(html / "_static").rglob("*.map"), *{*styles, *scripts}]:
        path.unlink()
    for name in LEFT_OUT:
        for path in html.rglob(name):
            path.unlink()


def _files(pages, pattern):
    """What tags load, each once: paths in the order of the pages."""
    found = {}
    for path, text in pages.items():
        for address in pattern.findall(text):
            found[(path.parent / address).resolve()] = None
    return [*found]


def _style(path):
    """The text of a style sheet with those it imports, its addresses from styles/."""
    text = path.read_text(encoding="utf-8").replace('@charset "UTF-8";', "")
    imported = re.compile(r"@import (?:url\()?[\"']([^\"']+)[\"']\)?;")
    text = imported.sub(lambda found: _style(path.parent / found[1]), text)
    if path.parent.name != "styles":
        text = re.sub(r"url\(\"?(?!data:)([^\")]+)\"?\)", r"url(../\1)", text)
    return text + "\n"


def _pruned(style, used):
    """Without rules for classes that no page and no script names."""
    notices = "\n".join(re.findall(r"/\*!.*?\*/", style, re.S))
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)

    def kept(rule):
        if re.search(r"[@(]", rule[1]):
            return rule[0]
        names = {s: re.findall(r"\.([A-Za-z_][\w-]*)", s) for s in rule[1].split(",")}
        left = ",".join(s for s, own in names.items() if used.issuperset(own))
        return f"{left}{{{rule[2]}}}" if left else ""

    style = re.sub(r"([^{}]+)\{([^{}]*)\}", kept, style)
    return notices + re.sub(r"@media[^{}]+\{\s*\}", "", style)


def _with_icons(style, sheets):
    """With a font of those icons alone that the rules show."""
    codes = {int(code, 16) for code in re.findall(r'content:"\\(f[0-9a-f]{3})"', style)}
    (theme,) = [p for p in sheets if p.name == "pydata-sphinx-theme.css"]
    whole = theme.parent.parent / "vendor/fontawesome/webfonts/fa-solid-900.ttf"
    options = subset.Options()
    font = subset.load_font(str(whole), options)
    some = subset.Subsetter(options)
    some.populate(unicodes=codes)
    some.subset(font)
    font.flavor, file = "woff", io.BytesIO()
    font.save(file)
    data = base64.b64encode(file.getvalue()).decode()
    source = f'src:url(data:font/woff;base64,{data}) format("woff")'
    return re.sub(r"src:url\([^;}]*fa-solid-900[^;}]*", source, style)


def _light(text, root, names):
    """A page that loads the two files, its pictures when they are near, and MathJax
    only where there is a formula."""
    math = 'class="math' in text

    def script(tag):
        name = tag[1].rsplit("/", 1)[-1]
        return tag[0] if name in APART and (math or name != "tex-chtml.js") else ""

    text = re.sub(r'\s*<link rel="preload"[^>]*>', "", text)
    text = STYLE.sub("", SCRIPT.sub(script, text))
    text = re.sub(r'<img (?=[^>]*src="(?!data:))', '<img loading="lazy" ', text)
    both = (
        f'<link rel="stylesheet" href="{root}{names["css"]}">\n'
        f'<script src="{root}{names["js"]}"></script>\n'
    )
    return re.sub(r"(<script>let toggleHintShow|</head>)", both + r"\1", text, count=1)
