"""Regularised, augmented and negative attention: by loops, and as gradient steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.attention import (
    AugmentedAttention,
    DifferentialAttention,
    NegativeAttention,
    RegularisedAttention,
)
from icl.attention.contrastive import _View
from icl.kernels import contrastive_loss, gram_features, initial_weight, normaliser


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def inputs(heads=2, kv_heads=2, tokens=9, width=4, batch=1, seed=0):
    shapes = [(batch, n, tokens, width) for n in (heads, kv_heads, kv_heads)]
    return [draw(*shape, seed=seed + n) for n, shape in enumerate(shapes)]


def warped(x):
    return 2 * torch.tanh(x) + 0.3 * x.square()


def augmented(q, k, v, front=0, of_value=warped, of_key=warped):
    attend = AugmentedAttention(demonstrations=front)
    return attend(q, k, v, of_value=of_value, of_key=of_key)


def pushed(left, key, value, beta, k, candidates):
    """Values of one head with their negatives, by loops.

    ``candidates(i)`` lists the tokens that i may be pushed away from.
    """
    found = value.clone()
    for i in range(len(key)):
        near = sorted(candidates(i), key=lambda j: (left[i] @ key[j]).item())[:k]
        for j in near:
            found[i] -= beta / len(near) * value[j]
    return found


def in_two_parts(q, k, v, own_k, own_v, seen=lambda t, i: i <= t):
    """One head; a token's own key and value stand in where it looks at itself."""
    out = torch.zeros(len(q), v.shape[-1], dtype=v.dtype)
    for t in range(len(q)):
        there = [i for i in range(t + 1) if seen(t, i)]
        keys = torch.stack([own_k[i] if i == t else k[i] for i in there])
        values = torch.stack([own_v[i] if i == t else v[i] for i in there])
        out[t] = (keys @ q[t] / math.sqrt(q.shape[-1])).softmax(0) @ values
    return out


def behind(front, q, k, v, new_k, new_v, rest_v=None):
    """One head; its first tokens are demonstrations to those that come after them."""
    rest_v = v if rest_v is None else rest_v
    early = in_two_parts(q, k, v, k, v)[:front]
    keys, values = (
        torch.cat([a[:front], b[front:]]) for a, b in ((new_k, k), (new_v, rest_v))
    )
    return torch.cat([early, in_two_parts(q, keys, values, keys, values)[front:]])


