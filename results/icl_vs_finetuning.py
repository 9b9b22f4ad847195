"""The comparison of Dai et al., run by run (icl.comparison).

Two tables grow, a row or two a run; what they have is not computed again, so a
killed run goes on where it stopped.

- ``icl_vs_finetuning``: predicted label ids of all evaluation examples as a
  string of digits, plain and batch-calibrated, empty where finetuning diverged.
  The row "labels" holds the true ones. "FT" is gradient descent, "LCGD" its
  layer-causal variant at the same learning rates.
- ``similarities``: what recording the zero-shot, in-context and finetuned passes
  gives: every measure's mean, its bootstrap interval over examples, and its
  means by layer.

The learning rate is searched from coarse to fine (icl.comparison.protocol), or
with ``--every-rate`` at all 36.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from icl import metrics
from icl.assets import sha256
from icl.comparison import (
    DEMONSTRATIONS,
    SEEDS,
    SEPARATORS,
    Subject,
    answers,
    protocol,
    run_scores,
    similarities,
)
from icl.finetuning import updated
from icl.models import DEFAULT, load_model
from icl.recording import POSITIONS, read
from icl.results import ROOT, add_rows, provenance, rows_made
from icl.tasks import demonstration_of_tokens, load_task

ANSWERS, SIMILARITIES = "icl_vs_finetuning", "similarities"
RUN = ["setting", "seed", "learning_rate"]
STRIDE = 4  # of the first pass over the learning rates


class Runs:
    """One model, task and separator: runs to make, and runs made."""

    def __init__(self, model_name, task_name, separator, examples=None):
        self.task = load_task(task_name)
        if examples is not None:
            self.task = self.task.head(examples)
        self.subject = Subject(
            *load_model(model_name), self.task, SEPARATORS[separator]
        )
        self.k = DEMONSTRATIONS[task_name]
        known, weights = {}, Path(model_name)
        if weights.exists():
            model_name = weights.stem
        if weights.is_file():
            known["model_sha256"] = sha256(weights)
        self.fixed = {"model": model_name, "task": task_name, "separator": separator}
        self.part = "/".join(self.fixed.values())
        self.facts = provenance(
            **self.fixed,
            **known,
            data_sha256=self.task.digest(),
            data_source=self.task.source,
            demonstrations=self.k,
            seeds=list(SEEDS),
        )
        self.folder = ROOT / "_build" / "recordings" / self.part
        self.done, self.calibrated, self.measured = {}, set(), set()
        self.searched = None  # the seed at which the learning rate is searched
        for name in (ANSWERS, SIMILARITIES):
            columns = [*RUN, "predictions", "calibrated"]
            rows = rows_made(name, columns, self.part, self.facts, **self.fixed)
            self._take(name, rows)
        if ("labels", 0, 0.0) not in self.done:
            exact = np.eye(len(self.task.label_words))[self.task.labels()]
            self.keep(("labels", 0, 0.0), exact)

    def _take(self, name, rows):
        keys = list(rows[RUN].itertuples(index=False, name=None))
        if name == SIMILARITIES:
            self.measured = set(keys)
            return
        self.done = dict(zip(keys, map(digits, rows.predictions), strict=True))
        known = zip(keys, rows.calibrated.notna(), strict=True)
        self.calibrated = {key for key, there in known if there}

    def keep(self, run, scores, part=""):
        """Add a run to the table; ``scores`` is ``None`` where it diverged."""
        self.done[run] = None if scores is None else scores.argmax(1)
        row = self.fixed | dict(zip(RUN, run, strict=True)) | answers(scores)
        key = [*self.fixed, *RUN]
        add_rows(ANSWERS, [row], key, self.part + part, self.facts)

    def report(self, run):
        hits = np.nan
        if self.done[run] is not None:
            hits = (self.done[run] == self.task.labels()).mean()
        print(self.part, *run, f"{hits:.4f}", flush=True)
        return self.done[run]

    def answer(self, *run):
        """Predictions of a run; it is made, without recording, if not there."""
        if run not in self.done:
            self.keep(run, run_scores(self.subject, *run, self.k))
        return self.report(run)

    def answer_and_record(self, *run):
        """:meth:`answer`, with recordings but for the search of the rate."""
        setting, seed, _ = run
        if setting == "FT":
            self.searched = self.searched or seed
            if seed == self.searched:
                return self.answer(*run)
            self.measure(*run)
        elif run not in self.calibrated:
            self.keep(run, self.recording(setting, seed)["prompt"].scores, "/recorded")
        return self.report(run)

    def recording(self, setting, seed):
        """The recording of a zero-shot or in-context run, kept on disk."""
        folder = self.folder / f"{setting}-{seed}"
        if folder.exists():
            return read(folder)
        examples = self.task.sample(self.k, seed) if setting == "ICL" else []
        return self.subject.record(folder, examples)

    def measure(self, *run):
        """Finetune, record and compare; a row for each measure and position."""
        diverged = run in self.done and self.done[run] is None
        if run in self.measured or diverged:
            return
        setting, seed, rate = run
        examples = self.task.sample(self.k, seed)
        folder = self.folder / f"{setting}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        causal = setting == "LCGD"
        try:
            update, training = self.subject.finetune(
                examples, rate, layer_causal=causal
            )
            with updated(self.subject.model, update):
                ft = self.subject.record(folder)
        except FloatingPointError:
            self.keep(run, None, "/recorded")
            return
        shutil.rmtree(folder)
        self.keep(run, ft["prompt"].scores, "/recorded")
        try:
            owner = demonstration_of_tokens(
                self.task, examples, self.subject.tokenizer, self.subject.separator
            )
        except ValueError as reason:
            print(f"{self.part}: no attention to training tokens, {reason}")
            training = owner = None
        zsl, icl = self.recording("ZSL", 0), self.recording("ICL", seed)
        rows = []
        for position in POSITIONS:
            three = zsl[position], ft[position], icl[position]
            found = similarities(*three, training, owner)
            rows += [
                self.fixed
                | dict(zip(RUN, run, strict=True))
                | {"position": position, "measure": name}
                | summary(value)
                for name, value in found.items()
            ]
        key = [*self.fixed, *RUN, "position", "measure"]
        add_rows(SIMILARITIES, rows, key, self.part, self.facts)
        self.measured.add(run)


def summary(found):
    """A measure in one row; its layers' means as numbers with spaces between."""
    mean, low, high = metrics.bootstrap_interval(found.per_example)
    return {
        "examples": len(found.values),
        "mean": round(mean, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "undefined": found.undefined,
        "layers": " ".join(f"{m:.4f}" for m in found.per_layer),
    }


def digits(string):
    """Label ids from a string of digits, ``None`` from an empty one."""
    return None if pd.isna(string) else np.array(list(map(int, string)))


def main(model_name, task_name, separator, finetune=True, stride=STRIDE, examples=None):
    runs = Runs(model_name, task_name, separator, examples)
    labels = runs.task.labels()
    if not finetune:
        for _ in protocol(runs.answer, labels, finetune=False):
            pass
        return
    hits = {}
    made = protocol(runs.answer_and_record, labels, stride=stride)
    for setting, seed, rate, predictions in made:
        if setting == "FT" and seed == runs.searched and predictions is not None:
            hits[rate] = (predictions == labels).mean()
    rate = max(sorted(hits), key=hits.get)
    for seed in SEEDS:
        for setting in ("FT", "LCGD"):
            runs.measure(setting, seed, rate)
            runs.report((setting, seed, rate))
    shutil.rmtree(runs.folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT, help="as icl.models.load_model")
    parser.add_argument("--task", default="mr")
    parser.add_argument("--separator", choices=SEPARATORS, default="newline")
    parser.add_argument("--icl-only", action="store_true", help="no finetuning")
    parser.add_argument("--every-rate", action="store_true", help="not coarse to fine")
    parser.add_argument("--examples", type=int, help="evaluate on so many")
    options = parser.parse_args()
    main(
        options.model,
        options.task,
        options.separator,
        finetune=not options.icl_only,
        stride=1 if options.every_rate else STRIDE,
        examples=options.examples,
    )
