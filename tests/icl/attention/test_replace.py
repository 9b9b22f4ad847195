"""All kinds of attention in models of all families."""

import copy
import itertools
import json
from dataclasses import fields
from functools import lru_cache

import jaxtyping
import pytest
import torch
from conftest import (
    SHARED,
    TINY,
    assert_same_token_by_token,
    padded_left,
    tiny_encoder,
    tiny_model,
)
from safetensors.torch import save_file
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    StaticCache,
)

from icl.activations import attention_modules
from icl.attention import (
    KINDS,
    AttentionKind,
    layerwise_momentum,
    option,
    rates,
    replace_attention,
    restore_attention,
)
from icl.models import load_model, untrained
from icl.scoring import score
from icl.tasks import token_counts

FAMILIES = [family for family in TINY if family != "xglm"]
IDS = torch.tensor([[3, 7, 5, 9, 4, 11, 6, 8, 5, 3, 12, 7]])

#: Settings of every kind that a whole pass and decoding have in common.
CASES = {
    "momentum": [
        dict(eta=0.7, learned=True),
        dict(eta=0.7),
        dict(eta=0.7, normalise=True, softmax=False),
    ],
    "heavy_ball": [dict(mu=0.7), dict(mu=0.7, learned=True)],
    "convolution": [
        dict(eta=0.7, reach=3, learned=True),
        dict(eta=0.7, reach=1, learned=True),
        dict(eta=0.7, reach=3),
    ],
    "released_momentum": [
        dict(exponentials=2),
        dict(),
        dict(exponentials=1, current=False, positive=True),
    ],
    "regularised": [
        dict(alpha=0.6, demonstrations=6),
        dict(alpha=0.6),
        dict(alpha=0.6, matched=True),
        dict(alpha=0.6, matched=True, demonstrations=6),
        dict(alpha=0.6, learned=True),
        dict(alpha=0.6, learned=True, matched=True, demonstrations=6),
    ],
    "augmented": [
        dict(hidden=16),
        dict(hidden=16, demonstrations=6),
        dict(matched=True),
        dict(matched=True, demonstrations=6),
        dict(hidden=16, residual=False, depth=2),
    ],
    "negative": [
        dict(beta=0.7, k=3),
        dict(beta=0.7, k=3, demonstrations=6),
        dict(beta=0.7, k=3, matched=True),
        dict(beta=0.7, k=3, matched=True, demonstrations=6),
        dict(beta=0.7, k=3, learned=True),
        dict(beta=0.7, k=3, learned=True, matched=True, demonstrations=6),
    ],
    "differential": [dict(lam=0.4)],
    "linear": [dict(), dict(decay=0.9, momentum=0.5)],
    "delta": [
        dict(beta=1.3),
        dict(beta=0.8, decay=0.9, momentum=0.5, learned=True),
    ],
}


def pairs():
    """Every kind in every family, with each of its settings in some family."""
    found = []
    for shift, (kind, cases) in enumerate(CASES.items()):
        for number in range(len(FAMILIES)):
            family = FAMILIES[(number + shift) % len(FAMILIES)]
            case = cases[number % len(cases)]
            name = f"{family}-{kind}-" + "-".join(map(str, case.values()))
            found.append(pytest.param(family, kind, case, id=name))
    return found


@lru_cache
def own_logits(family):
    return tiny_model(family)(IDS).logits


