"""What ``icl`` makes public is used; ``count`` says what counts as a use."""

import re
from pathlib import Path

from count import public_names, taken_by_text

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_public_name_is_used():
    unused = [name for name, used in public_names().items() if not used]
    assert not unused


def test_uses_are_found_in_text():
    names = taken_by_text("`python -m icl.training`, `icl.tasks.Task`; see `learn`.")
    assert names == {"icl.training", "icl.training.main", "icl.tasks.Task"}
    code = "from icl import online as o\no.learn()"
    assert "icl.online.learn" in taken_by_text(f"```python\n{code}\n```\n")


def test_the_readme_s_attentions_and_measures_are_what_they_say():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    (code,) = (block for block in blocks if "NegativeAttention" in block)
    scope = {}
    exec(code, scope)
    assert scope["negatives"].shape == scope["delta_rule"].shape == (1, 2, 8, 4)