def by_heads(function, q, k, v):
    """Apply ``function(q, k, v)`` to every head of every sequence."""
    groups = q.shape[1] // k.shape[1]
    rows = [
        [
            function(q[b, h], k[b, h // groups], v[b, h // groups])
            for h in range(q.shape[1])
        ]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(row) for row in rows])


@settings(deadline=None, max_examples=25)
@given(
    alpha=st.floats(-1, 1),
    tokens=st.integers(1, 9),
    groups=st.sampled_from([(1, 1), (4, 2)]),
)
def test_regularised_attention_by_loops(alpha, tokens, groups):
    q, k, v = inputs(*groups, tokens=tokens)
    expected = by_heads(
        lambda q, k, v: in_two_parts(q, k, v, k, (1 - alpha) * v), q, k, v
    )
    torch.testing.assert_close(RegularisedAttention(alpha=alpha)(q, k, v), expected)


@pytest.mark.parametrize("tokens", [9, 150])  # the second is more than a block
def test_augmented_attention_by_loops(tokens):
    q, k, v = inputs(4, 2, tokens)
    expected = by_heads(
        lambda q, k, v: in_two_parts(q, warped(k), warped(v), k, v), q, k, v
    )
    torch.testing.assert_close(augmented(q, k, v), expected)


@settings(deadline=None, max_examples=25)
@given(
    beta=st.floats(-2, 2),
    k_negatives=st.integers(1, 12),  # more than there are
    groups=st.sampled_from([(1, 1), (4, 2)]),
    by=st.sampled_from(["keys", "scores"]),
)
def test_negative_attention_by_loops(beta, k_negatives, groups, by):
    q, k, v = inputs(*groups)

    def head(q, k, v):
        left = k if by == "keys" else q
        values = pushed(left, k, v, beta, k_negatives, range)
        return in_two_parts(q, k, values, k, v)

    found = NegativeAttention(beta=beta, k=k_negatives, by=by)(q, k, v)
    torch.testing.assert_close(found, by_heads(head, q, k, v))


@pytest.mark.parametrize("front", [4, 9])
@pytest.mark.parametrize("new", [9, 3, 1])
def test_what_comes_after_demonstrations_reads_them(front, new):
    q, k, v = inputs(4, 2)

    def near(i):
        return [j for j in range(front) if j != i]

    for attend, head in (
        (
            RegularisedAttention(alpha=0.8, demonstrations=front),
            lambda q, k, v: behind(front, q, k, v, k, v, 0.2 * v),
        ),
        (
            lambda q, k, v: augmented(q, k, v, front),
            lambda q, k, v: behind(front, q, k, v, warped(k), warped(v)),
        ),
        (
            NegativeAttention(beta=0.7, k=2, demonstrations=front),
            lambda q, k, v: behind(front, q, k, v, k, pushed(k, k, v, 0.7, 2, near)),
        ),
    ):
        expected = by_heads(head, q, k, v)[:, :, 9 - new :]
        torch.testing.assert_close(attend(q[:, :, 9 - new :], k, v), expected)


def test_masks_say_who_is_seen():
    q, k, v = inputs()
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 1, 2, 2])  # a prefix, then two texts
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask &= (owner == 0) | (owner[:, None] == owner)

    def seen(t, i):
        return mask[t, i].item()

    def before(i):
        return [j for j in range(i) if mask[i, j]]

    def shrunk(q, k, v):
        return in_two_parts(q, k, v, k, 0.4 * v, seen)

    def negative(q, k, v):
        return in_two_parts(q, k, pushed(k, k, v, 0.7, 2, before), k, v, seen)

    hidden = torch.finfo(torch.float64).min
    additive = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~mask, hidden)
    for given_ in (mask, additive):
        found = RegularisedAttention(alpha=0.6)(q, k, v, given_[None, None])
        torch.testing.assert_close(found, by_heads(shrunk, q, k, v))
        found = NegativeAttention(beta=0.7, k=2)(q, k, v, given_[None, None])
        torch.testing.assert_close(found, by_heads(negative, q, k, v))


@pytest.mark.parametrize("new", [1, 4])
def test_the_last_tokens_alone(new):
    q, k, v = inputs(4, 2)
    for attend in (
        RegularisedAttention(alpha=0.3),
        augmented,
        NegativeAttention(beta=0.7, k=3),
        DifferentialAttention(lam=0.3),
    ):
        expected = attend(q, k, v)[:, :, -new:]
        torch.testing.assert_close(attend(q[:, :, -new:], k, v), expected)


# --- one step on the loss ------------------------------------------------------------

N, REST, WIDTH, ETA = 7, 3, 4, 0.3


def stepped(loss, W_0):
    """One gradient step of size ETA, by autograd."""
    W = W_0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(W), W)
    return W_0 - ETA * gradient


@pytest.fixture
def episode():
    """Seven demonstrations, three tokens of the query part, and a query."""
    q, k, v = draw(WIDTH), draw(N + REST, WIDTH, seed=1), draw(N + REST, WIDTH, seed=2)
    return q, k, v, (q[None, None, None], k[None, None], v[None, None])


def features(keys, q):
    """Exact features of the keys and of the query, and attention's normaliser."""
    phi = gram_features(torch.cat([keys, q[None]]) / WIDTH**0.25)
    return phi[:-1], phi[-1], normaliser(phi[:-1], phi[-1])


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0])
def test_regularised_attention_is_a_step_with_weight_decay(episode, alpha):
    q, k, v, given_ = episode
    phi, phi_q, D = features(k, q)

    def loss(W):
        decay = alpha / (2 * ETA) * W.square().sum()
        return contrastive_loss(W, v[:N], phi[:N], D, ETA) + decay

    W_1 = stepped(loss, initial_weight(v[N:], phi[N:], D))
    found = RegularisedAttention(alpha=alpha, demonstrations=N)(*given_)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


