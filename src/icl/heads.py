"""What a head attends with: its queries, keys and values, in any covered family."""

import re
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Heads(NamedTuple):
    """Queries, keys and values of the heads of one layer.

    Position embeddings are in them (rotary ones too) and the queries carry the
    factor ``1/√d_h``, so a head's scores are ``query @ key.mT`` and nothing
    else. Keys and values that several heads share are repeated for each.

    Attributes:
        query: ``(H, T, d_h)``, the tokens that were read.
        key: ``(H, P + T, d_h)``, with those of the prefix before them.
        value: likewise.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@torch.inference_mode()
def attention_inputs(model, ids, prefix=None, start=None):
    """The queries, keys and values of every head while ``model`` reads ``ids``.

    Args:
        model: from :func:`icl.models.load_model`; gpt2, opt, xglm, gpt_neox,
            llama or qwen.
        ids: token ids ``(T,)``, ``T`` at least 1.
        prefix: the list that an earlier call returned for the tokens that stand
            before ``ids``. They are attended to and not computed again.
        start: position of the first token; left out, the prefix's length.

    Returns:
        one :class:`Heads` a layer, in the model's dtype.

    Raises:
        ValueError: no ids, or a model whose attention cannot be reached.
    """
    ids = torch.as_tensor(ids, device=model.device)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids must be token ids (T,), T >= 1, not {tuple(ids.shape)}")
    cache = DynamicCache(config=model.config)
    for layer, heads in enumerate(prefix or []):
        key, value = (_shared(model, t)[None] for t in (heads.key, heads.value))
        cache.update(key, value, layer)
    length = cache.get_seq_length()
    start = length if start is None else start
    with watch_queries(model) as queries:
        model(
            ids[None],
            position_ids=torch.arange(start, start + len(ids), device=ids.device)[None],
            attention_mask=_causal(length, len(ids), model),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    if len(queries) != len(cache.layers):
        raise ValueError(
            f"the queries of {type(model).__name__} cannot be reached; covered are "
            "gpt2, opt, xglm, gpt_neox, llama and qwen"
        )
    return from_cache(queries, cache)


def from_cache(queries, cache):
    """One :class:`Heads` a layer from :func:`watch_queries` and the pass's cache."""
    return [
        Heads(query, _repeated(layer.keys, query), _repeated(layer.values, query))
        for query, layer in zip(queries, cache.layers, strict=True)
    ]


@contextmanager
def watch_queries(model):
    """A list that collects the queries of every layer that runs in the block.

    One ``(H, T, d_h)`` a layer and forward pass of one sequence, after position
    embeddings and with the factor ``1/√d_h``.
    """
    collected, hooks, usual = [], [], model.config._attn_implementation

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        collected.append(query[0].detach() * scaling)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )

    def project(module, inputs, output):  # XGLM's attention has no interface
        heads = model.config.num_attention_heads
        query = output[0].detach().unflatten(-1, (heads, -1)).transpose(0, 1)
        collected.append(query * query.shape[-1] ** -0.5)

    try:
        if model._supports_attention_backend:
            AttentionInterface.register("icl_heads", attend)
            AttentionMaskInterface.register("icl_heads", sdpa_mask)
            model.set_attn_implementation("icl_heads")
        else:
            for name, module in model.named_modules():
                if name.endswith("self_attn.q_proj"):
                    hooks.append(module.register_forward_hook(project))
        yield collected
    finally:
        if model._supports_attention_backend:
            model.set_attn_implementation(usual)
        for hook in hooks:
            hook.remove()


def _causal(length, tokens, model):
    """Additive mask ``(1, 1, T, P + T)``: the prefix and what came before."""
    ahead = torch.ones(tokens, length + tokens, dtype=torch.bool).triu(length + 1)
    mask = torch.zeros(ahead.shape, dtype=model.dtype)
    mask.masked_fill_(ahead, torch.finfo(model.dtype).min)
    return mask[None, None].to(model.device)


def _shared(model, heads):
    """Back from one key a head to the keys as the model shares them."""
    config = model.config
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads[:: len(heads) // shared]


def _repeated(shared, query):
    return shared[0].repeat_interleave(len(query) // shared.shape[1], 0)


def attention_modules(model):
    """The attention module of every layer, in order."""
    return [
        module
        for name, module in model.named_modules()
        if re.search(r"\.(attn|self_attn|attention)$", name)
    ]


def stack(layers):
    """One :class:`Heads` of tensors ``(L, H, ..., d_h)`` from a list of them."""
    return Heads(*(torch.stack(part) for part in zip(*layers, strict=True)))