def replaced(family, kind, sliding_window=64, **options):
    """A model in which what was learned has moved, in every head otherwise."""
    changes = {"sliding_window": sliding_window} if family == "gemma3_text" else {}
    model = tiny_model(family, **changes)
    own = {name for name, _ in model.named_parameters()}
    replace_attention(model, kind, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name not in own and not name.endswith("into"):
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def learned_names(model):
    names = ("rate_logits", "convolution_weights", "gate_weights", "of_key", "of_value")
    names += ("ema_logits", "ema_weights", "strengths")
    return [n for n, _ in model.named_parameters() if any(name in n for name in names)]


@pytest.mark.parametrize(("family", "kind", "case"), pairs())
def test_token_by_token_is_the_whole_pass(family, kind, case):
    model = replaced(family, kind, **case)
    whole = model(IDS).logits
    assert (whole - own_logits(family)).abs().max() > 1e-2  # it was replaced
    first = model(IDS[:, :1]).logits
    torch.testing.assert_close(first, whole[:, :1], rtol=1e-4, atol=1e-4)
    assert_same_token_by_token(model, IDS, whole)


def cases():
    """Every case of every kind, each in one family."""
    found = []
    every = [(kind, case) for kind, cases in CASES.items() for case in cases]
    for n, (kind, case) in enumerate(every):
        family = FAMILIES[n % len(FAMILIES)]
        name = f"{family}-{kind}-" + "-".join(map(str, case.values()))
        found.append(pytest.param(family, kind, case, id=name))
    return found


@pytest.mark.parametrize(("family", "kind", "case"), cases())
def test_generation_behind_padding(family, kind, case):
    model = replaced(family, kind, **case)
    padded, mask = padded_left(IDS, 5)
    longer = dict(max_new_tokens=5, do_sample=False, pad_token_id=1)
    alone = model.generate(IDS, attention_mask=torch.ones_like(IDS), **longer)
    ahead = model.generate(padded, attention_mask=mask, **longer)
    assert ahead[0, 5:].tolist() == alone[0].tolist()


def cut_cases():
    """Each case with one way to cut; those of demonstrations, or of few, with all."""
    found, ways = [], [[8], [1, 5, 6, 7], [8, 9, 10, 11]]
    for each in cases():
        _, kind, case = each.values
        every = "demonstrations" in case or len(CASES[kind]) < len(ways)
        for n, cuts in enumerate(ways):
            if every or n == CASES[kind].index(case) % len(ways):
                found.append(pytest.param(*each.values, cuts, id=f"{each.id}-{n}"))
    return found


@pytest.mark.parametrize(("family", "kind", "case", "cuts"), cut_cases())
def test_a_cache_of_fixed_size(family, kind, case, cuts):
    model = replaced(family, kind, **case)
    whole = model(IDS).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = IDS.tensor_split(cuts, 1)
    found = [model(ids, past_key_values=cache, use_cache=True).logits for ids in parts]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "kind", "case"), cases())
