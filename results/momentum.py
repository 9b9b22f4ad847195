"""Momentum attention and what it is compared with, trained from scratch.

One table grows, run by run; runs that it has are not trained again, and one that was
killed goes on from its checkpoint. Arms of one experiment and seed have the same
initial weights and see the same sequences in the same order. Measures:

- ``loss`` (of training, since the last step given) and ``held out``, nats a token, by
  step; in context: ``error`` (of the last of the labels) or ``recall``;
- ``held out, T tokens``: nats a token at the end, in windows of T;
- ``rate l.h``: what a head's learned rate, or its convolution's weight at distance
  one, has come to.
"""

import argparse
import hashlib
import shutil
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from icl.attention import equip, rates
from icl.corpora import BYTES, as_bytes, byte_pairs, load_text
from icl.learners import InContextRegressor
from icl.results import ROOT, add_rows, check_origin, provenance, read_table, table_path
from icl.synthetic import linear_labels, sample_inputs
from icl.training import (
    Plan,
    RecallBatches,
    TextBatches,
    gpt,
    losses,
    train,
)

TABLE = "momentum"


def momentum(rate, **options):
    return {"kind": "momentum", "eta": rate, **options}


ARMS = {
    "softmax": {},
    "softmax, more steps": {},
    "momentum .3": momentum(0.3),
    "momentum .5": momentum(0.5),
    "momentum .7": momentum(0.7),
    "momentum .9": momentum(0.9),
    "momentum .99": momentum(0.99),
    "momentum .9, normalised": momentum(0.9, normalise=True),
    "momentum, learned": momentum(0.5, learned=True),
    "decay .9 alone": momentum(0.9, softmax=False),
    "heavy ball .9": {"kind": "heavy_ball", "mu": 0.9},
    "layerwise .5": {"layerwise": 0.5},
    "shift .5": {"kind": "convolution", "eta": 0.5, "reach": 1},
    "convolution, learned": dict(kind="convolution", eta=0.5, reach=4, learned=True),
}
FEW = ("softmax", "momentum .5", "momentum, learned", "convolution, learned")
SOME = (*FEW, "momentum .9", "shift .5", "heavy ball .9")
MORE = 1.08  # steps that pay for the time which momentum costs, and some more


class Text(NamedTuple):
    """An experiment on running text; ``seeds`` is how many, 0 the first."""

    corpus: str
    vocabulary: int = BYTES
    size: str = "1m"
    length: int = 128
    positions: int = 128
    batch: int = 16
    steps: int = 600
    seeds: int = 5
    arms: tuple = SOME


EXPERIMENTS = {
    "shakespeare": Text("shakespeare", arms=(*ARMS,)),
    "wikitext2": Text("wikitext2", length=256, positions=256),
    "long": Text("shakespeare", steps=3000, seeds=3, arms=FEW),
    "beyond": Text("shakespeare", positions=512, steps=900, arms=FEW),
    "words": Text("reviews", 4096, "3m", 256, 256, seeds=3, arms=FEW),
    "regression": None,
    "recall": None,
}


@lru_cache(1)
def tokens_of(corpus, vocabulary):
    text = load_text(corpus)
    parts = text.train, text.held_out
    if vocabulary == BYTES:
        tokens = [as_bytes(part) for part in parts]
    else:
        pairs = byte_pairs(text.train, vocabulary)
        tokens = [np.array(pairs.encode(part).ids) for part in parts]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return *tokens, digest, text.source


def on_text(spec, arm, seed, folder):
    """Train one arm on running text; its rows, but for what names the run."""
    tokens, held_out, digest, _ = tokens_of(spec.corpus, spec.vocabulary)
    held_out = held_out[:50_000]
    steps = round(MORE * spec.steps) if arm == "softmax, more steps" else spec.steps
    plan = Plan(steps=steps, batch=spec.batch)
    spread = spec.positions if spec.positions > spec.length else None
    batches = TextBatches(tokens, spec.batch, spec.length, seed, spread)
    model = gpt(spec.size, spec.vocabulary, spec.positions, seed, ARMS[arm])

    def measure(model):
        return losses(model, held_out, spec.length).mean()

    about = dict(seed=seed, data_sha256=digest)
    history = train(model, batches, folder, plan, measure, **about)
    yield from rows_of(history, "held out")
    for length in (int(spec.length * part) for part in (0.25, 0.5, 1, 2, 4)):
        if length <= spec.positions:
            found = losses(model, held_out, length).mean()
            yield row(f"held out, {length} tokens", found, steps)
    yield from learned(model, steps)


