"""Momentum and contrastive attentions against softmax attention alone, in one process.

Ratios of the least of several times, the two taking turns:

- forward and backward at 1,024 tokens, with one fixed rate and with one learned
  per head, over ``scaled_dot_product_attention``; and the peak of the memory that each
  allocates;
- the sum alone at 8,192 tokens: a double loop over tokens (its inner loop a vector
  operation; timed on the first 512 tokens and scaled by the number of pairs) and the
  dense matrix of all decays, over the scan; and how the scan grows with the tokens;
- one step of decoding behind 4,096 tokens;
- the released form of momentum: forward and backward at 1,024 tokens, its peak of
  memory, and a step of decoding, as it starts and with slow rates throughout;
- forward and backward at 1,024 tokens of the contrastive attentions, of which the
  augmented one has maps that cost nothing; and at 4,096 tokens the memory that
  negatives allocate;
- a step of finetuning the built-in encoder with these, forward, backward and update, on
  16 sequences of 16 to 32 tokens, and of 48 to 96.
"""

from functools import partial

import torch
from measure import fastest, peak, record, record_curve, save, timed
from torch.nn.functional import scaled_dot_product_attention

from icl.attention import (
    AugmentedAttention,
    MomentumAttention,
    NegativeAttention,
    RegularisedAttention,
    ReleasedMomentumAttention,
    replace_attention,
)
from icl.models import ENCODER, load_model

HEADS, WIDTH = 12, 64


