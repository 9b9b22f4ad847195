"""Scoring label words behind shared demonstrations, no token computed twice.

The demonstrations, and the words that all queries begin with, are one prefix.
Its keys and values are computed once; the queries follow it packed side by side
in one row, each at the positions it would have alone, under a mask that lets a
query see the prefix and itself. Where a label word has several tokens, the
labels branch off their query in the same row. A model whose layers do not obey such
a mask gets every prompt by itself.
"""

import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

PACK_TOKENS = 384  # tokens in a row on a CPU: attention grows with its square
_PACK_TOKENS_CUDA = 2048  # on a GPU, which a short row does not fill
_ATTENTION = {DynamicLayer, DynamicSlidingWindowLayer}  # layers that obey a mask
_ENCODED = 256  # prompts at once: all would take gigabytes
TRUNK = -1  # the branch of a query's own tokens

_found = WeakKeyDictionary()  # model → what has been found out about it


class _PackingError(ValueError):
    """A model whose scores in a packed row are not those of each prompt alone."""


@torch.inference_mode()
def score(
    model, tokenizer, queries, label_words, demonstrations="", blank=" "
) -> Float[np.ndarray, "N C"]:
    """Mean log-probability of each of C label words after each of N queries.

    Args:
        model, tokenizer: from :func:`icl.models.load_model`.
        queries: prompts, each ending where its label word would follow.
        label_words: bare words; ``blank + word`` is scored, as the mean over its
            tokens of the log-probability over the full vocabulary
            (Dai et al. 2023, as their code does it).
        demonstrations: text before every query (:func:`icl.tasks.prompt_prefix`). A
            prompt is encoded as one text, without tokens that the tokenizer would add.
        blank: text between query and label word; default a blank.

    Returns:
        scores; the prediction is their ``argmax(axis=1)``.

    Raises:
        ValueError: no queries or labels, one without tokens, two label words of
            the same tokens, a prompt longer than the context, or a model that is
            not causal.
        FloatingPointError: the model's output is not finite.
    """
    packing = Packing(model, tokenizer, queries, label_words, demonstrations, blank)
    scores = np.empty((len(packing), len(packing.labels)))
    try:
        for row in packing.rows():
            log_p, _ = packing.run(row)
            packing.check(row, log_p)
            scores[row.numbers] = packing.label_scores(row, log_p)
    except _PackingError:
        return packing.score_alone()
    return scores


