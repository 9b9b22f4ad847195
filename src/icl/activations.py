"""What attention computes: queries, keys, values, scores and outputs.

:func:`capture_qkv` reads one prompt. :func:`record` uses the packed pass of
:mod:`icl.scoring`: a row's attention outputs, queries and scores are written to one
safetensors file as soon as the row has run, so memory does not grow with the number
of queries.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from icl.scoring import TRUNK, Packing, agree, check_eval, context_length, facts

#: The families whose attention can be reached.
FAMILIES = "gpt2, opt, xglm, gpt_neox, llama and qwen"

#: A recording is of the last token of the prompt, which predicts the label, or of the
#: last of the first label word after it, as in the code of Dai et al.
POSITIONS = ("prompt", "label")

_LIKELIEST = 10  # next tokens that are kept; Shen et al. (2024) compare as many


class Heads(NamedTuple):
    """Queries, keys and values of the heads of one layer.

    Position embeddings are in them (rotary ones too) and the queries carry the
    factor ``1/√d_h``, so a head's scores are ``query @ key.mT`` and nothing
    else. Keys and values that several heads share are repeated for each.

    Attributes:
        query: of the T tokens that were read.
        key, value: of these, behind those of the P tokens of the prefix.
    """

    query: Float[Tensor, "... H T d_h"]
    key: Float[Tensor, "... H P+T d_h"]
    value: Float[Tensor, "... H P+T d_h"]


@torch.inference_mode()
def capture_qkv(
    model, ids: Sequence[int] | Int[Tensor, " T"], prefix=(), start=None
) -> list[Heads]:
    """Queries, keys and values of every head while a model reads token ids.

    Args:
        model: from :func:`icl.models.load_model`, of one of ``FAMILIES``.
        ids: what is read, one token at least.
        prefix: what an earlier call returned for the tokens that stand before
            ``ids``. They are attended to and not computed again.
        start: position of the first token; default the prefix's length.

    Returns:
        the heads of each layer, in the model's dtype.

    Raises:
        ValueError: the model's attention cannot be reached, or the tokens are more
            than it holds.
    """
    ids = torch.as_tensor(ids, device=model.device)
    with capture_queries(model) as queries:
        cache, _ = _read(model, ids, prefix, start)
    return from_cache(queries, cache)


def _read(model, ids, prefix=(), start=None):
    heads = model.config.num_attention_heads
    group = heads // (getattr(model.config, "num_key_value_heads", None) or heads)
    shared = [[part[None, ::group] for part in layer[1:]] for layer in prefix]
    cache = DynamicCache(shared)
    length = cache.get_seq_length()
    start = length if start is None else start
    end, context = max(start, length) + len(ids), context_length(model.config)
    if context is not None and end > context:
        raise ValueError(f"{end} tokens are too many: the model holds {context}")
    ahead = torch.ones(len(ids), length + len(ids), dtype=torch.bool).triu(length + 1)
    mask = torch.zeros(ahead.shape, dtype=model.dtype)
    mask.masked_fill_(ahead, torch.finfo(model.dtype).min)
    logits = model(
        ids[None],
        position_ids=torch.arange(start, start + len(ids), device=ids.device)[None],
        attention_mask=mask[None, None].to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[0, -1:]
    return cache, logits


def from_cache(queries: list[Float[Tensor, "H T d_h"]], cache) -> list[Heads]:
    """Heads of each layer from :func:`capture_queries` and the pass's cache."""
    found = []
    for query, layer in zip(queries, cache.layers, strict=True):
        times = len(query) // layer.keys.shape[1]
        parts = (x[0].repeat_interleave(times, 0) for x in (layer.keys, layer.values))
        found.append(Heads(query, *parts))
    return found


def capture_queries(model):
    """A list that collects the attention queries of every layer that runs.

    One ``(H, T, d_h)`` per layer and forward pass of one sequence, after position
    embeddings and with the factor ``1/√d_h``.

    Raises:
        ValueError: the model is in training mode, or the queries do not reproduce its
            attention weights and prediction on a few tokens (compared once).
    """
    check_eval(model)
    known = facts(model)
    if "heads" not in known:
        known["heads"] = _has_heads(model)
    if not known["heads"]:
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be reached, or is more "
            f"than a softmax of queries times keys; covered are {FAMILIES}"
        )
    return _capturing(model)


