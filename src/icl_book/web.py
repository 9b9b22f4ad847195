"""What built pages load: one style sheet, one script, and icons of a few kilobytes.

The theme and its extensions give each page a dozen style sheets, as many scripts, and
two thousand icons in a script of 1.5 MB.
"""

import base64
import hashlib
import io
import json
import os
import re
from functools import partial
from pathlib import Path

from fontTools import subset

STYLE = re.compile(r'\s*<link (?=[^>]*rel="stylesheet")[^>]*href="([^"?]+)[^>]*>')
SCRIPT = re.compile(r'\s*<script [^>]*src="([^"?]+)[^>]*></script>')
PICTURE = re.compile(r'<img (?=[^>]*src="([^"]+\.svg)")(?![^>]*width=)')
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
    classes = re.findall(r'class="([^"]*)"', "".join(pages.values()))
    used = {*" ".join(classes).split(), *re.findall(r"[A-Za-z_][\w-]*", script)}
    style = _with_icons(_pruned("".join(map(_style, styles)), used), styles)
    names = {}
    for suffix, text in {"css": style, "js": script}.items():
        path = html / "_static" / "styles" / f"book.{suffix}"
        path.write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        names[suffix] = f"_static/styles/{path.name}?v={digest}"
    for path, text in pages.items():
        text = _with_files(text, path, html / "_images")
        text = PICTURE.sub(partial(_later, folder=path.parent), text)
        root = "../" * (len(path.relative_to(html).parts) - 1)
        path.write_text(_light(text, root, names), encoding="utf-8")
    _excerpts(html, pages)
    seen = "".join(path.read_text(encoding="utf-8") for path in pages)
    # files of builds before
    for path in [*(html / "_images").glob("*"), *(html / "_downloads").glob("*/*")]:
        if path.name not in seen or path.parent.name not in seen:
            path.unlink()
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
    first = "".join(_style(path.parent / name) for name in imported.findall(text))
    text = imported.sub("", text)
    if path.parent.name != "styles":
        text = re.sub(r"url\(\"?(?!data:)([^\")]+)\"?\)", r"url(../\1)", text)
    return f"{first}{text}\n"


def _pruned(style, used):
    """Without rules for classes that no page and no script names."""
    notices = "\n".join(re.findall(r"/\*!.*?\*/", style, re.S))
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)

    def kept(rule):
        if "@" in rule[1]:
            return rule[0]
        whole = re.split(r",(?![^(]*\))", rule[1])
        bare = [re.sub(r"\([^()]*\)", "", part) for part in whole]
        named = [re.findall(r"\.([A-Za-z_][\w-]*)", part) for part in bare]
        left = [p for p, own in zip(whole, named, strict=True) if used.issuperset(own)]
        return f"{','.join(left)}{{{rule[2]}}}" if left else ""

    style = re.sub(r"([^{}]+)\{([^{}]*)\}", kept, style)
    return notices + re.sub(r"\s+", " ", re.sub(r"@media[^{}]+\{\s*\}", "", style))


def _with_icons(style, sheets):
    """With a font of those icons alone that the rules show."""
    codes = {int(code, 16) for code in re.findall(r'"\\(f[0-9a-f]{3})"', style)}
    codes |= {ord(letter) for letter in re.findall("[\ue000-\uf8ff]", style)}
    (theme,) = [p for p in sheets if p.name == "pydata-sphinx-theme.css"]
    whole = theme.parent.parent / "vendor/fontawesome/webfonts/fa-solid-900.ttf"
    options, file = subset.Options(flavor="woff"), io.BytesIO()
    some = subset.Subsetter(options)
    some.populate(unicodes=codes)
    with subset.load_font(str(whole), options) as font:
        some.subset(font)
        subset.save_font(font, file, options)
    data = base64.b64encode(file.getvalue()).decode()
    source = f'src:url(data:font/woff;base64,{data}) format("woff")'
    return re.sub(r"src:url\([^;}]*fa-solid-900[^;}]*", source, style)


def _with_files(text, page, folder):
    """A page whose embedded pictures, of sliders, are files: few of them are seen."""
    to = os.path.relpath(folder, page.parent)

    def save(found):
        name = f"{hashlib.sha256(found[1].encode()).hexdigest()[:16]}.svg"
        (folder / name).write_bytes(base64.b64decode(found[1]))
        return f'src="{to}/{name}"'

    return re.sub(r'src="data:image/svg\+xml;base64,([^"]+)"', save, text)


def _later(tag, folder):
    """A picture that loads when it is near, in a place of its size."""
    head = (folder / tag[1]).read_text(encoding="utf-8")[:2000]
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', head)
    if not size:
        return tag[0]
    width, height = (round(float(points) * 4 / 3) for points in size.groups())
    return f'<img loading="lazy" width="{width}" height="{height}" '


def _excerpts(html, pages):
    """A script with all pages' text: from disk, the search may not read the pages."""
    texts = {}
    for path, text in pages.items():
        if article := re.search(r"<article.*?</article>", text, re.S):
            left_out = r"<span class=\"sd-.*?</span>|</?span[^>]*>"  # badges, colours
            left_out += r"|<script.*?</script>|<img[^>]*>"
            text = re.sub(left_out, "", article[0])
            name = path.relative_to(html).as_posix()
            texts[name] = f'<div role="main">{text}</div>'
    script = (
        f"const TEXTS = {json.dumps(texts, ensure_ascii=False)};\n"
        "window.fetch = async (address) =>"
        ' ({ text: () => TEXTS[address.replace("./", "")] });'
    )
    (html / "_static" / "texts.js").write_text(script, encoding="utf-8")
    page = html / "search.html"
    load = 'document.write(\'<script src="_static/texts.js"></\' + "script>")'
    load = f'<script>if (location.protocol === "file:") {load};</script>\n</head>'
    text = page.read_text(encoding="utf-8").replace("</head>", load, 1)
    page.write_text(text, encoding="utf-8")


def _light(text, root, names):
    """A page that loads the two files, and MathJax only where there is a formula."""
    math = 'class="math' in text

    def script(tag):
        name = tag[1].rsplit("/", 1)[-1]
        return tag[0] if name in APART and (math or name != "tex-chtml.js") else ""

    text = re.sub(r'\s*<link rel="preload"[^>]*>', "", text)
    text = STYLE.sub("", SCRIPT.sub(script, text))
    # words of a name, and names and brackets of code, which look as the text around
    text = re.sub(r'<span class="(?:pre|n|p)">([^<]*)</span>', r"\1", text)
    both = (
        f'<link rel="stylesheet" href="{root}{names["css"]}">\n'
        f'<script src="{root}{names["js"]}"></script>\n'
    )
    # after the settings of its parts, before what uses it
    place = r"(<script>DOCUMENTATION_OPTIONS|</head>)"
    return re.sub(place, both + r"\1", text, count=1)
