"""Scoring label words behind shared demonstrations, no token computed twice.

The demonstrations, and the words that all queries begin with, are one prefix.
Its keys and values are computed once; the queries follow it packed side by side
in one row, each at the positions it would have alone, under a mask that lets a
query see the prefix and itself. Where a label word has several tokens, the
labels branch off their query in the same row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

PACK_TOKENS = 384  # tokens in a row on a CPU: attention grows with its square
_PACK_TOKENS_CUDA = 2048  # on a GPU, which a short row does not fill
TRUNK = -1  # the branch of a query's own tokens


@torch.inference_mode()
def score(
    model, tokenizer, queries, label_words, demonstrations=""
) -> Float[np.ndarray, "N C"]:
    """Mean log-probability of each of C label words after each of N queries.

    Args:
        model, tokenizer: from :func:`icl.models.load_model`.
        queries: prompts, each ending where its label word would follow.
        label_words: bare words; ``" " + word`` is scored, as the mean over its
            tokens of the log-probability over the full vocabulary
            (Dai et al. 2023, as their code does it).
        demonstrations: text before every query (:func:`icl.tasks.prompt_prefix`),
            encoded by itself, without tokens that the tokenizer would add.

    Returns:
        scores; the prediction is their ``argmax(axis=1)``.

    Raises:
        ValueError: no queries or labels, an empty one, two label words with
            the same first token, or a prompt longer than the context.
        FloatingPointError: the model's output is not finite.
    """
    packing = Packing(model, tokenizer, queries, label_words, demonstrations)
    scores = np.empty((len(queries), len(label_words)))
    for row in packing.rows():
        log_p, _ = packing.run(row)
        scores[row.numbers] = packing.label_scores(row, log_p)
    return scores


class Row(NamedTuple):
    """Queries side by side in one row of T tokens, and where it is read.

    Attributes:
        numbers: which queries these are.
        ids, position: of each token, the position that in its own prompt.
        query, branch: the query that each token belongs to, and the label, or
            ``TRUNK``.
        stops: places in the row whose next-token distribution is needed.
        slots: for each query the index in ``stops`` of its last token and, for
            each label, those of the label's own tokens but the last.
    """

    numbers: list[int]
    ids: Int[Tensor, " T"]
    position: Int[Tensor, " T"]
    query: Int[Tensor, " T"]
    branch: Int[Tensor, " T"]
    stops: list[int]
    slots: list[tuple[int, list[range]]]


class Packing:
    """Queries, packed into rows behind a prefix whose keys and values are kept.

    Args:
        model, tokenizer, queries, label_words, demonstrations: as for :func:`score`.

    Attributes:
        shown: how many tokens of the prefix are the demonstrations'. The others are
            the tokens that all queries begin with.
    """

    def __init__(self, model, tokenizer, queries, label_words, demonstrations=""):
        texts = queries, label_words, demonstrations
        prefix, queries, labels = _encode(tokenizer, *texts)
        _check_length(model.config, prefix, queries, labels)
        self.model, self.labels, self.shown = model, labels, len(prefix)
        prefix, self._queries = _share(prefix, queries)
        self._start, self._keys_values = len(prefix), []
        if prefix:
            cache = DynamicCache(config=model.config)
            ids = torch.tensor([prefix], device=model.device)
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._keys_values = [(layer.keys, layer.values) for layer in cache.layers]

    def rows(self, whole: int | None = None) -> Iterator[Row]:
        """All queries, those of like length in one row.

        Args:
            whole: a label whose last token is to stand in the row as well; default
                none, since a last token is only predicted.
        """
        on_cuda = self.model.device.type == "cuda"
        limit = _PACK_TOKENS_CUDA if on_cuda else PACK_TOKENS
        branches = sum(len(ids) - 1 for ids in self.labels)
        pack, used = [], 0
        lengths = np.array([len(query) for query in self._queries])
        for n in lengths.argsort(kind="stable").tolist():
            size = lengths[n] + branches
            if pack and used + size > limit:
                yield self._lay_out(pack, whole)
                pack, used = [], 0
            pack.append(n)
            used += size
        yield self._lay_out(pack, whole)

    def _lay_out(self, numbers, whole):
        tokens, stops, slots = [], [], []
        for n in numbers:
            query = self._queries[n]
            end = self._start + len(query)
            tokens += [(t, self._start + s, n, TRUNK) for s, t in enumerate(query)]
            stops.append(len(tokens) - 1)
            last, inner = len(stops) - 1, []
            for branch, label in enumerate(self.labels):
                inner.append(range(len(stops), len(stops) + len(label) - 1))
                for s, t in enumerate(label, end):
                    if s < end + len(label) - 1:
                        stops.append(len(tokens))
                    elif branch != whole:
                        continue
                    tokens.append((t, s, n, branch))
            slots.append((last, inner))
        return Row(numbers, *torch.tensor(tokens).T, stops, slots)

    def run(self, row: Row) -> tuple[Float[Tensor, "S V"], DynamicCache]:
        """One forward pass: log-probabilities at the row's stops, and the cache."""
        model, cache = self.model, DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(self._keys_values):
            cache.update(keys, values, layer)
        mask = _mask(row, cache.get_seq_length(), model.dtype)
        logits = model(
            row.ids[None].to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=row.position[None].to(model.device),
            past_key_values=cache,
            use_cache=True,
            # a list: a tensor would be moved off the last GPU of a model on several
            logits_to_keep=row.stops,
        ).logits[0]
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.log_softmax(logits.to(exact), dim=-1).cpu(), cache

    def label_scores(
        self, row: Row, log_p: Float[Tensor, "S V"]
    ) -> Float[np.ndarray, "n C"]:
        """Mean log-probability of each label after each query of a row.

        Raises:
            FloatingPointError: one is not finite.
        """
        log_p = log_p.numpy()
        scores = np.array(
            [
                [
                    log_p[[last, *places], label].mean()
                    for label, places in zip(self.labels, inner, strict=True)
                ]
                for last, inner in row.slots
            ]
        )
        if not np.isfinite(scores).all():
            raise FloatingPointError(
                f"log-probabilities are not finite: the {self.model.dtype} weights of "
                f"{self.model.config.model_type} overflow or have diverged; load them "
                "as float32, or lower the learning rate"
            )
        return scores


