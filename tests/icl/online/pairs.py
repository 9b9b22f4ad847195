"""What the tests of online learners read: queries, unit keys and values; and rates."""

from functools import partial

import torch
from torch.nn.functional import normalize

from icl.online import State

F64 = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def draw(T=23, d_k=5, d_v=4, B=2, H=3, seed=0, dtype=F64):
    """Queries, unit keys and values."""
    g = torch.Generator().manual_seed(seed)
    widths = (d_k, d_k, d_v)
    q, k, v = (torch.randn(B, H, T, d, generator=g, dtype=F64) for d in widths)
    return [x.to(dtype) for x in (q, normalize(k, dim=-1), v)]


def rate(low, high, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=g, dtype=F64)


def initial(*shape):
    g = torch.Generator().manual_seed(9)
    return torch.randn(shape, generator=g, dtype=F64) / shape[-1] ** 0.5


def copies(*weights):
    return State(tuple(w.expand(2, 3, *w.shape) for w in weights))


BETA = rate(0, 2, 2, 3, 23, seed=1)
DECAY = rate(0.3, 1, 2, 3, 23, seed=2)
MU = rate(0, 0.9, 2, 3, 23, seed=3)
W_1, W_2 = initial(6, 5), initial(4, 6)  # of a network
