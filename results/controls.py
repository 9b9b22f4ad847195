"""The comparison again with one thing changed at a time (icl.comparison).

On 50 evaluation examples a task, with the demonstrations of seeds 1 to 3, at the
learning rate that icl_vs_finetuning picked. Each control replaces one of the two
learners that are compared, or the weights under both: "trained", "untrained", or
"untrained, own embeddings and norms". A row of ``controls`` is a measure with
its bootstrap interval over examples. A row of ``orders`` says what ten orders of
the same demonstrations do to one learner.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from icl import metrics
from icl.comparison import DEMONSTRATIONS, Subject, similarities
from icl.finetuning import updated
from icl.models import DEFAULT, load_model, untrained
from icl.recording import POSITIONS, record
from icl.results import add_rows, provenance, read_table, rows_made
from icl.tasks import PAPER_TASKS, demonstration_of_tokens, load_task

TABLE, ORDERS = "controls", "orders"
SEEDS, EXAMPLES, PERMUTATIONS = (1, 2, 3), 50, 10
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # tried with the first seed
WEIGHTS = {
    "trained": None,
    "untrained": (),
    "untrained, own embeddings and norms": ("embeddings", "norms"),
}


def picked_rate(model_name, task_name):
    """The learning rate that icl_vs_finetuning picked, at the seed it searched."""
    table, _ = read_table("icl_vs_finetuning")
    chosen = {"model": model_name, "task": task_name, "separator": "newline"}
    table = table[(table[list(chosen)] == list(chosen.values())).all(axis=1)]
    labels = table[table.setting == "labels"].predictions
    runs = table[(table.setting == "FT") & table.predictions.notna()]
    searched = runs.groupby("seed").filter(lambda rows: len(rows) > 1)
    if not len(labels) or not len(searched):
        raise ValueError(
            f"no search of the learning rate for {task_name} with {model_name}: run "
            f"results/icl_vs_finetuning.py --task {task_name} first"
        )
    truth = np.array(list(labels.iloc[0]))
    hits = [(np.array(list(p)) == truth).mean() for p in searched.predictions]
    best = searched.assign(hits=hits).sort_values(
        ["hits", "learning_rate"], ascending=[False, True]
    )
    return float(best.learning_rate.iloc[0])


class Passes:
    """Recorded passes of one subject, in a folder that is thrown away."""

    def __init__(self, subject, folder):
        self.subject, self.folder, self.count = subject, Path(folder), 0

    def read(self, examples=(), source=None):
        """Record behind ``examples``, which may be another subject's."""
        own, self.count = self.subject, self.count + 1
        return record(
            own.model,
            own.tokenizer,
            [own.task.query(e) for e in own.task.evaluation],
            own.task.label_words,
            (source or own).prefix(examples),
            folder=self.folder / str(self.count),
            positions=POSITIONS,
            attended=EXAMPLES,
        )

    def train(self, examples, rate, source=None, **options):
        """Recordings after finetuning, its queries in training, and the update."""
        update, training = (source or self.subject).finetune(examples, rate, **options)
        with updated(self.subject.model, update):
            return self.read(), training, update

    def owner(self, examples):
        own = self.subject
        return demonstration_of_tokens(own.task, examples, own.tokenizer)


def runs_of(passes, examples, others, rate, elsewhere, generator):
    """``(control, rate, zsl, ft, icl, training queries)``, the plain run first.

    Only the trained model is asked all; ``elsewhere`` is ``None`` for the others.
    """
    zsl, icl = passes.read(), passes.read(examples)
    ft, training, update = passes.train(examples, rate)
    yield "none", rate, zsl, ft, icl, training
    foreign, *_ = passes.train(others, rate)
    yield "finetuned on other demonstrations", rate, zsl, foreign, icl, None
    told = passes.read(others)
    yield "other demonstrations in context", rate, zsl, ft, told, None
    if elsewhere is None:
        return
    k, order = len(examples), generator.permutation(len(examples))
    turned, strangers = [examples[o] for o in order], elsewhere.task.sample(k, SEEDS[0])
    wrong = [
        e | {"label": other["label"]} for e, other in zip(examples, turned, strict=True)
    ]
    for name, told in [
        ("shuffled labels in context", passes.read(wrong)),
        ("another order in context", passes.read(turned)),
        ("another task in context", passes.read(strangers, elsewhere)),
    ]:
        yield name, rate, zsl, ft, told, None
    with updated(passes.subject.model, noise_like(update, generator)):
        noisy = passes.read()
    yield "noise in the weights", rate, zsl, noisy, icl, None
    foreign, *_ = passes.train(strangers, rate, source=elsewhere)
    yield "finetuned on another task", rate, zsl, foreign, icl, None
    moved, queries, _ = passes.train(turned, rate)
    queries = in_order(queries, passes.owner(turned), order)
    yield "finetuned in another order", rate, zsl, moved, icl, queries
    for name, shown, pace, options in [
        ("finetuned on shuffled labels", wrong, rate, {}),
        ("layer-causal", examples, rate, {"layer_causal": True}),
        ("ascent", examples, -rate, {}),
        ("not finetuned", examples, 1e-12, {}),
    ]:
        moved, queries, _ = passes.train(shown, pace, **options)
        yield name, pace, zsl, moved, icl, queries


