"""Families of models: whose prompts may be packed, whose attention can be recorded.

The table in book/running.md is this list.
"""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, WORDS, tiny_model
from test_activations import alone, level
from test_scoring import LABELS, PREFIX, QUERIES, one_by_one
from transformers.modeling_outputs import CausalLMOutput

from icl.activations import capture_qkv, read_recording, record
from icl.finetuning import kv_projections
from icl.scoring import facts, score

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4)
SIZES |= dict(num_attention_heads=4, max_position_embeddings=256)
PLAIN = SIZES | dict(num_key_value_heads=2)
HEADS = PLAIN | dict(head_dim=8)
WINDOW = HEADS | dict(sliding_window=40)  # longer than a prompt, not than a row
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2)
EXPERTS |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
LINEAR = HEADS | dict(linear_num_key_heads=2, linear_num_value_heads=2)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
OLDER = dict(n_embd=32, n_layer=3, n_head=4, n_positions=256)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
LATENT |= dict(v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
LOCAL = dict(num_layers=4, num_heads=4, window_size=16)
ALIBI = dict(num_hidden_layers=3, num_attention_heads=4)

RECORDED = "exact, packed; attention recorded"
PACKED = "exact, packed; attention refused"
SLOWER = "exact, each prompt alone: slower; attention refused"
REFUSED = "refused: not causal"

#: What happens with a family, and the sizes of a small model of it.
FAMILIES = {family: (RECORDED, {}) for family in TINY} | {
    "cohere": (RECORDED, PLAIN),
    "gemma": (RECORDED, HEADS),
    "gemma3_text": (RECORDED, WINDOW),
    "glm4": (RECORDED, HEADS),
    "gpt_bigcode": (RECORDED, OLDER),
    "granite": (RECORDED, PLAIN),
    "mistral": (RECORDED, WINDOW),
    "mixtral": (RECORDED, PLAIN | EXPERTS),
    "olmo2": (RECORDED, PLAIN),
    "phi": (RECORDED, PLAIN),
    "phi3": (RECORDED, PLAIN),
    "qwen2": (RECORDED, PLAIN),
    "qwen3_moe": (RECORDED, HEADS | EXPERTS),
    "smollm3": (RECORDED, PLAIN),
    "starcoder2": (RECORDED, PLAIN),
    "biogpt": (PACKED, SIZES),
    "deepseek_v3": (PACKED, SIZES | EXPERTS | LATENT),
    "falcon": (PACKED, ALIBI | dict(hidden_size=32, alibi=False)),
    "gemma2": (PACKED, WINDOW),
    "gpt_oss": (PACKED, WINDOW | EXPERTS),
    "gptj": (PACKED, OLDER | dict(rotary_dim=4)),
    "stablelm": (PACKED, PLAIN),
    "bloom": (SLOWER, dict(hidden_size=32, n_layer=3, n_head=4)),
    "falcon_h1": (SLOWER, PLAIN | dict(mamba_d_ssm=64) | MAMBA),
    "gpt_neo": (SLOWER, LOCAL | dict(attention_types=[[["global", "local"], 2]])),
    "granitemoehybrid": (
        SLOWER,
        PLAIN | MAMBA | dict(layer_types=["mamba", "attention"] * 2),
    ),
    "lfm2": (SLOWER, PLAIN | dict(layer_types=["conv", "full_attention"] * 2)),
    "mamba": (SLOWER, dict(hidden_size=32, state_size=8, num_hidden_layers=3)),
    "mpt": (SLOWER, dict(d_model=32, n_layers=3, n_heads=4, max_seq_len=256)),
    "qwen3_5_text": (SLOWER, LINEAR),
    "qwen3_next": (SLOWER, LINEAR | EXPERTS),
    "bert": (REFUSED, SIZES),
    "roberta": (REFUSED, SIZES),
    "xlnet": (REFUSED, dict(d_model=32, n_layer=2, n_head=4, d_inner=64)),
}


def judged(model, tokenizer, folder):
    """Which of the four a model is, its numbers compared with each prompt alone."""
    try:
        for prefix in (PREFIX, ""):
            got = score(model, tokenizer, QUERIES, LABELS, prefix)
            want = one_by_one(model, tokenizer, QUERIES, LABELS, prefix)
            np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
            assert np.ptp(want, axis=0).min() > 1e-3, "the case is too easy: ties"
    except ValueError:
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not causal"):
            score(model, tokenizer, QUERIES, LABELS)
        return REFUSED
    asked = model, tokenizer, QUERIES, ["Unclearly", "Positive"], PREFIX
    try:
        record(*asked, folder=folder, positions=("prompt", "label"))
    except ValueError:
        with pytest.raises(ValueError, match=type(model).__name__):
            record(*asked, folder=folder)
        with pytest.raises(ValueError, match=type(model).__name__):
            capture_qkv(model, [1, 2, 3])
        return PACKED
    for position, got in read_recording(folder).items():
        for n, query in enumerate(QUERIES):
            outputs, logs, _ = alone(model, tokenizer, PREFIX, query, position)
            np.testing.assert_allclose(got.outputs[n], outputs, atol=1e-4)
            both = np.concatenate([got.demonstrations[n], got.own[n]], -1)
            np.testing.assert_allclose(level(both), level(logs), atol=1e-3)
    return RECORDED


def noted(caplog):
    return [r for r in caplog.records if r.name == "icl.scoring"]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tokenizer, tmp_path, caplog):
    """And one line, once, says that a model is slower."""
    kind, sizes = FAMILIES[family]
    with caplog.at_level(logging.WARNING):
        model = tiny_model(family, **sizes)
        found = judged(model, tokenizer, tmp_path / "run")
    slower = len(noted(caplog)) == 1
    assert (SLOWER if slower and found == PACKED else found) == kind
    assert slower == (kind == SLOWER)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_half_precision(family, tokenizer, tmp_path):
    """Rounding is not taken for a difference, nor a difference for rounding."""
    kind, sizes = FAMILIES[family]
    model = tiny_model(family, **sizes).to(torch.bfloat16)
    asked = model, tokenizer, QUERIES, LABELS, PREFIX
    if kind == REFUSED:
        with pytest.raises(ValueError, match="not causal"):
            score(*asked)
        return
    score(*asked)
    assert ("not packed" in facts(model)) == (kind == SLOWER)
    if kind == RECORDED:
        record(*asked, folder=tmp_path / "run")
    else:
        with pytest.raises(ValueError, match=type(model).__name__):
            record(*asked, folder=tmp_path / "run")


