"""Online learners by chunks against their recurrence, in one process.

Prints ratios of the least of several times, the two taking turns, for keys and values
of width 64:

- the delta rule at 4,096 tokens, forward alone, and forward and backward: the
  recurrence of ``icl.memory.learn``, and a loop with nothing but the delta rule in it,
  over ``chunkwise``; for one head and, forward, for eight; then with decay and
  momentum;
- how time and memory of forward and backward grow from 1,024 to 16,384 tokens;
- the same with other sizes of chunks;
- Mesa at 512 tokens, its Newton steps one after another over ``mesa``;
- forward and backward of delta attention over those of softmax attention, in 12 heads.
"""

from functools import partial
from itertools import pairwise

import torch
from measure import fastest, peak
from torch.nn.functional import normalize, scaled_dot_product_attention

from icl.attention import memory_attention
from icl.memory import chunkwise, learn, mesa

WIDTH = 64


def drawn(tokens, heads=1, width=WIDTH):
    q, k, v = torch.randn(3, 1, heads, tokens, width)
    beta = torch.rand(1, heads, tokens)
    return [x.requires_grad_() for x in (q, normalize(k, dim=-1), v, beta)]


def bare(query, key, value, beta):
    """The delta rule and nothing else."""
    W, outputs = torch.zeros(query.shape[1], WIDTH, WIDTH), []
    for q, k, v, b in zip(
        *(x[0].unbind(1) for x in (query, key, value, beta)), strict=True
    ):
        error = v - (W @ k[..., None])[..., 0]
        W = W + (b[:, None] * error)[..., None] * k[:, None]
        outputs.append((W @ q[..., None])[..., 0])
    return (torch.stack(outputs, 1)[None],)


def forward(attend, inputs):
    with torch.no_grad():
        return attend(*inputs)


def trained(attend, inputs):
    out = attend(*inputs)[0]
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def against_the_recurrence():
    gated = {"decay": 0.99, "momentum": 0.5}
    rules = {
        "learn": (learn, chunkwise),
        "a bare loop": (bare, chunkwise),
        "decay and momentum, learn": [partial(f, **gated) for f in (learn, chunkwise)],
    }
    for name, attends in rules.items():
        for heads, how in ((1, forward), (1, trained), (8, forward)):
            inputs = drawn(4096, heads)
            slow, fast = (partial(how, attend, inputs) for attend in attends)
            a, b = fastest(slow, fast, repeats=1 if how is trained else 3)
            b = min(b, *fastest(fast, repeats=20))
            print(f"4,096 tokens, heads: {heads}, {how.__name__}: ", end="")
            print(f"{name} {a:.3f} s / chunkwise {b:.4f} s = {a / b:.1f} x")


def growth():
    times, most = [], []
    for tokens in (1024, 2048, 4096, 8192, 16384):
        run = partial(trained, chunkwise, drawn(tokens, 4))
        times += fastest(run)
        most.append(peak(run))
    for what, of in (("time", times), ("memory", most)):
        ratios = ", ".join(f"{b / a:.2f}" for a, b in pairwise(of))
        print(f"{what} with twice the tokens, from 1,024 on: {ratios} x")
    weights = 4 * 4 * 16384 * WIDTH**2
    print(
        f"16,384 tokens, 4 heads: {most[-1] / 1e6:.0f} MB, where the weights of ",
        end="",
    )
    print(f"all tokens have {weights / 1e6:.0f} MB")


def sizes():
    inputs, chunks = drawn(4096, 4), (16, 32, 64, 128, 256)
    attends = [partial(chunkwise, chunk=chunk) for chunk in chunks]
    times = fastest(*(partial(trained, attend, inputs) for attend in attends))
    told = [f"{c}: {t / min(times):.2f}" for c, t in zip(chunks, times, strict=True)]
    print(f"chunks of so many tokens, time over the least: {', '.join(told)}")


def newton():
    inputs = [x.detach() for x in drawn(512)]
    full = partial(learn, precondition="full", decayed=False)
    runs = [partial(forward, attend, inputs) for attend in (full, mesa)]
    a, b = fastest(*runs, repeats=2)
    print(f"512 tokens, forward: Newton {a:.3f} s / mesa {b:.4f} s = {a / b:.1f} x")


def against_softmax():
    def delta(q, k, v):
        return (memory_attention(q, k, v),)

    def softmax(q, k, v):
        return (scaled_dot_product_attention(q, k, v, is_causal=True),)

    for tokens in (1024, 4096):
        inputs = drawn(tokens, 12)[:3]
        a, b = fastest(*(partial(trained, f, inputs) for f in (softmax, delta)))
        print(f"{tokens:,} tokens: delta {b:.3f} s / softmax {a:.3f} s = {b / a:.2f} x")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; width {WIDTH}")
    against_the_recurrence()
    growth()
    sizes()
    newton()
    against_softmax()
