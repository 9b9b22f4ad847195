r"""Networks that learn in context: built by hand, or trained to do so.

A token is a row ``(x_i, y_i)``; the last row is the query, ``(x, 0)``. A layer of
linear self-attention in the form of Ahn et al. (2023), with the tokens as rows,

.. math:: Z \leftarrow Z + \tfrac1N\, Z Q^\top (Z^\top M Z) P^\top,

attends to the N examples and not to the query (M has a zero there). In usual
terms :math:`Q = W_K^\top W_Q`, and P is the projection times :math:`W_V`. What is
predicted is *minus* the last entry of the query's row.
"""

import math

import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from icl.synthetic import check_task


def tokens(X, y, x):
    """Rows ``(x_i, y_i)`` and, last, ``(x, 0)``: ``(B, N + 1, d + 1)``.

    Args:
        X, y, x: ``(B, N, d)``, ``(B, N)`` and ``(B, d)``.
    """
    check_task(X, y, x)
    inputs = torch.cat([X, x[:, None]], 1)
    labels = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
    return torch.cat([inputs, labels[..., None]], 2)


def gd_weights(dim, eta, gamma=None, w_0=None):
    r"""Weights with which linear attention takes steps of gradient descent.

    The construction of von Oswald et al. (2023): keys and queries are the inputs,
    values the errors, ``W_K = W_Q = diag(I, 0)``, ``W_V = [[0, 0], [w_0ᵀ, -1]]``,
    projection ``η/N``. With ``gamma`` each layer also moves the inputs, ``x ←
    (I − γ/N Σ x_i x_iᵀ) x``, their GD++.

    Args:
        dim: d.
        eta: learning rates, ``(L,)``, one a layer.
        gamma: ``(L,)``, or ``None`` for plain gradient descent.
        w_0: the weight to start from, ``(d,)``; left out, zero. The prediction is
            then ``w_0ᵀ x`` plus what the layers give.

    Returns:
        ``(P, Q)``, each ``(L, d + 1, d + 1)``.
    """
    eta = torch.as_tensor(eta)
    L, corner = len(eta), torch.zeros(dim + 1, dtype=eta.dtype)
    corner[-1] = 1.0
    inputs = torch.diag(1 - corner)
    row = -corner if w_0 is None else torch.cat([w_0, -corner[-1:]])
    P = eta[:, None, None] * torch.outer(corner, row)
    if gamma is not None:
        gamma = torch.as_tensor(gamma)
        if gamma.shape != eta.shape:
            raise ValueError(f"{L} layers need as many gamma, not {len(gamma)}")
        P = P - gamma[:, None, None] * inputs
    return P, inputs.repeat(L, 1, 1)


def random_weights(generator, layers, dim, std):
    """Normal ``(P, Q)``, each ``(L, d + 1, d + 1)``, with a standard deviation."""
    if layers < 1 or not std > 0:
        raise ValueError(f"{layers} layers with deviation {std}: both must be positive")
    shape = 2, layers, dim + 1, dim + 1
    return tuple(std * torch.randn(shape, generator=generator))


class LinearTransformer(nn.Module):
    """Layers of linear self-attention (Ahn et al. 2023) with weights P and Q.

    Args:
        P, Q: ``(L, d + 1, d + 1)`` each, from :func:`gd_weights` or
            :func:`random_weights`.
    """

    def __init__(self, P, Q):
        super().__init__()
        if P.shape != Q.shape or P.ndim != 3 or P.shape[1] != P.shape[2]:
            raise ValueError(
                "P and Q are (L, d + 1, d + 1) each, not "
                f"{tuple(P.shape)} and {tuple(Q.shape)}"
            )
        self.P, self.Q = nn.Parameter(P), nn.Parameter(Q)

    def forward(self, X, y, x):
        """Predictions ``(B,)`` for tasks ``(B, N, d)``, ``(B, N)``, ``(B, d)``."""
        Z = tokens(X, y, x)
        if Z.shape[-1] != self.P.shape[-1]:
            raise ValueError(
                f"weights for inputs of width {self.P.shape[-1] - 1} are given "
                f"inputs of width {X.shape[-1]}"
            )
        N = X.shape[1]
        for P, Q in zip(self.P, self.Q, strict=True):
            examples = Z[:, :-1]
            Z = Z + Z @ (Q.mT @ (examples.mT @ examples) @ P.mT) / N
        return -Z[:, -1, -1]


def softmax_attention(U, V):
    """``softmax(U Vᵀ/√d)`` over the last axis: ``(..., N, d), (..., M, d)``."""
    return (U @ V.mT / math.sqrt(U.shape[-1])).softmax(-1)


def functional_gd(X, y, x, attention, eta):
    r"""Predictions of stacked attention whose labels carry residuals.

    Layer l takes from the label entry of each row, the query's too, what it
    attends to: :math:`r_j \leftarrow r_j - \eta_l \sum_{i \le N} h(x_j, x_i) r_i`.
    If h is a kernel this is gradient descent on the squared error in its
    reproducing-kernel Hilbert space, :math:`f \leftarrow f + \eta_l \sum_i (y_i -
    f(x_i)) h(x_i, \cdot)`, and minus the query's entry is f(x) (Cheng et al.
    2024).

    Args:
        X, y, x: ``(B, N, d)``, ``(B, N)`` and ``(B, d)``.
        attention: h; ``attention(U, V) -> (B, rows of U, rows of V)``.
        eta: learning rates, ``(L,)``, one a layer.

    Returns:
        ``(B,)``, differentiable in ``eta``.
    """
    Z, N = tokens(X, y, x), X.shape[1]
    weights, r = attention(Z[..., :-1], X), Z[..., -1:]
    for rate in eta:
        r = r - rate * weights @ r[:, :N]
    return -r[:, -1, 0]


