r"""Weight updates seen as linear attention, and attention seen as a weight update.

A linear layer :math:`F(x) = W x` trained by gradient descent ends at
:math:`W_T = a\,W_0 + \sum_i c_i\, e_i \otimes x'_i`: its training inputs
:math:`x'_i` are keys, its error signals :math:`e_i = -\gamma\,
\partial L_i/\partial F(x'_i)` are values, and the test input is the query
(Aizerman et al. 1964; Irie et al. 2022; Dai et al. 2023, eq. 7-9).

Read the other way, attention to demonstrations without its softmax adds
:math:`\Delta W_\mathrm{ICL} = \sum_i v_i \otimes k_i` to a zero-shot weight
(Dai et al. 2023, eq. 10-12), and finetuning the key and value projections adds
a :math:`\Delta W_\mathrm{FT}` (eq. 13).
"""

from typing import NamedTuple

import torch


def linear_attention(values, keys, query):
    """Unnormalised linear attention, ``Σ_i v_i (k_iᵀ q)``.

    Args:
        values: ``(N, d_o)``.
        keys: ``(N, d_i)``.
        query: ``(..., d_i)``.

    Returns:
        ``(..., d_o)``. (Dai et al. 2023, eq. 9: LinearAttn(E, X', x).)
    """
    _same_length(values, keys)
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query and keys differ in width: {query.shape[-1]} and {keys.shape[-1]}"
        )
    return (query @ keys.mT) @ values


class Training(NamedTuple):
    """A trained linear layer with the record of its training.

    Attributes:
        weight: the trained ``W_T``, ``(d_o, d_i)``.
        keys: the input of every example at every visit, ``(M, d_i)``.
        values: its error signal ``e`` at that visit, ``(M, d_o)``.
        step: the step of each visit, ``(M,)``.
        example: which training example it was, ``(M,)``.
    """

    weight: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    step: torch.Tensor
    example: torch.Tensor


def train_linear(
    W_0, X, Y, loss, batches, learning_rate, momentum=0.0, weight_decay=0.0
):
    """Train ``F(x) = W x`` by gradient descent and keep the error signals.

    The update is that of ``torch.optim.SGD``: ``g ← ∇L + λ W``,
    ``m ← μ m + g``, ``W ← W − γ m``. The record needs the gradient at the
    layer's *output* alone, so ``loss`` may be any differentiable function.

    Args:
        W_0: ``(d_o, d_i)``.
        X: training inputs ``(N, d_i)``.
        Y: their targets, ``(N, ...)``.
        loss: ``loss(outputs (B, d_o), targets (B, ...)) -> scalar``.
        batches: the index tensors of the steps, in order.
        learning_rate, momentum, weight_decay: γ, μ, λ.
    """
    _same_length(X, Y)
    W, velocity = W_0.clone(), torch.zeros_like(W_0)
    record = {"keys": [], "values": [], "step": [], "example": []}
    for t, batch in enumerate(batches):
        outputs = (X[batch] @ W.mT).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(outputs, Y[batch]), outputs)
        record["keys"].append(X[batch])
        record["values"].append(-learning_rate * gradient)
        record["step"].append(torch.full_like(batch, t))
        record["example"].append(batch)
        velocity = momentum * velocity + gradient.mT @ X[batch] + weight_decay * W
        W = W - learning_rate * velocity
    return Training(W, **{name: torch.cat(part) for name, part in record.items()})