def test_the_table_of_the_book_is_this_list():
    page = Path(__file__).parents[2] / "book" / "running.md"
    rows = re.findall(r"^\| (.+?) \| (`.+?`) \|$", page.read_text(), re.M)
    table = {k: sorted(re.findall(r"`(\w+)`", names)) for k, names in rows}
    want = {}
    for family, (kind, _) in FAMILIES.items():
        want.setdefault(kind, []).append(family)
    assert table == {kind: sorted(names) for kind, names in want.items()}


class Means(transformers.PreTrainedModel):
    """Tokens mixed by a running mean that obeys no mask, cache or position."""

    config_class = transformers.LlamaConfig
    ahead = False

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        size = config.vocab_size, config.hidden_size
        self.rows = torch.nn.Parameter(torch.randn(size))
        self.out = torch.nn.Parameter(torch.randn(size))
        self.post_init()

    def forward(self, input_ids, **ignored):
        x = torch.tanh(self.rows[input_ids])
        n = torch.arange(1.0, x.shape[1] + 1)[:, None]
        mean = x.mean(1, keepdim=True) if self.ahead else x.cumsum(1) / n
        return CausalLMOutput(logits=4 * (x + mean).to(x.dtype) @ self.out.T)


class MeansAhead(Means):
    """The mean of all tokens, later ones too."""

    ahead = True


@pytest.mark.parametrize("kind", [Means, MeansAhead])
@pytest.mark.parametrize("first", [1, 4])
def test_a_layer_that_no_list_knows(kind, first, tokenizer, tmp_path, caplog):
    """Even if a first call, of one query, could not tell."""
    sizes = dict(vocab_size=len(WORDS) + 3, hidden_size=8, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes)
    model = kind(config).eval()
    if kind is MeansAhead:
        with pytest.raises(ValueError, match="MeansAhead is not causal"):
            score(model, tokenizer, QUERIES[:first], LABELS, PREFIX)
        return
    score(model, tokenizer, QUERIES[:first], LABELS[:1])
    assert judged(model, tokenizer, tmp_path / "run") == PACKED
    assert len(noted(caplog)) == 1
    with pytest.raises(ValueError, match="Means"):
        kv_projections(model)


def test_a_replaced_attention_is_compared_anew(tokenizer, tmp_path):
    """Delta attention has a state that packed prompts share; softmax has none."""
    from icl.attention import replace_attention

    model = tiny_model("llama")
    want = score(model, tokenizer, QUERIES, LABELS, PREFIX)
    replace_attention(model, "delta")
    assert judged(model, tokenizer, tmp_path / "run") == PACKED
    model.set_attn_implementation("sdpa")
    got = score(model, tokenizer, QUERIES, LABELS, PREFIX)
    np.testing.assert_array_equal(got, want)
