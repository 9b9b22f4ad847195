"""How Dai et al. compare in-context learning with finetuning: protocol, measures.

The protocol, for one task: zero-shot; ICL with each seed; at the seed with the best ICL
accuracy, K/V-finetuning at every learning rate of a grid; at the best rate,
finetuning with the other seeds. Both choices are made on the evaluation set
itself, as in the paper (appendix B), so every run is kept: the picked one is to
be seen among the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl import metrics
from icl.finetuning import kv_sgd, updated
from icl.heads import watch_queries
from icl.recording import POSITIONS, record
from icl.scoring import score
from icl.tasks import PAPER_TASKS, Task, prompt_prefix, token_counts

SEEDS = tuple(range(1, 8))
#: How many demonstrations a task has, 32 or what the paper's models can hold.
DEMONSTRATIONS = dict.fromkeys(PAPER_TASKS, 32) | {"agnews": 22, "cb": 19}
#: Ends of a demonstration, a line break or as in the original code.
SEPARATORS = {"newline": "\n", "eos": "eos"}
LEARNING_RATES = tuple(m * s / 1e4 for s in (1, 10, 100, 1000) for m in range(1, 10))


@dataclass(frozen=True)
class Subject:
    """A model before a task, in one prompt layout.

    Attributes:
        model: from :func:`icl.models.load_model`.
        tokenizer: its tokenizer.
        task: a :class:`icl.tasks.Task`; all its evaluation examples are used.
        separator: see :func:`icl.tasks.prompt_prefix`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    separator: str = "\n"

    def prefix(self, examples=()) -> str:
        """What stands before a query with these demonstrations.

        Raises:
            ValueError: they do not fit into the model's context.
        """
        context = getattr(self.model.config, "max_position_embeddings", None)
        arguments = self.task, examples, self.tokenizer, self.separator, context
        return prompt_prefix(*arguments)

    def score(self, examples=()) -> np.ndarray:
        """Log-probabilities of the label words ``(N, C)`` behind ``examples``."""
        return score(*self._asked(), self.prefix(examples))

    def record(self, folder, examples=(), positions=POSITIONS, attended=100):
        """:func:`icl.recording.record` behind ``examples``."""
        return record(
            *self._asked(),
            self.prefix(examples),
            folder=folder,
            positions=positions,
            attended=attended,
        )

    def finetune(self, examples, learning_rate, **options):
        """:func:`finetune_watched` on ``examples``, a step each, in their order.

        Of the attention queries, those of the examples' own tokens: not of the
        token that a layout puts at the front.
        """
        alone = self.prefix()
        texts = [alone + self.task.demonstration(e) for e in examples]
        update, queries = finetune_watched(
            self.model, self.tokenizer, texts, learning_rate, **options
        )
        if not alone:
            return update, queries
        front = token_counts(self.tokenizer, [alone])[0]
        counts = token_counts(self.tokenizer, texts)
        own = np.concatenate([np.arange(n) >= front for n in counts])
        return update, queries[own]

    def _asked(self):
        queries = [self.task.query(example) for example in self.task.evaluation]
        return self.model, self.tokenizer, queries, self.task.label_words


def run_scores(subject, setting, seed, learning_rate, k=32):
    """What one run of the protocol says of every query.

    Args:
        subject: a :class:`Subject`.
        setting: ``"ZSL"``, ``"ICL"``, ``"FT"``, or ``"LCGD"``, which is FT's
            layer-causal variant (Deutch et al. 2024).
        seed: draws the demonstrations; ZSL has none.
        learning_rate: of finetuning.
        k: the number of demonstrations.

    Returns:
        log-probabilities of the label words ``(N, C)``, or ``None`` where finetuning
        diverged.

    Raises:
        ValueError: no such setting.
    """
    if setting not in ("ZSL", "ICL", "FT", "LCGD"):
        raise ValueError(f"setting {setting!r} is not one of ZSL, ICL, FT, LCGD")
    examples = [] if setting == "ZSL" else subject.task.sample(k, seed)
    if setting in ("ZSL", "ICL"):
        return subject.score(examples)
    causal = setting == "LCGD"
    try:
        update, _ = subject.finetune(examples, learning_rate, layer_causal=causal)
        with updated(subject.model, update):
            return subject.score()
    except FloatingPointError:
        return None


