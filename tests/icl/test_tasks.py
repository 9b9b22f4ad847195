"""Tasks: prompts as the paper's code has them, sampling, sources, bad files."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from conftest import word_tokenizer
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from icl import tasks
from icl.tasks import (
    Task,
    demonstration_of_tokens,
    load_task,
    prompt_prefix,
    token_starts,
)

PROMPTS = {
    "sst2": ("Sentence: a b Label:", ["Negative", "Positive"]),
    "sst5": ("Sentence: a b Label:", ["terrible", "bad", "neutral", "good", "great"]),
    "mr": ("Review: a b Sentiment:", ["Negative", "Positive"]),
    "subj": ("Input: a b Type:", ["objective", "subjective"]),
    "agnews": (
        "Classify the news articles into the categories of World, Sports, Business, "
        "and Technology. Article: a b Answer:",
        ["World", "Sports", "Business", "Technology"],
    ),
    "cb": (
        "a b Question: c d. True, False, or Neither? Answer:",
        ["True", "False", "Neither"],
    ),
}
EVALUATION = {"subj": "test", "agnews": "test"}


def write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def example(name, label):
    if name == "cb":
        return {"premise": "a b", "hypothesis": "c d", "label": label}
    return {"text": "a b", "label": label}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An ICL_DATA folder with two rows for every task of the paper."""
    for name in PROMPTS:
        rows = [example(name, 0), example(name, 1)]
        write(tmp_path, f"{name}/train.jsonl", rows)
        write(tmp_path, f"{name}/{EVALUATION.get(name, 'validation')}.jsonl", rows)
    monkeypatch.setenv("ICL_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_the_paper(name, data):
    task = load_task(name)
    query, words = PROMPTS[name]
    assert task.query(task.train[0]) == query
    assert task.demonstration(task.train[1]) == f"{query} {words[1]}"
    assert list(task.label_words) == words
    assert task.source == "the folder in ICL_DATA"


def test_evaluation_cap(data):
    rows = [{"text": str(n), "label": n % 4} for n in range(2500)]
    write(data, "agnews/test.jsonl", rows)
    want = datasets.Dataset.from_list(rows).shuffle(seed=1).select(range(2000))
    assert list(load_task("agnews").evaluation) == want.to_list()


def test_a_part_of_the_examples(data):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(9)]
    write(data, "mr/validation.jsonl", rows)
    order = datasets.Dataset.from_list(rows).shuffle(seed=1)["text"][:4]
    assert [e["text"] for e in load_task("mr").head(4).evaluation] == sorted(order)
    assert len(load_task("mr").head(20).evaluation) == 9
    with pytest.raises(ValueError, match="0 evaluation"):
        load_task("mr").head(0)


def test_sampling_is_that_of_datasets(data):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(500)]
    write(data, "mr/train.jsonl", rows)
    for seed in range(1, 8):
        want = datasets.Dataset.from_list(rows).shuffle(seed=seed)
        assert load_task("mr").sample(32, seed) == want.select(range(32)).to_list()


def test_more_demonstrations_than_examples(data):
    with pytest.raises(ValueError, match="mr has 2 .* 3"):
        load_task("mr").sample(3, seed=1)


