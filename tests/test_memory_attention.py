"""Linear attention and the delta rule in the place of softmax attention."""

import pytest
import torch
from conftest import assert_same_token_by_token, padded_left, tiny_model
from torch.nn.functional import normalize, rms_norm
from transformers import AutoModelForCausalLM

from icl.attention import equip, memory_attention
from icl.memory import learn
from icl.scoring import score

IDS = torch.tensor([[3, 7, 5, 9, 4, 11, 6, 8, 5, 3, 12, 7]])
CASES = [
    dict(kind="linear"),
    dict(kind="linear", decay=0.9, momentum=0.5),
    dict(kind="delta", beta=1.3),
    dict(kind="delta", beta=0.8, decay=0.9, momentum=0.5, learned=True),
]


def equipped(family, **case):
    """Learned rates differ from head to head and from token to token."""
    model = equip(tiny_model(family), **case)
    for name, parameter in model.named_parameters():
        if name.endswith("momentum"):
            with torch.no_grad():
                parameter += torch.randn_like(parameter)
    return model


def inputs(heads=4, kv_heads=2, tokens=9, new=None):
    g = torch.Generator().manual_seed(0)
    shapes = [(heads, new or tokens), (kv_heads, tokens), (kv_heads, tokens)]
    return [torch.randn(2, *n, 5, generator=g, dtype=torch.float64) for n in shapes]


@pytest.mark.parametrize("new", [9, 3, 1])
@pytest.mark.parametrize("loss", ["squared", "inner"])
def test_it_is_the_learner_on_unit_keys_and_queries(new, loss):
    q, k, v = inputs(new=new)
    rates = {"beta": 1.5, "decay": 0.8, "momentum": 0.3}
    found = memory_attention(q, k, v, **rates, loss=loss)
    for b in range(2):
        for head in range(4):
            ask = torch.zeros(1, 1, 9, 5, dtype=torch.float64)
            ask[0, 0, 9 - new :] = q[b, head] / q[b, head].norm(dim=-1, keepdim=True)
            key = k[b : b + 1, None, head // 2]
            key = key / key.norm(dim=-1, keepdim=True)
            value = v[b : b + 1, None, head // 2]
            out, _ = learn(ask, key, value, **rates, loss=loss)
            out = out[0, 0, 9 - new :]
            size = (out.square().mean(-1, keepdim=True) + 2.3e-16).sqrt()
            torch.testing.assert_close(found[b, head], out / size)


def test_padding_is_not_learned():
    q, k, v = inputs()
    mask = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :4] = False
    mask[0, :, :, 7:] = False
    beta = torch.linspace(0.1, 1.9, 9, dtype=torch.float64)
    for given_ in (mask, torch.zeros(mask.shape).masked_fill(~mask, -3.4e38)):
        found = memory_attention(q, k, v, beta, 0.9, 0.5, mask=given_)
        for b, real in ((0, slice(0, 7)), (1, slice(4, 9))):
            alone = [x[b : b + 1, :, real] for x in (q, k, v)]
            expected = memory_attention(*alone, beta[real], 0.9, 0.5)
            torch.testing.assert_close(found[b : b + 1, :, real], expected)


def test_other_masks_are_refused():
    q, k, v = inputs()
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 1, 2, 2])
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    packed = causal & ((owner == 0) | (owner[:, None] == owner))
    hole = causal.clone()
    hole[:, 4] = False
    for mask in (packed, causal.triu(-3), hole, torch.ones_like(causal)):
        with pytest.raises(
            ValueError, match="must be causal, over one piece of tokens"
        ):
            memory_attention(q, k, v, mask=mask[None, None])