def test_a_cache_of_fixed_size_behind_padding(family, kind, case):
    model = replaced(family, kind, **case)
    whole = model(IDS).logits
    padded, mask = padded_left(IDS, 3)
    cache = StaticCache(config=model.config, max_cache_len=20)
    found = []
    for first, last in [(0, 10), (10, 11), (11, 15)]:
        seen = mask[:, :last]
        position = (seen.cumsum(1) - 1).clamp(min=0)[:, first:]
        options = {} if family == "opt" else {"position_ids": position}
        options |= dict(past_key_values=cache, use_cache=True, attention_mask=seen)
        found.append(model(padded[:, first:last], **options).logits)
    found = torch.cat(found, 1)[:, 3:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_vanishing_rate_it_is_the_models_own_attention(family):
    model = replace_attention(tiny_model(family), "momentum", eta=1e-30)
    assert torch.equal(model(IDS).logits, own_logits(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("regularised", dict(alpha=0.0)),
        ("augmented", dict(hidden=7)),
        ("augmented", dict(hidden=70, residual=False, depth=2)),
        ("negative", dict(beta=0.0, k=2)),
        ("negative", dict(beta=0.9, k=4, demonstrations=12)),
    ],
)
def test_nothing_changed_is_the_models_own_attention(family, kind, case):
    found = replace_attention(tiny_model(family), kind, **case)(IDS).logits
    torch.testing.assert_close(found, own_logits(family), rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_sequences():
    model = replaced("gpt2", "negative", beta=0.7, k=3, demonstrations=6)
    both = torch.cat([IDS, IDS.flip(1)])
    alone = torch.cat([model(ids[None]).logits for ids in both])
    torch.testing.assert_close(model(both).logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind", "case"),
    [
        ("gpt2", "momentum", dict(eta=0.7, learned=True)),
        ("opt", "convolution", dict(eta=0.7, reach=3, learned=True)),
        ("gpt_neox", "heavy_ball", dict(mu=0.7)),
        ("llama", "momentum", dict(eta=0.7, learned=True)),
        ("qwen3", "momentum", dict(eta=0.7)),
    ],
)
def test_packed_scoring_is_scoring_one_by_one(family, kind, case, tokenizer):
    model = replaced(family, kind, **case)
    queries = ["Review : a bad film Sentiment :", "Review : good Sentiment :"]
    labels = ["Positive", "Negative", "Unclearly"]
    shown = "Review : the plot was dull . Sentiment : Negative "
    packed = score(model, tokenizer, queries, labels, shown)
    for query, row in zip(queries, packed, strict=True):
        for label, found in zip(labels, row, strict=True):
            ids = [
                tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in (shown, query, " " + label)
            ]
            text = torch.tensor([sum(ids, [])])
            log_p = model(text).logits[0].log_softmax(-1)
            tail = ids[2]
            steps = range(text.shape[1] - len(tail) - 1, text.shape[1] - 1)
            exact = [log_p[s, t].item() for s, t in zip(steps, tail, strict=True)]
            assert found == pytest.approx(sum(exact) / len(exact), abs=1e-4)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(
    "kind", ["regularised", "augmented", "negative", "differential"]
)
def test_packed_scoring_behind_demonstrations(kind, front, tokenizer):
    """Behind a prefix that is read as demonstrations, or token by token."""
    shown = "Review : the plot was dull . Sentiment : Negative "
    queries = ["a bad film Sentiment :", "so very good and moving Type :"]
    labels = ["Positive", "Negative"]
    case = {n: v for n, v in CASES[kind][0].items() if n != "demonstrations"}
    if front and kind != "differential":
        case["demonstrations"] = token_counts(tokenizer, [shown])[0]
    model = replaced("llama", kind, **case)
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


def test_a_memory_is_scored_text_by_text(tokenizer):
    """It refuses packed texts, whose states would mix."""
    model, queries = replaced("llama", "delta"), ["a bad film", "good"]
    found = score(model, tokenizer, queries, ["Positive", "Negative"], "the ")
    words = tokenizer.convert_tokens_to_ids(["Positive", "Negative"])
    for query, scores in zip(queries, found, strict=True):
        ids = tokenizer("the " + query, return_tensors="pt").input_ids
        log_p = model(ids).logits[0, -1].log_softmax(-1)[words]
        assert scores.tolist() == pytest.approx(log_p.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("momentum", dict(eta=0.8, normalise=True)),
        ("heavy_ball", dict(mu=0.8)),
        ("convolution", dict(eta=0.8, reach=2)),
        ("regularised", dict(alpha=0.8, demonstrations=7)),
        ("negative", dict(beta=0.8, k=30)),  # more than there are
        ("differential", dict(lam=0.3)),
        ("linear", dict(decay=0.9)),
        ("delta", dict(beta=0.5, momentum=0.4)),
    ],
)
def test_a_layer_computes_its_kind(kind, options):
    model = replace_attention(tiny_model("gpt2"), kind, **options)
    seen = {}
    block = model.transformer.h[0].attn
    block.c_attn.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
    block.c_proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    model(IDS)
    q, k, v = (
        x.unflatten(-1, (4, 8)).transpose(1, 2) for x in seen["qkv"].split(32, -1)
    )
    wanted = KINDS[kind](**options)(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_layers_keep_their_own(family):
    """The middle one's output changes and nothing before it."""
    seen = {}
    for name, options in {"own": None, "middle": {"layers": [1]}, "all": {}}.items():
        model = tiny_model(family)
        if options is not None:
            replace_attention(model, "regularised", alpha=0.9, **options)
        found = model(IDS, output_hidden_states=True)
        seen[name] = found.hidden_states
    torch.testing.assert_close(seen["middle"][1], seen["own"][1])
    assert (seen["middle"][2] - seen["own"][2]).abs().max() > 1e-3
    assert (seen["middle"][3] - seen["all"][3]).abs().max() > 1e-3
    some = dict(eta=0.5, learned=True, layers=[0, 2])
    model = replace_attention(tiny_model(family), "momentum", **some)
    assert rates(model).shape == (2, 4)
    assert len(learned_names(model)) == 2


# --- what is learned, and what is saved ------------------------------------------


@pytest.mark.parametrize(("family", "kind", "case"), cases())
def test_a_saved_model_comes_back(family, kind, case, tmp_path):
    model = replaced(family, kind, **case)
    whole = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, whole)
    for n in range(2):  # what came back can be saved again
        folder = tmp_path / str(n)
        model.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())["icl_attention"]
        assert saved.items() >= {"kind": kind, "learned": False, **case}.items()
        model = AutoModelForCausalLM.from_pretrained(folder)
        if learned_names(restore_attention(copy.deepcopy(model), folder)):
            with pytest.raises(ValueError, match="not loaded"):
                model(IDS)
            with pytest.raises(ValueError, match="no weights"):
                restore_attention(copy.deepcopy(model), tmp_path)
            restore_attention(model, folder)
        torch.testing.assert_close(model(IDS).logits, whole)


