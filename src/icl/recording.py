"""What attention does while queries are scored, kept on disk.

The recording rides on the packed pass of :mod:`icl.scoring`: a pack's attention
outputs, queries and scores are written to one safetensors file as soon as the
pack has run, so memory does not grow with the number of queries.
"""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from icl import scoring
from icl.heads import attention_modules, watch_queries

#: Which token is read, the prompt's last, from which the label is predicted, or
#: the last of the first label's word behind it, which the code of Dai et al. reads.
POSITIONS = ("prompt", "label")

LIKELIEST = 10  # next tokens that are kept; Shen et al. (2024) compare as many


class Recording(NamedTuple):
    """What :func:`record` kept, for N queries in their order.

    Attributes:
        scores: as :func:`icl.scoring.score` gives them, ``(N, C)``.
        outputs: outputs of the attention modules at the position that was read,
            after the output projection and before the residual, ``(N, L, d)``.
        queries: the attention queries there, ``(N, L, H, d_h)``.
        own: N arrays ``(L, H, n)``: scores before the softmax over the query's
            own tokens, the one that is read included.
        demonstrations: the same over the tokens of the prefix, of the first
            queries only, ``(attended, L, H, P)``.
        tokens: ids of the ten likeliest next tokens after the prompt, the
            likeliest first, ``(N, 10)``; at either position the prompt's.
        log_p: their log-probabilities, ``(N, 10)``.
    """

    scores: np.ndarray
    outputs: np.ndarray
    queries: np.ndarray
    own: list
    demonstrations: np.ndarray
    tokens: np.ndarray
    log_p: np.ndarray


@torch.inference_mode()
def record(
    model,
    tokenizer,
    queries,
    label_words,
    demonstrations="",
    *,
    folder,
    positions=("prompt",),
    attended=100,
):
    """Score queries and keep what attention did at one or two of their tokens.

    Args:
        model, tokenizer, queries, label_words, demonstrations: as for
            :func:`icl.scoring.score`.
        folder: where to write; it appears when the last pack has run, so a
            killed run leaves none.
        positions: which of ``POSITIONS`` are read, in one and the same pass.
        attended: for how many of the first queries the scores over the prefix
            are kept (the original code's figures for Kendall's tau use 100).

    Returns:
        ``{position: Recording}``, as :func:`read` reads it from ``folder``.

    Raises:
        ValueError: an unknown position, a folder that exists, a model whose
            attention cannot be reached; and see :func:`icl.scoring.score`.
        FloatingPointError: the model's output is not finite.
    """
    folder = Path(folder)
    if isinstance(positions, str) or not positions or {*positions} - {*POSITIONS}:
        raise ValueError(
            f"positions must be some of {', '.join(POSITIONS)}, not {positions!r}"
        )
    if folder.exists():
        raise ValueError(f"the folder {folder} exists; delete it or name another")
    prefix, encoded, labels = scoring._encode(
        tokenizer, queries, label_words, demonstrations
    )
    scoring._check_length(model, prefix, encoded, labels)
    before = len(prefix)
    prefix, encoded = scoring._share(prefix, encoded)
    keys_values = scoring._encode_prefix(model, prefix)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for number, pack in enumerate(scoring._packs(encoded, labels)):
            whole = 0 if "label" in positions else None
            layout = scoring._lay_out(pack, labels, len(prefix), whole)
            found = _run(model, keys_values, layout, pack, labels, positions, before)
            for position, arrays in found.items():
                arrays |= _first(arrays, attended)
                save_file(arrays, scratch / f"{position}-{number:05d}.safetensors")
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read(folder)


