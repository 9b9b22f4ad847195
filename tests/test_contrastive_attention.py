"""Regularised, augmented and negative attention: by loops, and as gradient steps."""

import copy
import itertools
import math

import pytest
import torch
from conftest import assert_same_token_by_token, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from icl.attention import (
    View,
    augmented_attention,
    differential_attention,
    equip,
    negative_attention,
    rates,
    regularised_attention,
)
from icl.kernels import contrastive_loss, gram_features, initial_weight, normaliser
from icl.scoring import score
from icl.tasks import token_counts


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def inputs(heads=2, kv_heads=2, tokens=9, width=4, batch=1, seed=0):
    shapes = [(batch, n, tokens, width) for n in (heads, kv_heads, kv_heads)]
    return [draw(*shape, seed=seed + n) for n, shape in enumerate(shapes)]


def warped(x):
    return 2 * torch.tanh(x) + 0.3 * x.square()


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
    torch.testing.assert_close(regularised_attention(q, k, v, alpha), expected)


@pytest.mark.parametrize("tokens", [9, 300])  # the second is more than a block
def test_augmented_attention_by_loops(tokens):
    q, k, v = inputs(4, 2, tokens)
    expected = by_heads(
        lambda q, k, v: in_two_parts(q, warped(k), warped(v), k, v), q, k, v
    )
    torch.testing.assert_close(augmented_attention(q, k, v, warped, warped), expected)


@settings(deadline=None, max_examples=25)
@given(
    beta=st.floats(-2, 2),
    k_negatives=st.integers(1, 7),
    groups=st.sampled_from([(1, 1), (4, 2)]),
    by=st.sampled_from(["keys", "scores"]),
)
def test_negative_attention_by_loops(beta, k_negatives, groups, by):
    q, k, v = inputs(*groups)

    def head(q, k, v):
        left = k if by == "keys" else q
        values = pushed(left, k, v, beta, k_negatives, range)
        return in_two_parts(q, k, values, k, v)

    found = negative_attention(q, k, v, beta, k_negatives, by=by)
    torch.testing.assert_close(found, by_heads(head, q, k, v))


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
        found = regularised_attention(q, k, v, 0.6, mask=given_[None, None])
        torch.testing.assert_close(found, by_heads(shrunk, q, k, v))
        found = negative_attention(q, k, v, 0.7, 2, mask=given_[None, None])
        torch.testing.assert_close(found, by_heads(negative, q, k, v))


@pytest.mark.parametrize("new", [1, 4])
def test_the_last_tokens_alone(new):
    q, k, v = inputs(4, 2)
    for attend in (
        lambda q: regularised_attention(q, k, v, 0.3),
        lambda q: augmented_attention(q, k, v, warped, warped),
        lambda q: negative_attention(q, k, v, 0.7, 3),
    ):
        torch.testing.assert_close(attend(q[:, :, -new:]), attend(q)[:, :, -new:])


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
    shown = torch.arange(N + REST) < N
    return q, k, v, shown, (q[None, None, None], k[None, None], v[None, None])


def features(keys, q):
    """Exact features of the keys and of the query, and attention's normaliser."""
    phi = gram_features(torch.cat([keys, q[None]]) / WIDTH**0.25)
    return phi[:-1], phi[-1], normaliser(phi[:-1], phi[-1])


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0])
def test_regularised_attention_is_a_step_with_weight_decay(episode, alpha):
    q, k, v, shown, given_ = episode
    phi, phi_q, D = features(k, q)

    def loss(W):
        decay = alpha / (2 * ETA) * W.square().sum()
        return contrastive_loss(W, v[:N], phi[:N], D, ETA) + decay

    W_1 = stepped(loss, initial_weight(v[N:], phi[N:], D))
    found = regularised_attention(*given_, alpha, shown)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


def test_augmented_attention_is_a_step_on_augmented_pairs(episode):
    q, k, v, shown, given_ = episode
    keys = torch.cat([warped(k[:N]), k[N:]])
    phi, phi_q, D = features(keys, q)
    W_1 = stepped(
        lambda W: contrastive_loss(W, warped(v[:N]), phi[:N], D, ETA),
        initial_weight(v[N:], phi[N:], D),
    )
    found = augmented_attention(*given_, warped, warped, shown)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k_negatives", [1, 3, 6])
