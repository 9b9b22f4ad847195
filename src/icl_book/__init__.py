"""What runs the notebooks of the book and makes its pages; ``icl`` is the science."""
