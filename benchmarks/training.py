"""Training steps with icl.training against a plain loop, in one process.

Tokens a second and their ratios, the loops taking turns and the fastest of several
rounds counting, for a GPT of 1 million parameters on random bytes:

- a plain loop (transformers' GPT-2 as it comes, scaled_dot_product_attention, AdamW,
  clipping, a new learning rate at each step);
- the trainer with softmax attention, and with momentum, fixed and learned per head.
"""

import tempfile
import time

import numpy as np
import torch
from measure import peak_rate, record, save
from transformers import GPT2LMHeadModel

from icl.training import (
    SIZES,
    TrainConfig,
    build_model,
    gpt2_config,
    text_batches,
    train,
)

SIZE, VOCABULARY, LENGTH, BATCH, STEPS, ROUNDS = "1m", 256, 256, 16, 15, 4
CONFIG = TrainConfig(steps=STEPS, batch=BATCH, evaluate_every=STEPS, save_every=10**6)
ARMS = {
    "softmax": None,
    "momentum": {"kind": "momentum", "eta": 0.5},
    "momentum, learned": {"kind": "momentum", "eta": 0.5, "learned": True},
}


def plain_loop(batches):
    options = {"activation_function": "gelu_new", "attn_implementation": "sdpa"}
    config = gpt2_config(VOCABULARY, LENGTH, *SIZES[SIZE], **options)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate_at(step)
        ids = torch.from_numpy(batches(step)["input_ids"])
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trainer(batches, attention):
    model = build_model(SIZE, VOCABULARY, LENGTH, 0, attention, rotary=False)
    with tempfile.TemporaryDirectory() as folder:
        train(model, batches, folder, CONFIG, report=str)


def main():
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 100_000)
    batches = text_batches(tokens, BATCH, LENGTH)
    runs = {"plain loop": lambda: plain_loop(batches)}
    for name, attention in ARMS.items():
        runs[name] = lambda attention=attention: trainer(batches, attention)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    speed = {name: STEPS * BATCH * LENGTH / took for name, took in best.items()}
    plain, usual = speed["plain loop"], speed["softmax"]
    for name, pace in speed.items():
        record(f"{name}, {SIZE} parameters", pace, "tokens/s")
    name = "speed of the trainer over a plain loop"
    record(name, usual / plain, "x", at_least=1)
    for name in [*ARMS][1:]:
        ratio = speed[name] / usual
        record(f"speed with {name}, over softmax", ratio, "x", at_least=0.92)
    best = peak_rate()
    record("the machine's measured peak", best / 1e9, "GFLOP/s")
    record("rate of the trainer over the machine's peak", usual * flops() / best)
    save()


def flops():
    """Floating-point operations of a training step per token."""
    layers, width, _ = SIZES[SIZE]
    model = build_model(SIZE, VOCABULARY, LENGTH, rotary=False)
    weights = model.num_parameters() - model.transformer.wpe.weight.numel()
    return 6 * weights + 6 * layers * width * LENGTH


if __name__ == "__main__":
    main()
