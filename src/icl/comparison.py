"""How Dai et al. compare in-context learning with finetuning: protocol, measures.

The protocol, for one task: zero-shot; ICL with each seed; at the seed with the best ICL
accuracy, K/V-finetuning at every learning rate of a grid; at the best rate,
finetuning with the other seeds. Both choices are made on the evaluation set
itself, as in the paper (appendix B), so every run is kept: the picked one is to
be seen among the others.
"""

import numpy as np
import torch

from icl import metrics
from icl.finetuning import kv_sgd, updated
from icl.heads import watch_queries
from icl.scoring import score
from icl.tasks import prompt_prefix

SEEDS = tuple(range(1, 8))
LEARNING_RATES = tuple(m * s / 1e4 for s in (1, 10, 100, 1000) for m in range(1, 10))


def protocol(
    model,
    tokenizer,
    task,
    separator="\n",
    k=32,
    finetune=True,
    seeds=SEEDS,
    learning_rates=LEARNING_RATES,
    done=None,
):
    """Run the protocol, yielding each run as it ends.

    Args:
        model, tokenizer: from :func:`icl.models.load_model`.
        task: a :class:`icl.tasks.Task`; all its evaluation examples are used.
        separator: see :func:`icl.tasks.prompt_prefix`.
        k: the number of demonstrations.
        finetune: ``False`` stops after ICL.
        seeds, learning_rates: what to try.
        done: ``{(setting, seed, learning_rate): predictions}`` of runs that need
            not be computed again; they are yielded too.

    Yields:
        ``(setting, seed, learning_rate, predictions)``: setting ``"ZSL"`` (seed
        and rate 0), ``"ICL"`` (rate 0) or ``"FT"``; predicted label ids
        ``(N,)``, or ``None`` where finetuning diverged.

    Raises:
        ValueError: see :func:`icl.scoring.score` and
            :func:`icl.tasks.prompt_prefix`.
    """
    done, accuracies = done or {}, {}
    queries = [task.query(example) for example in task.evaluation]
    context = getattr(model.config, "max_position_embeddings", None)
    alone = prompt_prefix(task, [], tokenizer, separator, context)

    def predict(prefix):
        return score(model, tokenizer, queries, task.label_words, prefix).argmax(1)

    def in_context(seed, _):
        examples = task.sample(k, seed)
        return predict(prompt_prefix(task, examples, tokenizer, separator, context))

    def finetuned(seed, rate):
        texts = [alone + task.demonstration(e) for e in task.sample(k, seed)]
        try:
            update, _ = kv_sgd(model, tokenizer, texts, rate)
            with updated(model, update):
                return predict(alone)
        except FloatingPointError:
            return None

    def run(compute, *key):
        predictions = done[key] if key in done else compute(*key[1:])
        hits = -1 if predictions is None else np.mean(predictions == task.labels())
        accuracies[key] = hits
        return *key, predictions

    def best(setting):
        return max((k for k in accuracies if k[0] == setting), key=accuracies.get)

    yield run(lambda *_: predict(alone), "ZSL", 0, 0.0)
    for seed in seeds:
        yield run(in_context, "ICL", seed, 0.0)
    if not finetune:
        return
    _, picked, _ = best("ICL")
    for rate in learning_rates:
        yield run(finetuned, "FT", picked, rate)
    _, _, rate = best("FT")
    for seed in seeds:
        if seed != picked:
            yield run(finetuned, "FT", seed, rate)


def finetune_watched(model, tokenizer, texts, learning_rate, **options):
    """:func:`icl.finetuning.kv_sgd`, and the attention queries of its own tokens.

    Returns:
        ``(update, queries)``: queries ``(n, L, H, d_h)`` of all tokens of all
        texts, each as it was in its text's own step.
    """
    with watch_queries(model) as seen:
        update, _ = kv_sgd(model, tokenizer, texts, learning_rate, **options)
    layers = len(seen) // len(texts)
    steps = [torch.stack(seen[i : i + layers]) for i in range(0, len(seen), layers)]
    queries = torch.cat(steps, dim=2).permute(2, 0, 1, 3)
    return update, queries.float().cpu().numpy()


def similarities(zsl, ft, icl, training_queries, owner, top=100):
    """The similarities of Dai et al. (2023) and of Deutch et al. (2024).

    Args:
        zsl, ft, icl: a :class:`icl.recording.Recording` of each setting, of the
            same queries at the same position.
        training_queries: from :func:`finetune_watched`, ``(n, L, H, d_h)``.
        owner: whose token each token of ICL's prefix is, from
            :func:`icl.tasks.demonstration_of_tokens`; ``n`` of them are not -1.
        top: how many tokens "top recall" counts (of all, if there are fewer).

    Returns:
        ``{name: icl.metrics.Similarity}``.

    Raises:
        ValueError: the prefix's tokens are not those that were trained on.
    """
    owner = np.asarray(owner)
    kept = owner >= 0
    if kept.sum() != len(training_queries):
        raise ValueError(
            f"the prefix has {kept.sum()} tokens of demonstrations, but finetuning saw "
            f"{len(training_queries)}: give both the same demonstrations"
        )
    # Kendall's tau is over fewer queries: those whose scores were kept
    m_icl = icl.demonstrations.sum(2)[..., kept]
    m_ft = metrics.training_attention(ft.queries[: len(m_icl)], training_queries)
    return {
        "SimAOU": metrics.simaou(zsl.outputs, ft.outputs, icl.outputs),
        "SimAOU, not normalised": metrics.simaou(
            zsl.outputs, ft.outputs, icl.outputs, normalise=False
        ),
        "SimAM before": metrics.simam(zsl.own, icl.own),
        "SimAM after": metrics.simam(ft.own, icl.own),
        "SimAM of changes": metrics.simam_delta(zsl.own, ft.own, icl.own),
        "Kendall": metrics.kendall(m_icl, m_ft),
        "Kendall of examples": metrics.kendall_of_examples(m_icl, m_ft, owner[kept]),
        "top recall": metrics.top_recall(m_icl, m_ft, min(top, kept.sum())),
    }