def in_order(training, owner, order):
    """Training queries of demonstrations in ``order``, put back in the first one."""
    owner = owner[owner >= 0]
    blocks = {o: training[owner == place] for place, o in enumerate(order)}
    return np.concatenate([blocks[o] for o in range(len(order))])


def noise_like(update, generator):
    """Gaussian noise of each matrix's own norm in place of the update."""
    noise = {}
    for name, part in update.items():
        drawn = torch.from_numpy(generator.normal(size=part.shape)).to(part)
        noise[name] = drawn * (part.norm() / drawn.norm())
    return noise


def replaced_outputs(zsl, ft, icl, generator):
    """SimAOU with noise, or another query's change, for one of the two changes."""
    z, f, i = zsl.outputs, ft.outputs, icl.outputs

    def noise(change):
        drawn = generator.normal(size=change.shape)
        scale = np.linalg.norm(change, axis=-1) / np.linalg.norm(drawn, axis=-1)
        return drawn * scale[..., None]

    for control, h_ft, h_icl in [
        ("noise for the finetuned change", z + noise(f - z), i),
        ("noise for both changes", z + noise(f - z), z + noise(i - z)),
        ("another query's finetuned change", z + np.roll(f - z, 1, axis=0), i),
    ]:
        for normalise in (True, False):
            yield control, normalise, metrics.simaou(z, h_ft, h_icl, normalise)
    for normalise in (True, False):
        change = normed(i) - normed(z) if normalise else i - z
        zero = np.zeros_like(change)
        for control, drawn in [
            ("isotropic direction", generator.normal(size=change.shape)),
            ("uniform positive direction", generator.random(change.shape)),
        ]:
            found = metrics.simaou(zero, drawn, change, normalise=False)
            yield control, normalise, found


def normed(h):
    return h / np.linalg.norm(h, axis=-1, keepdims=True)


def shifted_kendall(ft, icl, training, owner):
    """Kendall with the finetuned model's attention of another query."""
    kept = owner >= 0
    m_icl = icl.demonstrations.sum(2)[..., kept]
    m_ft = metrics.training_attention(ft.queries, training)
    return metrics.kendall(m_icl, np.roll(m_ft, 1, axis=0))


def answers(found, labels):
    """Accuracies of one recording, plain and calibrated, by example."""
    return {
        "accuracy": found.scores.argmax(1) == labels,
        "accuracy, calibrated": metrics.calibrated(found.scores).argmax(1) == labels,
    }


def distributions(zsl, ft, icl):
    """Shen et al.'s comparison of next tokens, by example."""
    for name, a in [("ICL and FT", ft), ("ICL and ZSL", zsl)]:
        yield f"token overlap, {name}", metrics.token_overlap(a.tokens, icl.tokens)
        sure = np.exp(a.log_p), icl.tokens, np.exp(icl.log_p)
        yield f"overlap cosine, {name}", metrics.overlap_cosine(a.tokens, *sure)


