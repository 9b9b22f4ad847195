"""Helpers for the chapters of "In-context learning as gradient descent".

Importing the package keeps progress bars out of notebooks and pipes: they are
drawn only where a terminal can redraw them.
"""

import os
import sys
import warnings

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message="IProgress not found")  # no bars, no widgets