class InContextRegressor(nn.Module):
    """A causal transformer that reads ``x_1, y_1, x_2, y_2, ...`` (Garg et al. 2022).

    The body is GPT-2 without dropout; linear maps read tokens in and predictions
    out. An input is a token ``(x_i, 0)`` and a label a token ``(0, y_i)``, so that
    the label has an entry of its own (Garg et al. put it into the first of x's).

    Args:
        dim: d.
        examples: the most examples it can read, the query included.
        width, layers, heads: of GPT-2.
        seed: of the random weights; torch's own generator is left alone.
        inner: width of the MLPs' hidden layers; left out, four times the model's.
    """

    def __init__(self, dim, examples, width=64, layers=3, heads=4, seed=0, inner=None):
        super().__init__()
        config = GPT2Config(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            n_positions=2 * examples,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=inner,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read_in = nn.Linear(dim + 1, width)
            self.body = GPT2Model(config)
            self.read_out = nn.Linear(width, 1)

    def forward(self, X, y):
        """Each label from the examples before it, ``(B, N)``; y_i is not seen at i.

        Args:
            X, y: ``(B, N, d)`` and ``(B, N)``.
        """
        B, N, d = X.shape
        if y.shape != (B, N) or d + 1 != self.read_in.in_features:
            raise ValueError(
                f"X must be (B, N, {self.read_in.in_features - 1}) and y (B, N); given "
                f"are {tuple(X.shape)} and {tuple(y.shape)}"
            )
        if self.body.config.n_positions < 2 * N:
            raise ValueError(
                f"{N} examples are more than the {self.body.config.n_positions // 2} "
                "that this model has positions for"
            )
        sequence = X.new_zeros(B, 2 * N, d + 1)
        sequence[:, ::2, :-1] = X
        sequence[:, 1::2, -1] = y
        states = self.body(inputs_embeds=self.read_in(sequence)).last_hidden_state
        return self.read_out(states[:, ::2]).squeeze(-1)


class PairedRegressor(InContextRegressor):
    """The same network reading rows ``(x_i, y_i)``, and the query's ``(x, 0)``.

    A row is a demonstration with its label, so that one layer of attention can
    compare the query with all of them (the form of von Oswald et al. 2023).
    """

    def forward(self, X, y):
        """The last label from the examples before it, ``(B, 1)``.

        Args:
            X, y: ``(B, N, d)`` and ``(B, N)``; the last of y is not read.
        """
        rows = tokens(X[:, :-1], y[:, :-1], X[:, -1])
        states = self.body(inputs_embeds=self.read_in(rows)).last_hidden_state
        return self.read_out(states[:, -1])


def warm_cosine(done):
    """A learning-rate factor: up over a tenth of the training, down as a cosine."""
    return min(done / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    loss, parameters, steps, learning_rate, betas=(0.9, 0.999), clip=None, schedule=None
):
    """Train with Adam on losses that are drawn afresh.

    Args:
        loss: ``loss() -> scalar``; draws a batch, from a generator of its own.
        parameters: tensors that the loss depends on.
        steps, learning_rate, betas: of Adam.
        clip: the largest norm of the gradient.
        schedule: ``schedule(done) -> factor`` of the learning rate, ``done`` in
            (0, 1]; left out, constant.

    Returns:
        the loss of every step, a list.

    Raises:
        ValueError: fewer than one step, or a loss that is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    parameters = list(parameters)
    adam = torch.optim.Adam(parameters, learning_rate, betas)
    losses = []
    for step in range(steps):
        if schedule is not None:
            adam.param_groups[0]["lr"] = learning_rate * schedule((step + 1) / steps)
        value = loss()
        losses.append(_finite(value, step))
        adam.zero_grad()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        adam.step()
    return losses


def minimise(loss, parameters, steps):
    """Minimise with L-BFGS a loss that is always the same.

    Unlike Adam, L-BFGS does not care along which axes the parameters lie. It may
    jump too far on a polynomial of high degree, so the parameters are left at the
    best point that it met.

    Args:
        loss: ``loss() -> scalar``, without randomness.
        parameters: tensors that the loss depends on.
        steps: the most iterations.

    Returns:
        the loss there.

    Raises:
        ValueError: fewer than one step, or a loss that is not finite at the start.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    parameters = list(parameters)
    with torch.no_grad():
        best = _finite(loss(), 0), [p.clone() for p in parameters]
    lbfgs = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure():
        nonlocal best
        lbfgs.zero_grad()
        value = loss()
        value.backward()
        if value.item() < best[0]:
            best = value.item(), [p.detach().clone() for p in parameters]
        return value

    lbfgs.step(closure)
    with torch.no_grad():
        for parameter, kept in zip(parameters, best[1], strict=True):
            parameter.copy_(kept)
    return best[0]


def _finite(value, step):
    if not torch.isfinite(value):
        raise ValueError(
            f"the loss is {value.item()} at step {step}; use a lower learning rate, "
            "smaller initial weights or clip the gradient"
        )
    return value.item()