def test_tokens_of_half_precision():
    q, k, v = (x.bfloat16() for x in inputs())
    found = memory_attention(q, k, v)
    whole = memory_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(found, whole.bfloat16())  # rounded once, at the end
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory_attention(q.float(), k.float(), v.float()), whole)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_token_by_token_is_the_whole_pass(family, case):
    model = equipped(family, **case)
    whole = model(IDS).logits
    assert (whole - tiny_model(family)(IDS).logits).abs().max() > 1e-2
    assert_same_token_by_token(model, IDS, whole)
    padded, mask = padded_left(IDS, 5)
    longer = dict(max_new_tokens=5, do_sample=False, pad_token_id=1)
    alone = model.generate(IDS, attention_mask=torch.ones_like(IDS), **longer)
    ahead = model.generate(padded, attention_mask=mask, **longer)
    assert ahead[0, 5:].tolist() == alone[0].tolist()


def test_a_layer_computes_the_function_of_its_kind():
    """With rates that its gates read from the keys."""
    model = equipped("gpt2", **CASES[-1])
    seen = {}
    block = model.transformer.h[0].attn
    block.c_attn.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
    block.c_proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    model(IDS)
    q, k, v = (
        x.unflatten(-1, (4, 8)).transpose(1, 2) for x in seen["qkv"].split(32, -1)
    )
    gates = block.momentum
    assert gates.shape == (4, 3, 9)
    beta, decay, momentum = (
        torch.sigmoid((k * gates[:, n, None, :8]).sum(-1) + gates[:, n, None, 8])
        for n in range(3)
    )
    unit = normalize(q, dim=-1), normalize(k, dim=-1)
    step = 2 * (1 - momentum) * beta
    out, _ = learn(*unit, v, step, decay=decay, momentum=momentum)
    expected = rms_norm(out, (8,)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


def test_gates_begin_at_the_given_rates_and_learn():
    rates = dict(beta=0.5, decay=0.9, momentum=0.25)
    fixed = equip(tiny_model("llama"), "delta", **rates)
    model = equip(tiny_model("llama"), "delta", learned=True, **rates)
    torch.testing.assert_close(model(IDS).logits, fixed(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    gates = {n: p for n, p in model.named_parameters() if n.endswith("momentum")}
    assert len(gates) == 3
    for gate in gates.values():
        assert gate.shape == (4, 3, 9)
        assert (gate.grad.abs().amax(2) > 0).all()
    at_the_end = equip(tiny_model("llama"), "delta", learned=True, beta=0.5)
    shapes = [p.shape for n, p in at_the_end.named_parameters() if "momentum" in n]
    assert shapes == [(4, 1, 9)] * 3


def test_a_saved_model_comes_back(tmp_path):
    model = equip(tiny_model("llama"), "delta", beta=0.7, decay=0.95)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="icl_delta"
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    other = tiny_model("llama")
    learned = equip(tiny_model("llama"), "delta", beta=0.7, learned=True)
    other.config.icl_attention = learned.config.icl_attention
    other.set_attn_implementation("icl_delta")
    with pytest.raises(ValueError, match="learned its rates, and they are not loaded"):
        other(IDS)


def test_packed_scoring_is_refused(tokenizer):
    model = equipped("llama", kind="delta")
    with pytest.raises(ValueError, match="not packed texts or a window"):
        score(
            model, tokenizer, ["a bad film", "good"], ["Positive", "Negative"], "the "
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"beta": 2.1},
            r"beta in \[0, 2 \(1 - momentum\)\]; given were 0.0, 1.0 and 2",
        ),
        ({"beta": 1.1, "momentum": 0.5}, "given were 0.5, 1.0 and 1.1"),
        ({"decay": 0.0}, r"decay in \(0, 1\] and .* given were 0.0, 0.0 and 1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), .* were 1.0, 1.0 and 1.0"),
        ({"eta": 1.0}, "delta is told beta, decay, momentum; given were eta"),
    ],
)
def test_equip_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        equip(tiny_model("gpt2"), "delta", **options)


def test_dropout_is_refused():
    model = equip(tiny_model("gpt2", attn_pdrop=0.1), "delta")
    with pytest.raises(ValueError, match="delta attention has no dropout"):
        model.train()(IDS)
