"""The relaxed updates of Dai et al. (2023), measured on the heads of a model.

A prompt is one opening token, the demonstrations, the query. The opening token
stands in the zero-shot prompt as well and so belongs to the query's part; in
most models it takes a large share of all attention, whatever follows.
"""

import numpy as np
import torch

from icl.duality import attention_weight, finetuning_weight, split_attention
from icl.finetuning import heads_on_frozen_inputs
from icl.heads import Heads, attention_inputs, stack
from icl.tasks import prompt_prefix


def encode_prompt(task, demonstrations, tokenizer, context=None):
    """Token ids of the opening line break and of the demonstrations after it."""
    prefix = prompt_prefix(task, demonstrations, tokenizer, "\n", context)
    return tokenizer("\n" + prefix, add_special_tokens=False)["input_ids"]


def guesses(query, key, value, demonstrations):
    """What demonstrations change in a head's output, and guesses at it.

    Args:
        query, key, value, demonstrations: as for
            :func:`icl.duality.split_attention`.

    Returns:
        a dictionary of ``(..., d_o)``. With ``m`` the mass on the ``n``
        demonstration tokens, ``h`` the output over the rest and bars for means
        over the demonstration tokens:

        - ``"change"``: the truth;
        - ``"relaxed"``: ``ΔW_ICL q`` (Dai et al. 2023, eq. 11-12);
        - ``"mean value"``: ``Σ v_i``, the same for every query;
        - ``"centred"``: ``Σ v_i (k_i - k̄)ᵀ q``;
        - ``"gated mean"``: ``m (v̄ - h)``;
        - ``"gated"``: ``m (v̄ + Σ v_i (k_i - k̄)ᵀ q / n - h)``, the change with
          the softmax over the demonstrations expanded to first order.
    """
    split = split_attention(query, key, value, demonstrations)
    where = torch.as_tensor(demonstrations, device=key.device)
    keys, values = key[..., where, :], value[..., where, :]
    mean = values.mean(-2)
    scores = (keys @ query[..., None])[..., 0]
    centred = _mix(scores - scores.mean(-1, keepdim=True), values)
    gate = split.mass[..., None]
    return {
        "change": split.change,
        "relaxed": _mix(scores, values),  # = ΔW_ICL q, without forming ΔW_ICL
        "mean value": values.sum(-2),
        "centred": centred,
        "gated mean": gate * (mean - split.rest),
        "gated": gate * (mean + centred / keys.shape[-2] - split.rest),
    }


def relaxation(model, prompt, queries, ends):
    """How well the guesses explain the change, for every head of a model.

    Args:
        model: from :func:`icl.models.load_model`.
        prompt: ids from :func:`encode_prompt`.
        queries: lists of ids; each is read behind the prompt, and its last
            token's attention is measured.
        ends: how many tokens of the prompt to keep, one entry a measurement.

    Returns:
        ``{name: (len(ends), N, L, H)}``:

        - ``"mass"``, ``"opening"``: share of attention on the demonstrations
          and on the opening token;
        - ``"spread"``: standard deviation of the scores over the demonstrations;
        - ``"cosine: g"``: of guess ``g`` with the change;
        - ``"norm: relaxed"``, ``"norm: change"``;
        - ``"cosine: passes"``: of the change with the difference between the
          head's outputs in context and zero-shot, when every layer below has
          seen the demonstrations or has not.
    """
    whole = attention_inputs(model, prompt)
    found = {}
    for end in ends:
        prefix = [Heads(*(part[:, :end] for part in heads)) for heads in whole]
        for ids in queries:
            heads = _wide(attention_inputs(model, ids, prefix))
            alone = _wide(attention_inputs(model, [*prompt[:1], *ids], start=end - 1))
            for name, value in _measure(heads, alone, end).items():
                found.setdefault(name, []).append(value)
    shape = (len(ends), len(queries))
    return {
        name: np.stack([v.cpu().numpy() for v in values]).reshape(
            *shape, *values[0].shape
        )
        for name, values in found.items()
    }


def _measure(heads, alone, end):
    query, key, value = heads.query[:, :, -1], *heads[1:]
    where = torch.zeros(key.shape[-2], dtype=torch.bool)
    where[1:end] = True
    found = guesses(query, key, value, where)
    change = found.pop("change")
    scores = (key @ query[..., None])[..., 0]
    attention = scores.softmax(-1)
    before = (alone.key @ alone.query[:, :, -1, :, None])[..., 0].softmax(-1)
    passes = _mix(attention, value) - _mix(before, alone.value)
    return {
        "mass": attention[..., where].sum(-1),
        "opening": attention[..., 0],
        "spread": scores[..., where].std(-1),
        **{f"cosine: {g}": _cosine(v, change) for g, v in found.items()},
        "norm: relaxed": found["relaxed"].norm(dim=-1),
        "norm: change": change.norm(dim=-1),
        "cosine: passes": _cosine(passes, change),
    }


def icl_update(layers, centred=False):
    """``ΔW_ICL`` of every head, ``(L, H, d_h, d_h)``: what a prompt's tokens add.

    Args:
        layers: from :func:`icl.heads.attention_inputs` of a prompt
            (:func:`encode_prompt`); the opening token is left out.
        centred: take the keys relative to their mean, which removes the part
            that a shift of all keys can make or unmake.
    """
    _, key, value = _wide(layers)
    key, value = key[..., 1:, :], value[..., 1:, :]
    if centred:
        key = key - key.mean(-2, keepdim=True)
    return attention_weight(value, key)


def ft_update(model, update, ids, start=0):
    """``ΔW_FT`` of every head, in its three parts of ``(L, H, d_h, d_h)``.

    Args:
        model: from :func:`icl.models.load_model`.
        update: from :func:`icl.finetuning.kv_sgd`.
        ids: the query's tokens with the opening token before them.
        start: position of the first; one less than a prompt's length puts the
            query where it stands behind that prompt, so that ``ΔW_FT`` and
            ``ΔW_ICL`` act on the same ``q``.
    """
    before = _wide(attention_inputs(model, ids, start=start))
    after = _wide(heads_on_frozen_inputs(model, update, ids, start))
    return finetuning_weight(before.value, before.key, after.value, after.key)


def _wide(layers):
    """Stacked heads in float32 at least."""
    wide = torch.promote_types(layers[0].key.dtype, torch.float32)
    return Heads(*(part.to(wide) for part in stack(layers)))


def _cosine(a, b):
    return torch.cosine_similarity(a, b, dim=-1)


def _mix(attention, value):
    return (attention[..., None, :] @ value)[..., 0, :]