def test_augmented_attention_is_a_step_on_augmented_pairs(episode):
    q, k, v, given_ = episode
    keys = torch.cat([warped(k[:N]), k[N:]])
    phi, phi_q, D = features(keys, q)
    W_1 = stepped(
        lambda W: contrastive_loss(W, warped(v[:N]), phi[:N], D, ETA),
        initial_weight(v[N:], phi[N:], D),
    )
    found = augmented(*given_, N)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k_negatives", [1, 3, 6])
def test_negative_attention_is_a_step_on_pairs_and_negatives(episode, k_negatives):
    q, k, v, given_ = episode
    phi, phi_q, D = features(k, q)
    beta = 0.8

    def loss(W):
        total = torch.zeros((), dtype=W.dtype)
        for i in range(N):
            drawn = v[i] @ W @ phi[i]
            others = sorted({*range(N)} - {i}, key=lambda j: (k[i] @ k[j]).item())
            for j in others[:k_negatives]:
                drawn = drawn - beta / k_negatives * (v[j] @ W @ phi[i])
            total = total - drawn / (ETA * D)
        return total

    W_1 = stepped(loss, initial_weight(v[N:], phi[N:], D))
    attend = NegativeAttention(beta=beta, k=k_negatives, demonstrations=N)
    found = attend(*given_)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


# --- in an encoder --------------------------------------------------------------------

SPECIAL = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0, 1, 1, 1]])
SEEN = torch.tensor([9, 7])  # tokens of the two texts; what is behind them is padding


def encoder_parts(t, length, special):
    """Demonstrations of a token, all others but special ones, and its query part."""
    shown = [i for i in range(length) if i != t and not special[i]]
    return shown, [i for i in range(length) if i not in shown]


def in_encoder(q, k, v, new_k, new_v, own_v, length, special):
    """One head, by a double loop; its demonstrations' keys and values are new."""
    out = torch.zeros_like(v)
    for t in range(length):
        shown, own = encoder_parts(t, length, special)
        scores = [new_k[i] @ q[t] for i in shown] + [k[i] @ q[t] for i in own]
        weights = (torch.stack(scores) / math.sqrt(q.shape[-1])).softmax(0)
        values = [new_v[i] for i in shown] + [own_v[i] for i in own]
        for weight, value in zip(weights, values, strict=True):
            out[t] += weight * value
    return out


def encoder_case(kind, special, length, strength=0.7, k=3):
    """A kind, its function on a head by loops, and its control's."""
    content = [i for i in range(length) if not special[i]]

    def looped(q, key, v, new_k, new_v, own_v):
        return in_encoder(q, key, v, new_k, new_v, own_v, length, special)

    if kind == "regularised":
        return (
            lambda q, k, v: looped(q, k, v, k, v, (1 - strength) * v),
            lambda q, k, v: (
                looped(q, k, v, k, v, v)
                * looped(q, k, v, k, one(v), (1 - strength) * one(v))
            ),
        )
    if kind == "augmented":
        return lambda q, k, v: looped(q, k, v, warped(k), warped(v), v), None

    def negative(by):
        def head(q, key, v):
            left = key if by == "keys" else q
            others = [[j for j in content if j != i] for i in range(len(key))]
            new = pushed(left, key, v, strength, k, others.__getitem__)
            return looped(q, key, v, key, new, v)

        return head

    def scaled(q, key, v):
        alone = len(content) == 1  # has none to be pushed from
        return looped(q, key, v, key, v if alone else (1 - strength) * v, v)

    return negative(kind.split()[-1]), scaled


def one(v):
    return torch.ones_like(v)


def kind_of(name, **options):
    if name == "regularised":
        return RegularisedAttention(alpha=0.7, **options)
    if name == "augmented":
        views = dict(of_key=warped, of_value=warped)
        return lambda *given, **more: AugmentedAttention()(*given, **views, **more)
    return NegativeAttention(beta=0.7, k=3, by=name.split()[-1], **options)


ENCODER_KINDS = ["regularised", "augmented", "negative by keys", "negative by scores"]


def padded(mask_kind):
    mask = torch.arange(9) < SEEN[:, None]
    mask = mask[:, None, None].expand(-1, -1, 9, -1)
    if mask_kind == "boolean":
        return mask
    low = torch.finfo(torch.float64).min
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


#: Every two of kind, mask, and whether there are special tokens.
LOOPS = [
    (kind, mask, (n + m) % 2 == 0)
    for n, kind in enumerate(ENCODER_KINDS)
    for m, mask in enumerate((None, "boolean", "additive"))
]


