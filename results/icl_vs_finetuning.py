"""Predictions by the protocol of Dai et al., run by run (icl.comparison).

A row holds the predicted label ids of all evaluation examples as a string of
digits, empty where finetuning diverged; the row "labels" holds the true ones.
Rows that the table already has are not computed again, so a killed run goes on
where it stopped.
"""

import argparse

import numpy as np
import pandas as pd

from icl.comparison import SEEDS, protocol
from icl.models import DEFAULT, load_model
from icl.results import provenance, read_table, table_path, write_table
from icl.tasks import load_task

TABLE = "icl_vs_finetuning"
SEPARATORS = {"newline": "\n", "eos": "eos"}
DEMONSTRATIONS = {"cb": 19, "agnews": 22}  # as the original code; 32 for the others


def main(model_name, task_name, separator, finetune):
    task = load_task(task_name)
    model, tokenizer = load_model(model_name)
    k = DEMONSTRATIONS.get(task_name, 32)
    rows, about = [], {}
    if table_path(TABLE).exists():
        table, about = read_table(TABLE)
        rows = table.to_dict("records")
    fixed = {"model": model_name, "task": task.name, "separator": separator}
    mine = [r for r in rows if {f: r[f] for f in fixed} == fixed]
    done = {
        (r["setting"], r["seed"], r["learning_rate"]): digits(r["predictions"])
        for r in mine
    }
    about.setdefault(
        "/".join(fixed.values()),
        provenance(
            **fixed,
            data_sha256=task.digest(),
            data_source=task.source,
            demonstrations=k,
            seeds=list(SEEDS),
        ),
    )

    def keep(setting, seed, rate, predictions):
        found = "" if predictions is None else "".join(map(str, predictions))
        key = {"setting": setting, "seed": seed, "learning_rate": rate}
        rows.append(fixed | key | {"predictions": found})
        write_table(TABLE, rows, about)

    if ("labels", 0, 0.0) not in done:
        keep("labels", 0, 0.0, task.labels())
    runs = protocol(
        model,
        tokenizer,
        task,
        SEPARATORS[separator],
        k,
        finetune,
        done=done,
    )
    for setting, seed, rate, predictions in runs:
        if (setting, seed, rate) not in done:
            keep(setting, seed, rate, predictions)
        right = np.nan if predictions is None else (predictions == task.labels()).mean()
        print(*fixed.values(), setting, seed, rate, f"{right:.4f}", flush=True)


def digits(text):
    """Label ids from a string of digits, ``None`` from an empty one."""
    return None if pd.isna(text) else np.array(list(map(int, text)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--task", default="mr")
    parser.add_argument("--separator", choices=SEPARATORS, default="newline")
    parser.add_argument("--icl-only", action="store_true", help="no finetuning")
    options = parser.parse_args()
    main(options.model, options.task, options.separator, not options.icl_only)
