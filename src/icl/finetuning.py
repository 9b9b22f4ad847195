"""Finetuning of the key and value projections alone, as Dai et al. do it.

The original code runs plain SGD with batch size 1 on these weights and biases, one
pass in the order of the prompt: no momentum, weight decay or clipping, dropout off.
"""

import math
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from icl import activations
from icl.scoring import agree, check_eval, encode


def kv_projections(model) -> dict:
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
        path = name.rpartition(".")[0]
        if path.endswith((".k_proj", ".v_proj")):
            parts[name] = lambda t: t
        # GPT-2: columns q | k | v
        elif ".attn.c_attn." in name and isinstance(model.get_submodule(path), Conv1D):
            parts[name] = lambda t: t[..., t.shape[-1] // 3 :]
        elif ".attention.query_key_value." in name:  # GPT-NeoX: q, k, v per head
            parts[name] = lambda t: t.unflatten(0, (heads, 3, -1))[:, 1:]
    if not parts:
        raise ValueError(
            f"no key and value projections found in {type(model).__name__}; covered "
            f"are {activations.FAMILIES}"
        )
    return parts


def kv_sgd(
    model, tokenizer, texts, learning_rate, layer_causal=False, parts=None
) -> tuple[dict[str, Tensor], list[float]]:
    """One pass of SGD over texts on the key and value projections.

    The loss is the next-token cross-entropy averaged over all tokens of a text
    but its first (Dai et al. 2023, as their code computes it). Weights are trained in
    float32; the model is left as it was.

    Args:
        model, tokenizer: from :func:`icl.models.load_model`.
        texts: training texts in order, each one step; encoded without added tokens.
        learning_rate: the step size, constant; a negative one ascends.
        layer_causal: the variant of Deutch et al. (2024), as their code
            computes it. Every block is trained by itself: its input is held
            fixed, its output goes straight through the model's last norm and
            output embedding, and its loss moves no other block.
        parts: what is trained, ``{parameter name: view}``: some of
            :func:`kv_projections` (default all), or whole other parameters
            (``lambda t: t``).

    Returns:
        ``(update, losses)``: ``{parameter name: ΔW}`` on the views of
        :func:`kv_projections`, to be used with :func:`applied_update`, and the loss
        of each text before its own step (summed over blocks if layer-causal).

    Raises:
        ValueError: no texts, one of less than two tokens or more than the context, a
            learning rate of zero, or an architecture that is not covered.
        FloatingPointError: the loss is no longer finite.
    """
    if not abs(learning_rate) > 0:
        raise ValueError(f"the learning rate must not be {learning_rate!r}")
    examples = encode(tokenizer, "text", texts)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    for number, ids in enumerate(examples):
        if not 2 <= len(ids) <= context:
            raise ValueError(
                f"text {number} has {len(ids)} tokens, but training needs 2, of which "
                f"one is predicted, and the model holds {context}"
            )
    parts = kv_projections(model) if parts is None else parts
    check_eval(model)
    weights = {name: model.get_parameter(name) for name in parts}
    all_logits = _block_logits if layer_causal else _logits
    losses = []
    with _to_change(model, parts) as before:
        for weight in weights.values():
            weight.requires_grad_(True)
        for step, ids in enumerate(examples, 1):
            ids = torch.tensor(ids, device=model.device)
            total, gradients = 0.0, {}
            for logits in all_logits(model, ids[None]):
                loss = cross_entropy(logits[:-1].float(), ids[1:])
                total += loss.item()
                found = torch.autograd.grad(
                    loss, list(weights.values()), allow_unused=layer_causal
                )
                for name, grad in zip(weights, found, strict=True):
                    if grad is not None:
                        old = gradients.get(name)
                        gradients[name] = grad if old is None else old + grad
            losses.append(total)
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"finetuning diverged: the loss at step {step} of {len(examples)} "
                    f"is {total} with learning rate {learning_rate}"
                )
            with torch.no_grad():
                for name, grad in gradients.items():
                    part = parts[name]
                    part(weights[name]).sub_(learning_rate * part(grad))
        update = {
            name: part(weights[name].detach()) - part(before[name])
            for name, part in parts.items()
        }
    return update, losses