def test_load_model_restores_what_was_learned(tokenizer, tmp_path):
    for n, (kind, options) in enumerate(
        [("released_momentum", {}), ("momentum", dict(eta=0.7, learned=True))]
    ):
        folder = tmp_path / str(n)
        model = replaced("llama", kind, **options)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again, _ = load_model(folder, device="cpu")
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_without_the_package_a_saved_model_is_refused(tmp_path, monkeypatch):
    """Rather than to come back with softmax attention."""
    replaced("llama", "negative", beta=0.5, k=2).save_pretrained(tmp_path)
    # all that the package leaves in transformers
    monkeypatch.delitem(AttentionInterface._global_mapping, "icl_negative")
    with pytest.raises(ValueError, match="icl_negative"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- every way to run a model -------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "case"), cases())
def test_generation_by_beams_and_by_sampling(family, kind, case):
    model = replaced(family, kind, **case)
    longer = dict(max_new_tokens=5, pad_token_id=1, eos_token_id=None)
    ways = [dict(num_beams=3, do_sample=False), dict(do_sample=True, top_k=5)]
    if len(CASES[kind]) > 1:  # every kind in both ways, its cases taking turns
        ways = [ways[CASES[kind].index(case) % 2]]
    for how in ways:
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(model.generate(IDS, use_cache=use_cache, **how, **longer))
        assert torch.equal(*found)


@pytest.mark.parametrize(("family", "kind", "case"), cases())
def test_gradients_with_checkpointing(family, kind, case):
    model = replaced(family, kind, **case).requires_grad_(True).train()
    for module, name in itertools.product(
        model.modules(), ("p", "dropout", "attention_dropout")
    ):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)
    found = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        model.activation_checkpointing_enable()
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize(("family", "kind", "case"), cases())
def test_half_precision(family, kind, case):
    """A layer's output is that of the same numbers in full precision, rounded."""
    module = attention_modules(replaced(family, kind, **case))[1].to(torch.bfloat16)
    attend = KINDS[kind].from_config(module.config)
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 4, 12, 8, dtype=torch.bfloat16)
    share = getattr(module, "num_key_value_groups", 1)
    k, v = k[:, ::share], v[:, ::share]
    found = attend.forward(q, k, v, None, module=module)
    assert found.dtype == torch.bfloat16
    wide = [x.float() for x in (q, k, v)]
    expected = attend.forward(*wide, None, module=module.float())
    off = 0.1 if kind == "augmented" else 0.03  # its views are in half precision too
    torch.testing.assert_close(found.float(), expected, rtol=off, atol=off)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by the compiler
@pytest.mark.parametrize("kind", CASES)
def test_compiled(kind):
    model = replaced("llama", kind, **CASES[kind][0])
    whole = model(IDS).logits
    compiled = torch.compile(model, backend="eager")
    jaxtyping.config.update("jaxtyping_disable", True)  # it cannot be traced
    try:
        torch.testing.assert_close(compiled(IDS).logits, whole)
        assert_same_token_by_token(compiled, IDS, whole)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("kind", "case"), [(k, c) for k in CASES for c in CASES[k]])