@torch.no_grad()  # what a model keeps of inference mode could not be trained
def _has_heads(model):
    ids = torch.arange(16, device=model.device) * 7 % model.config.vocab_size
    usual = getattr(model.config, "_attn_implementation", None)
    try:
        with _capturing(model) as queries:
            cache, logits = _read(model, ids)
        own = model(ids[None], use_cache=False).logits[0, -1:]
        if model._supports_attention_backend:
            model.set_attn_implementation("eager")
        weights = model(ids[None], output_attentions=True).attentions
        heads = from_cache(queries, cache)
        pairs = [[x.float().log_softmax(-1) for x in (logits, own)]]
        for each, weight in zip(heads, weights, strict=True):
            scores = (each.query @ each.key.mT).float()
            future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
            found = scores.masked_fill(future, -torch.inf).softmax(-1)
            pairs.append([found.flatten(1), weight[0].float().flatten(1)])
        return all(agree(*pair, model.dtype) for pair in pairs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever the model does not take
        return False
    finally:
        if model._supports_attention_backend:
            model.set_attn_implementation(usual)


@contextmanager
def _capturing(model):
    collected = []

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        collected.append(query[0].detach() * scaling)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )

    def project(module, inputs, output):  # XGLM's attention has no interface
        heads = model.config.num_attention_heads
        query = output[0].detach().unflatten(-1, (heads, -1)).transpose(0, 1)
        collected.append(query * query.shape[-1] ** -0.5)

    with ExitStack() as undo:
        if model._supports_attention_backend:
            AttentionInterface.register("icl_heads", attend)
            AttentionMaskInterface.register("icl_heads", sdpa_mask)
            usual = model.config._attn_implementation
            undo.callback(model.set_attn_implementation, usual)
            model.set_attn_implementation("icl_heads")
        else:
            for name, module in model.named_modules():
                if name.endswith("self_attn.q_proj"):
                    undo.enter_context(module.register_forward_hook(project))
        yield collected


@contextmanager
def capture_outputs(model):
    """A list that collects the output ``(T, d)`` of every attention module."""
    collected = []

    def keep(module, inputs, output):
        collected.append(output[0][0])

    with ExitStack() as hooks:
        for module in attention_modules(model):
            hooks.enter_context(module.register_forward_hook(keep))
        yield collected


def attention_modules(model) -> list[torch.nn.Module]:
    """The attention module of every layer, in order."""
    return [
        module
        for name, module in model.named_modules()
        if re.search(r"\.(attn|self_attn|attention|attention\.self)$", name)
        and not hasattr(module, "self")  # BERT's is inside of that
    ]


def stack_layers(layers: list[Heads]) -> Heads:
    """The heads of L layers as one :class:`Heads` of tensors ``(L, H, ..., d_h)``."""
    return Heads(*(torch.stack(part) for part in zip(*layers, strict=True)))


class Recording(NamedTuple):
    """What :func:`record` has kept of N queries, in their order.

    Attributes:
        scores: as :func:`icl.scoring.score` gives them.
        outputs: outputs of the attention modules at the token that is read,
            after the output projection and before the residual.
        queries: the attention queries there.
        tokens, log_p: ids and log-probabilities of the K = 10 likeliest next tokens,
            the likeliest first; at either position those after the prompt.
        own: for each query scores ``(L, H, n)`` before the softmax over its own n
            tokens, the one that is read included.
        demonstrations: the same over the P tokens of the demonstrations, of the
            first A queries only.
    """

    scores: Float[np.ndarray, "N C"]
    outputs: Float[np.ndarray, "N L d"]
    queries: Float[np.ndarray, "N L H d_h"]
    tokens: Int[np.ndarray, "N K"]
    log_p: Float[np.ndarray, "N K"]
    own: list[Float[np.ndarray, "L H n"]]
    demonstrations: Float[np.ndarray, "A L H P"]


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
    blank=" ",
) -> None:
    """Score queries and keep what attention did at one or two of their tokens.

    Args:
        model, tokenizer, queries, label_words, demonstrations, blank: as for
            :func:`icl.scoring.score`.
        folder: new folder, for :func:`read_recording`; it appears when the last row
            has run, so an interrupted run leaves none.
        positions: which of ``POSITIONS`` are read, in one pass.
        attended: for how many of the first queries the scores over the
            demonstrations are kept; default 100, as in the original code.

    Raises:
        ValueError: an unknown position, a folder that exists, a model whose
            attention cannot be reached; and see :func:`icl.scoring.score`.
        FloatingPointError: the model's output is not finite.
    """
    folder = Path(folder)
    if isinstance(positions, str) or not positions or {*positions} - {*POSITIONS}:
        raise ValueError(f"positions are some of {POSITIONS}, not {positions!r}")
    if folder.exists():
        raise ValueError(f"the folder {folder} exists; delete it or name another")
    packing = Packing(model, tokenizer, queries, label_words, demonstrations, blank)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        rows = packing.rows(whole=0 if "label" in positions else None)
        for number, row in enumerate(rows):
            found = _record_row(packing, row, positions, attended)
            for position, arrays in found.items():
                save_file(arrays, scratch / f"{position}-{number:05d}.safetensors")
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_recording(folder) -> dict[str, Recording]:
    """The recording in a folder, by position."""
    files = {p: sorted(Path(folder).glob(f"{p}-*.safetensors")) for p in POSITIONS}
    if not any(files.values()):
        raise ValueError(f"there is no recording in {folder}")
    return {
        p: _join([load_file(file) for file in own]) for p, own in files.items() if own
    }