class Regression(torch.nn.Module):
    """An :class:`InContextRegressor` with its loss, for the trainer."""

    def __init__(self, seed, attention):
        super().__init__()
        self.predict = InContextRegressor(5, 11, 128, 4, 4, seed)
        self.config = self.predict.body.config
        if attention:
            equip(self.predict.body, **attention)

    def forward(self, X, y):
        found = self.predict(X, y)
        return SimpleNamespace(predictions=found, loss=(found - y).square().mean())


class LinearTasks(NamedTuple):
    """Batches of linear tasks with labels of variance 1."""

    batch: int
    seed: int

    def __call__(self, step):
        g = torch.Generator().manual_seed(self.seed * 10**7 + step)
        X = sample_inputs(g, self.batch, 11, 5)
        return {"X": X.numpy(), "y": (linear_labels(g, X) / 5**0.5).numpy()}


def in_context(name, arm, seed, folder):
    """Train one arm to learn in context; its rows."""
    if name == "regression":
        plan, make = Plan(3000), LinearTasks
        model, label = Regression(seed, ARMS[arm]), "error"

        def judge(found, batch):
            return (found.predictions.numpy() - batch["y"])[:, -1] ** 2
    else:
        plan, make = Plan(1500), partial(RecallBatches, pairs=16, symbols=64)
        model, label = gpt("1m", 128, 64, seed, ARMS[arm]), "recall"

        def judge(found, batch):
            asked = batch["labels"][:, 1:]
            right = found.logits[:, :-1].argmax(-1).numpy() == asked
            return right[asked >= 0]

    unseen = make(plan.batch, seed=10**6)  # no run is trained on these

    @torch.inference_mode()
    def measure(model):
        found = []
        for n in range(8):
            batch = unseen(n)
            given = {name: torch.from_numpy(array) for name, array in batch.items()}
            found.append(judge(model(**given), batch))
        return np.concatenate(found).mean()

    history = train(
        model, make(plan.batch, seed=seed), folder, plan, measure, seed=seed
    )
    yield from rows_of(history, label)
    yield from learned(
        model.predict.body if name == "regression" else model, plan.steps
    )


def row(measure, value, step):
    return {"measure": measure, "step": step, "value": float(value)}


def rows_of(history, label):
    for point in history:
        yield row("loss", point["loss"], point["step"])
        yield row(label, point["measure"], point["step"])


def learned(model, steps):
    if not model.config.to_dict().get("icl_attention", {}).get("learned"):
        return
    found = rates(model)
    found = found if found.ndim == 2 else found[..., 0]
    for (layer, head), rate in np.ndenumerate(found.numpy()):
        yield row(f"rate {layer}.{head}", rate, steps)


def main(name):
    spec = EXPERIMENTS[name]
    arms, seeds = (spec.arms, spec.seeds) if spec else (FEW, 5)
    facts = provenance(experiment=name, seeds=list(range(seeds)))
    if spec:
        *_, digest, source = tokens_of(spec.corpus, spec.vocabulary)
        facts |= dict(data_sha256=digest, data_source=source, **spec._asdict())
    done = set()
    if table_path(TABLE).exists():
        table, about = read_table(TABLE)
        check_origin(TABLE, about, name, facts)
        table = table[table.experiment == name]
        done.update(zip(table.arm, table.seed, strict=True))
    for seed in range(seeds):
        for arm in arms:
            if (arm, seed) in done:
                continue
            print(f"{name}, {arm}, seed {seed}", flush=True)
            folder = ROOT / "_build" / TABLE / name / f"{arm} {seed}"
            if spec:
                rows = list(on_text(spec, arm, seed, folder))
            else:
                rows = list(in_context(name, arm, seed, folder))
            fixed = {"experiment": name, "arm": arm, "seed": seed}
            key = [*fixed, "measure", "step"]
            add_rows(TABLE, [fixed | r for r in rows], key, name, facts)
            shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    main(parser.parse_args().experiment)