def test_a_window_is_kept_or_refused(kind, case):
    """Behind a sliding window of 6, decoding is the whole pass."""
    model = replaced("gemma3_text", kind, **case, sliding_window=6)
    if kind in ("negative", "linear", "delta") or case.get("demonstrations"):
        with pytest.raises(ValueError, match="window"):
            model(IDS)
    else:
        assert_same_token_by_token(model, IDS, model(IDS).logits)


def test_options_that_are_not_set_are_missed():
    plain = tiny_model("llama")
    plain.set_attn_implementation("icl_momentum")
    with pytest.raises(ValueError, match="not set"):
        plain(IDS)
    other = replace_attention(tiny_model("llama"), "delta")
    other.set_attn_implementation("icl_linear")
    with pytest.raises(ValueError, match="not set"):
        other(IDS)


LEARNED = {
    "regularised": ("strengths", dict(alpha=-0.3), (4,)),
    "negative": ("strengths", dict(beta=0.5, k=2), (4,)),
    "momentum": ("rate_logits", dict(eta=0.25), (4,)),
    "heavy_ball": ("rate_logits", dict(mu=0.25), (4,)),
    "convolution": ("convolution_weights", dict(eta=0.5, reach=2), (4, 2)),
    "delta": ("gate_weights", dict(beta=0.5, decay=0.9, momentum=0.25), (4, 3, 9)),
    "linear": ("gate_weights", dict(beta=0.5), (4, 1, 9)),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_rates_begin_at_the_given_ones_and_are_learned(kind):
    name, options, shape = LEARNED[kind]
    model = replace_attention(tiny_model("llama"), kind, learned=True, **options)
    same = replace_attention(tiny_model("llama"), kind, **options)
    torch.testing.assert_close(model(IDS).logits, same(IDS).logits)
    for twin in (model, copy.deepcopy(model)):
        twin(IDS, labels=IDS).loss.backward()
        parameters = dict(twin.named_parameters())
        spared = {n for n, p in parameters.items() if getattr(p, "no_weight_decay", 0)}
        assert spared == {n for n in parameters if n.endswith(f".{name}")}
        assert len(spared) == 3
        for n in spared:
            assert parameters[n].shape == shape
            gradient = parameters[n].grad.abs()
            assert (gradient.amax(2) if len(shape) == 3 else gradient).min() > 0


@pytest.mark.parametrize("kind", [*LEARNED, "augmented"])
def test_what_was_learned_is_not_lost(kind):
    options = dict(hidden=5)
    if kind in LEARNED:
        options = LEARNED[kind][1] | {"learned": True}
    model = replaced("gpt2", kind, **options)
    other = tiny_model("gpt2")
    other.config.icl_attention = model.config.icl_attention
    other.set_attn_implementation(f"icl_{kind}")
    with pytest.raises(ValueError, match="not loaded"):
        other(IDS)
    other = replace_attention(tiny_model("gpt2"), kind, **options)
    other.requires_grad_(False).load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_rates_are_those_of_every_head():
    model = replace_attention(tiny_model("gpt2"), "momentum", eta=0.25, learned=True)
    torch.testing.assert_close(rates(model), torch.full((3, 4), 0.25).double())
    with torch.no_grad():
        model.transformer.h[1].attn.rate_logits[2] = 0.0
    assert rates(model)[1, 2] == 0.5
    model = replace_attention(tiny_model("gpt2"), "convolution", eta=0.5, reach=2)
    expected = torch.tensor([0.5, 0.25]).double().expand(3, 4, 2)
    torch.testing.assert_close(rates(model), expected)
    for other in (tiny_model("gpt2"), replace_attention(model, "delta")):
        with pytest.raises(ValueError, match="no rates"):
            rates(other)


def test_views_are_learned():
    model = replace_attention(tiny_model("llama"), "augmented", hidden=5)
    model(IDS, labels=IDS).loss.backward()
    parts = {n: p for n, p in model.named_parameters() if ".of_" in n}
    assert len(parts) == 3 * 2 * 2
    drawn = [part for name, part in parts.items() if name.endswith("into")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    for name, part in parts.items():
        assert (part.grad.abs().max() > 0) == name.endswith("out")


def test_what_was_learned_before_is_gone():
    model = tiny_model("gpt2")
    for options in (
        dict(kind="convolution", eta=0.5, reach=2, learned=True),
        dict(kind="augmented", hidden=5),
        dict(kind="delta", beta=0.5, learned=True),
        dict(kind="augmented", matched=True),
        dict(kind="momentum", eta=0.3),
    ):
        alone = replace_attention(tiny_model("gpt2"), **options)
        replace_attention(model, **options)
        assert learned_names(model) == learned_names(alone)
    assert not learned_names(model)
    assert (rates(model) == 0.3).all()


# --- in encoders -------------------------------------------------------------------

ENCODED = torch.tensor([[0, 5, 9, 4, 0, 11, 6, 0], [0, 8, 3, 12, 0, 1, 1, 1]])
OF_TWO = dict(
    attention_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    special_tokens_mask=torch.isin(ENCODED, torch.tensor([0, 1])).int(),
)
ENCODER_CASES = [
    ("regularised", dict(alpha=0.6)),
    ("regularised", dict(alpha=-0.6, learned=True, matched=True)),
    ("augmented", dict(hidden=16)),
    ("augmented", dict(matched=True)),
    ("negative", dict(beta=0.7, k=2)),
    ("negative", dict(beta=0.7, k=2, by="scores", learned=True)),
]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(("kind", "case"), ENCODER_CASES)
def test_an_encoder_with_another_attention(family, kind, case, tmp_path):
    """In a layer, batches with padding, both readings, and saved and loaded again."""
    model = replace_attention(tiny_encoder(family), kind, **case)
    own = tiny_encoder(family)(ENCODED, **OF_TWO).logits
    torch.manual_seed(1)
    for name, part in model.named_parameters():
        if any(n in name for n in ("of_key", "of_value", "strengths")):
            part.data += 0.3 * torch.randn_like(part)
    seen = {}
    layer = attention_modules(model)[1]
    for name in ("query", "key", "value"):
        layer.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: seen.update({name: out})
        )
    layer.register_forward_hook(lambda m, i, out: seen.update(out=out[0]))
    found = model(ENCODED, **OF_TWO).logits
    assert (found - own).abs().max() > 1e-3
    qkv = [seen[n].unflatten(-1, (4, 8)).transpose(1, 2) for n in ("query", "key")]
    qkv.append(seen["value"].unflatten(-1, (4, 8)).transpose(1, 2))
    mask = OF_TWO["attention_mask"].bool()[:, None, None].expand(-1, -1, 8, -1)
    given = dict(special_tokens_mask=OF_TWO["special_tokens_mask"], module=layer)
    attend = KINDS[kind].from_config(model.config)
    wanted = attend(*qkv, mask, **given).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], wanted)
    alone = model(
        ENCODED[1:, :5],
        OF_TWO["attention_mask"][1:, :5],
        special_tokens_mask=OF_TWO["special_tokens_mask"][1:, :5],
    )
    torch.testing.assert_close(found[1:], alone.logits, rtol=1e-4, atol=1e-5)
    other = model(ENCODED, OF_TWO["attention_mask"]).logits
    assert (kind, case) == ("augmented", {}) or (found - other).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    again = restore_attention(again, tmp_path)
    torch.testing.assert_close(again(ENCODED, **OF_TWO).logits, found)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_nothing_changed_is_the_encoders_own_attention(family):
    own = tiny_encoder(family)(ENCODED, **OF_TWO).logits
    for kind, case in (
        ("regularised", dict(alpha=0.0)),
        ("augmented", dict(hidden=3)),
        ("negative", dict(beta=0.0, k=2)),
    ):
        model = replace_attention(tiny_encoder(family), kind, **case)
        found = model(ENCODED, **OF_TWO).logits
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    model = replace_attention(
        tiny_encoder(family), "regularised", alpha=0.9, layers=[1]
    )
    states = model(ENCODED, **OF_TWO, output_hidden_states=True).hidden_states
    plain = tiny_encoder(family)(ENCODED, **OF_TWO, output_hidden_states=True)
    torch.testing.assert_close(states[1], plain.hidden_states[1])
    assert (states[2] - plain.hidden_states[2]).abs().max() > 1e-3
    replace_attention(model, "softmax")
    assert torch.equal(model(ENCODED, **OF_TWO).logits, own)