def test_negative_attention_is_a_step_on_pairs_and_negatives(episode, k_negatives):
    q, k, v, shown, given_ = episode
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
    found = negative_attention(*given_, beta, k_negatives, shown)[0, 0, 0]
    torch.testing.assert_close(found, W_1 @ phi_q, rtol=1e-10, atol=1e-10)


# --- gradients, and what is refused ---------------------------------------------------


@pytest.mark.parametrize("tokens", [6, 150])
def test_gradients(tokens):
    given_ = [x.requires_grad_() for x in inputs(2, 1, tokens, width=2)]
    check = torch.autograd.gradcheck
    options = dict(fast_mode=tokens > 10)
    assert check(lambda q, k, v: regularised_attention(q, k, v, 0.4), given_, **options)
    assert check(
        lambda q, k, v: augmented_attention(q, k, v, warped, warped), given_, **options
    )
    assert check(lambda q, k, v: negative_attention(q, k, v, 0.4, 3), given_, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: regularised_attention(q, k, v, math.nan), "alpha must be fin"),
        (lambda q, k, v: negative_attention(q, k, v, math.inf, 2), "beta must be fini"),
        (
            lambda q, k, v: negative_attention(q, k, v, 1.0, 9),
            "k must be 1 to 8, the o",
        ),
        (lambda q, k, v: negative_attention(q, k, v, 1.0, 0), "k must be 1 to 8"),
        (
            lambda q, k, v: negative_attention(q, k, v, 1.0, 2, torch.arange(9) < 2),
            "k must be 1 to 1",
        ),
        (
            lambda q, k, v: negative_attention(q, k, v, 1.0, 2, by="values"),
            "'keys' or 'scores', not 'values'",
        ),
        (
            lambda q, k, v: negative_attention(q[:, :, 1:], k, v, 1.0, 2, by="scores"),
            "needs the queries of all tokens",
        ),
        (
            lambda q, k, v: regularised_attention(q, k, v, 0.1, torch.zeros(9).bool()),
            "marks no token",
        ),
        (
            lambda q, k, v: regularised_attention(q, k, v, 0.1, torch.ones(9)),
            r"must be booleans \(9,\) or \(1, 9\), not torch.float32",
        ),
        (
            lambda q, k, v: augmented_attention(q, k, v, warped, lambda x: x[..., :2]),
            r"of_key must keep the shape \(1, 2, 9, 4\), but returned \(1, 2, 9, 2\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*inputs())


def test_every_sequence_of_a_batch_needs_a_demonstration():
    marks = torch.arange(9) < torch.tensor([[4], [0]])
    with pytest.raises(ValueError, match="marks no token of some sequence"):
        regularised_attention(*inputs(batch=2), 0.1, marks)


# --- controls and kin ---------------------------------------------------------------


def total_weight(attend, q, k, **options):
    """The sum of the weights, that is attention to values of one."""
    return attend(q, k, torch.ones_like(k), **options)[..., :1]


@settings(deadline=None, max_examples=20)
@given(strength=st.floats(-1.5, 1.5), part=st.integers(0, 1), seed=st.integers(0, 99))
def test_controls_keep_the_weight_and_drop_the_contrast(strength, part, seed):
    q, k, v = inputs(4, 2, seed=seed)
    if part:
        q = q[:, :, -1:]
    shown = torch.arange(9) < 4 if part else None
    for attend in (
        lambda *x, **o: regularised_attention(*x, strength, shown, **o),
        lambda *x, **o: negative_attention(*x, strength, 2, shown, **o),
    ):
        weight = total_weight(attend, q, k)
        matched = total_weight(attend, q, k, matched=True)
        torch.testing.assert_close(weight, matched)
    control = regularised_attention(q, k, v, strength, shown, matched=True)
    plain = regularised_attention(q, k, v, 0.0, shown)
    weight = total_weight(lambda *x: regularised_attention(*x, strength, shown), q, k)
    torch.testing.assert_close(control, plain * weight)
    control = negative_attention(q, k, v, strength, 2, shown, matched=True)
    scaled = (1 - strength) * v
    if shown is None:
        scaled[:, :, 0] = v[:, :, 0]  # has none before it to be pushed from
    expected = augmented_attention(q, k, v, lambda _: scaled, lambda k: k, shown)
    torch.testing.assert_close(control, expected)


def test_differential_attention_by_hand():
    q, k, v = inputs(4, 2)
    weights = []
    for half in (slice(0, 2), slice(2, 4)):
        scores = q[..., half] @ k[..., half].repeat_interleave(2, 1).mT / 2**0.5
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
    expected = (weights[0] - 0.3 * weights[1]) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(differential_attention(q, k, v, 0.3), expected)


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"depth": 3}])
def test_views_begin_as_the_identity_and_can_leave_it(options):
    view, z = View(4, 9, seed=1, **options), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(view(z), z)
    view(z).square().sum().backward()
    assert view.out.grad.abs().max() > 0
    view = View(4, 9, seed=1, **(options | {"depth": 1}))
    with torch.no_grad():
        view.out.fill_(1.0)
    step = torch.nn.functional.gelu(z @ view.into[0].T) @ torch.ones(9, 4)
    expected = z + step if options.get("residual", True) else step
    torch.testing.assert_close(view(z), expected)


