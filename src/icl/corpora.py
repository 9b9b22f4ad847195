"""Running text to train language models on."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from icl.tasks import data_folder, mend_cp1252, movie_reviews

BYTES = 256  # the vocabulary of as_bytes


class Corpus(NamedTuple):
    """Text to train on, text to measure on, and where both come from."""

    train: str
    held_out: str
    source: str


def load_text(name: str) -> Corpus:
    """A corpus by name: ``reviews``, ``shakespeare`` or ``wikitext2``.

    ``reviews`` are 25,000 film reviews (Maas et al. 2011) in a registry package,
    every twentieth held out. The others are looked for in the folder that
    ``ICL_DATA`` names: ``shakespeare`` in ``tinyshakespeare/input.txt``, its last
    tenth held out, and ``wikitext2`` (Merity et al. 2017) in ``wikitext2/valid.txt``
    to train on and ``wikitext2/test.txt``, held out.

    Raises:
        ValueError: another name, or a corpus that ``ICL_DATA`` does not hold.
        AssetError: the registry package cannot be fetched.
    """
    if name == "reviews":
        return _reviews()
    if name == "shakespeare":
        text = _read("tinyshakespeare/input.txt")
        cut = len(text) * 9 // 10
        return Corpus(text[:cut], text[cut:], "tinyshakespeare, the folder in ICL_DATA")
    if name == "wikitext2":
        train, held_out = _read("wikitext2/valid.txt"), _read("wikitext2/test.txt")
        return Corpus(train, held_out, "wikitext-2, the folder in ICL_DATA")
    raise ValueError(f"corpus {name!r} is not one of reviews, shakespeare, wikitext2")


def as_bytes(text: str) -> Int[np.ndarray, " N"]:
    """The bytes of a text in UTF-8: tokens in a vocabulary of 256."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def _read(name):
    folder = data_folder()
    if folder is None or not (folder / name).is_file():
        where = f"{folder / name} is not there" if folder else "ICL_DATA is not set"
        raise ValueError(
            f"no text {name}: {where}. ICL_DATA names a folder that holds it; the "
            "corpus 'reviews' needs none"
        )
    try:
        text = (folder / name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / name} is not UTF-8 ({error})") from error
    if not text.strip():
        raise ValueError(f"{folder / name} is empty")
    return text


def _reviews():
    reviews = dict.fromkeys(row["text"] for row in movie_reviews("imdb"))
    reviews = [mend_cp1252(r).replace("<br /><br />", "\n") for r in reviews]
    reviews = [reviews[i] for i in np.random.default_rng(0).permutation(len(reviews))]
    held_out = reviews[::20]
    train = [r for n, r in enumerate(reviews) if n % 20]
    source = "the registry package movie-reviews (its IMDb reviews)"
    return Corpus("\n\n".join(train), "\n\n".join(held_out), source)
