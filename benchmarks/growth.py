"""How the seconds of scoring grow with queries, demonstrations and the model's size.

With SmolLM2 on MR, by ``icl.scoring.score`` and by the original way, a pass for every
query and label; the latter on few. The least of two times counts:

- queries, behind 32 demonstrations;
- demonstrations, seconds per query;
- size: 32 queries behind 16 demonstrations, with GPT-2s of random weights, and the rate
  with the largest over the machine's measured peak.
"""

import argparse
from functools import partial

from measure import SEED, fastest, peak_rate, record, record_curve, save, smollm2_on_mr
from scoring import flops, inner_weights, original

from icl.scoring import score
from icl.tasks import prompt_prefix, token_counts
from icl.training import SIZES, build_model

QUERIES = 32  # where their number is not what grows


def main(sizes):
    model, tokenizer, task, usual = smollm2_on_mr()
    words, queries = task.label_words, [task.query(e) for e in task.evaluation]

    def setting(n, examples, model=model):
        prefix = prompt_prefix(task, examples, tokenizer)
        return model, tokenizer, queries[:n], words, prefix

    def least(scorer, *arguments):
        return fastest(partial(scorer, *arguments), repeats=2)[0]

    ours = {n: least(score, *setting(n, usual)) for n in (16, 32, 64, 128, 256)}
    theirs = {n: least(original, *setting(n, usual)) for n in (1, 2, 4)}
    record_curve("packed scorer", "queries", ours)
    record_curve("a pass for each query and label", "queries", theirs)

    ours, theirs = {}, {}
    for k in (4, 8, 16, 32, 64):
        examples = task.sample(k, SEED)
        ours[k] = least(score, *setting(QUERIES, examples)) / QUERIES
        theirs[k] = least(original, *setting(1, examples))
    record_curve(f"packed scorer, a query of {QUERIES}", "demonstrations", ours)
    record_curve("a pass for each label, a query", "demonstrations", theirs)

    seconds = {}
    for size in sizes:
        random = build_model(size, len(tokenizer), 2048, rotary=False).eval()
        arguments = setting(QUERIES, task.sample(16, SEED), random)
        weights = inner_weights(random)
        seconds[weights] = least(score, *arguments)
    what = f"packed scorer, {QUERIES} queries, GPT-2 of random weights"
    record_curve(what, "parameters", seconds, last=3)
    *_, prefix = arguments
    lengths = token_counts(tokenizer, queries[:QUERIES])
    work = flops(random, token_counts(tokenizer, [prefix])[0], lengths)
    rate = work / seconds[weights] / peak_rate()
    record(f"rate of scoring with {size} over the machine's measured peak", rate)
    save(task)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    main(parser.parse_args().sizes)