def drawn(batch, tokens, length=None):
    shapes = [(batch, HEADS, n, WIDTH) for n in (tokens, *[length or tokens] * 2)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def trained(attention, inputs, *rates):
    """Forward and backward; as in a model, nobody keeps the output for long."""
    inputs = [x for x in (*inputs, *rates) if x.requires_grad]
    back = torch.ones_like(inputs[0])
    torch.autograd.grad((attention() * back).sum(), inputs)


def momentum():
    q, k, v = inputs = drawn(4, 1024)
    learned = torch.full((HEADS,), 0.9, requires_grad=True)

    def usual():
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    for name, eta in [("fixed", torch.tensor(0.9)), ("learned a head", learned)]:

        def ours(eta=eta):
            return MomentumAttention(eta=eta)(q, k, v)

        runs = [
            lambda: trained(usual, inputs),
            lambda ours=ours, eta=eta: trained(ours, inputs, eta),
        ]
        a, b = fastest(*runs)
        over = f"momentum attention over softmax, 1,024 tokens, eta {name}"
        record(f"{over}, seconds", b / a, "x", at_most=1.1)
        a, b = map(peak, runs)
        record(f"{over}, memory", b / a, "x", at_most=1.1)

    times = {}
    for tokens in (1024, 2048, 4096, 8192, 16384):
        q, k, v = (x.detach() for x in drawn(1, tokens))
        scan = partial(MomentumAttention(eta=0.9, softmax=False), v, v, v)
        (times[tokens],) = fastest(scan)
        if tokens == 8192:
            age = torch.arange(tokens)
            age = age[:, None] - age

            def dense(v=v, age=age):
                return (0.9 ** age.clamp(min=0)).masked_fill(age < 1, 0) @ v

            def loops(v=v, few=512):
                for t in range(few):
                    total = torch.zeros(HEADS, WIDTH)
                    for i in range(t):
                        total += 0.9 ** (t - i) * v[0, :, i]

            (slow,), naive = fastest(dense), timed(loops)[0] * (tokens / 512) ** 2
            over = "over the scan, sum of momentum, 8,192 tokens"
            record(f"a double loop {over}", naive / times[tokens], "x", at_least=50)
            record(f"a dense matrix {over}", slow / times[tokens], "x", at_least=5)
    record_curve("sum of momentum by the scan", "tokens", times, at_most=1.1)

    q, k, v = (x.detach() for x in drawn(1, 1, 4096))
    runs = [
        lambda: [scaled_dot_product_attention(q, k, v) for _ in range(50)],
        lambda: [MomentumAttention(eta=0.9)(q, k, v) for _ in range(50)],
    ]
    a, b = fastest(*runs)
    name = "momentum attention over softmax, a token behind 4,096"
    record(name, b / a, "x", at_most=2)


def released():
    q, k, v = inputs = drawn(4, 1024)
    logits = (0.2 * torch.randn(HEADS * WIDTH, 8)).requires_grad_()
    weights = torch.randn(HEADS * WIDTH, 8, requires_grad=True)
    module = torch.nn.Module()
    module.ema_logits, module.ema_weights = logits, weights
    attend = ReleasedMomentumAttention()

    def usual():
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours():
        return attend(q, k, v, parameters=attend.parameters(module))

    runs = [
        lambda: trained(usual, inputs),
        lambda: trained(ours, inputs, logits, weights),
    ]
    over = "released momentum over softmax, 1,024 tokens"
    a, b = fastest(*runs)
    record(f"{over}, seconds", b / a, "x", at_most=1.25)
    a, b = map(peak, runs)
    record(f"{over}, memory", b / a, "x", at_most=1.25)

    q, k, v = (x.detach() for x in drawn(1, 1, 4096))
    for rates, name in [(logits.detach(), "at first"), (logits.detach() + 9, "slow")]:
        module.ema_logits = rates

        @torch.no_grad()
        def step():
            return [attend.forward(q, k, v, None, module=module) for _ in range(50)]

        runs = [
            lambda: [scaled_dot_product_attention(q, k, v) for _ in range(50)],
            step,
        ]
        a, b = fastest(*runs)
        over = f"released momentum, rates {name}, over softmax, a token behind 4,096"
        record(over, b / a, "x", at_most=1.5)


def contrast():
    q, k, v = inputs = drawn(4, 1024)

    def usual():
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    free = {"of_key": torch.neg, "of_value": torch.neg}
    contrasts = {
        "regularised": lambda: RegularisedAttention(alpha=0.5)(q, k, v),
        "augmented": lambda: AugmentedAttention()(q, k, v, **free),
        "negatives, k = 8": lambda: NegativeAttention(beta=0.5, k=8)(q, k, v),
        "negatives, k = 64": lambda: NegativeAttention(beta=0.5, k=64)(q, k, v),
    }
    for name, ours in contrasts.items():
        runs = [lambda: trained(usual, inputs), lambda ours=ours: trained(ours, inputs)]
        a, b = fastest(*runs)
        most = 4 if name.startswith("negatives") else 2
        record(f"{name}, over softmax, 1,024 tokens, seconds", b / a, "x", at_most=most)
    q, k, v = inputs = drawn(1, 4096)
    for name in ("regularised", "negatives, k = 8"):
        most = peak(lambda name=name: trained(contrasts[name], inputs))
        over = f"{name}, 4,096 tokens, memory over that of one matrix of scores"
        record(over, most / (4 * HEADS * 4096**2))


def step_of(**options):
    """A function that takes a step of an arm on a batch."""
    model, _ = load_model(ENCODER, device="cpu", labels=2)
    model.requires_grad_(True)
    if options:
        replace_attention(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def run(batch):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def encoder():
    arms = {
        "regularised": step_of(kind="regularised", alpha=0.5),
        "augmented": step_of(kind="augmented", hidden=16),
        "negatives, k = 4": step_of(kind="negative", beta=0.5, k=4),
    }
    plain = step_of()
    for tokens in (32, 96):
        lengths = torch.linspace(tokens // 2, tokens, 16).long()
        shown = (torch.arange(tokens) < lengths[:, None]).long()
        ids = torch.randint(1000, 30000, shown.shape) * shown
        batch = {"input_ids": ids, "attention_mask": shown}
        batch["labels"] = torch.arange(16) % 2
        for name, run in arms.items():
            a, b = fastest(partial(plain, batch), partial(run, batch))
            most = 3 if name.startswith("negatives") else 2
            over = f"{name}, over softmax, a step of an encoder, {tokens} tokens"
            record(over, b / a, "x", at_most=most)


if __name__ == "__main__":
    torch.manual_seed(0)
    momentum()
    released()
    contrast()
    encoder()
    save()