@pytest.mark.parametrize(("kind", "mask", "special"), LOOPS)
def test_in_an_encoder_by_loops(kind, mask, special):
    """Two texts in a batch, with special tokens or without, padded or not."""
    q, k, v = inputs(heads=4, kv_heads=2, batch=2)
    given = dict(is_causal=False)
    given |= dict(special_tokens_mask=SPECIAL) if special else {}
    mask_ = None if mask is None else padded(mask)
    found = kind_of(kind)(q, k, v, mask_, **given)
    control = None
    if kind != "augmented":
        control = kind_of(kind, matched=True)(q, k, v, mask_, **given)
    for b, length in enumerate([9, 9] if mask is None else SEEN.tolist()):
        marks = SPECIAL[b] if special else torch.zeros(9)
        head, other = encoder_case(kind, marks, length)
        one_text = [x[b : b + 1] for x in (q, k, v)]
        expected = by_heads(head, *one_text)[0, :, :length]
        torch.testing.assert_close(found[b, :, :length], expected)
        if control is not None:
            expected = by_heads(other, *one_text)[0, :, :length]
            torch.testing.assert_close(control[b, :, :length], expected)
    assert found.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_in_an_encoder_with_few_tokens(kind, tokens):
    q, k, v = inputs(tokens=tokens)
    head, control = encoder_case(kind, [0] * tokens, tokens)
    found = kind_of(kind)(q, k, v, is_causal=False)
    torch.testing.assert_close(found, by_heads(head, q, k, v))
    if control is not None:
        found = kind_of(kind, matched=True)(q, k, v, is_causal=False)
        torch.testing.assert_close(found, by_heads(control, q, k, v))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ENCODER_KINDS[:3])
def test_in_an_encoder_every_token_is_a_step_on_its_loss(kind, special):
    """By autograd on the token's own loss, features exact."""
    q, k, v = inputs(heads=1, kv_heads=1)
    marks = SPECIAL[0] if special else torch.zeros(9)
    found = kind_of(kind)(q, k, v, is_causal=False, special_tokens_mask=marks[None])
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    content = [i for i in range(9) if not marks[i]]
    for t in range(9):
        shown, own = encoder_parts(t, 9, marks)
        new = warped if kind == "augmented" else lambda x: x
        keys = torch.cat([new(k[shown]), k[own]])
        phi, phi_q, D = features(keys, q[t])
        values = new(v)
        if kind.startswith("negative"):
            others = [[j for j in content if j != i] for i in range(9)]
            values = pushed(k, k, v, 0.7, 3, others.__getitem__)

        theirs = values[shown], phi[: len(shown)], D

        def loss(W, theirs=theirs):
            decay = 0.7 / (2 * ETA) * W.square().sum() * (kind == "regularised")
            return contrastive_loss(W, *theirs, ETA) + decay

        W_1 = stepped(loss, initial_weight(v[own], phi[len(shown) :], D))
        torch.testing.assert_close(found[0, 0, t], W_1 @ phi_q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_gradients_in_an_encoder(kind):
    given_ = [x.requires_grad_() for x in inputs(2, 2, 5, width=2)]

    def attend(q, k, v):
        marks = torch.tensor([[1, 0, 0, 0, 1]])
        return kind_of(kind)(q, k, v, is_causal=False, special_tokens_mask=marks)

    assert torch.autograd.gradcheck(attend, given_)


# --- gradients, and what is refused ---------------------------------------------------


@pytest.mark.parametrize("tokens", [5, 150])
@pytest.mark.parametrize("front", [0, 4])
def test_gradients(tokens, front):
    given_ = [x.requires_grad_() for x in inputs(2, 1, tokens, width=2)]
    for attend in (
        RegularisedAttention(alpha=0.4, demonstrations=front),
        lambda q, k, v: augmented(q, k, v, front),
        NegativeAttention(beta=0.4, k=3, demonstrations=front),
    ):
        assert torch.autograd.gradcheck(attend, given_, fast_mode=tokens > 10)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (RegularisedAttention, {"alpha": math.nan}, "alpha"),
        (RegularisedAttention, {"alpha": 0.1, "demonstrations": -1}, "demonstrations"),
        (NegativeAttention, {"beta": math.inf, "k": 2}, "beta"),
        (NegativeAttention, {"beta": 1.0, "k": 0}, "k = 0"),
        (NegativeAttention, {"beta": 1.0, "k": 9, "demonstrations": 9}, "k = 9"),
        (NegativeAttention, {"beta": 1.0, "k": 2, "by": "values"}, "by = values"),
        (AugmentedAttention, {"depth": 0}, "depth"),
        (DifferentialAttention, {"lam": -math.inf}, "lam"),
    ],
)
def test_values_that_are_not_allowed_are_refused(kind, options, name):
    with pytest.raises(ValueError, match=name):
        kind(**options)