# --- in models ----------------------------------------------------------------------

IDS = torch.tensor([[3, 7, 5, 9, 4, 11, 6, 8, 5, 3, 12, 7]])
FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "qwen3"]
CASES = [
    dict(kind="regularised", alpha=0.6),
    dict(kind="regularised", alpha=0.6, matched=True),
    dict(kind="augmented", hidden=16),
    dict(kind="augmented", matched=True),
    dict(kind="negative", beta=0.7, k=3),
    dict(kind="negative", beta=0.7, k=3, matched=True),
    dict(kind="differential", lam=0.4),
]


def changed(model):
    """Let the learned parts leave where they began."""
    for name, parameter in model.named_parameters():
        if name.endswith((".out", ".by")):
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model


def equipped(family, **case):
    return changed(equip(tiny_model(family), **case)).requires_grad_(False)


def test_a_batch_is_its_sequences():
    model = equipped("gpt2", kind="negative", beta=0.7, k=3, demonstrations=6)
    both = torch.cat([IDS, IDS.flip(1)])
    alone = torch.cat([model(ids[None]).logits for ids in both])
    torch.testing.assert_close(model(both).logits, alone, rtol=1e-4, atol=1e-4)


MARKED = [case | {"demonstrations": 6} for case in CASES[:-1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "case", CASES + MARKED, ids=lambda c: "-".join(map(str, c.values()))
)
def test_token_by_token_is_the_whole_pass(family, case):
    model = equipped(family, **case)
    whole = model(IDS).logits
    assert (whole - tiny_model(family)(IDS).logits).abs().max() > 1e-2
    assert_same_token_by_token(model, IDS, whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "case",
    [
        dict(kind="regularised", alpha=0.0),
        dict(kind="augmented", hidden=7),
        dict(kind="augmented", hidden=70, residual=False, depth=2),
        dict(kind="negative", beta=0.0, k=2),
        dict(kind="negative", beta=0.9, k=4, demonstrations=12),
    ],
)
def test_nothing_changed_is_the_models_own_attention(family, case):
    own = tiny_model(family)(IDS).logits
    found = equip(tiny_model(family), **case)(IDS).logits
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("front", [0, 8])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c["kind"])
def test_packed_scoring_is_scoring_one_by_one(case, front, tokenizer):
    """Behind a prefix that is read as demonstrations, or token by token."""
    shown = "Review : the plot was dull . Sentiment : Negative "
    queries = ["a bad film Sentiment :", "so very good and moving Type :"]
    labels = ["Positive", "Negative"]
    case = dict(case)
    if front and case["kind"] != "differential":
        case["demonstrations"] = token_counts(tokenizer, [shown])[0]
    model = equipped("llama", **case)
    found = score(model, tokenizer, queries, labels, shown)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prefix = model(torch.tensor([ids(shown)]), use_cache=True)
    for query, row in zip(queries, found, strict=True):
        cache = copy.deepcopy(prefix.past_key_values)
        out = model(torch.tensor([ids(query)]), past_key_values=cache)
        log_p = out.logits[0, -1].log_softmax(-1)
        expected = [log_p[ids(" " + label)[0]].item() for label in labels]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_layer_computes_the_function_of_its_kind(number):
    """On what its attention is given; the front of a sequence is its demonstrations."""
    case, expected = [
        (
            dict(kind="regularised", alpha=0.8, demonstrations=7),
            lambda *qkv: torch.cat(
                [
                    regularised_attention(*qkv, 0.0)[:, :, :7],
                    regularised_attention(*qkv, 0.8, torch.arange(12) < 7)[:, :, 7:],
                ],
                2,
            ),
        ),
        (
            dict(kind="negative", beta=0.8, k=30),  # longer sequences than this
            lambda *qkv: negative_attention(*qkv, 0.8, 11),
        ),
        (
            dict(kind="differential", lam=0.3),
            lambda *qkv: differential_attention(*qkv, 0.3),
        ),
    ][number]
    model = equip(tiny_model("gpt2"), **case)
    seen = {}
    block = model.transformer.h[0].attn
    block.c_attn.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
    block.c_proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    model(IDS)
    q, k, v = (
        x.unflatten(-1, (4, 8)).transpose(1, 2) for x in seen["qkv"].split(32, -1)
    )
    wanted = expected(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_layers_keep_their_own(family):
    """The middle one's output changes and nothing before it."""
    seen = {}
    for name, options in {"own": None, "middle": {"layers": [1]}, "all": {}}.items():
        model = tiny_model(family)
        if options is not None:
            equip(model, "regularised", alpha=0.9, **options)
        found = model(IDS, output_hidden_states=True)
        seen[name] = found.hidden_states
    torch.testing.assert_close(seen["middle"][1], seen["own"][1])
    assert (seen["middle"][2] - seen["own"][2]).abs().max() > 1e-3
    assert (seen["middle"][3] - seen["all"][3]).abs().max() > 1e-3
    model = equip(tiny_model(family), "momentum", eta=0.5, learned=True, layers=[0, 2])
    assert rates(model).shape == (2, 4)
    assert len([n for n, _ in model.named_parameters() if "momentum" in n]) == 2


def test_a_saved_model_comes_back(tmp_path):
    model = equip(tiny_model("llama"), "negative", beta=0.6, k=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="icl_negative"
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_learned_views_are_learned_and_not_lost():
    model = equip(tiny_model("llama"), "augmented", hidden=5)
    model(IDS, labels=IDS).loss.backward()
    parts = {n: p for n, p in model.named_parameters() if ".of_" in n}
    assert len(parts) == 3 * 2 * 2
    drawn = [part for name, part in parts.items() if name.endswith("into")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    for name, part in parts.items():
        assert (part.grad.abs().max() > 0) == name.endswith("out")
    other = tiny_model("llama")
    other.config.icl_attention = model.config.icl_attention
    other.set_attn_implementation("icl_augmented")
    with pytest.raises(ValueError, match="learned its views, and they are not load"):
        other(IDS)
    equip(model, "regularised", alpha=0.1)
    assert not [name for name, _ in model.named_parameters() if ".of_" in name]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("regularised", {}, "regularised is told alpha, demonstrations, matched; give"),
        ("regularised", {"alpha": math.nan}, "alpha must be finite, not nan"),
        ("negative", {"beta": math.inf, "k": 2}, "beta must be finite, not inf"),
        ("negative", {"beta": 1.0, "k": 0}, "k is 1 token or more, not 0"),
        (
            "negative",
            {"beta": 1.0, "k": 9, "demonstrations": 9},
            "k must be less than the 9 demonstrations, not 9",
        ),
        ("augmented", {}, "depth is 1 or more, and .* hidden width of 1 or more"),
        (
            "augmented",
            {"hidden": 15, "residual": False},
            "heads of width 8 need a hidden width of 16 or more",
        ),
        ("augmented", {"hidden": 8, "depth": 0}, "a view of depth 0 with 8 hidden"),
        ("differential", {"lam": -math.inf}, "lam must be finite"),
        (
            "differential",
            {"lam": 0.3, "layers": [2, 3]},
            r"layers are numbers from 0 to 2, not \[2, 3\]",
        ),
        ("differential", {"lam": 0.1, "learned": True}, "learned is for momentum, hea"),
    ],
)
def test_equip_says_what_is_wrong(kind, options, message):
    with pytest.raises(ValueError, match=message):
        equip(tiny_model("gpt2"), kind, **options)


def test_dropout_is_refused():
    model = equip(tiny_model("gpt2", attn_pdrop=0.1), "regularised", alpha=0.3)
    with pytest.raises(ValueError, match="regularised attention has no dropout"):
        model.train()(IDS)
