r"""Softmax attention as the prediction of a kernel model after one gradient step.

The softmax kernel :math:`\exp(x^\top y) = \phi(x)^\top \phi(y)` by three feature
maps (exact on a finite set, Taylor, positive random features); the *dual model*
:math:`f(z) = W \phi(z)` of Ren and Liu (2024) with its loss; and causal
random-feature attention in linear time. A *positive random feature* is handled
as its logarithm, since features overflow long before attention does.

Scores are plain inner products ``query @ key.mT``: a factor ``1/√d`` belongs
into the queries (as :func:`icl.heads.attention_inputs` has it).
"""

import math
from itertools import combinations_with_replacement

import torch

# -- feature maps -------------------------------------------------------------


def gram_features(vectors):
    r"""Features whose inner products are exactly :math:`\exp(z_i^\top z_j)`.

    For a finite set no infinite feature space is needed: any square root
    of its Gram matrix will do. It is taken of
    :math:`e^{-|z_i - z_j|^2/2}`, whose diagonal is 1, and row :math:`i` is then
    multiplied by :math:`e^{|z_i|^2/2}`. An inner product of two features is off
    by about :math:`\varepsilon\,e^{|z_i|^2/2 + |z_j|^2/2}`.

    Args:
        vectors: ``(n, d)``, all keys and queries that will meet.

    Returns:
        ``(n, n)``: row ``i`` is :math:`\phi(z_i)`, so ``d_r = n``.

    Raises:
        ValueError: not a matrix of at least one vector, not finite, or some
            norm so large that :math:`e^{|z|^2/2}` overflows.
    """
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"vectors must be (n, d), n >= 1, not {tuple(vectors.shape)}")
    _finite(vectors=vectors)
    z = vectors.double()
    norm, dtype = z.norm(dim=1), vectors.dtype
    largest = math.sqrt(2 * math.log(torch.finfo(dtype).max))
    if norm.max() >= largest:
        raise ValueError(
            f"exp(|z|²/2) overflows {dtype} for the vector of norm {norm.max():.4g}; "
            f"norms must stay below {largest:.4g}. Scale the vectors down, or "
            "subtract one vector from all keys, which leaves attention as it is"
        )
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    eigenvalues, U = torch.linalg.eigh(torch.exp(-distance.square() / 2))
    root = (U * eigenvalues.clamp(min=0).sqrt()) @ U.mT  # rounding may go below 0
    return ((norm.square() / 2).exp()[:, None] * root).to(dtype)


def taylor_features(x, degree):
    r"""All monomials of the entries of ``x`` up to a degree, scaled.

    :math:`x^a / \sqrt{a!}` for every multi-index :math:`|a| \le` ``degree``, so
    that :math:`\phi(x)^\top\phi(y) = \sum_{m \le degree} (x^\top y)^m / m!`. Of
    an odd degree this sum can be negative, of an even one it is positive.

    Args:
        x: ``(..., d)``.
        degree: at least 0.

    Returns:
        ``(..., d_r)`` with ``d_r = C(d + degree, degree)``.
    """
    if degree < 0:
        raise ValueError(f"degree must be at least 0, not {degree}")
    d = x.shape[-1]
    # A monomial of at most this degree in x is one of exactly it in (1, x).
    factors = list(combinations_with_replacement(range(d + 1), degree))
    factors = torch.tensor(factors, dtype=torch.long).reshape(len(factors), degree)
    scale = torch.ones(factors.shape, dtype=x.dtype)
    for j in range(1, degree):  # the runs 1, 2, 3 of equal factors multiply to a!
        again = (factors[:, j] == factors[:, j - 1]) & (factors[:, j] > 0)
        scale[:, j] = torch.where(again, scale[:, j - 1] + 1, scale[:, j])
    one_and_x = torch.cat([torch.ones_like(x[..., :1]), x], -1)
    monomials = one_and_x[..., factors.to(x.device)].prod(-1)
    return monomials / scale.prod(-1).sqrt().to(x.device)


