"""Weight updates as attention and attention as weight updates, in float64; and both
on the heads of a model, against slow and separate computations."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from conftest import tiny_model, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.activations import capture_qkv
from icl.duality import (
    approximation_quality,
    approximations,
    frobenius_cosine,
    ft_update,
    icl_update,
    subspace_overlap,
)
from icl.finetuning import heads_on_frozen_inputs, kv_sgd

F64 = torch.float64


def tokens(seed, n, d, d_o, lead=(), scale=1.0):
    g = torch.Generator().manual_seed(seed)
    sizes = [(*lead, d), (*lead, n, d), (*lead, n, d_o)]
    q, K, V = [torch.randn(size, generator=g, dtype=F64) for size in sizes]
    return scale * q, scale * K, V


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 9),
    d=st.integers(1, 6),
    d_o=st.integers(1, 5),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    data=st.data(),
)
def test_the_change_is_attention_to_all_less_that_to_the_rest(
    seed, n, d, d_o, lead, scale, data
):
    q, K, V = tokens(seed, n, d, d_o, lead, scale)
    where = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if where.all() or not where.any():
        with pytest.raises(ValueError, match="demonstrations"):
            approximations(q, K, V, where)
        return
    change = approximations(q, K, V, where)["change"]
    whole, alone = softmax_loop(q, K, V), softmax_loop(q, K, V, ~where)
    np.testing.assert_allclose(change, whole - alone, atol=1e-12)


def softmax_loop(q, K, V, keep=None):
    """Attention one token at a time, with NumPy."""
    q, K, V = q.numpy(), K.numpy(), V.numpy()
    out = np.zeros((*q.shape[:-1], V.shape[-1]))
    for place in np.ndindex(q.shape[:-1]):
        rows = range(K.shape[-2]) if keep is None else np.flatnonzero(keep.numpy())
        scores = np.array([K[place][i] @ q[place] for i in rows])
        weights = np.exp(scores - scores.max())
        out[place] = sum(w * V[place][i] for w, i in zip(weights, rows, strict=True))
        out[place] /= weights.sum()
    return out


def test_cosine_and_overlap_of_known_matrices():
    I = torch.eye(4, dtype=F64)  # noqa: E741
    A = torch.outer(I[0], I[1]) * 5 + torch.outer(I[1], I[2]) * 3
    B = torch.outer(I[1], I[1]) * 4 + torch.outer(I[0], I[3]) * 2
    assert frobenius_cosine(A, -2 * A).item() == pytest.approx(-1)
    assert frobenius_cosine(A, B).item() == pytest.approx(0)
    left, right = subspace_overlap(A, B, 1)  # e0 and e1 on the left, e1 twice right
    assert (left.item(), right.item()) == pytest.approx((0, 1))
    left, right = subspace_overlap(A, B, 2)  # {e0, e1} twice; {e1, e2} and {e1, e3}
    assert (left.item(), right.item()) == pytest.approx((1, 0.5))


def test_overlap_of_random_subspaces_is_rank_over_dimension():
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 500, 12, 12, generator=g, dtype=F64)
    for part in subspace_overlap(A, B, 3):
        standard_error = part.std() / 500**0.5
        assert abs(part.mean() - 3 / 12) < 4 * standard_error


def test_only_some_of_the_tokens_are_demonstrations():
    q, K, V = tokens(0, 5, 4, 3)
    where = torch.tensor([True, True, False, False, False])
    for wrong in (where[:4], where.long(), where[:, None]):  # integers would index
        with pytest.raises(ValueError, match="demonstrations"):
            unwrap(approximations)(q, K, V, wrong)


def test_overlap_refuses_ranks_that_there_are_not():
    A = torch.eye(3, 5, dtype=F64)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3, not {rank}"):
            subspace_overlap(A, A, rank)


# -- on the heads of a model -----------------------------------------------------------

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


def test_approximation_quality_against_a_loop_over_heads(llama):
    ends = [4, 9]
    found = approximation_quality(llama, PROMPT, QUERIES, ends)
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
    got = approximation_quality(model, PROMPT, [query], [9])["cosine: passes"][0, 0]
    together = capture_qkv(model, PROMPT + query)
    apart = capture_qkv(model, PROMPT[:1] + query, start=8)
    for layer, (one, two) in enumerate(zip(together, apart, strict=True)):
        for h in range(4):
            s = (one.key[h] @ one.query[h, -1]).numpy()
            v, rest = one.value[h].numpy(), [0, *range(9, len(s))]
            whole = softmax(s) @ v
            bare = softmax((two.key[h] @ two.query[h, -1]).numpy())
            passes = whole - bare @ two.value[h].numpy()
            want = cosine(passes, whole - softmax(s[rest]) @ v[rest])
            assert got[layer, h] == pytest.approx(want, abs=1e-6)


def test_first_order_is_exact_for_small_scores():
    g = torch.Generator().manual_seed(0)
    q, K = torch.randn(5, generator=g).double(), torch.randn(9, 5, generator=g).double()
    V = torch.randn(9, 4, generator=g).double()
    where = torch.arange(9) < 6
    gaps = []
    for scale in (1e-1, 1e-2):
        found = approximations(scale * q, K, V, where)
        gaps.append((found["gated"] - found["change"]).norm().item())
    assert gaps[1] / gaps[0] == pytest.approx(1e-2, rel=0.2)  # second order in scale


def test_icl_update(llama):
    layers = capture_qkv(llama, PROMPT)
    raw, centred = icl_update(layers), icl_update(layers, centred=True)
    for layer, (_, K, V) in enumerate(heads_alone(llama, PROMPT)):
        for h in range(4):
            k, v = K[h, 1:], V[h, 1:]
            outer = sum(np.outer(b, a) for a, b in zip(k, v, strict=True))
            np.testing.assert_allclose(raw[layer, h], outer, atol=1e-6)
            both = np.cov(v.T, k.T, bias=True)[: v.shape[1], v.shape[1] :] * len(k)
            np.testing.assert_allclose(centred[layer, h], both, atol=1e-6)


def last_states(model, ids, count, mlp=None):
    """``A``, ``n``, ``h`` of the last tokens in every layer, and their logits.

    ``mlp(layer, A, n)``, if given, is what the MLPs add instead.
    """
    found, undo = [], []
    for layer, block in enumerate(model.model.layers):
        at = {}

        def of_norm(module, given, output, at=at):
            at["A"], at["n"] = given[0][0, -count:], output[0, -count:]

        def of_down(module, given, at=at):
            at["h"] = given[0][0, -count:]

        def of_mlp(module, given, output, at=at, layer=layer):
            return output if mlp is None else mlp(layer, at["A"], at["n"])[None]

        norm = block.post_attention_layernorm
        undo.append(norm.register_forward_hook(of_norm))
        undo.append(block.mlp.down_proj.register_forward_pre_hook(of_down))
        undo.append(block.mlp.register_forward_hook(of_mlp))
        found.append(at)
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -count:]
    for hook in undo:
        hook.remove()
    return found, logits


def test_a_context_is_a_rank_one_update_of_gated_blocks_for_each_token(llama):
    """Dherin et al. (2025), for three weights and a norm: all layers, every token."""
    query = QUERIES[1]
    told, logits = last_states(llama, PROMPT + query, len(query))
    ranks, applied = [], []

    def patched(layer, A, n):
        mlp, C, rows = llama.model.layers[layer].mlp, told[layer], []
        for t in range(len(query)):
            turn = torch.outer(C["n"][t] - n[t], n[t]) / (n[t] @ n[t])
            adds = torch.outer(C["A"][t] - A[t], C["h"][t]) / (C["h"][t] @ C["h"][t])
            W_g, W_u = (W @ turn for W in (mlp.gate_proj.weight, mlp.up_proj.weight))
            ranks.extend(torch.linalg.matrix_rank(W) for W in (W_g, W_u, adds))
            gate = (mlp.gate_proj.weight + W_g) @ n[t]
            hidden = gate * gate.sigmoid() * ((mlp.up_proj.weight + W_u) @ n[t])
            rows.append((mlp.down_proj.weight + adds) @ hidden)
        applied.append(layer)
        return torch.stack(rows)

    alone, found = last_states(llama, query, len(query), patched)
    assert applied == [0, 1, 2]
    assert {int(rank) for rank in ranks} == {1}
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)
    # the patches do something, and blocks above attend to fewer tokens all the same
    _, plain = last_states(llama, query, len(query))
    assert (plain - logits).abs().max() > 0.1
    assert (alone[-1]["A"] - told[-1]["A"]).abs().max() > 1e-3


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
    before = capture_qkv(llama, ids, start=3)
    after = heads_on_frozen_inputs(llama, update, ids, start=3)
    parts = ft_update(llama, update, ids, start=3)
    total = sum(parts)
    for l in range(3):  # noqa: E741
        old = torch.einsum("hto,htk->hok", before[l].value, before[l].key)
        new = torch.einsum("hto,htk->hok", after[l].value, after[l].key)
        torch.testing.assert_close(total[l], new - old, atol=1e-8, rtol=1e-8)
        mixed = torch.einsum("hto,htk->hok", after[l].value, before[l].key)
        torch.testing.assert_close(parts.by_value[l], mixed - old)
        mixed = torch.einsum("hto,htk->hok", before[l].value, after[l].key)
        torch.testing.assert_close(parts.by_key[l], mixed - old)
