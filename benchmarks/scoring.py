"""The packed scorer against lm-evaluation-harness and the original way, in one process.

For SmolLM2 behind 32 demonstrations of MR, with predictions compared:

1. seconds of the harness over seconds of ``icl.scoring.score`` on the same queries,
   same model object, same prompts;
2. the same ratio on the whole evaluation set, over the ratio of tokens that the two
   must compute. The harness encodes every prompt anew, so its time on the whole set is
   its measured rate in tokens times the tokens of the set;
3. the same against the original code's way, one forward pass for every query and label,
   timed on a few queries: its time is that of a query times their number;
4. the floating-point rate of the scorer over that of matrix products, of the model's
   own shapes and at the machine's best.
"""

import argparse
import os
import re

import numpy as np
import torch
from measure import peak_rate, product_rate, record, save, smollm2_on_mr, timed

from icl.scoring import PACK_TOKENS, score
from icl.tasks import prompt_prefix, token_counts

BATCH_SIZES = (1, 2, 4)


def main(n_queries, n_original):
    # With the usual pool, lm-eval forks tokenizer threads and warns at each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model, tokenizer, task, demonstrations = smollm2_on_mr()
    prefix = prompt_prefix(task, demonstrations, tokenizer)
    words = task.label_words
    sample = [task.query(e) for e in task.head(n_queries).evaluation]
    full = [task.query(e) for e in task.evaluation]
    shared = token_counts(tokenizer, [prefix])[0]
    record("tokens of the demonstrations", shared)

    score(model, tokenizer, sample[:4], words, prefix)  # warm-up
    ours, scores = timed(score, model, tokenizer, sample, words, prefix)
    harness = Harness(model, tokenizer, words, prefix)
    batch = harness.best_batch_size(sample[:: max(1, len(sample) // 4)])
    theirs, peer = timed(harness.score, sample, batch)
    on = f"{len(sample)} queries"
    record(f"seconds of the harness over ours, {on}", theirs / ours, "x", at_least=20)
    compare("the harness's", scores, peer)

    few = sample[:n_original]
    took, peer = timed(original, model, tokenizer, few, words, prefix)
    took *= len(sample) / len(few)
    gained = took / ours
    record(f"seconds of the original way over ours, {on}", gained, "x")
    compare("the original way's", scores[: len(few)], peer)

    whole = f"the whole set of {len(full):,} queries"
    ours_full, _ = timed(score, model, tokenizer, full, words, prefix)
    lengths, sampled = token_counts(tokenizer, full), token_counts(tokenizer, sample)
    tokens = sum(lengths) + shared * len(full)
    theirs_full = theirs * tokens / (sum(sampled) + shared * len(sampled))
    bound = tokens / (sum(lengths) + shared)
    gained = theirs_full / ours_full
    record(f"seconds of our scorer, {whole}", ours_full, "s")
    record(f"seconds of the harness, by its rate, over ours, {whole}", gained, "x")
    name = "gain over the harness, whole set, over the ratio of tokens to compute"
    record(name, gained / bound, at_least=0.8)

    rate, best = flops(model, shared, lengths) / ours_full, peak_rate()
    layers = [p for n, p in model.named_parameters() if "layers" in n and p.dim() > 1]
    own = product_rate([(torch.randn(PACK_TOKENS, w.shape[1]), w) for w in layers])
    record("rate of the scorer", rate / 1e9, "GFLOP/s")
    record("rate of matrix products of the model's shapes", own / 1e9, "GFLOP/s")
    record("the machine's measured peak", best / 1e9, "GFLOP/s")
    name = "rate of the scorer over that of the model's shapes"
    record(name, rate / own, at_least=0.6)
    name = "rate of the scorer over the machine's measured peak"
    record(name, rate / best)
    save(task)


def compare(whose, scores, peer):
    """Record how far two arrays of scores agree."""
    same = (scores.argmax(1) == peer.argmax(1)).mean()
    record(f"share of predictions that are {whose}", same, at_least=1)
    error = np.abs(scores - peer).max()
    record(f"largest difference of a score from {whose}", error, "nats")


@torch.inference_mode()
def original(model, tokenizer, queries, words, prefix):
    """Scores ``(N, C)``, each query and label in a pass of its own."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    scores = np.empty((len(queries), len(words)))
    for n, query in enumerate(queries):
        for c, word in enumerate(words):
            label = encode(" " + word)
            ids = torch.tensor([encode(prefix) + encode(query) + label])
            log_p = torch.log_softmax(model(ids, use_cache=False).logits[0], dim=-1)
            ends = range(ids.shape[1] - len(label) - 1, ids.shape[1] - 1)
            scores[n, c] = log_p[ends, label].mean()
    return scores


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
    seen = shared * (shared + 1) / 2
    seen += sum(n * shared + n * (n + 1) / 2 for n in lengths)
    attention = 4 * config.num_hidden_layers * config.hidden_size * seen
    return 2 * inner_weights(model) * tokens + attention + 2 * head * len(lengths)


def inner_weights(model):
    """Parameters of a model's layers, without embeddings."""
    numbered = re.compile(r"\.\d+\.")
    return sum(p.numel() for n, p in model.named_parameters() if numbered.search(n))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--original", type=int, default=5, help="queries, one by one")
    options = parser.parse_args()
    main(options.queries, options.original)
