"""Zero-shot, in-context and finetuned predictions by the protocol of Dai et al.

For one task: zero-shot; ICL with each of seven seeds; at the seed with the best
ICL accuracy, K/V-finetuning at each of the 36 learning rates of the paper's
grid; at the best learning rate, finetuning with the other seeds. Selection is
by accuracy on the evaluation set itself, as in the paper (appendix B): the
table keeps every run, so that the picked one can be shown among them.

A row holds the predicted label ids of all evaluation examples as a string of
digits. Rows that the table already has are not computed again.
"""

import argparse
import json

import pandas as pd

from icl.finetuning import kv_sgd, updated
from icl.models import DEFAULT, load_model
from icl.results import provenance, table_path, write_table
from icl.scoring import score
from icl.tasks import load_task, prompt_prefix

TABLE = "icl_vs_finetuning"
SEEDS = range(1, 8)
DEMONSTRATIONS = 32
LEARNING_RATES = [m * s / 1e4 for s in (1, 10, 100, 1000) for m in range(1, 10)]
KEYS = ["model", "task", "separator", "setting", "seed", "learning_rate"]


def main(model_name, task_name, separator, finetune):
    model, tokenizer = load_model(model_name)
    task = load_task(task_name)
    queries = [task.query(example) for example in task.evaluation]
    text = "\n" if separator == "newline" else separator
    context = model.config.max_position_embeddings
    table = Table(model_name, task, separator)

    def prefix(k, seed):
        examples = task.sample(k, seed)
        return prompt_prefix(task, examples, tokenizer, text, context)

    def predict(before):
        return score(model, tokenizer, queries, task.label_words, before).argmax(1)

    def finetuned(seed, learning_rate):
        start = prefix(0, seed)
        texts = [
            start + task.demonstration(e) for e in task.sample(DEMONSTRATIONS, seed)
        ]
        try:
            update, _ = kv_sgd(model, tokenizer, texts, learning_rate)
            with updated(model, update):
                return predict(start)
        except FloatingPointError:
            return None  # diverged: a row without predictions

    table.run("labels", 0, 0, lambda: task.labels())
    table.run("ZSL", 0, 0, lambda: predict(prefix(0, 1)))
    icl = {
        seed: table.run(
            "ICL", seed, 0, lambda s=seed: predict(prefix(DEMONSTRATIONS, s))
        )
        for seed in SEEDS
    }
    if not finetune:
        return
    best_seed = max(icl, key=icl.get)
    ft = {
        rate: table.run("FT", best_seed, rate, lambda r=rate: finetuned(best_seed, r))
        for rate in LEARNING_RATES
    }
    best_rate = max(ft, key=ft.get)
    for seed in SEEDS:
        table.run("FT", seed, best_rate, lambda s=seed: finetuned(s, best_rate))


class Table:
    """The rows on disk, extended by one run at a time."""

    def __init__(self, model_name, task, separator):
        self.task, self.fixed = task, (model_name, task.name, separator)
        path = table_path(TABLE)
        self.rows, self.about = [], {}
        if path.exists():
            columns = {"predictions": str}
            frame = pd.read_csv(path, dtype=columns, keep_default_na=False)
            self.rows = frame.to_dict("records")
            self.about = json.loads(path.with_suffix(".json").read_text())
        about = provenance(
            model=model_name,
            task=task.name,
            data_sha256=task.digest(),
            data_source=task.source,
            separator=separator,
            demonstrations=DEMONSTRATIONS,
            seeds=list(SEEDS),
        )
        self.about.setdefault("/".join(self.fixed), about)

    def run(self, setting, seed, rate, predictions):
        """Accuracy of a run, computed unless the table has it."""
        key = (*self.fixed, setting, seed, rate)
        row = next((r for r in self.rows if tuple(r[k] for k in KEYS) == key), None)
        if row is None:
            found = predictions()
            digits = "" if found is None else "".join(map(str, found))
            row = dict(zip(KEYS, key, strict=True)) | {"predictions": digits}
            self.rows.append(row)
            write_table(TABLE, self.rows, self.about)
        labels = "".join(map(str, self.task.labels()))
        hits = sum(a == b for a, b in zip(row["predictions"], labels, strict=False))
        accuracy = hits / len(labels) if row["predictions"] else -1.0
        print(f"{' '.join(map(str, key))}: {accuracy:.4f}", flush=True)
        return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--task", default="mr")
    parser.add_argument("--separator", choices=["newline", "eos"], default="newline")
    parser.add_argument("--icl-only", action="store_true", help="no finetuning")
    options = parser.parse_args()
    main(options.model, options.task, options.separator, not options.icl_only)
