"""How Dai et al. compare in-context learning with finetuning: runs and measures."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl import activations, metrics
from icl.finetuning import applied_update, kv_sgd
from icl.scoring import context_length, score
from icl.tasks import PAPER_TASKS, Task, prompt_prefix, token_counts, token_starts

SEEDS = tuple(range(1, 8))
#: How many demonstrations a task has, 32 or what the paper's models can hold.
DEMONSTRATIONS = dict.fromkeys(PAPER_TASKS, 32) | {"agnews": 22, "cb": 19}
_TOP = 100  # tokens that top recall counts, or all if there are fewer
LEARNING_RATES = tuple(m * s / 1e4 for s in (1, 10, 100, 1000) for m in range(1, 10))


@dataclass(frozen=True)
class Evaluator:
    """A model on all evaluation examples of a task, in one prompt layout.

    Attributes:
        model, tokenizer: from :func:`icl.models.load_model`.
        task: examples, template and label words.
        layout: see :func:`icl.tasks.prompt_prefix`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    layout: str = "newline"

    def prefix(self, examples=()) -> str:
        """What stands before a query.

        Raises:
            ValueError: the demonstrations and the longest query do not fit into the
                model; the message says how many do.
        """
        layout, context = self.layout, context_length(self.model.config)

        def text(n):
            return prompt_prefix(self.task, examples[:n], self.tokenizer, layout)

        def fits(n):
            if context is None:
                return True
            shown = token_counts(self.tokenizer, [text(n)])[0]
            return shown + self._longest <= context

        if not fits(len(examples)):
            most = next((n for n in range(len(examples))[::-1] if fits(n)), 0)
            raise ValueError(
                f"{len(examples)} demonstrations of {self.task.name} and its longest "
                f"query do not fit into the model's {context} tokens: {most} "
                "demonstrations do"
            )
        return text(len(examples))

    @cached_property
    def _longest(self):
        """Tokens of the longest query with its label."""
        queries = [self.task.query(example) for example in self.task.evaluation]
        words = [self.task.blank + word for word in self.task.label_words]
        counts = (token_counts(self.tokenizer, texts) for texts in (queries, words))
        return sum(map(max, counts))

    def score(self, examples=()) -> Float[np.ndarray, "N C"]:
        """:func:`icl.scoring.score` behind demonstrations."""
        prefix = self.prefix(examples)
        return score(*self._prompts(), prefix, blank=self.task.blank)

    def record(
        self, folder, examples=(), positions=activations.POSITIONS, attended=100
    ) -> dict[str, activations.Recording]:
        """:func:`icl.activations.record` behind demonstrations."""
        options = {"folder": folder, "positions": positions, "attended": attended}
        options["blank"] = self.task.blank
        activations.record(*self._prompts(), self.prefix(examples), **options)
        return activations.read_recording(folder)

    def finetune(self, examples, learning_rate, **options):
        """:func:`finetune_with_queries` on demonstrations, in their order.

        The attention queries are those of the examples' own tokens, without what a
        layout puts at the front; None if the tokenizer has no character offsets.
        """
        alone = self.prefix()
        texts = [alone + self.task.demonstration(e) for e in examples]
        asked = self.model, self.tokenizer, texts, learning_rate
        update, queries = finetune_with_queries(*asked, **options)
        if not self.tokenizer.is_fast:
            return update, None
        own = [token_starts(self.tokenizer, text) >= len(alone) for text in texts]
        return update, queries[np.concatenate(own)]

    def _prompts(self):
        queries = [self.task.query(example) for example in self.task.evaluation]
        return self.model, self.tokenizer, queries, self.task.label_words


def run_scores(
    evaluator: Evaluator, setting: str, seed, learning_rate, k=32
) -> Float[np.ndarray, "N C"] | None:
    """Log-probabilities of the label words in one run; ``None`` where it diverged.

    The setting is ``"ZSL"``, ``"ICL"``, ``"FT"`` or ``"LCGD"``, FT's layer-causal
    variant (Deutch et al. 2024). All but ZSL have ``k`` demonstrations, drawn by
    ``seed``; the learning rate is that of finetuning.
    """
    if setting not in ("ZSL", "ICL", "FT", "LCGD"):
        raise ValueError(f"setting {setting!r} is not one of ZSL, ICL, FT, LCGD")
    examples = [] if setting == "ZSL" else evaluator.task.sample(k, seed)
    if setting in ("ZSL", "ICL"):
        return evaluator.score(examples)
    causal = setting == "LCGD"
    try:
        update, _ = evaluator.finetune(examples, learning_rate, layer_causal=causal)
        with applied_update(evaluator.model, update):
            return evaluator.score()
    except FloatingPointError:
        return None


def finetune_with_queries(
    model, tokenizer, texts, learning_rate, **options
) -> tuple[dict[str, torch.Tensor], Float[np.ndarray, "n L H d_h"]]:
    """:func:`icl.finetuning.kv_sgd`, and the attention queries of its own tokens.

    Returns:
        ``(update, queries)``, the queries of all tokens of all texts, each as it was
        in its text's own step.
    """
    with activations.capture_queries(model) as seen:
        update, _ = kv_sgd(model, tokenizer, texts, learning_rate, **options)
    layers = len(seen) // len(texts)
    seen = [layer.float().cpu() for layer in seen]
    steps = [torch.stack(seen[i : i + layers]) for i in range(0, len(seen), layers)]
    return update, torch.cat(steps, dim=2).permute(2, 0, 1, 3).numpy()


def similarities(
    zsl, ft, icl, training_queries=None, owner=None
) -> dict[str, metrics.Similarity]:
    """The similarities of Dai et al. (2023) and of Deutch et al. (2024), by name.

    Args:
        zsl, ft, icl: recordings of the same queries at the same position.
        training_queries: from :func:`finetune_with_queries`. If left
            out (the learners saw different tokens), so are the measures that need them.
        owner: number of the demonstration of each token of ICL's prefix, from
            :func:`icl.tasks.demonstration_of_tokens`.
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
    owner = np.asarray(owner)[: icl.demonstrations.shape[-1]]
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
        "top recall": metrics.top_recall(m_icl, m_ft, min(_TOP, kept.sum())),
    }