@pytest.mark.parametrize(
    ("name", "hub", "field"),
    [
        ("sst2", ("SetFit/sst2",), "text"),
        ("sst2_phrases", ("nyu-mll/glue", "sst2"), "sentence"),
    ],
)
def test_hub_rows_become_examples(name, hub, field, monkeypatch):
    def load_dataset(*asked, split):
        assert asked == hub
        rows = {field: ["fine ", "poor"], "label": [1, 0], "idx": [0, 1]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.delenv("ICL_DATA", raising=False)
    monkeypatch.setattr(tasks, "ask_hub", lambda *_: "there")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(name)
    assert task.train[0] == {"text": "fine", "label": 1}
    assert task.source == f"the hub, {' '.join(hub)}"


def test_a_data_set_that_the_hub_refuses(monkeypatch):
    monkeypatch.delenv("ICL_DATA", raising=False)
    monkeypatch.setattr(tasks, "ask_hub", lambda *_: "401 from the hub")
    with pytest.raises(ValueError, match="SetFit/sst5.*401"):
        load_task("sst5")


def test_no_source_at_all(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.delenv("ICL_DATA", raising=False)
    monkeypatch.setattr(tasks, "ask_hub", lambda *_: "there")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'cb'.* mr, subj_rebuilt, movie5"):
        load_task("cb")


def test_unknown_task():
    with pytest.raises(ValueError, match="'imdb'.* sst2, sst5.*sst2_phrases"):
        load_task("imdb")


def test_data_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv("ICL_DATA", "/no/such/folder")
    with pytest.raises(ValueError, match="'/no/such/folder'"):
        load_task("mr")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": "a"}', "'label'"),
        ('{"text": "a", "label": 2}', "label 2"),
        ('{"text": "a", "label": "1"}', "label '1'"),
        ('{"text": " ", "label": 1}', "text"),
        ('{"text": "a", ', "JSON"),
        ('["a", 1]', "JSON"),
        ("7", "JSON"),
        ("", "JSON"),  # a blank line that is not the last
        ('{"text": null, "label": 1}', "'text' .*None"),
        ('{"text": ["a", "b"], "label": 1}', "'text'"),
        ('{"text": 7, "label": 1}', "'text'"),
        ('{"text": "a", "label": true}', "label True"),
        ('{"text": "a", "label": 1.0}', "label 1.0"),
        ('{"text": "a", "label": 1, "score": NaN}', "NaN"),
        ('{"text": "a", "text": "b", "label": 1}', "twice"),
        ('{"text": "très bon", "label": 1}'.encode("latin-1"), "UTF-8"),
        ('{"text": "a", "label": 1}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_malformed_line_names_file_and_line(line, named, data):
    path, good = data / "mr" / "train.jsonl", b'{"text": "a", "label": 0}\n'
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(ValueError, match=f"train.jsonl, line 2: .*{named}"):
        load_task("mr")


def test_a_line_ends_with_a_line_feed_alone(data):
    """JSON text may hold other characters that end a line elsewhere."""
    text = "one\u2028two\x85three"
    row = json.dumps({"text": text, "label": 0}, ensure_ascii=False)
    (data / "mr" / "train.jsonl").write_text(row + "\n", encoding="utf-8")
    assert load_task("mr").train == [{"text": text, "label": 0}]


def test_what_editors_add_to_a_file_is_no_example(data):
    """A byte-order mark, blank last lines, Windows' line ends, blanks at the ends."""
    rows = '{"text": " é \\n", "label": 1}\r\n{"text": "a", "label": 0}\r\n\r\n\n'
    (data / "mr" / "train.jsonl").write_text(rows, encoding="utf-8-sig", newline="")
    want = [{"text": "é", "label": 1}, {"text": "a", "label": 0}]
    assert load_task("mr").train == want


def test_missing_split(data):
    (data / "subj" / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"subj/test.jsonl"):
        load_task("subj")
    (data / "subj" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"subj/test.jsonl"):
        load_task("subj")


def test_a_broken_link_is_not_passed_over(data, monkeypatch):
    (data / "sst2_phrases").symlink_to(data / "nowhere")
    (data / "cb" / "loop").symlink_to(data / "cb" / "loop")
    assert load_task("cb").train  # other links do not matter
    monkeypatch.setattr(tasks, "ask_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=r"sst2_phrases/train.jsonl"):
        load_task("sst2_phrases")


@pytest.mark.slow
def test_mr_from_the_registry(monkeypatch):
    monkeypatch.delenv("ICL_DATA", raising=False)
    task = load_task("mr")
    assert len(task.train) + len(task.evaluation) == 8530
    assert np.bincount(task.labels()).tolist() == [533, 533]
    texts = {e["text"] for e in task.train}
    assert not texts & {e["text"] for e in task.evaluation}
    assert "held out" in task.source
    first = 'the rock is destined to be the 21st century\'s new " conan "'
    assert task.train[0]["text"].startswith(first)
    whole = " ".join(e["text"] for e in (*task.train, *task.evaluation))
    assert not any("\x80" <= c <= "\x9f" for c in whole), "cp1252 read as Latin-1"


@pytest.mark.slow
def test_kin_tasks():
    subj, movie = load_task("subj_rebuilt"), load_task("movie5")
    counts = np.bincount([e["label"] for e in (*subj.train, *subj.evaluation)])
    assert counts[0] == counts[1] > 5000
    for task in (subj, movie):
        assert not {e["text"] for e in task.train} & {
            e["text"] for e in task.evaluation
        }
    assert len(movie.train) + len(movie.evaluation) == 10605
    rated = {e["text"]: e["label"] for e in (*movie.train, *movie.evaluation)}
    assert rated["Effective but too tepid biopic"] == 2  # rated -0.6, the middle bin


def test_cut_points_of_movie5(tmp_path, monkeypatch):
    """At each bound and right below it, in the form of the archive."""
    means = [-4, -1.81, -1.8, -0.61, -0.6, 0.59, 0.6, 1.79, 1.8, 4]
    lines = "".join(f"{n}\t{m}\ttext {n}\n" for n, m in enumerate(means * 120))
    inner, outer = io.BytesIO(), tmp_path / "outer.tar.gz"
    for target, name, held in [
        (inner, "movieReviewSnippets_GroundTruth.txt", lines.encode()),
        (outer, "hutto_ICWSM_2014.tar.gz", inner),
    ]:
        held = held if isinstance(held, bytes) else held.getvalue()
        where = {"fileobj" if target is inner else "name": target}
        with tarfile.open(mode="w:gz", **where) as archive:
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(held)
            archive.addfile(info, io.BytesIO(held))
    monkeypatch.setattr(tasks, "fetch", lambda name: outer)
    task = load_task("movie5")
    found = {e["text"]: e["label"] for e in (*task.train, *task.evaluation)}
    levels = [found[f"text {n}"] for n in range(1200)]
    assert levels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] * 120


def test_label_words_and_what_joins_them():
    rows = [{"text": "一", "label": 0}]
    task = Task("zh", "{text}：", ["好", "坏"], rows, rows, blank="")
    assert task.demonstration(rows[0]) == "一：好"
    assert task.digest() != Task("zh", "{text}：", ["好", "坏"], rows, rows).digest()
    for words in ("好坏", []):
        with pytest.raises(ValueError, match="label_words"):
            Task("zh", "{text}：", words, rows, rows)


def test_a_seventh_task():
    rows = [{"word": "one", "label": 0}, {"word": "uno", "label": 1}]
    task = Task("language", "{word} is", ["English", "Spanish"], rows, rows)
    assert task.demonstration(rows[1]) == "uno is Spanish"
    with pytest.raises(ValueError, match=r"language, train\[0\].*'text'"):
        Task("language", "{text} is", ["English", "Spanish"], rows, rows)


def test_prefix_layouts(data):
    task, tokenizer = load_task("mr"), word_tokenizer()
    demonstration = "Review: a b Sentiment: Negative"
    wanted = {
        "newline": ("\n", f"\n{demonstration}\n"),
        "bare": ("", f"{demonstration}\n"),
        "eos": ("<s>", f"<s>{demonstration}</s>"),
    }
    for layout, (alone, behind) in wanted.items():
        assert prompt_prefix(task, [], tokenizer, layout) == alone
        assert prompt_prefix(task, task.train[:1], tokenizer, layout) == behind
    assert prompt_prefix(task, [], tokenizer) == "\n"
    with pytest.raises(ValueError, match="'zz' is not one of newline, bare, eos"):
        prompt_prefix(task, [], tokenizer, "zz")


def test_an_opening_as_the_tokenizer_has_it(data):
    """Its beginning-of-text token, if it puts one before a text by itself."""
    task, tokenizer = load_task("mr"), word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert prompt_prefix(task, [], tokenizer) == "<s>\n"
    assert prompt_prefix(task, [], tokenizer, "bare") == ""
    tokenizer.eos_token = None
    assert prompt_prefix(task, task.train[:1], tokenizer).startswith("<s>\nReview")
    with pytest.raises(ValueError, match="no end-of-text token.*'newline'"):
        prompt_prefix(task, [], tokenizer, "eos")


def test_whose_token_is_it(data):
    task, tokenizer = load_task("mr"), word_tokenizer()
    same = [task.train[0]] * 2
    owner = demonstration_of_tokens(task, same, tokenizer, "eos")
    assert owner.tolist() == [-1, *[0] * 7, -1, *[1] * 7, -1]
    assert demonstration_of_tokens(task, [], tokenizer, "eos").tolist() == [-1]
    owner = demonstration_of_tokens(task, same, tokenizer)  # drops line breaks
    assert owner.tolist() == [0] * 7 + [1] * 7


@pytest.mark.parametrize("trim", [True, False])
def test_tokens_of_characters_in_pieces_and_of_blanks(data, trim):
    """Bytes of one character, and blanks that a token's span leaves out."""
    backend = Tokenizer(
        models.BPE({c: n for n, c in enumerate(ByteLevel.alphabet())}, [])
    )
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.post_processor = ByteLevelProcessor(trim_offsets=trim)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "\né  \U0001f600\n\nab "
    starts = [n for n, c in enumerate(text) for _ in c.encode()]
    assert token_starts(tokenizer, text).tolist() == starts
    task = load_task("mr")
    examples = [{"text": "é\U0001f600  x", "label": 1}] * 2
    size = len(task.demonstration(examples[0]).encode())
    owner = demonstration_of_tokens(task, examples, tokenizer)
    assert owner.tolist() == [-1, *[0] * size, -1, *[1] * size, -1]


def test_a_tokenizer_that_does_not_say_where_its_tokens_are():
    with pytest.raises(ValueError, match="Slow does not say which characters"):
        token_starts(type("Slow", (), {"is_fast": False})(), "a")


def test_digest_sees_every_part(data):
    before = load_task("mr").digest()
    assert load_task("mr").digest() == before
    write(data, "mr/train.jsonl", [example("mr", 1), example("mr", 1)])
    assert load_task("mr").digest() != before


# -- a file of the reader's own ------------------------------------------------------


def own_file(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_file_is_a_task(tmp_path):
    rows = [{"text": f"t{n}", "label": ["bad", "good", 0, 1][n % 4]} for n in range(9)]
    path = own_file(tmp_path / "mine.jsonl", rows)
    task = load_task(path, "Review: {text} Mood:", "bad, good")
    assert task.name == "mine"
    assert (len(task.train), len(task.evaluation)) == (5, 4)
    found = {e["text"]: e["label"] for e in [*task.train, *task.evaluation]}
    assert found == {f"t{n}": n % 2 for n in range(9)}
    example = {"text": "t", "label": 1}
    assert task.demonstration(example) == "Review: t Mood: good"
    assert load_task(path, "Review: {text} Mood:", "bad, good") == task
    chinese = own_file(tmp_path / "a.jsonl", [{"text": "好片", "label": "好"}] * 2)
    task = load_task(chinese, "评论：{text} 情感：", "坏, 好")
    assert task.demonstration(task.train[0]) == "评论：好片 情感：好"


@pytest.mark.parametrize(
    ("rows", "template", "labels", "named"),
    [
        (2, "", "a, b", "needs a template"),
        (2, "no field", "a, b", "needs a template.*no field"),
        (2, "{text} is {", "a, b", "template"),
        (2, "{text}:", "a", "two or more different label words"),
        (2, "{text}:", "a, a", "two or more different label words"),
        (1, "{text}:", "a, b", "one example"),
        (0, "{text}:", "a, b", "missing or empty"),
        (2, "{title}:", "a, b", "line 1: no field 'title'"),
        (2, "{text}:", "b, c", "line 1: label 'a' is not"),
    ],
)
def test_a_file_that_is_no_task(rows, template, labels, named, tmp_path):
    path = own_file(tmp_path / "mine.jsonl", [{"text": "t", "label": "a"}] * rows)
    with pytest.raises(ValueError, match=named):
        load_task(path, template, labels)


def test_a_named_task_has_its_own_words():
    with pytest.raises(ValueError, match="subj_rebuilt has its own"):
        load_task("subj_rebuilt", labels="a, b")