@contextmanager
def _to_change(model, names=()):
    """The model in float32 inside the block; after it all is as it was, bit for bit.

    The named weights are copies; the block is given what they were. A step of SGD is
    mostly smaller than half a unit in bfloat16's last place.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
    try:
        for tensor, data, _ in kept:
            if data.dtype in (torch.float16, torch.bfloat16):
                tensor.data = data.float()
        before = {name: model.get_parameter(name).data for name in names}
        for name, data in before.items():
            model.get_parameter(name).data = data.clone()
        yield before
    finally:
        for tensor, data, trained in kept:
            tensor.data = data
            tensor.requires_grad_(trained)


def _logits(model, ids):
    return [model(ids, use_cache=False).logits[0]]


def _block_logits(model, ids):
    """The next-token logits of every block's output, gradients kept apart."""
    found = []

    def detach(block, args, options):
        if args:
            return (args[0].detach(), *args[1:]), options
        return args, options | {"hidden_states": options["hidden_states"].detach()}

    def keep(block, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    stack, blocks = next(  # the module that holds the blocks, and the list of them
        (stack, blocks)
        for stack in model.modules()
        for blocks in (getattr(stack, "layers", None), getattr(stack, "h", None))
        if isinstance(blocks, torch.nn.ModuleList)
    )
    with ExitStack() as hooks:
        for block in blocks:
            pre = block.register_forward_pre_hook(detach, with_kwargs=True)
            hooks.enter_context(pre)
            hooks.enter_context(block.register_forward_hook(keep))
        own = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1:]
    names = ("norm", "ln_f", "final_layer_norm", "layer_norm", "project_out")
    last = [getattr(stack, n) for n in names if getattr(stack, n, None) is not None]

    def read(states):
        for module in last:
            states = module(states)
        return model.get_output_embeddings()(states)[0]

    with torch.no_grad():
        final = [x.float().log_softmax(-1) for x in (read(found[-1][:, -1:]), own)]
    if not agree(*final, torch.float32):
        raise ValueError(
            f"layer-causal finetuning does not cover {type(model).__name__}: between "
            "its last block and its logits is more than a norm"
        )
    yield from map(read, found)


@contextmanager
def applied_update(model, update: dict[str, Tensor]):
    """The model with an update added to its weights, inside a ``with`` block.

    The block runs in float32, in which the update was computed. On leaving it the
    weights are again what they were, bit for bit; gradients are taken inside.
    """
    parts = kv_projections(model)
    with _to_change(model, update):
        for name, change in update.items():
            part = parts.get(name, lambda t: t)
            part(model.get_parameter(name).data).add_(change)
        yield model


def heads_on_frozen_inputs(
    model, update: dict[str, Tensor], ids, start=0
) -> list[activations.Heads]:
    """The heads after finetuning, each layer on the inputs it had before.

    Dai et al. (2023, eq. 13) compare ``W_V X`` with ``(W_V + ΔW_V) X``: the
    same ``X``. So the inputs of every attention module are taken from the model
    as it was, and only the modules themselves are run with the update.

    Args:
        model, update: from :func:`icl.models.load_model` and :func:`kv_sgd`.
        ids, start: as for :func:`icl.activations.capture_qkv`.
    """
    calls, cache = [], DynamicCache()

    def keep(module, args, options):
        calls.append((module, args, options))

    def fresh(value):  # the first pass has filled its own cache
        return cache if isinstance(value, DynamicCache) else value

    with activations.capture_queries(model):  # compares, once, before the hooks
        pass
    with _to_change(model), ExitStack() as hooks:
        for module in activations.attention_modules(model):
            hook = module.register_forward_pre_hook(keep, with_kwargs=True)
            hooks.enter_context(hook)
        activations.capture_qkv(model, ids, start=start)
    with (
        torch.inference_mode(),
        applied_update(model, update),
        activations.capture_queries(model) as queries,
    ):
        for module, args, options in calls:
            module(*map(fresh, args), **{n: fresh(v) for n, v in options.items()})
    return activations.from_cache(queries, cache)
