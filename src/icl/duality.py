r"""Weight updates seen as linear attention, and attention seen as a weight update.

A linear layer trained by gradient descent is linear attention to its training inputs,
the keys, with its error signals as values (Aizerman et al. 1964; Irie et al. 2022;
Dai et al. 2023, eq. 7-9). Read the other way, attention to demonstrations without its
softmax adds :math:`\Delta W_\mathrm{ICL} = \sum_i v_i \otimes k_i` to a zero-shot
weight (eq. 10-12), and finetuning the key and value projections adds a
:math:`\Delta W_\mathrm{FT}` (eq. 13). Both are measured on the heads of a model.
There a prompt is one opening token, the demonstrations, the query; the opening token,
which takes much of the attention in most models, is in the zero-shot prompt as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icl.activations import Heads, capture_qkv, stack_layers
from icl.finetuning import heads_on_frozen_inputs
from icl.tasks import prompt_prefix

_Query = Float[Tensor, "*batch d"]
_Keys = Float[Tensor, "*batch n d"]
_Values = Float[Tensor, "*batch n d_o"]
_Matrix = Float[Tensor, "*batch d_o d"]


class KeyValueUpdate(NamedTuple):
    """``ΔW_FT`` of linear attention, in three parts (Dai et al. 2023, eq. 13)."""

    by_value: _Matrix  #: ``ΔW_V X (W_K X)ᵀ``
    by_key: _Matrix  #: ``W_V X (ΔW_K X)ᵀ``
    by_both: _Matrix  #: ``ΔW_V X (ΔW_K X)ᵀ``


def frobenius_cosine(A: _Matrix, B: _Matrix) -> Float[Tensor, "*batch"]:
    """Cosine of two matrices as vectors; NaN where one of them is zero."""
    norms = torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(B)
    return (A * B).sum((-1, -2)) / norms


def subspace_overlap(
    A: _Matrix, B: _Matrix, rank: int
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Overlap of the leading left and right singular subspaces of two matrices.

    ``‖U_Aᵀ U_B‖² / rank`` for the subspaces of dimension ``rank``, 1 to ``min(m, n)``
    (else ``ValueError``): 1 if they are equal, 0 if orthogonal, and ``rank / d`` on
    average for random ones in ``d`` dimensions.
    """
    if not 1 <= rank <= min(A.shape[-2:]):
        raise ValueError(f"rank must be 1 to {min(A.shape[-2:])}, not {rank}")
    (U, _, V), (P, _, Q) = (torch.linalg.svd(W, full_matrices=False) for W in (A, B))
    left = U[..., :rank].mT @ P[..., :rank]
    right = V[..., :rank, :] @ Q[..., :rank, :].mT
    return tuple(part.square().sum((-1, -2)) / rank for part in (left, right))


def encode_prompt(task, demonstrations, tokenizer) -> list[int]:
    """Token ids of :func:`icl.tasks.prompt_prefix`."""
    prefix = prompt_prefix(task, demonstrations, tokenizer)
    return tokenizer(prefix, add_special_tokens=False)["input_ids"]


def approximations(
    query: _Query, key: _Keys, value: _Values, demonstrations: Bool[Tensor, " n"]
) -> dict[str, Float[Tensor, "*batch d_o"]]:
    """Change of a head's output by demonstrations, and approximations to it.

    ``demonstrations`` is one boolean per token, some True and some False (else
    ``ValueError``). With ``m`` the attention on the ``n`` demonstration tokens, ``h``
    the output over the others and bars for means over the demonstration tokens:

    - ``"change"``: the change itself;
    - ``"relaxed"``: ``ΔW_ICL q`` (Dai et al. 2023, eq. 11-12);
    - ``"mean value"``: ``Σ v_i``, the same for every query;
    - ``"centred"``: ``Σ v_i (k_i - k̄)ᵀ q``;
    - ``"gated mean"``: ``m (v̄ - h)``;
    - ``"gated"``: ``m (v̄ + Σ v_i (k_i - k̄)ᵀ q / n - h)``, to first order the change.
    """
    where = torch.as_tensor(demonstrations, device=key.device)
    tokens, n = key.shape[-2], int(where.sum())
    if where.dtype != torch.bool or where.shape != (tokens,) or not 0 < n < tokens:
        raise ValueError(f"demonstrations must be {tokens} booleans, some True")
    scores, values = (key @ query[..., None])[..., 0], value[..., where, :]
    inside, outside = scores[..., where], scores[..., ~where]
    # softmax of the two log-normalisers = the mass of each group
    gate = torch.sigmoid(inside.logsumexp(-1) - outside.logsumexp(-1))[..., None]
    mean, rest = values.mean(-2), _mix(outside.softmax(-1), value[..., ~where, :])
    centred = _mix(inside - inside.mean(-1, keepdim=True), values)
    return {
        "change": gate * (_mix(inside.softmax(-1), values) - rest),
        "relaxed": _mix(inside, values),  # = ΔW_ICL q, without forming ΔW_ICL
        "mean value": values.sum(-2),
        "centred": centred,
        "gated mean": gate * (mean - rest),
        "gated": gate * (mean + centred / n - rest),
    }