def controls_of(passes, k, seed, rate, elsewhere):
    """Rows of one task, seed and kind of weights."""
    task, generator = passes.subject.task, np.random.default_rng(seed)
    examples, others = task.sample(k, seed), task.sample(k, seed + 100)
    owner, labels = passes.owner(examples), task.labels()
    runs = list(runs_of(passes, examples, others, rate, elsewhere, generator))
    for pace in RATES if elsewhere is not None and seed == SEEDS[0] else ():
        try:
            moved, training, _ = passes.train(examples, pace)
        except FloatingPointError:
            continue
        _, _, zsl, _, icl, _ = runs[0]
        runs.append((f"learning rate {pace:g}", pace, zsl, moved, icl, training))
    for control, pace, zsl, ft, icl, training in runs:
        about = {"control": control, "learning_rate": pace}
        for position in POSITIONS:
            three = zsl[position], ft[position], icl[position]
            found = similarities(*three, training, owner)
            if control == "none":
                found["Kendall, another query"] = shifted_kendall(
                    *three[1:], training, owner
                )
            for measure, value in found.items():
                yield about | row(position, measure, value.per_example)
            if control != "none":
                continue
            drawn = np.random.default_rng(seed)
            for name, normalise, value in replaced_outputs(*three, drawn):
                measure = "SimAOU" if normalise else "SimAOU, not normalised"
                this = about | {"control": name}
                yield this | row(position, measure, value.per_example)
        three = [recording["prompt"] for recording in (zsl, ft, icl)]
        for name, recording in zip(("ZSL", "FT", "ICL"), three, strict=True):
            for measure, right in answers(recording, labels).items():
                yield about | row("prompt", f"{measure}, {name}", right)
        for measure, value in distributions(*three):
            yield about | row("prompt", measure, value)


def row(position, measure, values):
    mean, low, high = metrics.bootstrap_interval(values)
    return {
        "position": position,
        "measure": measure,
        "examples": len(values),
        "mean": round(mean, 6),
        "low": round(low, 6),
        "high": round(high, 6),
    }


def orders_of(subject, k, seed, rate):
    """Rows on ten orders of the demonstrations, learner by learner."""
    task, generator = subject.task, np.random.default_rng(seed)
    examples = task.sample(k, seed)
    scores = {"ICL": [], "FT": []}
    for _ in range(PERMUTATIONS):
        turned = [examples[o] for o in generator.permutation(k)]
        scores["ICL"].append(subject.score(turned))
        with updated(subject.model, subject.finetune(turned, rate)[0]):
            scores["FT"].append(subject.score())
    deviations = {}
    for learner, found in scores.items():
        p = softmax(np.array(found), axis=-1)  # (orders, N, C)
        deviations[learner] = p - p.mean(0)
        spread = p.std(0, ddof=1).sum(-1)
        right = np.array(found).argmax(-1) == task.labels()
        yield {
            "learner": learner,
            "accuracies": " ".join(f"{a:.4f}" for a in right.mean(1)),
        } | row("prompt", "sensitivity to order", spread)
    a, b = (d.swapaxes(0, 1).reshape(d.shape[1], -1) for d in deviations.values())
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    agreement = np.full(len(a), np.nan)  # where the order changes nothing
    np.divide((a * b).sum(1), lengths, out=agreement, where=lengths > 0)
    yield {"learner": "both", "accuracies": ""} | row(
        "prompt", "correlation of order effects", agreement
    )


def main(model_name, task_name):
    task = load_task(task_name).head(EXAMPLES)
    rate, k = picked_rate(model_name, task_name), DEMONSTRATIONS[task_name]
    names = list(PAPER_TASKS)
    other = load_task(names[(names.index(task_name) + 3) % len(names)])
    fixed = {"model": model_name, "task": task_name}
    part = "/".join(fixed.values())
    facts = provenance(
        **fixed,
        data_sha256=task.digest(),
        data_source=task.source,
        demonstrations=k,
        seeds=list(SEEDS),
        other_task=other.name,
    )
    done = {}
    for name, columns in [(TABLE, ["seed", "weights"]), (ORDERS, ["seed"])]:
        made = rows_made(name, columns, part, facts, **fixed)
        done[name] = set(made.itertuples(index=False, name=None))
    model, tokenizer = load_model(model_name)

    def keep(name, rows, key, **about):
        add_rows(name, [fixed | about | r for r in rows], key, part, facts)
        print(part, name, *about.values(), flush=True)

    key = ["model", "task", "seed"]
    for seed in SEEDS:
        for weights, kept in WEIGHTS.items():
            if (seed, weights) in done[TABLE]:
                continue
            own = model if kept is None else untrained(model, seed, kept)
            elsewhere = Subject(own, tokenizer, other) if kept is None else None
            with tempfile.TemporaryDirectory() as folder:
                passes = Passes(Subject(own, tokenizer, task), folder)
                rows = list(controls_of(passes, k, seed, rate, elsewhere))
            columns = ["weights", "control", "position", "measure"]
            keep(TABLE, rows, key + columns, seed=seed, weights=weights)
        if (seed,) not in done[ORDERS] and seed == SEEDS[0]:
            rows = list(orders_of(Subject(model, tokenizer, task), k, seed, rate))
            keep(ORDERS, rows, [*key, "learner", "measure"], seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--task", choices=PAPER_TASKS, default="mr")
    options = parser.parse_args()
    main(options.model, options.task)