def gaussian_projection(d_r, d, orthogonal=False, generator=None, dtype=None):
    """Projections ``W`` with rows ``w ~ N(0, I_d)``, for random features.

    Args:
        d_r: the number of rows.
        d: the width of keys and queries.
        orthogonal: draw the rows in groups of ``d`` at right angles to each
            other (Choromanski et al. 2021); each row alone is still N(0, I_d).
        generator: a ``torch.Generator`` on the CPU.
        dtype: left out, torch's default.

    Returns:
        ``(d_r, d)``.
    """
    if d_r < 1 or d < 1:
        raise ValueError(f"d_r and d must be at least 1, not {d_r} and {d}")

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=dtype)

    if not orthogonal:
        return normal(d_r, d)
    blocks = normal(-(-d_r // d), d, d)
    Q, R = torch.linalg.qr(blocks)
    # QR alone fixes the signs of R's diagonal; with them, Q is uniform.
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    directions = Q.mT.reshape(-1, d)[:d_r]
    return directions * normal(d_r, d).norm(dim=1, keepdim=True)


def log_features(x, W, hyperbolic=False):
    r"""Logarithms of the positive random features of the softmax kernel.

    :math:`\phi(x) = d_r^{-1/2} e^{-|x|^2/2}\,[e^{w_1^\top x}, \dots]` has
    :math:`E[\phi(x)^\top\phi(y)] = \exp(x^\top y)` (Choromanski et al. 2021).

    Args:
        x: ``(..., d)``.
        W: ``(m, d)`` from :func:`gaussian_projection`.
        hyperbolic: use :math:`e^{w^\top x}` and :math:`e^{-w^\top x}` for every
            row, hence twice as many features as rows.

    Returns:
        ``(..., d_r)``, with ``d_r = m``, or ``2 m`` if hyperbolic.
    """
    if x.shape[-1] != W.shape[-1]:
        raise ValueError(
            f"vectors and projections differ in width: {x.shape[-1]} and {W.shape[-1]}"
        )
    u = x @ W.mT
    if hyperbolic:
        u = torch.cat([u, -u], -1)
    half = x.square().sum(-1, keepdim=True) / 2
    return u - half - math.log(u.shape[-1]) / 2


def kernel_variance(x, y, d_r, hyperbolic=False):
    r"""Variance of :math:`\phi(x)^\top\phi(y)` over independent rows.

    :math:`e^{2 x^\top y} (e^{|x+y|^2} - 1) / d_r`; hyperbolic features of the same
    number ``d_r`` have :math:`1 - e^{-|x+y|^2}` times that.

    Args:
        x, y: ``(..., d)``.
        d_r: number of features.
    """
    square = (x + y).square().sum(-1)
    variance = (2 * (x * y).sum(-1)).exp() * square.expm1() / d_r
    return -variance * (-square).expm1() if hyperbolic else variance


def balance(query, key):
    r"""Queries and keys that attend alike and suit positive random features better.

    Attention stays as it is when one vector is added to all keys, and when
    queries go through a matrix :math:`A` and keys through :math:`A^{-\top}`. The
    relative variance of the features grows as :math:`e^{|q+k|^2}`
    (:func:`kernel_variance`), so the keys are centred at minus the mean query,
    and :math:`A` makes :math:`E|Aq|^2 + E|A^{-\top}k|^2` of the centred vectors
    smallest: :math:`A^\top A` is the geometric mean of :math:`C_q^{-1}` and
    :math:`C_k`, their second moments.

    Args:
        query, key: ``(..., T, d)``.

    Returns:
        the same shapes; ``softmax(query @ key.mT)`` is unchanged.
    """
    if query.ndim < 2 or query.shape != key.shape:
        raise ValueError(
            "query and key must both be (..., T, d), not "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    _finite(query=query, key=key)
    q, k = (t.double() - t.double().mean(-2, keepdim=True) for t in (query, key))
    root = _power(_moments(q), 0.5)
    inverse = torch.linalg.inv(root)
    A = _power(inverse @ _power(root @ _moments(k) @ root, 0.5) @ inverse, 0.5)
    q, k = query.double() @ A, k @ torch.linalg.inv(A)
    return q.to(query.dtype), (k - q.mean(-2, keepdim=True)).to(key.dtype)


def _moments(x):
    """Second moments ``(..., d, d)``, a little ridge against empty directions."""
    ridge = 1e-3 * x.square().mean((-2, -1)).clamp(min=1e-12)[..., None, None]
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return x.mT @ x / x.shape[-2] + ridge * identity


def _power(symmetric, exponent):
    eigenvalues, U = torch.linalg.eigh(symmetric)
    eigenvalues = eigenvalues.clamp(min=torch.finfo(symmetric.dtype).tiny)
    return (U * eigenvalues[..., None, :] ** exponent) @ U.mT


# -- the dual model -----------------------------------------------------------


def normaliser(phi_keys, phi_query):
    r"""The normaliser of attention, :math:`D = \sum_i \phi(k_i)^\top\phi(q)`.

    Args:
        phi_keys: ``(M, d_r)``, of demonstration and query-part tokens.
        phi_query: ``(d_r,)``.

    Raises:
        ValueError: ``D`` is not positive, as odd Taylor degrees allow, or
            overflows.
    """
    D = (phi_keys @ phi_query).sum()
    if not 0 < D < math.inf:
        raise ValueError(
            f"the normaliser D must be positive and finite, not {D.item():.4g}: take a "
            "feature map with positive inner products (an even Taylor degree, say), "
            "or scale the vectors down if it overflows"
        )
    return D


def initial_weight(values, phi, D):
    r"""The dual model before its step: :math:`W_0 = \frac{1}{D} V_T \phi(K_T)^\top`.

    Args:
        values: of the query-part tokens, ``(n, d_o)``; ``n`` may be 0.
        phi: features of their keys, ``(n, d_r)``.
        D: from :func:`normaliser`.

    Returns:
        ``(d_o, d_r)``.
    """
    _paired(values, phi)
    return values.mT @ phi / D


def contrastive_loss(W, values, phi, D, eta):
    r"""The loss whose gradient step is attention to the demonstrations.

    :math:`L(W) = -\frac{1}{\eta D} \sum_i (W_V x_i)^\top W \phi(W_K x_i)`, linear
    in ``W``. A step of size ``eta`` from :func:`initial_weight` gives the weight
    whose prediction at :math:`\phi(q)` is the output of attention
    (Ren and Liu 2024).

    Args:
        W: ``(d_o, d_r)``.
        values: :math:`W_V x_i` of the demonstration tokens, ``(N, d_o)``.
        phi: features of their keys, ``(N, d_r)``.
        D: from :func:`normaliser`.
        eta: the step size, positive.

    Returns:
        a scalar; differentiate it with autograd.
    """
    _paired(values, phi)
    if not len(values):
        raise ValueError("there are no demonstrations: values is (0, d_o)")
    if not eta > 0:
        raise ValueError(f"the step size eta must be positive, not {eta}")
    return -(values * (phi @ W.mT)).sum() / (eta * D)


# -- causal attention in linear time ------------------------------------------


def streaming_attention(query, key, value, W, hyperbolic=False, chunk=128):
    r"""Causal random-feature attention in time and memory linear in ``T``.

    Keeps :math:`S_t = \sum_{s \le t} \phi(k_s) v_s^\top` and
    :math:`z_t = \sum_{s \le t} \phi(k_s)`; the output at ``t`` is
    :math:`S_t^\top\phi(q_t) / z_t^\top\phi(q_t)`. The sums are carried from chunk
    to chunk in float64, each feature relative to its largest value so far.

    Args:
        query, key: ``(..., T, d)``, the queries with their factor ``1/√d``.
        value: ``(..., T, d_o)``.
        W: ``(m, d)`` from :func:`gaussian_projection`, shared by the batch.
        hyperbolic: as in :func:`log_features`.
        chunk: tokens handled at once, fewer where their keys differ too much for
            one peak; of no influence on the result.

    Returns:
        ``(..., T, d_o)`` in the dtype of ``value``. Differentiable.

    Raises:
        ValueError: shapes that do not match, no tokens, or inputs not finite.
        FloatingPointError: squared norms beyond float64.
    """
    _check_streams(query, key, value, W, chunk)
    W = W.double()
    outputs, state = [], (None, torch.tensor(-math.inf, dtype=W.dtype))
    for start in range(0, query.shape[-2], chunk):
        q, k, v = (
            t[..., start : start + chunk, :].double() for t in (query, key, value)
        )
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # this column sums to z
        output, state = _advance(state, q, k, v, W, hyperbolic)
        outputs.append(output.to(value.dtype))
    return torch.cat(outputs, -2)


def _advance(state, q, k, v, W, hyperbolic):
    """Outputs of one chunk, and the sums and their peaks after it."""
    (S, last), n = state, q.shape[-2]
    a, b = log_features(k, W, hyperbolic), log_features(q, W, hyperbolic)
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
            "norms of queries or keys are too large: their squares exceed float64; "
            "scale them down"
        )
    # Later keys of the chunk dwarf the sums of earlier tokens: take them apart.
    outputs = []
    for part in (slice(0, n // 2), slice(n // 2, n)):
        tokens = (t[..., part, :] for t in (q, k, v))
        output, state = _advance(state, *tokens, W, hyperbolic)
        outputs.append(output)
    return torch.cat(outputs, -2), state


#: Below this a sum may have lost digits to terms that were rounded to 0.
_UNDERFLOW = torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps


def _check_streams(query, key, value, W, chunk):
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    shapes += f", value {tuple(value.shape)}"
    if query.ndim < 2 or query.shape != key.shape or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"query and key must both be (..., T, d) and value (..., T, d_o), not "
            f"{shapes}"
        )
    if not query.shape[-2]:
        raise ValueError(f"there are no tokens: {shapes}")
    if W.ndim != 2 or not len(W):
        raise ValueError(f"W must be (m, d), m >= 1, not {tuple(W.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    _finite(query=query, key=key, value=value, W=W)


def _finite(**tensors):
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{name} must be finite; {bad} of its {tensor.numel()} entries are not"
            )


def _paired(values, phi):
    if values.ndim != 2 or phi.ndim != 2 or len(values) != len(phi):
        raise ValueError(
            "values (N, d_o) and features (N, d_r) must pair up, not "
            f"{tuple(values.shape)} and {tuple(phi.shape)}"
        )