def test_causal_attention_is_not_for_encoders():
    for kind, case in (
        ("momentum", dict(eta=0.5)),
        ("differential", dict(lam=0.1)),
        ("delta", {}),
        ("regularised", dict(alpha=0.1, demonstrations=2)),
    ):
        with pytest.raises(ValueError, match="BertFor.* is not causal"):
            replace_attention(tiny_encoder("bert"), kind, **case)


# --- options ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("nesterov", {}, "nesterov"),
        ("momentum", {}, "eta"),
        ("momentum", {"eta": 1.5}, "1.5"),
        ("heavy_ball", {"eta": 0.5}, "mu"),
        ("heavy_ball", {"mu": 0.5, "normalise": True}, "normalise"),
        ("heavy_ball", {"mu": 0.0}, "mu"),
        ("convolution", {"eta": 0.5}, "reach"),
        ("convolution", {"eta": 0.5, "reach": 0}, "reach"),
        ("released_momentum", {"exponentials": 0}, "exponentials"),
        ("regularised", {}, "alpha"),
        ("negative", {"beta": 1.0, "k": 9, "demonstrations": 9}, "k = 9"),
        ("augmented", {}, "hidden"),
        ("augmented", {"hidden": 15, "residual": False}, "16"),
        ("augmented", {"hidden": 8, "depth": 0}, "depth"),
        ("differential", {"lam": 0.3, "layers": [2, 3]}, "layers"),
        ("differential", {"lam": 0.1, "learned": True}, "learned"),
        ("delta", {"eta": 1.0}, "eta"),
        ("delta", {"beta": 2.1}, "beta"),
    ],
)
def test_wrong_options_are_refused(kind, options, name):
    with pytest.raises(ValueError, match=name):
        replace_attention(tiny_model("gpt2"), kind, **options)


