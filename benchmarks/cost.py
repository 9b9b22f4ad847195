"""What a run costs, against what operations and bytes predict.

A run that scores queries behind demonstrations takes the operations that ``flops``
counts, and in every pass waits for all weights to come from memory. Two speeds turn
both into seconds: that of a pass over one token, which does little but wait, and that
of the costliest run. The others have fewer layers, demonstrations or queries:

1. CPU seconds of each over those predicted, the least and the largest of these ratios.

All is computed by one thread, as the runs of a sweep are, and what counts is the CPU's
time: a second in which it was busy with something else is not this run's.
"""

import argparse
import math
import time

import torch
from measure import SEED, record, save, smollm2_on_mr
from scoring import flops

from icl.scoring import PACK_TOKENS, score
from icl.tasks import prompt_prefix, token_counts


def main(queries, demonstrations, repeats):
    torch.set_num_threads(1)
    model, tokenizer, task, _ = smollm2_on_mr()
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        alone = cpu_seconds(lambda: model(token), 5)
    bandwidth = weight_bytes(model) / alone
    record("rate of a pass over one token, one thread", bandwidth / 1e9, "GB/s")

    layers, runs = list(model.model.layers), []
    for depth in (len(layers), len(layers) // 3):
        model.model.layers = torch.nn.ModuleList(layers[:depth])
        model.config.num_hidden_layers = depth
        for k in demonstrations:
            prefix = prompt_prefix(task, task.sample(k, SEED) if k else [], tokenizer)
            shared = token_counts(tokenizer, [prefix])[0] if k else 0
            for n in queries:
                few = [task.query(e) for e in task.head(n).evaluation]
                lengths = token_counts(tokenizer, few)
                given = (model, tokenizer, few, task.label_words, prefix)
                took = cpu_seconds(lambda given=given: score(*given), repeats)
                passes = (k > 0) + math.ceil(sum(lengths) / PACK_TOKENS)
                waiting = passes * weight_bytes(model) / bandwidth
                runs.append((flops(model, shared, lengths), waiting, took))

    work, waiting, took = max(runs)
    speed = work / (took - waiting)
    record("rate of the costliest run, one thread", speed / 1e9, "GFLOP/s")
    runs.remove((work, waiting, took))
    ratios = [took / (work / speed + waiting) for work, waiting, took in runs]
    of = f"CPU seconds over those predicted, of {len(runs)} other runs"
    record(f"least {of}", min(ratios), "x")
    record(f"largest {of}", max(ratios), "x")
    save(task)


def cpu_seconds(work, repeats):
    """The least CPU seconds of several calls."""
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def weight_bytes(model):
    """Bytes of the layers' weights and of the output embedding's, in float32."""
    head = model.get_output_embeddings().weight.numel()
    return 4 * (head + sum(p.numel() for p in model.model.layers.parameters()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, nargs="+", default=[6, 24, 96])
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[0, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    main(options.queries, options.demonstrations, options.repeats)
