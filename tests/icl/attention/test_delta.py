"""Linear attention and the delta rule, against the online learner."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import rms_norm

from icl.attention import KINDS, DeltaAttention, LinearAttention
from icl.online import recurrent

RATES = {"beta": 0.6, "decay": 0.8, "momentum": 0.3}


def inputs(heads=4, kv_heads=2, tokens=9, new=None):
    g = torch.Generator().manual_seed(0)
    shapes = [(heads, new or tokens), (kv_heads, tokens), (kv_heads, tokens)]
    return [torch.randn(2, *n, 5, generator=g, dtype=torch.float64) for n in shapes]


@pytest.mark.parametrize("new", [9, 3, 1])
@pytest.mark.parametrize(
    ("kind", "loss"), [(DeltaAttention, "squared"), (LinearAttention, "inner")]
)
def test_it_is_the_learner_on_unit_keys_and_queries(new, kind, loss):
    q, k, v = inputs(new=new)
    found = kind(**RATES)(q, k, v)
    for b in range(2):
        for head in range(4):
            ask = torch.zeros(1, 1, 9, 5, dtype=torch.float64)
            ask[0, 0, 9 - new :] = q[b, head] / q[b, head].norm(dim=-1, keepdim=True)
            key = k[b : b + 1, None, head // 2]
            key = key / key.norm(dim=-1, keepdim=True)
            value = v[b : b + 1, None, head // 2]
            out, _ = recurrent(ask, key, value, **RATES, loss=loss)
            out = out[0, 0, 9 - new :]
            size = (out.square().mean(-1, keepdim=True) + 2.3e-16).sqrt()
            torch.testing.assert_close(found[b, head], out / size)


def with_gates(gates, q, k, v, mask=None):
    """The delta rule whose rates were learned."""
    module = SimpleNamespace(gate_weights=gates)
    attend = DeltaAttention(**RATES, learned=True)
    return attend.forward(q, k, v, mask, module=module)


@pytest.mark.parametrize("learned", [False, True])
def test_padding_is_not_learned(learned):
    q, k, v = inputs()
    mask = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :4] = False
    mask[0, :, :, 7:] = False
    torch.manual_seed(0)
    gates = torch.randn(4, 3, 6)  # rates that differ from token to token

    def attend(*inputs):
        return with_gates(gates, *inputs) if learned else DeltaAttention()(*inputs)

    for given_ in (mask, torch.zeros(mask.shape).masked_fill(~mask, -3.4e38)):
        found = attend(q, k, v, given_)
        for b, real in ((0, slice(0, 7)), (1, slice(4, 9))):
            alone = [x[b : b + 1, :, real] for x in (q, k, v)]
            torch.testing.assert_close(found[b : b + 1, :, real], attend(*alone))


def test_gates_read_the_rates_from_keys():
    q, k, v = (x.float() for x in inputs())
    gates = torch.randn(4, 3, 6)
    read = k.repeat_interleave(2, 1)[:, :, None] * gates[:, :, None, :5]
    beta, decay, momentum = (read.sum(-1) + gates[:, :, None, 5]).sigmoid().unbind(2)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k.repeat_interleave(2, 1))]
    rates = {"decay": decay, "momentum": momentum}
    out, _ = recurrent(
        *unit, v.repeat_interleave(2, 1), 2 * (1 - momentum) * beta, **rates
    )
    found = with_gates(gates, q, k, v)
    torch.testing.assert_close(found, rms_norm(out, (5,)), rtol=1e-4, atol=1e-5)


def test_other_masks_are_refused():
    q, k, v = inputs()
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 1, 2, 2])
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    packed = causal & ((owner == 0) | (owner[:, None] == owner))
    hole = causal.clone()
    hole[:, 4] = False
    for mask in (packed, causal.triu(-3), hole, torch.ones_like(causal)):
        with pytest.raises(ValueError, match="causal"):
            DeltaAttention()(q, k, v, mask[None, None])


def test_tokens_of_half_precision():
    q, k, v = (x.bfloat16() for x in inputs())
    found = DeltaAttention()(q, k, v)
    whole = DeltaAttention()(q.float(), k.float(), v.float())
    torch.testing.assert_close(found, whole.bfloat16())  # rounded once, at the end
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(DeltaAttention()(q.float(), k.float(), v.float()), whole)


@pytest.mark.parametrize("kind", ["linear", "delta"])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta": 2.1}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.1, "momentum": 0.5}, "beta"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.1}, "decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
    ],
)
def test_rates_outside_of_their_range_are_refused(kind, options, name):
    with pytest.raises(ValueError, match=name):
        KINDS[kind](**options)