def read(folder) -> dict:
    """The recording that lies in ``folder``, ``{position: Recording}``.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for position in POSITIONS:
        files = sorted(Path(folder).glob(f"{position}-*.safetensors"))
        if files:
            found[position] = _join([load_file(file) for file in files])
    if not found:
        raise ValueError(f"there is no recording in {folder}")
    return found


def _join(packs):
    def gather(name, by):
        order = np.argsort(np.concatenate([pack[by] for pack in packs]))
        return np.concatenate([pack[name] for pack in packs])[order]

    own = {}
    for pack in packs:
        ends = np.cumsum(pack["lengths"])[:-1]
        parts = np.split(pack["own"], ends, axis=-1)
        own.update(zip(pack["n"].tolist(), parts, strict=True))
    return Recording(
        scores=gather("scores", "n"),
        outputs=gather("outputs", "n"),
        queries=gather("queries", "n"),
        own=[own[n] for n in sorted(own)],
        demonstrations=gather("demonstrations", "attended"),
        tokens=gather("tokens", "n"),
        log_p=gather("log_p", "n"),
    )


def _first(arrays, attended):
    """The scores over the demonstrations, of the first queries only."""
    chosen = arrays["n"] < attended
    kept = np.ascontiguousarray(arrays["demonstrations"][chosen])
    return {"attended": arrays["n"][chosen], "demonstrations": kept}


def _run(model, keys_values, layout, pack, labels, positions, before):
    """Run a pack; returns the arrays of its file, for each position.

    ``before`` of the prefix's tokens are demonstrations', the rest the queries'.
    """
    with watch_queries(model) as queries, _watch_outputs(model) as outputs:
        log_p, cache = scoring._run(model, keys_values, layout)
    scores = np.array(list(scoring._label_scores(log_p, layout, labels)))
    scoring._check_finite(model, scores)
    after_prompt = log_p[[last for last, _ in layout.slots]]
    best, tokens = after_prompt.topk(min(LIKELIEST, log_p.shape[-1]))
    if not len(queries) == len(outputs) == len(cache.layers):
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be reached; covered are "
            "gpt2, opt, xglm, gpt_neox, llama and qwen"
        )
    found = {}
    for position in positions:
        branches = [scoring.TRUNK] + ([0] if position == "label" else [])
        mine = torch.isin(layout.branch, torch.tensor(branches))
        columns = [(mine & (layout.query == n)).nonzero()[:, 0] for n, _ in pack]
        start = cache.get_seq_length() - len(layout.ids)
        shared = torch.arange(before, start)
        own = [torch.cat([shared, start + column]) for column in columns]
        found[position] = {
            "n": np.array([n for n, _ in pack]),
            "scores": scores,
            "tokens": tokens.numpy(),
            "log_p": best.numpy(),
            **_at_the_last(own, before, start, queries, outputs, cache),
        }
    return found


def _at_the_last(own, before, start, queries, outputs, cache):
    """What each query's last token reads.

    ``own`` are the places of the queries' tokens, counted from the first of the
    prefix; the row begins at place ``start``.
    """
    places = torch.stack([place[-1] for place in own]) - start
    read_by = [layer[:, places] for layer in queries]
    maps = torch.stack(
        [
            _scores(query, layer.keys[0])
            for query, layer in zip(read_by, cache.layers, strict=True)
        ]
    )
    mine = [maps[:, :, i, place] for i, place in enumerate(own)]
    return {
        "outputs": _array(torch.stack([rows[places] for rows in outputs], 1)),
        "queries": _array(torch.stack(read_by, 1).permute(2, 1, 0, 3)),
        "own": _array(torch.cat(mine, -1)),
        "lengths": np.array([len(place) for place in own]),
        "demonstrations": _array(maps[..., :before].permute(2, 0, 1, 3)),
    }


def _scores(query, keys):
    """``(H, p, P + T)`` from queries of every head and keys that heads may share."""
    shared = query.reshape(len(keys), -1, query.shape[-1])
    return (shared @ keys.mT).reshape(*query.shape[:2], -1)


def _array(tensor):
    return tensor.float().contiguous().cpu().numpy()


@contextmanager
def _watch_outputs(model):
    """A list that collects the output ``(T, d)`` of every attention module."""
    collected = []

    def keep(module, inputs, output):
        collected.append(output[0][0])

    hooks = [m.register_forward_hook(keep) for m in attention_modules(model)]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
