"""Finetuning of the key and value projections alone, as Dai et al. do it.

The original code runs plain SGD with batch size 1: one pass over the
demonstrations in the order of the prompt, constant learning rate, no momentum,
weight decay or clipping, dropout off. Only the key and value projections of
every layer move, weights and biases.
"""

import math
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from icl.heads import (
    attention_inputs,
    attention_modules,
    from_cache,
    watch_queries,
)


def kv_projections(model):
    """The part of each parameter that makes keys or values.

    Returns:
        ``{parameter name: part}``, where ``part(tensor)`` is the view of a
        tensor of the parameter's shape that belongs to K or V. GPT-2 and
        GPT-NeoX hold q, k and v in one matrix; the others keep ``k_proj`` and
        ``v_proj`` apart.

    Raises:
        ValueError: the architecture is none of those covered.
    """
    heads = getattr(model.config, "num_attention_heads", None)
    parts = {}
    for name, _ in model.named_parameters():
        if "k_proj." in name or "v_proj." in name:
            parts[name] = lambda t: t
        elif ".attn.c_attn." in name:  # GPT-2: columns q | k | v
            parts[name] = lambda t: t[..., t.shape[-1] // 3 :]
        elif ".attention.query_key_value." in name:  # GPT-NeoX: q, k, v per head
            parts[name] = lambda t: t.unflatten(0, (heads, 3, -1))[:, 1:]
    if not parts:
        raise ValueError(
            f"no key and value projections found in {type(model).__name__}; covered "
            "are gpt2, opt, xglm, gpt_neox, llama and qwen"
        )
    return parts


def kv_sgd(
    model,
    tokenizer,
    texts,
    learning_rate,
    completions=None,
    layer_causal=False,
    parts=None,
):
    """One pass of SGD over ``texts`` on the key and value projections.

    The loss is the next-token cross-entropy averaged over all tokens of a text
    but its first (Dai et al. 2023, as their code computes it). The model is
    left as it was. :func:`icl.heads.watch_queries` around the call collects the
    training tokens' attention queries, a layer after the other, a text after
    the other, each at the text's own step.

    Args:
        model: from :func:`icl.models.load_model`.
        tokenizer: its tokenizer; texts are encoded without added tokens.
        texts: training texts in order, each one step.
        learning_rate: the step size, constant; a negative one ascends.
        completions: what follows each text, a list as long; given, the loss is
            the mean over the completion's tokens alone.
        layer_causal: the variant of Deutch et al. (2024), as their code
            computes it. Every block is trained by itself: its input is held
            fixed, its output goes straight through the model's last norm and
            output embedding, and its loss moves no other block.
        parts: what is trained instead, ``{parameter name: view}``: some of
            :func:`kv_projections`, or whole other parameters (``lambda t: t``).

    Returns:
        ``(update, losses)``: ``{parameter name: ΔW}`` on the views of
        :func:`kv_projections`, to be used with :func:`updated`, and the loss
        of each text before its own step (summed over blocks if layer-causal).

    Raises:
        ValueError: no texts, completions that are not as many or empty, a text
            that the context does not hold, a learning rate of zero, or an
            architecture that is not covered.
        FloatingPointError: the loss is no longer finite; the message says at
            which step.
    """
    if not texts or not abs(learning_rate) > 0:
        raise ValueError(
            f"finetuning needs texts and a learning rate other than 0; given were "
            f"{len(texts)} texts and learning rate {learning_rate!r}"
        )
    examples = _encode(tokenizer, texts, completions)
    context = getattr(model.config, "max_position_embeddings", None)
    for number, (ids, _) in enumerate(examples):
        if context is not None and len(ids) > context:
            raise ValueError(
                f"text {number} has {len(ids)} tokens, but the model holds {context}; "
                "shorten it or leave it out"
            )
    parts = kv_projections(model) if parts is None else parts
    weights = {name: model.get_parameter(name) for name in parts}
    before = {name: w.detach().clone() for name, w in weights.items()}
    all_logits = _block_logits if layer_causal else _logits
    losses = []
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for step, (ids, first) in enumerate(examples, 1):
            ids = torch.tensor(ids, device=model.device)
            total, gradients = 0.0, [None] * len(weights)
            for logits in all_logits(model, ids[None]):
                loss = torch.nn.functional.cross_entropy(
                    logits[first - 1 : -1].float(), ids[first:]
                )
                total += loss.item()
                found = torch.autograd.grad(
                    loss, list(weights.values()), allow_unused=layer_causal
                )
                gradients = [
                    new if old is None else old if new is None else old + new
                    for old, new in zip(gradients, found, strict=True)
                ]
            losses.append(total)
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"finetuning diverged: the loss at step {step} of {len(texts)} is "
                    f"{total} with learning rate {learning_rate}"
                )
            with torch.no_grad():
                for (name, weight), grad in zip(
                    weights.items(), gradients, strict=True
                ):
                    part = parts[name]
                    part(weight).sub_(learning_rate * part(grad))
        update = {
            name: part(weights[name].detach()) - part(before[name])
            for name, part in parts.items()
        }
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.requires_grad_(False).copy_(before[name])
    return update, losses


