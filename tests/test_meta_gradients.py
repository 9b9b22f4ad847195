"""The relaxed updates on real heads, against slow and separate computations."""

import numpy as np
import pytest
import torch
from conftest import tiny_model, word_tokenizer

from icl.finetuning import heads_on_frozen_inputs, kv_sgd
from icl.heads import attention_inputs
from icl.meta_gradients import ft_update, guesses, icl_update, relaxation

PROMPT = [0, 5, 9, 3, 14, 7, 22, 4, 11]
QUERIES = [[8, 19, 6], [12, 3, 10, 5]]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").double()


@pytest.fixture(scope="module")
def update(llama):
    texts = ["Review : a good film Sentiment : Positive", "Review : dull plot bad"]
    return kv_sgd(llama, word_tokenizer(), texts, 0.5)[0]


def heads_alone(model, ids, start=0):
    """Float64 queries, keys, values by the projections and the rotary formula."""
    config, layers = model.config, []
    states = model(
        torch.tensor([ids]),
        position_ids=torch.arange(start, start + len(ids))[None],
        output_hidden_states=True,
    ).hidden_states
    d = config.hidden_size // config.num_attention_heads
    place = np.arange(start, start + len(ids))[:, None]
    angle = place / config.rope_parameters["rope_theta"] ** (np.arange(0, d, 2) / d)
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    for layer, x in zip(model.model.layers, states[:-1], strict=True):
        x = layer.input_layernorm(x)[0].detach().numpy()

        def project(linear, x=x, heads=config.num_attention_heads):
            rows = x @ linear.weight.detach().numpy().T
            out = rows.reshape(len(x), -1, d).transpose(1, 0, 2)
            return out.repeat(heads // len(out), 0)

        def turn(x):
            half = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
            return x * cos + half * sin

        attn = layer.self_attn
        query, key = turn(project(attn.q_proj)) / d**0.5, turn(project(attn.k_proj))
        layers.append((query, key, project(attn.v_proj)))
    return layers


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_relaxation_against_a_loop_over_heads(llama):
    ends = [4, 9]
    found = relaxation(llama, PROMPT, QUERIES, ends)
    for i, end in enumerate(ends):
        for n, query in enumerate(QUERIES):
            together = heads_alone(llama, PROMPT[:end] + query)
            apart = heads_alone(llama, PROMPT[:1] + query, start=end - 1)
            for layer, (Q, K, V) in enumerate(together):
                for h in range(4):
                    q, k, v = Q[h, -1], K[h], V[h]
                    s = k @ q
                    p = softmax(s)
                    rest = [0, *range(end, len(k))]
                    whole = p @ v
                    change = whole - softmax(s[rest]) @ v[rest]
                    relaxed = sum(np.outer(v[t], k[t]) @ q for t in range(1, end))
                    mean = v[1:end].mean(0)
                    centre = k[1:end].mean(0)
                    centred = sum(v[t] * ((k[t] - centre) @ q) for t in range(1, end))
                    first = mean + centred / (end - 1) - softmax(s[rest]) @ v[rest]
                    bare = apart[layer][1][h] @ apart[layer][0][h, -1]
                    passes = whole - softmax(bare) @ apart[layer][2][h]
                    want = {
                        "mass": p[1:end].sum(),
                        "opening": p[0],
                        "spread": s[1:end].std(ddof=1),
                        "cosine: relaxed": cosine(relaxed, change),
                        "cosine: mean value": cosine(mean, change),
                        "cosine: centred": cosine(centred, change),
                        "cosine: gated mean": cosine(
                            mean - softmax(s[rest]) @ v[rest], change
                        ),
                        "cosine: gated": cosine(first, change),
                        "norm: relaxed": np.linalg.norm(relaxed),
                        "norm: change": np.linalg.norm(change),
                        "cosine: passes": cosine(passes, change),
                    }
                    assert set(want) == set(found)
                    for name, value in want.items():
                        got = found[name][i, n, layer, h]
                        # the model turns rotary angles in float32
                        assert got == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_zero_shot_query_keeps_its_place():
    """With absolute positions it matters that the query stands where it did."""
    model, query = tiny_model("gpt2").double(), QUERIES[1]
    got = relaxation(model, PROMPT, [query], [9])["cosine: passes"][0, 0]
    together = attention_inputs(model, PROMPT + query)
    apart = attention_inputs(model, PROMPT[:1] + query, start=8)
    for layer, (one, two) in enumerate(zip(together, apart, strict=True)):
        for h in range(4):
            s = (one.key[h] @ one.query[h, -1]).numpy()
            v, rest = one.value[h].numpy(), [0, *range(9, len(s))]
            whole = softmax(s) @ v
            bare = softmax((two.key[h] @ two.query[h, -1]).numpy())
            passes = whole - bare @ two.value[h].numpy()
            want = cosine(passes, whole - softmax(s[rest]) @ v[rest])
            assert got[layer, h] == pytest.approx(want, abs=1e-6)


def test_first_order_guess_is_exact_for_small_scores():
    g = torch.Generator().manual_seed(0)
    q, K = torch.randn(5, generator=g).double(), torch.randn(9, 5, generator=g).double()
    V = torch.randn(9, 4, generator=g).double()
    where = torch.arange(9) < 6
    gaps = []
    for scale in (1e-1, 1e-2):
        found = guesses(scale * q, K, V, where)
        gaps.append((found["gated"] - found["change"]).norm().item())
    assert gaps[1] / gaps[0] == pytest.approx(1e-2, rel=0.2)  # second order in scale


def test_icl_update(llama):
    layers = attention_inputs(llama, PROMPT)
    raw, centred = icl_update(layers), icl_update(layers, centred=True)
    for layer, (_, K, V) in enumerate(heads_alone(llama, PROMPT)):
        for h in range(4):
            k, v = K[h, 1:], V[h, 1:]
            outer = sum(np.outer(b, a) for a, b in zip(k, v, strict=True))
            np.testing.assert_allclose(raw[layer, h], outer, atol=1e-6)
            both = np.cov(v.T, k.T, bias=True)[: v.shape[1], v.shape[1] :] * len(k)
            np.testing.assert_allclose(centred[layer, h], both, atol=1e-6)


def test_frozen_inputs_meet_updated_projections(llama, update):
    """Layer l's keys are (W_K + ΔW_K) X with the X of the untouched model."""
    ids = [0, 8, 19, 6, 4]
    plain = heads_alone(llama, ids, start=7)
    frozen = heads_on_frozen_inputs(llama, update, ids, start=7)
    states = llama(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for l, layer in enumerate(llama.model.layers):  # noqa: E741
        x = layer.input_layernorm(states[l])[0]
        dW_V = update[f"model.layers.{l}.self_attn.v_proj.weight"]
        more = (x @ dW_V.T).unflatten(-1, (2, -1)).transpose(0, 1)
        want = torch.as_tensor(plain[l][2]) + more.repeat_interleave(2, 0)
        torch.testing.assert_close(frozen[l].value, want, atol=1e-6, rtol=0)
        changed = (frozen[l].key - torch.as_tensor(plain[l][1])).abs().max()
        assert changed > 1e-4
        want = torch.as_tensor(plain[l][0])
        torch.testing.assert_close(frozen[l].query, want, atol=1e-6, rtol=0)


def test_ft_update_is_the_change_of_linear_attention(llama, update):
    ids = [0, 8, 19, 6, 4]
    before = attention_inputs(llama, ids, start=3)
    after = heads_on_frozen_inputs(llama, update, ids, start=3)
    total = sum(ft_update(llama, update, ids, start=3))
    for l in range(3):  # noqa: E741
        old = torch.einsum("hto,htk->hok", before[l].value, before[l].key)
        new = torch.einsum("hto,htk->hok", after[l].value, after[l].key)
        torch.testing.assert_close(total[l], new - old, atol=1e-8, rtol=1e-8)