def test_an_option_that_counts_is_a_whole_number():
    kind = KINDS["released_momentum"]()
    object.__setattr__(kind, "exponentials", 2.5)  # past the types that tests check
    with pytest.raises(ValueError, match=r"exponentials = 2\.5 is not allowed"):
        kind.__post_init__()


def test_a_model_without_the_interface_is_refused():
    with pytest.raises(ValueError, match="XGLMForCausalLM"):
        replace_attention(tiny_model("xglm"), "momentum", eta=0.5)


@pytest.mark.parametrize("kind", ["regularised", "differential", "delta"])
def test_dropout_is_refused(kind):
    model = tiny_model("gpt2", attn_pdrop=0.1)
    replace_attention(model, kind, **CASES[kind][0])
    with pytest.raises(ValueError, match="dropout"):
        model.train()(IDS)


def test_dropout_of_the_models_own_attention_stays():
    model = tiny_model("gpt2", attn_pdrop=0.5)
    replace_attention(model, "momentum", eta=0.5).train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_help_lists_the_options(kind):
    for each in fields(KINDS[kind]):
        assert f"    {each.name}: {each.metadata['meaning']}" in KINDS[kind].__doc__


def test_a_kind_is_one_class():
    class Faded(AttentionKind, kind="faded"):
        """Every value a part of its own."""

        part: float = option("a positive number", lambda part: part > 0)

        def init_learned(self, model, layer):
            return {"gain": torch.nn.Parameter(torch.ones(1))}

        def forward(self, query, key, value, mask, module=None, **options):
            return self.part * value * self.get_learned(module, "gain")

    try:
        model = replace_attention(tiny_model("gpt2"), "faded", part=0.5)
        assert model.config.icl_attention["part"] == 0.5
        model(IDS, labels=IDS).loss.backward()
        gains = [module.gain for module in attention_modules(model)]
        assert all(gain.grad.abs() > 0 for gain in gains)
        with pytest.raises(ValueError, match="part"):
            replace_attention(model, "faded", part=-1.0)
    finally:
        del KINDS["faded"]


