"""What ``icl`` makes public is used; ``count`` says what counts as a use."""

import ast

from count import public_names, taken, taken_by_text


def test_every_public_name_is_used():
    unused = [name for name, used in public_names().items() if not used]
    assert not unused


def test_uses_are_found_in_code_and_in_text():
    code = (
        "from icl import online as o, tasks\nfrom icl.models import load_model as lm\n"
    )
    names = taken(ast.parse(code + "o.learn(tasks.Task.query, other.thing)"))
    assert {"icl.online.learn", "icl.tasks.Task", "icl.models.load_model"} <= names
    assert not any("other" in name for name in names)
    names = taken_by_text("`python -m icl.training`, `icl.tasks.Task`; see `learn`.")
    assert names == {"icl.training", "icl.training.main", "icl.tasks.Task"}
    assert "icl.online.learn" in taken_by_text(f"```python\n{code}o.learn()\n```\n")
