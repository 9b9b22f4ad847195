"""Momentum attention as released, against double loops written here."""

import math

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.activations import attention_modules
from icl.attention import (
    MomentumAttention,
    ReleasedMomentumAttention,
    convolve_chunked,
    convolve_fft,
    convolve_recurrent,
    ema_kernel,
    replace_attention,
)
from icl.attention.masks import causal_sdpa


def draw(channels=6, n=3, tokens=9, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, tokens, generator=g, dtype=torch.float64)
    logits, weight = torch.randn(2, channels, n, generator=g, dtype=torch.float64)
    return x, (3 * logits).sigmoid(), weight


def by_hand(x, decay, weight):
    out = torch.zeros_like(x)
    for t in range(x.shape[2]):
        for s in range(t + 1):
            out[..., t] += (weight * decay**s).sum(1) * x[..., t - s]
    return out


FORMS = {
    "fft": lambda x, a, w: convolve_fft(x, ema_kernel(a, w, x.shape[2])),
    "chunked": convolve_chunked,
    "recurrent": convolve_recurrent,
}


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 100),
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    n=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_every_form_is_the_double_loop(form, tokens, batch, channels, n, seed):
    x, decay, weight = draw(channels, n, tokens, batch, seed)
    found = FORMS[form](x, decay, weight)
    torch.testing.assert_close(found, by_hand(x, decay, weight), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    x, decay, weight = draw(channels=2, n=2, tokens=35, batch=1)
    inputs = [part.requires_grad_() for part in (x, decay, weight)]
    assert torch.autograd.gradcheck(FORMS[form], inputs)


def released(heads=4, kv_heads=2, tokens=40, new=None, n=2, **options):
    """The kind called by itself, and what the definition gives."""
    g = torch.Generator().manual_seed(1)
    shapes = [(heads, new or tokens), (kv_heads, tokens), (kv_heads, tokens)]
    q, k, v = (torch.randn(2, *s, 3, generator=g, dtype=torch.float64) for s in shapes)
    _, decay, weight = draw(heads * 3, n)
    weight = weight * len(weight) ** -0.5
    attend = ReleasedMomentumAttention(exponentials=n, **options)
    values = v.repeat_interleave(heads // kv_heads, 1).mT.flatten(1, 2)
    past = by_hand(values, decay, weight)
    if not attend.current:
        past -= weight.sum(1)[:, None] * values
    past = past.unflatten(1, (heads, 3)).mT[:, :, tokens - (new or tokens) :]
    return attend, (q, k, v), (decay, weight), past


@pytest.mark.parametrize("new", [40, 7, 1])
@pytest.mark.parametrize("current", [True, False])
def test_it_is_its_definition(new, current):
    attend, (q, k, v), parameters, past = released(new=new, current=current)
    expected = causal_sdpa(q, k, v, None, None) + past
    found = attend(q, k, v, parameters=parameters)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_the_formula_is_one_exponential_without_the_current_token(tokens):
    _, (q, k, v), _, _ = released(tokens=tokens)
    d, eta = q.shape[1] * v.shape[3], 0.7
    # √d cancels the kernel's scale
    one = torch.full((d, 1), eta).double(), torch.ones(d, 1).double()
    attend = ReleasedMomentumAttention(exponentials=1, current=False)
    formula = MomentumAttention(eta=eta)(q, k, v)
    torch.testing.assert_close(attend(q, k, v, parameters=one), formula)


def test_it_starts_as_released():
    model = replace_attention(tiny_model("llama"), "released_momentum", seed=3)
    module = attention_modules(model)[0]
    d = model.config.hidden_size
    assert module.ema_logits.shape == module.ema_weights.shape == (d, 8)
    n = module.ema_logits.numel() ** 0.5
    assert abs(module.ema_logits.mean().item()) < 4 * 0.2 / n
    assert module.ema_logits.std().item() == pytest.approx(0.2, abs=4 * 0.2 / n)
    assert module.ema_weights.std().item() == pytest.approx(1, abs=4 / n)
    decay, weight = ReleasedMomentumAttention().parameters(module)
    torch.testing.assert_close(weight, module.ema_weights.double() / math.sqrt(d))
    torch.testing.assert_close(decay, module.ema_logits.double().sigmoid())
    positive = replace_attention(
        tiny_model("llama"), "released_momentum", seed=3, positive=True
    )
    _, found = ReleasedMomentumAttention(positive=True).parameters(
        attention_modules(positive)[0]
    )
    torch.testing.assert_close(found, weight.abs(), atol=1e-3 / math.sqrt(d), rtol=1e-4)


def test_packed_texts_and_windows():
    """Of two texts in a row each is itself; behind a window nothing is seen."""
    attend, (q, k, v), parameters, _ = released(tokens=12)
    place = torch.arange(12)
    causal = place[:, None] >= place
    text = place >= 5
    packed = causal & (text[:, None] == text)
    found = attend(q, k, v, packed[None, None], parameters=parameters)
    for own in (slice(0, 5), slice(5, 12)):
        alone = [x[:, :, own] for x in (q, k, v)]
        expected = attend(*alone, parameters=parameters)
        torch.testing.assert_close(found[:, :, own], expected)
    window = causal & (place[:, None] - place < 4)
    found = attend(q, k, v, window[None, None], parameters=parameters)
    last = [x[:, :, 8:] for x in (q, k, v)]
    expected = attend(*last, parameters=parameters)[:, :, -1]
    torch.testing.assert_close(found[:, :, -1], expected)


def test_not_a_number_stays_in_its_sequence():
    attend, (q, k, v), parameters, _ = released()
    clean = attend(q, k, v, parameters=parameters)
    v[0, :, 35] = math.nan
    found = attend(q, k, v, parameters=parameters)
    torch.testing.assert_close(found[1], clean[1])
    assert found[0, :, 35:].isnan().all()


def test_slow_rates_decode_exactly():
    """The kernel that decoding keeps is cut where it no longer counts, not before."""
    _, (q, k, v), _, _ = released(tokens=300, new=1)
    attend = ReleasedMomentumAttention(exponentials=1)
    for rate in (0.5, 0.99, 0.9999, 1 - 1e-12, 1.0):
        parts = (
            torch.full((12, 1), rate, dtype=torch.float64),
            torch.ones(12, 1).double(),
        )
        whole = convolve_recurrent(v.repeat_interleave(2, 1).mT.flatten(1, 2), *parts)
        expected = causal_sdpa(q, k, v, None, None)
        expected = expected + whole[..., -1:].unflatten(1, (4, 3)).mT
        torch.testing.assert_close(attend(q, k, v, parameters=parts), expected)


@torch.no_grad()
def test_a_changed_rate_is_seen_by_the_next_step():
    model = replace_attention(tiny_model("llama"), "released_momentum")
    ids = torch.tensor([[3, 7, 5, 9]])
    for _ in range(2):
        cache = model(ids[:, :3], use_cache=True).past_key_values
        step = model(ids[:, 3:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
        for module in attention_modules(model):
            module.ema_weights.data.neg_()


@torch.no_grad()
def test_another_kernel_of_the_same_rates_is_seen_by_the_next_step():
    model, ids = tiny_model("llama"), torch.tensor([[3, 7, 5, 9]])
    for current in (True, False):
        replace_attention(model, "released_momentum", current=current)
        cache = model(ids[:, :3], use_cache=True).past_key_values
        step = model(ids[:, 3:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