def test_layerwise_momentum_looks_ahead():
    model = tiny_model("llama")
    own = model(IDS).logits
    layerwise_momentum(model, 0.4)
    found = model(IDS).logits
    replace_attention(model, "softmax")
    assert torch.equal(model(IDS).logits, own)
    body = model.model
    before, x = None, body.embed_tokens(IDS)
    place = torch.arange(IDS.shape[1])[None]
    turn = body.rotary_emb(x, place)
    for layer in body.layers:
        start = x if before is None else x + 0.4 * (x - before)
        before, x = x, layer(start, position_embeddings=turn, position_ids=place)
    torch.testing.assert_close(found, model.lm_head(body.norm(x)))
    with pytest.raises(ValueError, match="mu"):
        layerwise_momentum(model, 1.0)


def test_layerwise_momentum_once(tmp_path):
    model = tiny_model("llama")
    layerwise_momentum(model, 0.7)
    layerwise_momentum(model, 0.4)
    once = tiny_model("llama")
    layerwise_momentum(once, 0.4)
    whole = once(IDS).logits
    assert torch.equal(model(IDS).logits, whole)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, whole)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(restore_attention(again, tmp_path)(IDS).logits, whole)
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        model(IDS)


def test_softmax_takes_away_what_was_replaced(tmp_path):
    model = tiny_model("llama")
    whole = model(IDS).logits
    replace_attention(model, "momentum", eta=0.5, learned=True)
    layerwise_momentum(model, 0.4)
    replace_attention(model, "softmax")
    assert torch.equal(model(IDS).logits, whole)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(restore_attention(again, tmp_path)(IDS).logits, whole)


def test_a_refusal_leaves_the_model_as_it_was():
    model = replaced("llama", "momentum", eta=0.5, learned=True)
    whole = model(IDS).logits
    with pytest.raises(ValueError, match="hidden"):
        replace_attention(model, "augmented", hidden=0)
    assert torch.equal(model(IDS).logits, whole)


def test_an_attention_that_is_more_than_a_softmax_is_refused():
    small = dict(SHARED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    for family in ("gpt_oss", "gemma2"):
        config = AutoConfig.for_model(family, vocab_size=38, **small)
        with pytest.raises(ValueError, match="sinks, or a cap"):
            replace_attention(AutoModelForCausalLM.from_config(config), "linear")


def test_a_window_that_is_an_option_of_the_layer():
    config = AutoConfig.for_model("mistral", vocab_size=38, sliding_window=6, **SHARED)
    model = AutoModelForCausalLM.from_config(config).eval()
    replace_attention(model, "negative", beta=0.5, k=2)
    with pytest.raises(ValueError, match="window"):
        model(IDS)


def test_demonstrations_of_two_texts_in_a_row_are_refused():
    model = replaced("llama", "regularised", alpha=0.6, demonstrations=3)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.raises(ValueError, match="several texts"):
        model(IDS, position_ids=positions, use_cache=False)


def test_other_files_beside_the_model_are_not_read(tmp_path):
    model = replaced("llama", "momentum", eta=0.5, learned=True)
    model.save_pretrained(tmp_path)
    older = {n: torch.zeros(4) for n in learned_names(model)}
    save_file(older, tmp_path / "backup.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(rates(restore_attention(again, tmp_path)), rates(model))
    one = {n: torch.zeros(1) for n in older}
    save_file(one, tmp_path / "model.safetensors")
    again = replace_attention(tiny_model("llama"), "softmax")
    again.config.icl_attention = model.config.icl_attention
    with pytest.raises(ValueError, match="of this shape"):
        restore_attention(again, tmp_path)


def test_an_untrained_model_has_the_attention():
    model = replaced("llama", "augmented", hidden=5)
    layerwise_momentum(model, 0.4)
    fresh = untrained(model, 1)
    names = {n for n, _ in fresh.named_parameters()}
    assert names == {n for n, _ in model.named_parameters()}
    found = fresh(IDS).logits
    fresh.load_state_dict(model.state_dict())
    assert (found - fresh(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)