def approximation_quality(
    model, prompt: list[int], queries: list[list[int]], ends: Sequence[int]
) -> dict[str, Float[np.ndarray, "ends queries layers heads"]]:
    """Agreement of the :func:`approximations` with the change, on a model's heads.

    Args:
        model: from :func:`icl.models.load_model`.
        prompt: ids from :func:`encode_prompt`.
        queries: ids of texts to read behind it; measured is their last token.
        ends: lengths to which the prompt is cut, one measurement each.

    Returns:
        ``"mass"`` and ``"opening"``, shares of attention on the demonstrations and on
        the opening token; ``"spread"``, standard deviation of the scores over the
        demonstrations; ``"norm: relaxed"``, ``"norm: change"``; ``"cosine: NAME"`` of
        each approximation with the change; and ``"cosine: passes"`` of the change with
        the difference between the head's outputs in context and zero-shot, when every
        layer below has seen the demonstrations or has not.
    """
    whole, rows = capture_qkv(model, prompt), []
    for end in ends:
        prefix = [Heads(*(part[:, :end] for part in heads)) for heads in whole]
        for ids in queries:
            heads = _stack_wide(capture_qkv(model, ids, prefix))
            alone = capture_qkv(model, [*prompt[:1], *ids], start=end - 1)
            rows.append(_measure(heads, _stack_wide(alone), end))
    found = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {k: v.unflatten(0, (len(ends), -1)).cpu().numpy() for k, v in found.items()}


def _measure(heads, alone, end):
    query, key, value = heads.query[:, :, -1], *heads[1:]
    where = torch.zeros(key.shape[-2], dtype=torch.bool)
    where[1:end] = True
    compared = approximations(query, key, value, where)
    change = compared.pop("change")
    scores = (key @ query[..., None])[..., 0]
    attention = scores.softmax(-1)
    before = (alone.key @ alone.query[:, :, -1, :, None])[..., 0].softmax(-1)
    compared["passes"] = _mix(attention, value) - _mix(before, alone.value)
    return {
        "mass": attention[..., where].sum(-1),
        "opening": attention[..., 0],
        "spread": scores[..., where].std(-1),
        "norm: relaxed": compared["relaxed"].norm(dim=-1),
        "norm: change": change.norm(dim=-1),
    } | {
        f"cosine: {name}": torch.cosine_similarity(output, change, dim=-1)
        for name, output in compared.items()
    }


def icl_update(layers: list[Heads], centred=False) -> Float[Tensor, "L H d_h d_h"]:
    """``ΔW_ICL`` of every head, of all tokens of a prompt but its opening one.

    Args:
        layers: from :func:`icl.activations.capture_qkv` of :func:`encode_prompt`.
        centred: subtract the mean key: a shift of all keys then changes nothing.
    """
    _, key, value = _stack_wide(layers)
    key, value = key[..., 1:, :], value[..., 1:, :]
    if centred:
        key = key - key.mean(-2, keepdim=True)
    return value.mT @ key


def ft_update(
    model, update: dict[str, Tensor], ids: list[int], start: int = 0
) -> KeyValueUpdate:
    """``ΔW_FT`` of every head, in its three parts ``(L, H, d_h, d_h)``.

    Args:
        model: from :func:`icl.models.load_model`.
        update: from :func:`icl.finetuning.kv_sgd`.
        ids: the query's tokens with the opening token before them.
        start: position of the first; a prompt's length minus 1 puts the query where
            it stands behind that prompt, to act on the same ``q`` as ``ΔW_ICL``.
    """
    before = _stack_wide(capture_qkv(model, ids, start=start))
    after = _stack_wide(heads_on_frozen_inputs(model, update, ids, start))
    key, value = before.key, before.value
    more_key, more_value = after.key - key, after.value - value
    parts = more_value.mT @ key, value.mT @ more_key, more_value.mT @ more_key
    return KeyValueUpdate(*parts)


def _stack_wide(layers):
    """Stacked heads, in float32 at least."""
    wide = torch.promote_types(layers[0].key.dtype, torch.float32)
    return Heads(*(part.to(wide) for part in stack_layers(layers)))


def _mix(attention, value):
    return (attention[..., None, :] @ value)[..., 0, :]
