"""The packed scorer against lm-evaluation-harness, in one process.

Prints three ratios for SmolLM2 behind 32 demonstrations of MR:

1. seconds of the harness over seconds of ``icl.scoring.score`` on the same
   queries, same model object, same prompts, predictions compared;
2. the same ratio on the whole evaluation set, over the ratio of tokens that the
   two must compute. The harness encodes every prompt anew, so its time on the
   whole set is its measured rate in tokens times the tokens of the set, unless
   ``--whole`` asks for the real run (half an hour and more);
3. the floating-point rate of the scorer over that of plain matrix products of
   the model's own shapes.
"""

import argparse
import math
import os
import time

import numpy as np
import torch

from icl.models import load_model
from icl.scoring import PACK_TOKENS, score
from icl.tasks import load_task, prompt_prefix, token_counts

SEED, DEMONSTRATIONS = 5, 32
BATCH_SIZES = (1, 2, 4)


def main(n_queries, whole):
    # With the usual pool, lm-eval forks tokenizer threads and warns at each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model, tokenizer = load_model(device="cpu", dtype=torch.float32)
    task = load_task("mr")
    demonstrations = task.sample(DEMONSTRATIONS, SEED)
    prefix = prompt_prefix(task, demonstrations, tokenizer)
    words = task.label_words
    sample = [task.query(e) for e in task.head(n_queries).evaluation]
    full = [task.query(e) for e in task.evaluation]
    shared = token_counts(tokenizer, [prefix])[0]
    print(f"{torch.get_num_threads()} threads, {len(demonstrations)} demonstrations")
    print(f"in {shared} tokens, {len(sample)} queries, then {len(full)}")

    score(model, tokenizer, sample[:4], words, prefix)  # warm-up
    ours, scores = timed(score, model, tokenizer, sample, words, prefix)
    harness = Harness(model, tokenizer, words, prefix)
    batch = harness.best_batch_size(sample[:: max(1, len(sample) // 8)])
    theirs, peer = timed(harness.score, sample, batch)
    same = (scores.argmax(1) == peer.argmax(1)).mean()
    print(f"scorer {ours:.1f} s, harness {theirs:.1f} s at batch size {batch};")
    print(f"predictions equal: {same:.1%}, largest score difference", end=" ")
    print(f"{np.abs(scores - peer).max():.1e}")
    print(f"ratio 1, {len(sample)} queries: {theirs / ours:.1f} x")

    ours_full, _ = timed(score, model, tokenizer, full, words, prefix)
    lengths, sampled = token_counts(tokenizer, full), token_counts(tokenizer, sample)
    tokens = sum(lengths) + shared * len(full)
    if whole:
        theirs_full, _ = timed(harness.score, full, batch)
        how = "measured"
    else:
        theirs_full = theirs * tokens / (sum(sampled) + shared * len(sampled))
        how = "from its rate in tokens"
    bound = tokens / (sum(lengths) + shared)
    print(f"whole set: scorer {ours_full:.1f} s, harness {theirs_full:.0f} s ({how})")
    gained = theirs_full / ours_full
    print(f"ratio 2: {gained:.1f} x of at most {bound:.1f} x: {gained / bound:.2f}")

    work = flops(model, shared, lengths)
    rate, plain = work / ours_full / 1e9, matrix_product_rate(model) / 1e9
    print(f"scorer {rate:.0f} GFLOP/s, matrix products {plain:.0f} GFLOP/s")
    print(f"ratio 3: {rate / plain:.2f}")


def timed(function, *arguments):
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


class Harness:
    """lm-evaluation-harness's ``HFLM`` on the same model and prompts."""

    def __init__(self, model, tokenizer, words, prefix):
        from lm_eval.models.huggingface import HFLM

        self.lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
        self.words, self.prefix = words, prefix

    def score(self, queries, batch_size):
        """Log-probabilities ``(N, C)``, as its multiple-choice tasks get them."""
        from lm_eval.api.instance import Instance

        self.lm.batch_size_per_gpu = batch_size
        requests = [
            Instance("loglikelihood", {}, (self.prefix + query, " " + word), n)
            for n, query in enumerate(queries)
            for word in self.words
        ]
        found = self.lm.loglikelihood(requests, disable_tqdm=True)
        return np.array([f[0] for f in found]).reshape(len(queries), -1)

    def best_batch_size(self, queries):
        """The fastest of a few batch sizes on a few queries."""
        seconds = {b: timed(self.score, queries, b)[0] for b in BATCH_SIZES}
        shown = ", ".join(f"{b}: {s:.1f} s" for b, s in seconds.items())
        print(f"harness, {len(queries)} queries by batch size: {shown}")
        return min(seconds, key=seconds.get)


def flops(model, shared, lengths):
    """Floating-point operations that the packed scorer cannot do without."""
    config = model.config
    tokens = shared + sum(lengths)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head  # tied: counted once
    seen = shared * (shared + 1) / 2
    seen += sum(n * shared + n * (n + 1) / 2 for n in lengths)
    width = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * width * seen
    return 2 * body * tokens + attention + 2 * head * len(lengths)


def matrix_product_rate(model, repeats=3):
    """Best rate of the model's own weights times as many rows as a pack has."""
    weights = [p for n, p in model.named_parameters() if "layers" in n and p.dim() > 1]
    inputs = {w.shape[1]: torch.randn(PACK_TOKENS, w.shape[1]) for w in weights}
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        best = min(best, time.perf_counter() - start)
    return 2 * PACK_TOKENS * sum(w.numel() for w in weights) / best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--whole", action="store_true", help="harness on all queries")
    options = parser.parse_args()
    main(options.queries, options.whole)
