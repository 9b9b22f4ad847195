"""The recording pass against the original way of recording, in one process.

The original code runs every query by itself behind its whole prompt and writes
what it records as JSON text. For SmolLM2 and MR behind 32 demonstrations:

0. seconds and peak memory of one whole setting on 1,000 queries (zero-shot, in
   context, finetuning, finetuned; all recordings at both positions; all
   measures);
1. seconds of the original way over seconds of ``icl.activations.record``, for the
   in-context pass and for a whole setting (zero-shot, in context, finetuning,
   finetuned; all recordings; all measures), results compared;
2. seconds of recording over seconds of scoring alone.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch

from icl.activations import (
    POSITIONS,
    capture_outputs,
    capture_queries,
    read_recording,
    record,
)
from icl.comparison import Evaluator, finetune_with_queries, similarities
from icl.finetuning import applied_update
from icl.scoring import score
from icl.tasks import demonstration_of_tokens, prompt_prefix

LEARNING_RATE = 1e-3


def main(n_whole, n_queries, n_overhead):
    model, tokenizer, task, demonstrations = measure.smollm2_on_mr()
    prefix = prompt_prefix(task, demonstrations, tokenizer)
    texts = [task.demonstration(e) for e in demonstrations]
    queries = [task.query(e) for e in task.evaluation[:n_queries]]
    words = task.label_words
    score(model, tokenizer, queries[:4], words, prefix)  # warm-up
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(model, tokenizer, task.head(n_whole))
        took, _ = measure.timed(whole_setting, evaluator, demonstrations, Path(folder))
        measure.record(f"a whole setting, {n_whole:,} queries", took, "s", at_most=300)
        name = f"a whole setting, {n_whole:,} queries, peak memory"
        measure.record(name, peak(), "GiB", at_most=4)
        ways = {"packed": packed, "one by one": one_by_one}
        took, found = {}, {}
        for way, run in ways.items():
            run = partial(run, model, tokenizer, queries, words, Path(folder) / way)
            owner = demonstration_of_tokens(task, demonstrations, tokenizer)
            took[way], found[way] = setting(model, tokenizer, texts, prefix, owner, run)
        for part, least in (("in context", 15), ("whole setting", 5)):
            ours, theirs = (took[way][part] for way in ways)
            name = f"seconds of recording one by one over ours, {n_queries} queries"
            measure.record(f"{name}, {part}", theirs / ours, "x", at_least=least)
        apart = [abs(found["one by one"][n] - v) for n, v in found["packed"].items()]
        name = "largest difference of a measure between the two"
        measure.record(name, max(apart))

        more = [task.query(e) for e in task.evaluation[:n_overhead]]
        arguments = model, tokenizer, more, words, prefix
        alone, _ = measure.timed(score, *arguments)
        with_all, _ = measure.timed(
            packed, *arguments[:-1], Path(folder), "more", prefix
        )
        name = f"seconds of recording over scoring alone, {n_overhead} queries"
        measure.record(name, with_all / alone, "x", at_most=1.2)
    measure.save(task)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def whole_setting(evaluator, demonstrations, folder):
    """All measures at both positions, by position."""
    zsl = evaluator.record(folder / "whole-zsl")
    icl = evaluator.record(folder / "whole-icl", demonstrations)
    update, training = evaluator.finetune(demonstrations, LEARNING_RATE)
    with applied_update(evaluator.model, update):
        ft = evaluator.record(folder / "whole-ft")
    owner = demonstration_of_tokens(evaluator.task, demonstrations, evaluator.tokenizer)
    return {p: similarities(zsl[p], ft[p], icl[p], training, owner) for p in POSITIONS}


def setting(model, tokenizer, texts, prefix, owner, run):
    """Seconds of the parts of one setting, and its measures."""
    start = time.perf_counter()
    zsl = run("zsl", "")
    in_context, icl = measure.timed(run, "icl", prefix)
    update, training = finetune_with_queries(model, tokenizer, texts, LEARNING_RATE)
    with applied_update(model, update):
        ft = run("ft", "")
    measures = similarities(zsl, ft, icl, training, owner)
    whole = time.perf_counter() - start
    measures = {name: found.mean for name, found in measures.items()}
    return {"in context": in_context, "whole setting": whole}, measures


def packed(model, tokenizer, queries, words, folder, name, prefix):
    folder = folder / name
    record(model, tokenizer, queries, words, prefix, folder=folder)
    return read_recording(folder)["prompt"]


class Rows:
    """What was read back from JSON, under the names of a Recording."""

    def __init__(self, rows):
        for name in ("outputs", "queries", "demonstrations"):
            setattr(self, name, np.array([row[name] for row in rows]))
        self.own = [np.array(row["own"]) for row in rows]


@torch.inference_mode()
def one_by_one(model, tokenizer, queries, words, folder, name, prefix):
    """Every query behind its own copy of the prompt; records as lines of JSON."""
    folder.mkdir(exist_ok=True)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    before = encode(prefix)
    with open(folder / f"{name}.jsonl", "w") as file:
        for query in queries:
            ids = torch.tensor([before + encode(query)])
            with capture_queries(model) as seen, capture_outputs(model) as outputs:
                cache = model(ids, use_cache=True).past_key_values
            maps = []
            for q, layer in zip(seen, cache.layers, strict=True):
                keys = layer.keys[0].repeat_interleave(len(q) // layer.keys.shape[1], 0)
                maps.append((keys @ q[:, -1, :, None])[..., 0])
            row = {
                "outputs": [o[-1].tolist() for o in outputs],
                "queries": [q[:, -1].tolist() for q in seen],
                "own": [m[:, len(before) :].tolist() for m in maps],
                "demonstrations": [m[:, : len(before)].tolist() for m in maps],
            }
            file.write(json.dumps(row) + "\n")
    with open(folder / f"{name}.jsonl") as file:
        return Rows([json.loads(line) for line in file])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--overhead", type=int, default=100)
    options = parser.parse_args()
    main(options.whole, options.queries, options.overhead)
