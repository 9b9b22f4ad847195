"""Online learners by chunks against their recurrence, in one process.

Ratios of the least of several times, the two taking turns, for keys and values
of width 64:

- the delta rule at 4,096 tokens, forward alone, and forward and backward: the
  loop ``icl.online.recurrent`` ("learn" in the table), and a loop with nothing but the
  delta rule in it, over ``chunkwise``; for one head and, forward, for eight; then with
  decay and momentum;
- how time and memory of forward and backward grow from 1,024 to 16,384 tokens;
- chunks of the default size against others;
- Mesa at 512 tokens, its Newton steps one after another over ``mesa``;
- forward and backward of delta attention over those of softmax attention, in 12 heads;
- the same of whole language models, the small ones of the chapter on memories, on one
  text of 512 to 8,192 bytes.
"""

from functools import partial

import torch
from measure import fastest, peak, record, record_curve, save
from torch.nn.functional import normalize, scaled_dot_product_attention

from icl.attention import DeltaAttention
from icl.online import chunkwise, mesa, recurrent
from icl.training import build_model

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
        "delta rule, learn": (recurrent, chunkwise),
        "delta rule, a bare loop": (bare, chunkwise),
        "delta rule with decay and momentum, learn": [
            partial(f, **gated) for f in (recurrent, chunkwise)
        ],
    }
    for name, attends in rules.items():
        for heads, how in ((1, forward), (1, trained), (8, forward)):
            inputs = drawn(4096, heads)
            slow, fast = (partial(how, attend, inputs) for attend in attends)
            a, b = fastest(slow, fast, repeats=1 if how is trained else 3)
            b = min(b, *fastest(fast, repeats=20))
            pass_ = "forward" if how is forward else "forward and backward"
            what = f"{name} over chunkwise, 4,096 tokens, heads: {heads}, {pass_}"
            wanted = 20 if heads == 1 and "momentum" not in name else None
            record(what, a / b, "x", at_least=wanted)


def growth():
    times, most = {}, {}
    for tokens in (1024, 2048, 4096, 8192, 16384):
        run = partial(trained, chunkwise, drawn(tokens, 4))
        (times[tokens],) = fastest(run)
        most[tokens] = peak(run) / 1e6
    what = "delta rule by chunks, 4 heads, both passes"
    record_curve(what, "tokens", times, at_most=1.1)
    record_curve(what, "tokens", most, "MB", at_most=1.1)
    weights = 4 * 4 * 16384 * WIDTH**2 / 1e6
    name = (
        "delta rule by chunks, 16,384 tokens, memory over that of all tokens' weights"
    )
    record(name, most[16384] / weights)


def sizes():
    inputs, chunks = drawn(4096, 4), (16, 32, 64, 128, 256)
    attends = [partial(chunkwise, chunk=chunk) for chunk in chunks]
    usual, *times = fastest(
        *(partial(trained, attend, inputs) for attend in (chunkwise, *attends))
    )
    name = "chunks of the default size over the best of 16 to 256, seconds"
    record(name, usual / min(times), "x")


def newton():
    inputs = [x.detach() for x in drawn(512)]
    full = partial(recurrent, precondition="full", decayed=False)
    runs = [partial(forward, attend, inputs) for attend in (full, mesa)]
    a, b = fastest(*runs, repeats=2)
    record("Newton steps over mesa, 512 tokens, forward", a / b, "x")


def against_softmax():
    def delta(q, k, v):
        return (DeltaAttention()(q, k, v),)

    def softmax(q, k, v):
        return (scaled_dot_product_attention(q, k, v, is_causal=True),)

    for tokens in (1024, 4096):
        inputs = drawn(tokens, 12)[:3]
        a, b = fastest(*(partial(trained, f, inputs) for f in (softmax, delta)))
        record(f"delta attention over softmax, {tokens:,} tokens, seconds", b / a, "x")


def language_models():
    started = {"learned": True, "beta": 0.5, "momentum": 0.5}
    arms = {
        "softmax": None,
        "linear": {"kind": "linear", "learned": True},
        "delta": {"kind": "delta", "learned": True},
        "delta, momentum": {"kind": "delta", **started},
    }
    lengths = (512, 1024, 2048, 4096, 8192)
    models = [
        build_model("1m", 256, lengths[-1], 0, a, rotary=False) for a in arms.values()
    ]
    times, most = {}, {}
    for length in lengths:
        ids = torch.randint(256, (1, length))

        def step(model, ids=ids):
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        runs = [partial(step, model) for model in models]
        times[length] = dict(zip(arms, fastest(*runs, repeats=4), strict=True))
        most[length] = dict(zip(arms, map(peak, runs), strict=True))
    for name in arms:
        what = f"small language model, {name}, both passes"
        record_curve(what, "bytes of text", {n: times[n][name] for n in lengths})
        record_curve(
            what, "bytes of text", {n: most[n][name] / 1e6 for n in lengths}, "MB"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    against_the_recurrence()
    growth()
    sizes()
    newton()
    against_softmax()
    language_models()
    save()
