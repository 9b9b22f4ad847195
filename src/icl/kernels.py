r"""Softmax attention as the prediction of a kernel model after one gradient step.

The features of a finite set that make the softmax kernel, :math:`\exp(x^\top y) =
\phi(x)^\top \phi(y)`; the *dual model* :math:`f(z) = W \phi(z)` of Ren and Liu (2024)
with its loss; shorter queries and keys for the same attention; and causal
random-feature attention in linear time, which computes with logarithms of features,
since features overflow long before attention does.

Scores are plain inner products ``query @ key.mT``: a factor ``1/√d`` belongs
into the queries (as :func:`icl.activations.capture_qkv` has it).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_Tokens = Float[Tensor, "*batch T d"]
_Features = Float[Tensor, "n d_r"]
_Targets = Float[Tensor, "n d_o"]
_Weight = Float[Tensor, "d_o d_r"]
_Normaliser = float | Float[Tensor, ""]

#: Below this a sum may have lost digits to terms that were rounded to 0.
_UNDERFLOW = torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps


def gram_features(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    r"""Features whose inner products are exactly :math:`\exp(z_i^\top z_j)`.

    ``vectors`` are all keys and queries to compare. The features are rows of a square
    root of their Gram matrix: of :math:`e^{-|z_i - z_j|^2/2}`, whose diagonal is 1,
    with row :math:`i` multiplied by :math:`e^{|z_i|^2/2}`. An inner product of two
    features is off by about :math:`\varepsilon\,e^{|z_i|^2/2 + |z_j|^2/2}`.

    Raises:
        ValueError: a norm so large that :math:`e^{|z|^2/2}` overflows, or not finite.
    """
    z = vectors.double()
    norm, dtype = z.norm(dim=1), vectors.dtype
    largest = math.sqrt(2 * math.log(torch.finfo(dtype).max))
    if not norm.max() < largest:
        raise ValueError(
            f"exp(|z|²/2) overflows {dtype} for the vector of norm {norm.max():.4g}; "
            f"norms must stay below {largest:.4g}. Scale the vectors down, or "
            "subtract one vector from all keys, which leaves attention as it is"
        )
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    eigenvalues, U = torch.linalg.eigh(torch.exp(-distance.square() / 2))
    root = (U * eigenvalues.clamp(min=0).sqrt()) @ U.mT  # rounding may go below 0
    return ((norm.square() / 2).exp()[:, None] * root).to(dtype)


def normaliser(
    phi_keys: _Features, phi_query: Float[Tensor, " d_r"]
) -> Float[Tensor, ""]:
    r"""Normaliser of attention, :math:`D = \sum_i \phi(k_i)^\top\phi(q)` of all keys.

    Raises:
        ValueError: ``D`` is not positive, as odd Taylor degrees allow, or overflows.
    """
    D = (phi_keys @ phi_query).sum()
    if not 0 < D < math.inf:
        raise ValueError(
            f"the normaliser D must be positive and finite, not {D.item():.4g}: take a "
            "feature map with positive inner products (an even Taylor degree, say), "
            "or scale the vectors down if it overflows"
        )
    return D


def initial_weight(values: _Targets, phi: _Features, D: _Normaliser) -> _Weight:
    r"""The dual model before its step: :math:`W_0 = \frac{1}{D} V_T \phi(K_T)^\top`.

    Of values and key features of the query part, and ``D`` from :func:`normaliser`.
    """
    return values.mT @ phi / D


def contrastive_loss(
    W: _Weight, values: _Targets, phi: _Features, D: _Normaliser, eta: float
) -> Float[Tensor, ""]:
    r"""The loss whose gradient step is attention to the demonstrations.

    :math:`L(W) = -\frac{1}{\eta D} \sum_i (W_V x_i)^\top W \phi(W_K x_i)` of values
    and key features of the demonstrations, linear in ``W``. A step of size ``eta`` from
    :func:`initial_weight` gives the weight whose prediction at :math:`\phi(q)` is the
    output of attention (Ren and Liu 2024). Other numbers of values than features, and
    an ``eta`` that is not positive, raise ``ValueError``.
    """
    if len(values) != len(phi) or not eta > 0:
        raise ValueError(
            f"{len(values)} values need as many features, not {len(phi)}, and a "
            f"positive step size eta, not {eta}"
        )
    return -(values * (phi @ W.mT)).sum() / (eta * D)


def balance(query: _Tokens, key: _Tokens) -> tuple[_Tokens, _Tokens]:
    r"""Queries and keys with the same attention, and the least mean of ``|q + k|²``.

    One vector added to all keys changes no softmax, and neither do queries :math:`Aq`
    with keys :math:`A^{-\top}k`. The best vector makes the mean of the keys the
    negative of the queries' mean. The best matrix has :math:`A^\top A = C_q^{-1/2}
    (C_q^{1/2} C_k C_q^{1/2})^{1/2} C_q^{-1/2}`, with the second moments of centred
    queries and keys plus a ridge of 1e-3 times their mean square entry, against
    directions that no token has. Means and moments are over all tokens, later ones too.
    """
    centred = [x - x.mean(-2, keepdim=True) for x in (query, key)]
    C_q, C_k = map(_moments, centred)
    root = _power(C_q, 0.5)
    inverse = torch.linalg.inv(root)
    A = _power(inverse @ _power(root @ C_k @ root, 0.5) @ inverse, 0.5)
    query = query @ A
    return query, centred[1] @ torch.linalg.inv(A) - query.mean(-2, keepdim=True)


def _moments(x):
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    ridge = 1e-3 * x.square().mean((-2, -1))[..., None, None]
    return x.mT @ x / x.shape[-2] + ridge * identity


def _power(C, exponent):
    eigenvalues, U = torch.linalg.eigh(C)
    return (U * eigenvalues[..., None, :] ** exponent) @ U.mT


def streaming_attention(
    query: _Tokens,
    key: _Tokens,
    value: Float[Tensor, "*batch T d_o"],
    W: Float[Tensor, "m d"],
    chunk: int = 128,
) -> Float[Tensor, "*batch T d_o"]:
    r"""Causal random-feature attention in time and memory linear in ``T``.

    Keeps :math:`S_t = \sum_{s \le t} \phi(k_s) v_s^\top` and
    :math:`z_t = \sum_{s \le t} \phi(k_s)`; the output at ``t`` is
    :math:`S_t^\top\phi(q_t) / z_t^\top\phi(q_t)`. The sums are carried from chunk
    to chunk in float64, each feature relative to its largest value so far. Features are
    :math:`\phi(x) = e^{-|x|^2/2}\,[e^{w_1^\top x}, \dots]` (Choromanski et al. 2021).

    Args:
        query, key, value: the queries with their factor ``1/√d``.
        W: its rows are normal draws ``w``.
        chunk: tokens handled at once, fewer where their keys differ too much for
            one peak; of no influence on the result.

    Raises:
        ValueError: queries, keys and values of different numbers.
        FloatingPointError: queries, keys or their squared norms beyond float64.
    """
    if query.shape != key.shape or key.shape[:-1] != value.shape[:-1]:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"query, key and value need as many tokens, not {shapes}")
    W = W.double()
    outputs, state = [], (None, torch.tensor(-math.inf, dtype=W.dtype))
    for part in zip(*(t.split(chunk, -2) for t in (query, key, value)), strict=True):
        q, k, v = (t.double() for t in part)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # this column sums to z
        output, state = _advance(state, q, k, v, W)
        outputs.append(output.to(value.dtype))
    return torch.cat(outputs, -2)


def _advance(state, q, k, v, W):
    """Outputs of one chunk, and the sums and their peaks after it."""
    (S, last), n = state, q.shape[-2]
    a, b = (x @ W.mT - x.square().sum(-1, keepdim=True) / 2 for x in (k, q))
    # Peaks cancel between keys, queries and sums: they are no part of the graph.
    peak = torch.maximum(last, a.detach().amax(-2, keepdim=True))
    a, b = (a - peak).exp(), b + peak
    b = (b - b.detach().amax(-1, keepdim=True)).exp()
    inside, S_new = (b @ a.mT).tril() @ v, a.mT @ v
    if S is not None:
        before = S * (last - peak).exp().mT
        inside, S_new = inside + b @ before, S_new + before
    D = inside[..., -1:]
    if (D > _UNDERFLOW).all():
        return inside[..., :-1] / D, (S_new, peak)
    if n == 1:  # a peak of its own key: the sum is at least 1
        raise FloatingPointError(
            "queries or keys are not finite, or so large that their squared norms "
            "exceed float64; scale them down"
        )
    # Later keys of the chunk dwarf the sums of earlier tokens: take them apart.
    outputs, halves = [], (t.split([n // 2, n - n // 2], -2) for t in (q, k, v))
    for half in zip(*halves, strict=True):
        output, state = _advance(state, *half, W)
        outputs.append(output)
    return torch.cat(outputs, -2), state
