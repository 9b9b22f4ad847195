"""A chapter answers for its parameters: with another value it enters other numbers."""

import copy
import tempfile
from functools import lru_cache
from unittest import mock

import matplotlib.pyplot as plt
import nbformat
import pytest

from icl import models
from icl_book import page
from icl_book.build import chapter_path, chapters
from icl_book.execute import read_parameters

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
#: Another value of each parameter, of which the chapters make something at smoke scale.
OTHER = {
    "seed": 7,
    "task": "subj_rebuilt",
    "k": 3,
    "layout": "newline",
    "learning_rate": 0.01,
    "position": "label",
    "alpha": 0.3,
    "beta": 0.3,
    "eta": 0.7,
    "noise": 0.5,
    "d_r": 100,
    "pairs": 6,
    "inputs": "normal",
    "function": "linear",
}
#: Of the chapters that take longest one parameter each, for time.
ONE_OF = {
    "09_icl_and_finetuning": "layout",
    "10_attention_outputs": "position",
    "11_attention_maps": "k",
    "12_what_survives": "learning_rate",
    "13_layers_and_order": "seed",
    "14_momentum_attention": "eta",
    "16_contrast_pretrained": "beta",
}


def pairs():
    """Chapters that enter numbers of their runs, with a parameter."""
    for name in chapters():
        if "page.result(" in chapter_path(name).read_text("utf-8"):
            known = {*read_parameters(chapter_path(name))} & {*OTHER}
            yield from ((name, p) for p in sorted(known) if ONE_OF.get(name, p) == p)


@lru_cache
def code_of(name):
    """Its cells up to the last that enters numbers; whether each has the parameters."""
    cells = nbformat.read(chapter_path(name), as_version=4).cells
    cells = [c for c in cells if c.cell_type == "code"]
    last = max(n for n, c in enumerate(cells) if "page.result(" in c.source)
    return [
        (compile(c.source, name, "exec"), "parameters" in c.metadata.get("tags", ()))
        for c in cells[: last + 1]
    ]


def entered(name, **given):
    rows, scope = [], {"__name__": "__main__"}
    take = mock.patch.object(
        page, "result", lambda *r, facts=None, **c: rows.append(c | {"rows": r})
    )
    again = mock.patch.object(
        models, "load_model", lambda *a, **o: copy.deepcopy(load(*a, **o))
    )
    with take, again:
        for cell, has_parameters in code_of(name):
            exec(cell, scope)
            if has_parameters:
                scope |= given | {"scale": "smoke"}
    for value in scope.values():
        if isinstance(value, tempfile.TemporaryDirectory):
            value.cleanup()
    plt.close("all")
    return repr(rows)


usual = lru_cache(entered)
load = lru_cache(models.load_model)


@pytest.mark.parametrize(("name", "parameter"), [*pairs()])
def test_another_value_gives_other_numbers(name, parameter):
    value = OTHER[parameter]
    if value == read_parameters(chapter_path(name))[parameter].default:
        value = "mr"  # a task
    assert entered(name, **{parameter: value}) != usual(name)
