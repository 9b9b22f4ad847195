"""One model on one task of the reader's own: a page, a record, refusals."""

import json
import re

import nbformat
import pytest
import transformers
from bs4 import BeautifulSoup
from conftest import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from icl_book import build
from icl_book.build import write_report
from icl_book.store import ROOT, BookError

pytestmark = pytest.mark.slow
WORDS = [f"w{n}" for n in range(10)] + [f"好{n}" for n in range(10)]


def byte_tokenizer():
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate([*letters, "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>"
    )


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where reports go; beside it the notebook and a random model."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    tiny_model("llama", vocab_size=257).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path


def given(root, rows, template="Text: {text} Kind:", labels="no, yes", **options):
    """A report's parameters, the rows in a file."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (root / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    named = dict(model=str(root / "tiny"), task=str(root / "mine.jsonl"), draws=2)
    return named | dict(template=template, labels=labels) | options


def report(root, rows, **options):
    return write_report(given(root, rows, **options))


def test_a_random_model_on_a_task_of_twenty_classes(root):
    rows = [{"text": f"t{n} x", "label": WORDS[n // 3]} for n in range(60)]
    path = report(root, rows, labels=", ".join(WORDS), queries=6)
    assert path.parent == root / "_build" / "reports"
    assert re.fullmatch(r"tiny-mine-[0-9a-f]{6}\.html", path.name)
    page = BeautifulSoup(path.read_text("utf-8"), "html.parser")
    assert [h.get_text()[:8] for h in page.find_all("h2")][:2] == [
        "Verdicts",
        "What was",
    ]
    assert all(tag["src"].startswith("data:") for tag in page.find_all(src=True))
    assert not page.find_all("link", href=True)
    assert not re.search(r"import\(|fetch\(", page.get_text())
    pictures = page.find_all("img")
    assert len(pictures) == 3
    assert all(len(picture["alt"]) > 60 for picture in pictures)
    record = json.loads(path.with_suffix(".json").read_text())
    facts = record["facts"]
    assert record["rows"][0]["demonstrations"] < 16  # no more fit
    assert "supported" not in json.loads(facts["verdicts"]).values()  # learned nothing
    measures = {(row["measure"], row["control"]) for row in record["rows"]}
    assert {
        ("accuracy, plain", "ICL"),
        ("SimAOU", "itself"),
        ("SimAOU, not normalised", "minus: untrained model"),
        ("Kendall", "minus: ascent"),
        ("update, centred", ""),
    } <= measures
    judged = [row for row in record["rows"] if "low" in row]
    assert len(judged) > 20
    assert all(r["low"] <= r["mean"] <= r["high"] for r in judged)


def test_what_makes_no_report_is_said(root):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    with pytest.raises(BookError, match="one example to evaluate on"):
        report(root, rows)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([("a", 0)] * 8, "all of one class"),
        ([("a" * 300, 0), ("b", 1)] * 4, "do not fit into the model's 256 tokens"),
    ],
)
def test_what_else_makes_none(rows, named, root):
    rows = [{"text": text, "label": label} for text, label in rows]
    asked = given(root, rows)
    with pytest.raises(ValueError, match=named):
        run_here(asked)


def test_equal_label_words_make_none(root):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(8)]
    with pytest.raises(ValueError, match="different label words"):
        run_here(given(root, rows, labels="yes, yes"))


def test_a_line_that_is_no_json_makes_none(root):
    asked = given(root, [{"text": "a", "label": 0}] * 4)
    with (root / "mine.jsonl").open("a") as file:
        file.write("\ntext, yes")
    with pytest.raises(ValueError, match="mine.jsonl, line 5"):
        run_here(asked)


def test_an_encoder_makes_none(root):
    tiny_model("bert", vocab_size=257).save_pretrained(root / "tiny")
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(8)]
    with pytest.raises(ValueError, match="is not causal"):
        run_here(given(root, rows))


def run_here(parameters):
    """The cells of the report in this process: a kernel would import all anew."""
    scope = {}
    for cell in nbformat.read(ROOT / "experiments" / "report.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)
            if "parameters" in cell.metadata.get("tags", ()):
                scope |= parameters