def _join(rows):
    def gather(name, by="n"):
        order = np.argsort(np.concatenate([row[by] for row in rows]))
        return np.concatenate([row[name] for row in rows])[order]

    arrays = {name: gather(name) for name in Recording._fields[:5]}
    maps = {name: part for row in rows for name, part in row.items()}
    arrays["own"] = [maps[f"own {n}"] for n in range(len(arrays["scores"]))]
    return Recording(**arrays, demonstrations=gather("demonstrations", "attended"))


def _record_row(packing, row, positions, attended):
    """Run a row of queries: the arrays of its file, for each position."""
    model = packing.model
    with capture_queries(model) as queries, capture_outputs(model) as outputs:
        log_p, cache = packing.run(row)
    if not len(queries) == len(outputs) == len(cache.layers):
        raise ValueError(f"not every layer of {type(model).__name__} has attention")
    packing.check(row, log_p)
    after_prompt = log_p[[last for last, _ in row.slots]]
    best, tokens = after_prompt.topk(min(_LIKELIEST, log_p.shape[-1]))
    n = np.array(row.numbers)
    of_queries = {
        "n": n,
        "attended": n[n < attended],
        "scores": packing.label_scores(row, log_p),
        "tokens": tokens.numpy(),
        "log_p": best.numpy(),
    }
    start = cache.get_seq_length() - len(row.ids)
    found = {}
    for position in positions:
        branches = torch.tensor([TRUNK] + ([0] if position == "label" else []))
        mine = torch.isin(row.branch, branches)
        shared = torch.arange(packing.shown, start)
        own = [  # places of each query's tokens, from the first of the prefix
            torch.cat([shared, start + (mine & (row.query == n)).nonzero()[:, 0]])
            for n in row.numbers
        ]
        last = torch.stack([places[-1] for places in own]) - start
        read_by = [layer[:, last] for layer in queries]
        pairs = zip(read_by, cache.layers, strict=True)
        maps = _by_query([_scores(query, layer.keys[0]) for query, layer in pairs], 1)
        found[position] = of_queries | {
            "outputs": _by_query([layer[last] for layer in outputs], 0),
            "queries": _by_query(read_by, 1),
            "demonstrations": maps[n < attended, ..., : packing.shown],
        }
        for i, places in enumerate(own):
            own_map = np.ascontiguousarray(maps[i][..., places.numpy()])
            found[position][f"own {n[i]}"] = own_map
    return found


def _scores(query, keys):
    """``(H, p, P + T)`` from queries of every head and keys that heads may share."""
    shared = query.reshape(len(keys), -1, query.shape[-1])
    return (shared @ keys.mT).reshape(*query.shape[:2], -1)


def _by_query(layers, axis):
    """``(p, L, ...)`` from one tensor per layer, whose p queries are along an axis."""
    stacked = torch.stack([layer.float().cpu() for layer in layers])
    return stacked.movedim(axis + 1, 0).contiguous().numpy()