class Row(NamedTuple):
    """Queries side by side in one row of T tokens, and where it is read.

    Attributes:
        numbers: which queries these are.
        ids, position: id of each token, and its position in its own prompt.
        query, branch: number of the query and of the label that each token belongs
            to; ``TRUNK`` for the query's own tokens.
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
        model, tokenizer, queries, label_words, demonstrations, blank: as for
            :func:`score`.

    Attributes:
        labels: the tokens of each label.
        shown: how many tokens of the prefix are the demonstrations'. The others are
            the tokens that all queries begin with.
    """

    def __init__(
        self, model, tokenizer, queries, label_words, demonstrations="", blank=" "
    ):
        texts = queries, label_words, demonstrations, blank
        self.model = model
        check_eval(model)
        prefix, queries, self.labels = _encode(tokenizer, *texts)
        self.shown, self._keys_values = len(prefix), []
        longest = min(map(len, queries)) - 1  # a query keeps its last token
        shared = min(longest, *(_common(queries[0], query) for query in queries))
        self._prefix = prefix + queries[0][:shared]  # what all queries begin with
        self._queries = [query[shared:] for query in queries]
        self._check_length(max(map(len, self.labels)) - 1)
        self._known = facts(model)

    def __len__(self):
        return len(self._queries)

    def rows(self, whole: int | None = None) -> Iterator[Row]:
        """All queries, those of like length in one row, the longest first.

        Args:
            whole: a label whose last token is to stand in the row as well; default
                none, since a last token is only predicted.

        Raises:
            ValueError: the model does not take packed rows.
        """
        if whole is not None:
            self._check_length(len(self.labels[whole]))
        self._read_prefix()
        on_cuda = self.model.device.type == "cuda"
        limit = _PACK_TOKENS_CUDA if on_cuda else PACK_TOKENS
        branches = sum(len(ids) - 1 for ids in self.labels)
        packs, used = [[]], 0
        lengths = np.array([len(query) for query in self._queries])
        for n in lengths.argsort(kind="stable").tolist():
            size = lengths[n] + branches
            if packs[-1] and used + size > limit:
                packs.append([])
                used = 0
            packs[-1].append(n)
            used += size
        for pack in reversed(packs):  # what is compared is the longest
            yield self._lay_out(pack, whole)

    def _check_length(self, label):
        context = context_length(self.model.config)
        shared, longest = len(self._prefix), max(map(len, self._queries)) + label
        if context is not None and shared + longest > context:
            longest += shared - self.shown
            raise ValueError(
                f"the prompt is too long: {self.shown} tokens of demonstrations and "
                f"{longest} of the longest query with its label, but the model holds "
                f"{context}; give fewer demonstrations"
            )

    def _read_prefix(self):
        with self._refusing():
            layers = DynamicCache(config=self.model.config).layers
            if "not packed" in self._known or {*map(type, layers)} - _ATTENTION:
                raise self._refusal()
            rope = getattr(self.model.config, "rope_parameters", None) or {}
            turned = rope.get("original_max_position_embeddings", math.inf)
            longest = len(self._prefix) + max(map(len, self._queries))
            longest += max(map(len, self.labels)) - 1
            if rope.get("rope_type") == "longrope" and longest > turned:
                raise self._refusal()  # the longest turns the others' positions
            if self._prefix and not self._keys_values:
                cache = DynamicCache()
                ids = torch.tensor([self._prefix], device=self.model.device)
                self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                self._keys_values = [(each.keys, each.values) for each in cache.layers]

    def _refusal(self):
        self._known["not packed"] = True
        name, dtype = type(self.model).__name__, self.model.dtype
        return _PackingError(
            f"{name} in {dtype} computes packed prompts otherwise than each alone, so "
            "its attention cannot be recorded"
        )

    @contextmanager
    def _refusing(self):
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever the model does not take
            raise self._refusal() from error

    def _lay_out(self, numbers, whole):
        tokens, stops, slots = [], [], []
        for n in numbers:
            query, start = self._queries[n], len(self._prefix)
            end = start + len(query)
            tokens += [(t, s, n, TRUNK) for s, t in enumerate(query, start)]
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
        model, cache = self.model, DynamicCache(self._keys_values)
        with self._refusing():
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
            if len(logits) != len(row.stops):
                raise self._refusal()
        return _log_softmax(logits), cache

    def check(self, row: Row, log_p: Float[Tensor, "S V"]) -> None:
        """Compare a row's last query with its prompt alone, from scratch.

        Rows of a kind (with or without a prefix, neighbours and branches) are compared
        again if they are longer than before, or their prefix is shorter.

        Raises:
            ValueError: they differ by more than rounding.
        """
        label, (last, inner) = max(self.labels, key=len), row.slots[-1]
        stops = [last, *inner[self.labels.index(label)]]
        kind = bool(self._prefix), len(row.numbers) > 1, len(label) > 1
        prefix, length = len(self._prefix), len(self._prefix) + len(row.ids)
        shortest, longest = self._known.get(kind, (prefix, 0))
        if (prefix >= shortest and length <= longest) or not log_p.isfinite().any():
            return  # label_scores says what is not finite
        ids = self._prefix + self._queries[row.numbers[-1]] + label[:-1]
        if not agree(log_p[stops], self._alone(ids, len(label)), self.model.dtype):
            raise self._refusal()
        self._known[kind] = min(prefix, shortest), max(length, longest)

    def score_alone(self) -> Float[np.ndarray, "N C"]:
        """Scores of all queries, each prompt in passes of its own: slower.

        Raises:
            ValueError: the model is not causal.
        """
        if "alone" not in self._known:
            name, ids = type(self.model).__name__, self._prefix + self._queries[0]
            ids = (ids + self.labels[0])[:32]
            half, vocabulary = len(ids) // 2, self.model.config.vocab_size
            other = ids[:half] + [(t + 1) % vocabulary for t in ids[half:]]
            one, two = (self._alone(x, len(ids) - half + 1)[:1] for x in (ids, other))
            if not agree(one, two, torch.float32):  # of one shape: hardly any rounding
                raise ValueError(
                    f"{name} is not causal: what follows a token changes the "
                    "prediction after it; choose a causal language model"
                )
            logging.getLogger(__name__).warning(
                "%s takes no packed prompts: each is computed alone, slower", name
            )
            self._known["alone"] = True
        scores = np.empty((len(self), len(self.labels)))
        for n, query in enumerate(self._queries):
            passes = {}
            for c, label in enumerate(self.labels):
                inner = tuple(label[:-1])
                if inner not in passes:
                    ids = self._prefix + query + label[:-1]
                    passes[inner] = self._alone(ids, len(label)).numpy()
                scores[n, c] = passes[inner][range(len(label)), label].mean()
        return self._finite(scores)

    def _alone(self, ids, last):
        """Log-probabilities after each of the last tokens of a prompt by itself."""
        takes = inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": last} if "logits_to_keep" in takes else {}
        ids = torch.tensor([ids], device=self.model.device)
        logits = self.model(ids, use_cache=False, **options).logits[0]
        return _log_softmax(logits[-last:])

    def label_scores(
        self, row: Row, log_p: Float[Tensor, "S V"]
    ) -> Float[np.ndarray, "n C"]:
        """Mean log-probability of each label after each query of a row.

        Raises:
            FloatingPointError: one is not finite.
        """
        log_p = log_p.numpy()
        scores = [
            [
                log_p[[last, *places], label].mean()
                for label, places in zip(self.labels, inner, strict=True)
            ]
            for last, inner in row.slots
        ]
        return self._finite(np.array(scores))

    def _finite(self, scores):
        if not np.isfinite(scores).all():
            raise FloatingPointError(
                f"log-probabilities are not finite: the {self.model.dtype} weights of "
                f"{self.model.config.model_type} overflow or have diverged; load them "
                "as float32, or lower the learning rate"
            )
        return scores


