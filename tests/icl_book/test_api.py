"""What ``icl`` makes public is used; ``count`` says what counts as a use."""

from count import public_names, taken_by_text


def test_every_public_name_is_used():
    unused = [name for name, used in public_names().items() if not used]
    assert not unused


def test_uses_are_found_in_text():
    names = taken_by_text("`python -m icl.training`, `icl.tasks.Task`; see `learn`.")
    assert names == {"icl.training", "icl.training.main", "icl.tasks.Task"}
    code = "from icl import online as o\no.learn()"
    assert "icl.online.learn" in taken_by_text(f"```python\n{code}\n```\n")
