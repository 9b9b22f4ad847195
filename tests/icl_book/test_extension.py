"""Which chapter uses a function, as the pages of the package say."""

import ast

from icl_book.extension import used_names


def test_names_are_followed_through_imports_and_modules():
    code = """
from icl import metrics, kernels as k
from icl.scoring import score as s
import icl.tasks as t
from icls.other import thing

metrics.kendall(k.gram_features(1))
t.Task.query(other.kendall(s), thing)
"""
    assert used_names(ast.parse(code)) == {
        "icl.metrics",
        "icl.kernels",
        "icl.scoring.score",
        "icl.tasks",
        "icl.tasks.Task",
        "icl.tasks.Task.query",
        "icl.metrics.kendall",
        "icl.kernels.gram_features",
    }