def test_inputs_that_do_not_fit_are_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="queries of all tokens"):
        NegativeAttention(beta=1.0, k=2, by="scores")(q[:, :, 1:], k, v)
    with pytest.raises(RuntimeError):
        augmented(q, k, v, of_key=lambda x: x[..., :2])
    with pytest.raises(RuntimeError):
        augmented(q, k, v, of_value=lambda x: x[..., :2])
    with pytest.raises(RuntimeError):
        DifferentialAttention(lam=0.3)(*inputs(width=3))
    with pytest.raises(ValueError, match="fit"):
        RegularisedAttention(alpha=0.3)(q, k, v, torch.ones(1, 2, 9, 9).bool().tril())


# --- controls and kin ---------------------------------------------------------------


def total_weight(attend, q, k):
    """The sum of the weights, that is attention to values of one."""
    return attend(q, k, torch.ones_like(k))[..., :1]


@settings(deadline=None, max_examples=20)
@given(strength=st.floats(-1.5, 1.5), part=st.integers(0, 1), seed=st.integers(0, 99))
def test_controls_keep_the_weight_and_drop_the_contrast(strength, part, seed):
    q, k, v = inputs(4, 2, seed=seed)
    front = 4 if part else 0
    if part:
        q = q[:, :, -1:]

    def regularised(alpha, **options):
        return RegularisedAttention(alpha=alpha, demonstrations=front, **options)

    def negative(**options):
        return NegativeAttention(beta=strength, k=2, demonstrations=front, **options)

    for attend, control in (
        (regularised(strength), regularised(strength, matched=True)),
        (negative(), negative(matched=True)),
    ):
        weight = total_weight(attend, q, k)
        torch.testing.assert_close(weight, total_weight(control, q, k))
    control = regularised(strength, matched=True)(q, k, v)
    weight = total_weight(regularised(strength), q, k)
    torch.testing.assert_close(control, regularised(0.0)(q, k, v) * weight)
    control = negative(matched=True)(q, k, v)
    scaled = (1 - strength) * v
    if not front:
        scaled[:, :, 0] = v[:, :, 0]  # has none before it to be pushed from
    expected = augmented(q, k, v, front, lambda _: scaled, lambda k: k)
    torch.testing.assert_close(control, expected)


def test_differential_attention_by_hand():
    q, k, v = inputs(4, 2)
    weights = []
    for half in (slice(0, 2), slice(2, 4)):
        scores = q[..., half] @ k[..., half].repeat_interleave(2, 1).mT / 2**0.5
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
    expected = (weights[0] - 0.3 * weights[1]) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(DifferentialAttention(lam=0.3)(q, k, v), expected)


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"depth": 3}])
def test_views_begin_as_the_identity_and_can_leave_it(options):
    view, z = _View(4, 9, seed=1, **options), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(view(z), z)
    view(z).square().sum().backward()
    assert view.out.grad.abs().max() > 0
    view = _View(4, 9, seed=1, **(options | {"depth": 1}))
    with torch.no_grad():
        view.out.fill_(1.0)
    step = torch.nn.functional.gelu(z @ view.into[0].T) @ torch.ones(9, 4)
    expected = z + step if options.get("residual", True) else step
    torch.testing.assert_close(view(z), expected)


@pytest.mark.parametrize(("hidden", "residual"), [(0, True), (7, False)])
def test_views_that_are_too_narrow_are_refused(hidden, residual):
    with pytest.raises(ValueError, match="hidden"):
        _View(4, hidden, residual=residual)
