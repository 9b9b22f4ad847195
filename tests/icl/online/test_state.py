"""What a learner continues from, and what it refuses."""

import math
from functools import partial
from inspect import unwrap

import pytest
import torch
from pairs import BETA, DECAY, F64, MU, W_1, W_2, close, copies, draw

from icl import online
from icl.online import chunkwise, mesa, mlp, recurrent

FORMS = [
    partial(recurrent, beta=BETA, decay=DECAY, momentum=MU),
    partial(recurrent, beta=BETA, implicit=True, loss="separable", decay=DECAY),
    partial(recurrent, beta=BETA / 2, precondition="diagonal", decay=DECAY),
    partial(recurrent, beta=BETA, precondition="full", decay=DECAY, decayed=False),
    partial(recurrent, beta=BETA / 9, model=mlp, momentum=MU, state=copies(W_1, W_2)),
    partial(recurrent, beta=BETA, decay=DECAY, minibatch=5),
    partial(chunkwise, beta=BETA, decay=DECAY, momentum=MU, chunk=4),
    partial(chunkwise, beta=BETA, decay=DECAY, chunk=6),
    partial(mesa, beta=BETA, decay=DECAY, chunk=7),
]


def cut(form, tokens):
    """The form told the rates of some tokens."""
    told = {
        name: x[:, :, tokens] if isinstance(x, torch.Tensor) else x
        for name, x in form.keywords.items()
    }
    return partial(form.func, **told)


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_nothing(form):
    q, k, v = draw()
    other = draw(seed=7)
    mixed = [
        torch.cat([a[:, :, :11], b[:, :, 11:]], 2)
        for a, b in zip((q, k, v), other, strict=True)
    ]
    close(form(*mixed)[0][:, :, :11], form(q, k, v)[0][:, :, :11])
    assert (form(*mixed)[0][:, :, 11] - form(q, k, v)[0][:, :, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_what_is_continued_is_one_pass(form):
    q, k, v = draw()
    whole, state, *_ = form(q, k, v)
    parts, then = [], {}
    for tokens in (slice(0, 10), slice(10, 15), slice(15, 23)):
        given_ = (x[:, :, tokens] for x in (q, k, v))
        out, after, *_ = cut(form, tokens)(*given_, **then)
        parts.append(out)
        then = {"state": after}
    close(torch.cat(parts, 2), whole)
    close(after, state)


def test_the_forms_of_a_layer_share_their_states():
    q, k, v = draw()
    setting = {"beta": BETA[:, :, :12], "decay": DECAY[:, :, :12], "ridge": 0.5}
    full = {"precondition": "full", "decayed": False, "ridge": 0.5}
    first, second = (
        [x[:, :, t] for x in (q, k, v)] for t in (slice(12), slice(12, 23))
    )
    _, from_loop = recurrent(*first, **setting | full)
    _, from_mesa, _ = mesa(*first, **setting)
    close(from_loop, from_mesa._replace(velocity=from_loop.velocity))
    ahead, _ = recurrent(*second, state=from_mesa, **full)
    close(mesa(*second, ridge=0.5, state=from_loop)[0], ahead)


@pytest.mark.parametrize("attend", [recurrent, chunkwise])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 2.1}, r"2\.1"),
        ({"beta": -0.1}, r"-0\.1"),
        ({"key": 3 * draw()[1]}, "not 9"),
        ({"beta": -0.1, "implicit": True}, r"-0\.1"),
        ({"beta": math.nan}, "beta .* nan"),
        ({"loss": "inner", "beta": math.inf}, "beta .* inf"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.01}, r"decay .* 1\.01"),
        ({"decay": DECAY - 0.5}, "decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"loss": "hinge"}, "hinge"),
        ({"query": draw(22)[0]}, "22"),
        ({"value": draw(22)[2]}, "22"),
        ({"value": draw(24)[2]}, "24"),  # the last would not be read
        ({"value": draw()[2][0]}, r"\[3, 23, 4\]"),
        ({"state": copies(W_1)}, r"\(2, 3, 4, 5\), not \(2, 3, 6, 5\)"),
        ({"state": copies(W_1[:1])}, r"not \(2, 3, 1, 5\)"),  # would broadcast
        ({"state": copies(W_1[:4])._replace(velocity=copies(W_1).weights)}, "6, 5"),
        ({"state": copies(W_1[:4], W_1[:4])}, "unpack"),
    ],
)
def test_what_is_refused(attend, change, message):
    q, k, v = draw()
    with pytest.raises(ValueError, match=message):
        unwrap(attend)(**(dict(query=q, key=k, value=v) | change))


@pytest.mark.parametrize("attend", [recurrent, chunkwise])
@pytest.mark.parametrize("shape", [(2, 3), (3, 1, 23), (1, 2, 3, 23)])
def test_rates_that_do_not_broadcast_are_refused(attend, shape):
    for name in ("beta", "decay", "momentum"):
        with pytest.raises(RuntimeError, match="23|3"):
            attend(*draw(), **{name: torch.full(shape, 0.5, dtype=F64)})


@pytest.mark.parametrize("attend", [recurrent, chunkwise, mesa])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("which", "token"), [(0, 22), (0, 3), (1, 0), (1, 22), (2, 22)]
)
def test_numbers_that_are_not_finite_are_refused(attend, bad, which, token):
    inputs = draw()
    inputs[which][1, 2, token, 1] = bad
    with pytest.raises(ValueError, match="finite|β"):
        attend(*inputs)


def test_the_names_of_the_package_are_functions():
    """Two of its modules have names of functions; the functions win."""
    for name in ("recurrent", "chunkwise", "mesa"):
        assert callable(getattr(online, name))
        assert getattr(online, name).__module__ == f"icl.online.{name}"