def _encode(tokenizer, texts, completions):
    """``(ids, first)`` of each text: the first token that the loss is taken over."""

    def encode(some):
        return tokenizer(list(some), add_special_tokens=False)["input_ids"]

    if completions is None:
        return [(ids, 1) for ids in encode(texts)]
    if len(completions) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(completions)} completions")
    ends = encode(completions)
    if not all(ends):
        raise ValueError("an empty completion leaves no token to take the loss over")
    return [(a + b, len(a)) for a, b in zip(encode(texts), ends, strict=True)]


def _logits(model, ids):
    return [model(ids, use_cache=False).logits[0]]


def _block_logits(model, ids):
    """The next-token logits of every block's output, gradients kept apart."""
    found, hooks = [], []

    def detach(block, args, options):
        if args:
            return (args[0].detach(), *args[1:]), options
        return args, options | {"hidden_states": options["hidden_states"].detach()}

    def keep(block, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    stack, blocks = _blocks(model)
    try:
        for block in blocks:
            hooks.append(block.register_forward_pre_hook(detach, with_kwargs=True))
            hooks.append(block.register_forward_hook(keep))
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    names = ("norm", "ln_f", "final_layer_norm", "layer_norm", "project_out")
    last = [getattr(stack, n) for n in names if getattr(stack, n, None) is not None]
    for states in found:
        for module in last:
            states = module(states)
        yield model.get_output_embeddings()(states)[0]


def _blocks(model):
    """The module that holds the transformer blocks, and the list of them."""
    for stack in model.modules():
        for name in ("layers", "h"):
            blocks = getattr(stack, name, None)
            if isinstance(blocks, torch.nn.ModuleList):
                return stack, blocks
    raise ValueError(f"the blocks of {type(model).__name__} cannot be found")


@contextmanager
def updated(model, update):
    """The model with ``update`` added to its weights, inside a ``with`` block.

    On leaving the block the weights are again what they were, bit for bit.
    """
    parts = kv_projections(model)
    views = {
        name: parts.get(name, lambda t: t)(model.get_parameter(name)) for name in update
    }
    before = {name: view.detach().clone() for name, view in views.items()}
    with torch.no_grad():
        for name, view in views.items():
            view.add_(update[name])
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(before[name])


def heads_on_frozen_inputs(model, update, ids, start=0):
    """The heads after finetuning, each layer on the inputs it had before.

    Dai et al. (2023, eq. 13) compare ``W_V X`` with ``(W_V + ΔW_V) X``: the
    same ``X``. So the inputs of every attention module are taken from the model
    as it was, and only the modules themselves are run with the update.

    Args:
        model: from :func:`icl.models.load_model`.
        update: from :func:`kv_sgd`.
        ids, start: as for :func:`icl.heads.attention_inputs`.

    Returns:
        one :class:`icl.heads.Heads` a layer.
    """
    calls, cache = [], DynamicCache(config=model.config)

    def keep(module, args, options):
        calls.append((module, args, options))

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in attention_modules(model)
    ]
    try:
        attention_inputs(model, ids, start=start)
    finally:
        for hook in hooks:
            hook.remove()

    def fresh(value):  # the first pass has filled its own cache
        return cache if isinstance(value, DynamicCache) else value

    with (
        torch.inference_mode(),
        updated(model, update),
        watch_queries(model) as queries,
    ):
        for module, args, options in calls:
            module(*map(fresh, args), **{n: fresh(v) for n, v in options.items()})
    return from_cache(queries, cache)