def answers(scores) -> dict[str, str]:
    """Predicted label ids as strings of digits, as the tables keep them.

    Args:
        scores: from :func:`run_scores`.

    Returns:
        ``{"predictions", "calibrated"}``, plain and batch-calibrated
        (:func:`icl.metrics.calibrated`); empty where finetuning diverged.
    """
    if scores is None:
        return {"predictions": "", "calibrated": ""}
    plain, calibrated = scores.argmax(1), metrics.calibrated(scores).argmax(1)
    return {
        "predictions": "".join(map(str, plain)),
        "calibrated": "".join(map(str, calibrated)),
    }


def predictor(subject, k=32):
    """What the settings of the protocol answer.

    Args:
        subject: a :class:`Subject`.
        k: the number of demonstrations, drawn by a run's seed.

    Returns:
        a function ``run(setting, seed, learning_rate)`` for :func:`protocol`.
    """

    def run(setting, seed, learning_rate):
        scores = run_scores(subject, setting, seed, learning_rate, k)
        return None if scores is None else scores.argmax(1)

    return run


def protocol(run, labels, finetune=True, seeds=SEEDS, rates=LEARNING_RATES, stride=1):
    """The runs of the protocol, each as it ends.

    Args:
        run: ``run(setting, seed, learning_rate)`` gives the predicted label ids
            ``(N,)``, or ``None`` where finetuning diverged (:func:`predictor`).
        labels: the true ones, ``(N,)``.
        finetune: ``False`` stops after ICL.
        seeds, rates: what to try.
        stride: 1 tries every rate. 4, say, tries every fourth, then halves the
            stride around the best until it is 1: the rule that picks stays the
            same, but a narrow second peak may be missed.

    Yields:
        ``(setting, seed, learning_rate, predictions)``: setting ``"ZSL"`` (seed
        and rate 0), ``"ICL"`` (rate 0) or ``"FT"``.
    """
    found = {}

    def hits(key):
        return -1 if found[key] is None else np.mean(found[key] == labels)

    def runs(keys):
        for key in keys:
            if key not in found:
                found[key] = run(*key)
                yield *key, found[key]

    def best(setting):
        return max(sorted(key for key in found if key[0] == setting), key=hits)

    yield from runs([("ZSL", 0, 0.0)])
    yield from runs([("ICL", seed, 0.0) for seed in seeds])
    if not finetune:
        return
    _, picked, _ = best("ICL")
    yield from runs([("FT", picked, rate) for rate in rates[::stride]])
    while stride > 1:
        stride //= 2
        at = rates.index(best("FT")[2])
        near = rates[max(0, at - stride) : at + stride + 1 : stride]
        yield from runs([("FT", picked, rate) for rate in near])
    _, _, rate = best("FT")
    yield from runs([("FT", seed, rate) for seed in seeds])


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


def similarities(zsl, ft, icl, training_queries=None, owner=None, top=100):
    """The similarities of Dai et al. (2023) and of Deutch et al. (2024).

    Args:
        zsl, ft, icl: a :class:`icl.recording.Recording` of each setting, of the
            same queries at the same position.
        training_queries: from :func:`finetune_watched`, ``(n, L, H, d_h)``. Left
            out, as where the two learners saw other tokens, so are the measures
            of attention to them.
        owner: whose token each token of ICL's prefix is, from
            :func:`icl.tasks.demonstration_of_tokens`; ``n`` of them are not -1.
        top: how many tokens "top recall" counts (of all, if there are fewer).

    Returns:
        ``{name: icl.metrics.Similarity}``.

    Raises:
        ValueError: the prefix's tokens are not those that were trained on.
    """
    outputs, own = (zsl.outputs, ft.outputs, icl.outputs), (zsl.own, ft.own, icl.own)
    found = {
        "SimAOU": metrics.simaou(*outputs),
        "SimAOU, not normalised": metrics.simaou(*outputs, normalise=False),
        "SimAM before": metrics.simam(zsl.own, icl.own),
        "SimAM after": metrics.simam(ft.own, icl.own),
        "SimAM of changes": metrics.simam_delta(*own),
    }
    if training_queries is None:
        return found
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
    return found | {
        "Kendall": metrics.kendall(m_icl, m_ft),
        "Kendall of examples": metrics.kendall_of_examples(m_icl, m_ft, owner[kept]),
        "top recall": metrics.top_recall(m_icl, m_ft, min(top, kept.sum())),
    }
