"""Which chapter uses a function, as the pages of the package say."""

from icl_book.extension import used_names


def test_names_are_followed_through_imports_and_modules():
    cells = [
        "from icl import metrics, kernels as k\nfrom icl.scoring import score as s",
        "metrics.kendall(k.gram_features(1))\nother.kendall(s)",
    ]
    cells = [{"cell_type": "code", "source": [source]} for source in cells]
    cells.append({"cell_type": "markdown", "source": ["from icl.heads import stack"]})
    found = used_names({"cells": cells})
    assert found == {
        "icl.metrics",
        "icl.kernels",
        "icl.scoring.score",
        "icl.metrics.kendall",
        "icl.kernels.gram_features",
    }