def step_weights(steps, learning_rate, momentum=0.0, weight_decay=0.0, dtype=None):
    r"""How much of the start and of every step is left in the trained weight.

    ``W_t`` and the velocity follow a linear recurrence, so the trained weight
    is :math:`W_T = a W_0 + \sum_t c_t \sum_{i \in B_t} e_i \otimes x_i`. Without
    weight decay :math:`a = 1` and :math:`c_t = (1-\mu^{T-t})/(1-\mu)`: older
    steps count more. Without momentum
    :math:`a = (1-\gamma\lambda)^T`, :math:`c_t = (1-\gamma\lambda)^{T-1-t}`:
    older steps count less.

    Returns:
        ``(a, c)``: a scalar and a tensor ``(steps,)``.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    # W = a W_0 + Σ c_t (−γ G_t) and velocity = v W_0 + Σ p_t G_t at every step
    a = torch.ones((), dtype=dtype or torch.get_default_dtype())
    v = torch.zeros_like(a)
    c, p = torch.zeros(2, steps, dtype=a.dtype)
    for t in range(steps):
        v = momentum * v + weight_decay * a
        p = momentum * p - learning_rate * weight_decay * c
        p[t] = 1.0
        a = a - learning_rate * v
        c = c + p
    return a, c


def dual_prediction(W_0, training, query, a=1.0, c=None):
    """The trained layer's output without its trained weight.

    ``a W_0 q + LinearAttn(c e, X', q)``, the dual form of ``W_T q``.

    Args:
        W_0: the weight before training, ``(d_o, d_i)``.
        training: a :class:`Training`.
        query: ``(..., d_i)``.
        a, c: from :func:`step_weights`; left out, those of plain SGD (ones).
    """
    values = training.values
    if c is not None:
        values = values * c[training.step, None]
    return a * (query @ W_0.mT) + linear_attention(values, training.keys, query)


class Split(NamedTuple):
    """Softmax attention over two groups of tokens, taken apart.

    The whole output is ``mass * demonstrations + (1 - mass) * rest``.

    Attributes:
        mass: the share of attention that the demonstrations get, ``(...)``.
        demonstrations: attention over the demonstrations alone, ``(..., d_o)``.
        rest: attention over the other tokens alone, ``(..., d_o)``.
    """

    mass: torch.Tensor
    demonstrations: torch.Tensor
    rest: torch.Tensor

    @property
    def change(self):
        """What the demonstrations change, ``mass * (demonstrations - rest)``."""
        return self.mass[..., None] * (self.demonstrations - self.rest)


def split_attention(query, key, value, demonstrations) -> Split:
    """Attention of one query as a mixture of two attentions.

    Exact for softmax attention: each group has its own softmax, and the groups
    are mixed by the masses that the common softmax gives them. What Dai et al.
    (2023) relax between their eq. 10 and 11.

    Args:
        query: ``(..., d)``, with the factor ``1/√d`` in it.
        key: ``(..., n, d)``.
        value: ``(..., n, d_o)``.
        demonstrations: booleans ``(n,)``: is the token part of a demonstration?

    Raises:
        ValueError: shapes that do not fit, or one of the groups is empty.
        FloatingPointError: a score is not finite.
    """
    _fitting(query, key, value)
    where = torch.as_tensor(demonstrations, device=key.device)
    if where.dtype != torch.bool or where.shape != key.shape[-2:-1]:
        raise ValueError(
            f"demonstrations must be booleans ({key.shape[-2]},), one a key, not "
            f"{where.dtype} of shape {tuple(where.shape)}"
        )
    if where.all() or not where.any():
        raise ValueError(
            "attention is split into demonstrations and the rest; of the "
            f"{len(where)} tokens {int(where.sum())} are demonstrations"
        )
    scores = (key @ query[..., None])[..., 0]
    if not torch.isfinite(scores).all():
        raise FloatingPointError("some query-key scores are not finite")
    inside, outside = scores[..., where], scores[..., ~where]
    # softmax of the two log-normalisers = the mass of each group
    mass = torch.sigmoid(inside.logsumexp(-1) - outside.logsumexp(-1))

    def attend(scores, value):
        return (scores.softmax(-1)[..., None, :] @ value)[..., 0, :]

    return Split(
        mass,
        attend(inside, value[..., where, :]),
        attend(outside, value[..., ~where, :]),
    )


def attention_weight(value, key):
    """The weight matrix of linear attention, ``Σ_i v_i ⊗ k_i``.

    Over the query's own tokens this is ``W_ZSL``, over the demonstrations
    ``ΔW_ICL`` (Dai et al. 2023, eq. 11-12): ``(W_ZSL + ΔW_ICL) q`` is linear
    attention over both.

    Args:
        value: ``(..., n, d_o)``.
        key: ``(..., n, d)``.

    Returns:
        ``(..., d_o, d)``.
    """
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"values and keys must be as many: {tuple(value.shape)} and "
            f"{tuple(key.shape)}"
        )
    if not key.shape[-2]:
        raise ValueError("there are no tokens to attend to")
    return value.mT @ key


class KeyValueUpdate(NamedTuple):
    """What finetuning keys and values adds to the weight of linear attention.

    Each is ``(..., d_o, d)``; their sum is ``ΔW_FT``.

    Attributes:
        by_value: ``ΔW_V X (W_K X)ᵀ``.
        by_key: ``W_V X (ΔW_K X)ᵀ``.
        by_both: ``ΔW_V X (ΔW_K X)ᵀ``.
    """

    by_value: torch.Tensor
    by_key: torch.Tensor
    by_both: torch.Tensor


def finetuning_weight(value, key, new_value, new_key) -> KeyValueUpdate:
    """``ΔW_FT`` of linear attention, expanded (Dai et al. 2023, eq. 13).

    Args:
        value, key: ``W_V X`` and ``W_K X`` of the tokens ``X`` that the query
            attends to, ``(..., n, d_o)`` and ``(..., n, d)``.
        new_value, new_key: the same from ``W_V + ΔW_V`` and ``W_K + ΔW_K``.
    """
    more_value, more_key = new_value - value, new_key - key
    return KeyValueUpdate(
        attention_weight(more_value, key),
        attention_weight(value, more_key),
        attention_weight(more_value, more_key),
    )


def frobenius_cosine(A, B):
    """Cosine of two matrices ``(..., m, n)`` as vectors, ``(...)``.

    NaN where one of them is zero.
    """
    norms = torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(B)
    return (A * B).sum((-1, -2)) / norms


def effective_rank(W):
    """Roy & Vetterli's (2007) effective rank of ``(..., m, n)``.

    The exponential of the entropy of the singular values as a distribution:
    ``r`` for a matrix with ``r`` equal ones, 1 for an outer product.
    """
    values = torch.linalg.svdvals(W)
    p = values / values.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def subspace_overlap(A, B, rank):
    """How far the leading singular subspaces of two matrices coincide.

    ``‖U_Aᵀ U_B‖² / rank`` for the left and for the right subspaces of
    dimension ``rank``: 1 if they are equal, 0 if orthogonal, and ``rank / d``
    on average for random ones in ``d`` dimensions.

    Args:
        A, B: ``(..., m, n)``.
        rank: 1 to ``min(m, n)``.

    Returns:
        ``(left, right)``, each ``(...)``.
    """
    if not 1 <= rank <= min(A.shape[-2:]):
        raise ValueError(f"rank must be 1 to {min(A.shape[-2:])}, not {rank}")
    (U, _, V), (P, _, Q) = (torch.linalg.svd(W, full_matrices=False) for W in (A, B))
    left = U[..., :rank].mT @ P[..., :rank]
    right = V[..., :rank, :] @ Q[..., :rank, :].mT
    return tuple(part.square().sum((-1, -2)) / rank for part in (left, right))


def _same_length(values, keys):
    if len(values) != len(keys):
        raise ValueError(f"{len(keys)} keys need as many values, not {len(values)}")
    if not len(keys):
        raise ValueError("there are no training examples to attend to")


def _fitting(query, key, value):
    fits = query.shape[-1] == key.shape[-1] and query.shape[:-1] == key.shape[:-2]
    if not fits or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            "needed are query (..., d), key (..., n, d) and value (..., n, d_o); given "
            f"were {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
