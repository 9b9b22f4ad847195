"""Masks and the distances in them, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.attention.masks import (
    causal_sdpa,
    relative_positions,
    repeat_kv,
    to_bool_mask,
    to_float64,
    upcast,
)

CPU = torch.device("cpu")


def additive(mask, dtype=torch.float32):
    hidden = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def by_hand(mask):
    """How many visible tokens come behind each visible one, up to the query's own."""
    rows = []
    for row in mask.flatten(0, -2).tolist():
        later = [sum(row[place + 1 :]) for place in range(len(row))]
        rows.append([n if seen else -1 for n, seen in zip(later, row, strict=True)])
    return torch.tensor(rows).view(mask.shape)


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 12),
    tokens=st.integers(1, 12),
    hidden=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11))),
    padding=st.integers(0, 5),
)
def test_distances_count_what_a_query_sees(length, tokens, hidden, padding):
    tokens = min(tokens, length)
    mask = torch.ones(2, 1, tokens, length, dtype=torch.bool).tril(length - tokens)
    for row, column in hidden:  # holes, but for a query's own token
        if row < tokens and column < length - tokens + row:
            mask[0, 0, row, column] = False
    mask[1, :, :, :padding] = False
    expected = by_hand(mask)
    for given_ in (mask, additive(mask), additive(mask, torch.bfloat16)):
        assert torch.equal(to_bool_mask(given_), mask)
        assert torch.equal(relative_positions(given_, tokens, length, CPU), expected)
    whole = relative_positions(None, tokens, length, CPU)
    causal = torch.ones(1, 1, tokens, length, dtype=torch.bool).tril(length - tokens)
    assert torch.equal(whole, by_hand(causal))


def test_other_masks_are_refused():
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    right = causal.clone()
    right[1, :, :, 6:] = False
    for mask in (right, torch.ones_like(causal), additive(right)):
        with pytest.raises(ValueError, match="causal"):
            relative_positions(mask, 9, 9, CPU)


@pytest.mark.parametrize("tokens", [9, 4, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_is_causal(tokens, masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 5, generator=g).double() for n in (4, 2, 2))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[9 - tokens :]
    scores = q[:, :, 9 - tokens :] @ repeat_kv(k, 4).mT * 0.7
    expected = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ repeat_kv(v, 4)
    mask = causal[None, None] if masked else None
    found = causal_sdpa(q[:, :, 9 - tokens :], k, v, mask, 0.7)
    torch.testing.assert_close(found, expected)


def test_precision():
    half, double = torch.ones(2, dtype=torch.bfloat16), torch.ones(2).double()
    assert upcast(half).dtype == torch.float32
    assert upcast(double).dtype == torch.float64
    assert to_float64(0.9999, CPU).item() == 0.9999
