"""Contrastive attention in a language model: at inference, and finetuned.

On 100 evaluation examples a task behind Dai et al.'s number of demonstrations.

- ``contrast_inference``: the trained model's attention replaced. Demonstrations are
  the prompt's ("prompt"). On one task also with all tokens before a token as its
  demonstrations ("tokens"), and one layer at a time.
- ``contrast_finetuning``: one pass of SGD over the demonstrations on the views of
  augmented attention, on K and V of all layers, or on K and V of as many as make the
  same number of parameters; then zero-shot.
"""

import argparse

import numpy as np

from icl import metrics
from icl.attention import equip
from icl.comparison import DEMONSTRATIONS, Subject
from icl.finetuning import kv_projections, kv_sgd, updated
from icl.models import DEFAULT, load_model
from icl.results import add_rows, provenance, rows_made
from icl.tasks import PAPER_TASKS, load_task, token_counts

INFERENCE, FINETUNING = "contrast_inference", "contrast_finetuning"
EXAMPLES, SEEDS = 100, (1, 2, 3)
RATES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
HIDDEN = 64


def regularised(alpha, matched=False):
    return {"kind": "regularised", "alpha": alpha, "matched": matched}


def negative(beta, k=8, matched=False):
    return {"kind": "negative", "beta": beta, "k": k, "matched": matched}


SETTINGS = {
    **{f"regularised {a:g}": regularised(a) for a in (-1, -0.5, 0.25, 0.5, 0.75, 1)},
    **{f"regularised {a:g}, matched": regularised(a, True) for a in (-0.5, 0.5, 1)},
    **{f"negative {b:g}": negative(b) for b in (-0.5, 0.1, 0.25, 0.5, 1)},
    **{f"negative {b:g}, matched": negative(b, 8, True) for b in (-0.5, 0.25, 0.5)},
    **{f"negative 0.25, k {k}": negative(0.25, k) for k in (1, 64)},
}
CLOSER = "mr"  # the task that is looked at from all sides
BY_LAYER = ("regularised 0.5", "negative 0.5")


def judged(scores, labels):
    """How right the answers are, plainly and calibrated, and how often one is given."""
    p = np.exp(scores)
    p /= p.sum(1, keepdims=True)
    return {
        "accuracy": (scores.argmax(1) == labels).mean(),
        "accuracy_calibrated": (metrics.calibrated(scores).argmax(1) == labels).mean(),
        "commonest": np.bincount(scores.argmax(1)).max() / len(labels),
        "label_loss": -np.log(p[np.arange(len(labels)), labels]).mean(),
    }


class Table:
    """Rows of one model and task, made once."""

    def __init__(self, name, key, model_name, task):
        self.name, self.key = name, key
        self.fixed = {"model": model_name, "task": task.name}
        self.part = "/".join(self.fixed.values())
        self.facts = provenance(
            **self.fixed,
            data_sha256=task.digest(),
            data_source=task.source,
            demonstrations=DEMONSTRATIONS[task.name],
            seeds=list(SEEDS),
        )
        made = rows_made(name, key, self.part, self.facts, **self.fixed)
        self.done = set(made.itertuples(index=False, name=None))

    def add(self, run, make):
        """The row of a run, if it is not there, from ``make()``."""
        if run in self.done:
            return
        named = dict(zip(self.key, run, strict=True))
        row = self.fixed | named | {n: round(float(v), 6) for n, v in make().items()}
        add_rows(self.name, [row], [*self.fixed, *self.key], self.part, self.facts)
        print(self.part, *run, f"{row['accuracy']:.3f}", flush=True)


def at_inference(subject, table):
    model, task = subject.model, subject.task
    labels, k = task.labels(), DEMONSTRATIONS[task.name]
    for seed in SEEDS:
        examples = task.sample(k, seed)
        front = token_counts(subject.tokenizer, [subject.prefix(examples)])[0]

        def asked(told=None, layers=None, examples=examples):
            if told is None:
                model.set_attn_implementation("sdpa")
            else:
                equip(model, layers=layers, **told)
            return judged(subject.score(examples), labels)

        table.add((seed, "none", "prompt", -1), asked)
        if seed == SEEDS[0]:
            table.add((0, "zero-shot", "prompt", -1), lambda: asked(examples=()))
        readings = {"prompt": {"demonstrations": front}, "tokens": {}}
        for reading, told in readings.items():
            if reading == "tokens" and task.name != CLOSER:
                continue
            for name, setting in SETTINGS.items():
                run = seed, name, reading, -1
                table.add(run, lambda told=told | setting: asked(told))
        if seed != SEEDS[0] or task.name != CLOSER:
            continue
        for name in BY_LAYER:
            told = SETTINGS[name] | {"demonstrations": front}
            for layer in range(model.config.num_hidden_layers):
                run = seed, name, "prompt", layer
                table.add(run, lambda told=told, layer=layer: asked(told, [layer]))


def finetuned(subject, table):
    model, task = subject.model, subject.task
    labels, k = task.labels(), DEMONSTRATIONS[task.name]
    model.set_attn_implementation("sdpa")
    projections = kv_projections(model)
    equip(model, "augmented", hidden=HIDDEN)
    views = {n: lambda t: t for n, _ in model.named_parameters() if ".of_" in n}

    def count(parts):
        return sum(parts[n](model.get_parameter(n)).numel() for n in parts)

    depth = model.config.num_hidden_layers
    layers = round(depth * count(views) / count(projections))
    first = 2 * ((depth - layers) // 2)  # in the middle; a layer has two
    some = {n: projections[n] for n in list(projections)[first : first + 2 * layers]}
    arms = {"views": views, "K and V, all": projections, "K and V, as many": some}
    for seed in SEEDS:
        texts = [task.demonstration(e) for e in task.sample(k, seed)]
        for arm, parts in arms.items():
            for rate in RATES:

                def trained(parts=parts, rate=rate, texts=texts):
                    own = {"parameters": count(parts), "accuracy": np.nan}
                    try:
                        update, losses = kv_sgd(
                            model, subject.tokenizer, texts, rate, parts=parts
                        )
                        with updated(model, update):
                            own |= judged(subject.score(), labels)
                    except FloatingPointError:
                        return own
                    return own | {"training_loss": np.mean(losses[len(losses) // 2 :])}

                table.add((seed, arm, rate), trained)


def main(model_name, task_name, what):
    task = load_task(task_name).head(EXAMPLES)
    subject = Subject(*load_model(model_name), task)
    if what == "inference":
        key = ["seed", "setting", "reading", "layer"]
        at_inference(subject, Table(INFERENCE, key, model_name, task))
    else:
        key = ["seed", "trained", "learning_rate"]
        finetuned(subject, Table(FINETUNING, key, model_name, task))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("inference", "finetuning"))
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--task", choices=PAPER_TASKS, default="mr")
    options = parser.parse_args()
    main(options.model, options.task, options.what)
