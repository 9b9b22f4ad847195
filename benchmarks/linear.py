"""Linear maps by oneDNN against torch's default, in one process.

Seconds with the default over seconds with oneDNN for SmolLM2 on MR: scoring without and
behind 32 demonstrations, and finetuning. The two take turns, the least of two times
counts, and the answers are compared. The ratio depends on the CPU: about 1 where
the default BLAS is tuned for it.
"""

import time

import numpy as np
import torch
from measure import record, save, smollm2_on_mr

from icl.finetuning import kv_sgd
from icl.models import OneDNNLinear
from icl.scoring import score
from icl.tasks import prompt_prefix

QUERIES, REPEATS = 50, 2


def main():
    model, tokenizer, task, examples = smollm2_on_mr()
    queries = [task.query(e) for e in task.evaluation[:QUERIES]]
    texts = [task.demonstration(e) for e in examples]
    prefix = prompt_prefix(task, examples, tokenizer)
    words = task.label_words
    work = {
        "scoring": lambda: score(model, tokenizer, queries, words),
        "scoring in context": lambda: score(model, tokenizer, queries, words, prefix),
        "finetuning": lambda: np.array(kv_sgd(model, tokenizer, texts, 1e-3)[1]),
    }
    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for name, run in work.items():
        best, found = {}, {}
        for kind in [torch.nn.Linear, OneDNNLinear] * REPEATS:
            for module in maps:
                module.__class__ = kind
            start = time.perf_counter()
            found[kind] = run()
            took = time.perf_counter() - start
            best[kind] = min(took, best.get(kind, took))
        plain, own = best[torch.nn.Linear], best[OneDNNLinear]
        error = np.abs(found[torch.nn.Linear] - found[OneDNNLinear]).max()
        record(f"{name}, seconds by torch's default over oneDNN", plain / own, "x")
        record(f"{name}, largest difference of an answer", error, "nats")
    save(task)


if __name__ == "__main__":
    main()