def _encode(tokenizer, queries, label_words, demonstrations):
    if isinstance(queries, str) or not len(queries) or not len(label_words):
        raise ValueError("score needs a list of queries and a list of label words")
    for what, texts in [("query", queries), ("label word", label_words)]:
        for n, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"{what} {n} is empty: {text!r}")

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    labels, first = encode([" " + word for word in label_words]), {}
    for word, ids in zip(label_words, labels, strict=True):
        if ids[0] in first:
            raise ValueError(
                f"label words {first[ids[0]]!r} and {word!r} begin with the same "
                f"token ({tokenizer.decode(ids[:1])!r}) in this tokenizer; choose "
                "words that differ in their first token"
            )
        first[ids[0]] = word
    prefix = encode([demonstrations])[0] if demonstrations else []
    return prefix, encode(list(queries)), labels


def _check_length(config, prefix, queries, labels):
    windows = [getattr(config, "max_position_embeddings", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    context = min((w for w in windows if w), default=None)
    longest = max(map(len, queries)) + max(map(len, labels)) - 1
    if context is not None and len(prefix) + longest > context:
        raise ValueError(
            f"the prompt is too long: {len(prefix)} tokens of demonstrations and "
            f"{longest} of the longest query with its label, but the model holds "
            f"{context}; give fewer demonstrations (prompt_prefix(..., "
            "context=...) says how many fit)"
        )


def _share(prefix, queries):
    """Move the tokens that all queries begin with to the end of the prefix."""
    first, shared = queries[0], 0
    longest = min(map(len, queries)) - 1  # a query keeps its last token
    while shared < longest and len({query[shared] for query in queries}) == 1:
        shared += 1
    return prefix + first[:shared], [query[shared:] for query in queries]


def _mask(row, prefix_length, dtype):
    """Additive mask ``(1, 1, T, P + T)``: prefix, own query, own branch, no future."""
    query, branch, place = row.query, row.branch, torch.arange(len(row.ids))
    sees = (query[:, None] == query) & (place[:, None] >= place)
    sees &= (branch == TRUNK) | (branch[:, None] == branch)
    mask = torch.zeros(len(query), prefix_length + len(query), dtype=dtype)
    mask[:, prefix_length:].masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[None, None]