def facts(model) -> dict:
    """Cached facts about a model, by attention implementation and configuration."""
    config = model.config
    layout = getattr(config, "_attn_implementation", None), config.to_json_string()
    return _found.setdefault(model, {}).setdefault(layout, {})


def check_eval(model):
    """Refuse a model in training mode, whose dropout makes all numbers random."""
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")


def _log_softmax(logits):
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits.to(exact), dim=-1).cpu()


def agree(one: Float[Tensor, "S V"], two: Float[Tensor, "S V"], dtype) -> bool:
    """Whether two log-probabilities differ by rounding, relative to their spread."""
    finite = two.isfinite()
    one, two = one[finite], two[finite]
    eps = max(torch.finfo(d).eps for d in (dtype, torch.float32))
    return bool((one - two).norm() <= eps**0.5 * (two - two.mean()).norm())


def encode(tokenizer, what: str, texts) -> list[list[int]]:
    """Token ids of texts, without tokens that the tokenizer would add.

    Raises:
        ValueError: no texts, a str in place of a list, a text without tokens.
    """
    given = [] if texts is None or isinstance(texts, str) else [*texts]
    if not given:
        raise ValueError(f"{what}: a list of texts is needed, not {texts!r}")
    for n, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} {n} is empty or no str: {text!r}")
    found = tokenizer(given, add_special_tokens=False)["input_ids"]
    if [] in found:
        n = found.index([])
        raise ValueError(f"{what} {n} has no tokens in this tokenizer: {given[n]!r}")
    return found


def _encode(tokenizer, queries, label_words, demonstrations, blank):
    """Token ids of the demonstrations, of each query and of each label.

    The demonstrations' tokens are those with which they alone and every prompt begin; a
    label's tokens are those after the prompt's, as in the lm-evaluation-harness.
    """
    queries = queries if isinstance(queries, str | None) else [*queries]
    encode(tokenizer, "query", queries)  # neither is empty by itself
    encode(tokenizer, "label word", label_words)
    shown = tokenizer(demonstrations, add_special_tokens=False)["input_ids"]
    common, parts = len(shown), []
    for start in range(0, len(queries), _ENCODED):
        chunk = [demonstrations + query for query in queries[start:][:_ENCODED]]
        for ids in encode(tokenizer, "prompt", chunk):
            same = _common(shown, ids[:-1])
            common = min(common, same)
            parts.append((same, ids[same:]))
    prompt = demonstrations + queries[0]
    before = shown[: parts[0][0]] + parts[0][1]
    answers = encode(tokenizer, "prompt", [prompt + blank + w for w in label_words])
    labels = []
    for word, ids in zip(label_words, answers, strict=True):
        label = ids[len(before) :]
        if ids[: len(before)] != before or not label:
            raise ValueError(
                f"the tokenizer merges the label word {word!r} with the end of the "
                f"query {prompt[-20:]!r}; let a blank stand between them"
            )
        if label in labels:
            other = label_words[labels.index(label)]
            raise ValueError(
                f"label words {other!r} and {word!r} are the same tokens, "
                f"{tokenizer.convert_ids_to_tokens(label)}; choose words that differ"
            )
        labels.append(label)
    queries = [shown[common:same] + ids for same, ids in parts]
    return shown[:common], queries, labels


def _common(one, two):
    """How many tokens two lists begin with in common."""
    differ = (n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(differ, min(len(one), len(two)))


def context_length(config) -> int | None:
    """How many tokens a model takes, or attends to, at once; ``None`` if unbounded."""
    windows = [getattr(config, "max_position_embeddings", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((w for w in windows if w and w > 0), default=None)


def _mask(row, prefix_length, dtype):
    """Additive mask ``(1, 1, T, P + T)``: prefix, own query, own branch, no future."""
    query, branch, place = row.query, row.branch, torch.arange(len(row.ids))
    sees = (query[:, None] == query) & (place[:, None] >= place)
    sees &= (branch == TRUNK) | (branch[:, None] == branch)
    mask = torch.zeros(len(query), prefix_length + len(query), dtype=dtype)
    mask[:, prefix_length:].masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[None, None]
