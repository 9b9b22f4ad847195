"""A small trainer of language models with any attention of icl.attention.

One loop for a CPU, a GPU or several processes (``accelerate launch`` of a script that
calls :func:`train`). A checkpoint holds weights, optimizer and progress as safetensors
and JSON; an interrupted run resumes from the last one, bit for bit on a CPU.
On a GPU that has bfloat16, training is in mixed precision.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Integer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from icl.attention import layerwise_momentum, replace_attention
from icl.models import use_onednn

#: Layers, width and heads, by the number of parameters without embeddings.
SIZES = {
    "0.1m": (2, 64, 2),
    "1m": (4, 128, 4),
    "3m": (6, 192, 6),
    "10m": (6, 384, 6),
    "25m": (8, 512, 8),
    "85m": (12, 768, 12),
    "300m": (24, 1024, 16),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run of :func:`train`."""

    steps: int = 600  #: of the optimizer
    batch: int = 32  #: sequences per step, over all processes
    learning_rate: float = 1e-3  #: peak, after warm-up; then a cosine to a tenth of it
    warm_up: int = 50  #: steps of linear warm-up
    weight_decay: float = 0.1  #: of matrices (AdamW)
    clip: float = 1.0  #: maximal norm of the gradient
    save_every: int = 500  #: steps from checkpoint to checkpoint
    evaluate_every: int = 100  #: steps from evaluation to evaluation

    def __post_init__(self):
        counts = self.steps, self.batch, self.save_every, self.evaluate_every
        counts = *counts, self.warm_up + 1
        if any(type(n) is not int or n < 1 for n in counts):
            raise ValueError(f"{self}: counts are ints from 1, warm_up from 0")
        if not (0 < self.learning_rate < math.inf and self.clip > 0):
            raise ValueError(f"{self}: learning_rate and clip must be positive")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"{self}: weight_decay must be finite, and not negative")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def text_batches(
    tokens: Integer[np.ndarray, " N"], batch, length, seed=0, positions=None
) -> Callable[[int], dict]:
    """Sequences from random places of a text, as ``batches`` of :func:`train`.

    Args:
        tokens: ids, in memory or mapped.
        batch, length: sequences per step, and tokens per sequence.
        seed: draws the places, together with the step.
        positions: of the model; each sequence then starts at a random one, so that
            all are trained. Default: all start at 0.
    """
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are too few for sequences of {length}")

    def draw(step):
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(tokens) - length, batch)
        ids = np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)
        drawn = {"input_ids": ids, "labels": ids}
        if positions is not None:
            first = rng.integers(0, positions - length + 1, (batch, 1))
            drawn["position_ids"] = first + np.arange(length)
        return drawn

    return draw


def gpt2_config(vocabulary, positions, layers, width, heads, inner=None, **options):
    """Configuration of every GPT-2 that is trained from scratch: without dropout."""
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_inner=inner,
        use_cache=False,
        **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),
        **dict.fromkeys(["bos_token_id", "eos_token_id"]),
        **options,
    )


def build_model(
    size, vocabulary, positions, seed=0, attention=None, rotary=True, inner=None
):
    """A new language model of transformers.

    Llama's form by default: rotary positions, root-mean-square norms, gated MLPs. As a
    contrast GPT-2's: learned positions, layer norms. Embeddings are tied in both.

    Args:
        size: one of ``SIZES``.
        vocabulary, positions: numbers of tokens, and of places in a sequence.
        seed: of the random weights, which are the same with any attention.
        attention: arguments of :func:`icl.attention.replace_attention`, or
            ``{"layerwise": mu}`` for momentum from block to block; default softmax.
        rotary: Llama; if False GPT-2.
        inner: width of the MLPs' hidden layers; default 8/3 of the model's, rounded up
            to a multiple of 8, or for GPT-2 4 times the model's.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    if rotary:
        config = LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=inner or 8 * math.ceil(width / 3),
            tie_word_embeddings=True,
            use_cache=False,
            **dict.fromkeys(["bos_token_id", "eos_token_id"]),
        )
    else:
        options = {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's, in one kernel
        config = gpt2_config(vocabulary, positions, *SIZES[size], inner, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    use_onednn(model, always=True)  # a run that resumes must round alike
    if mu := (attention or {}).get("layerwise"):
        layerwise_momentum(model, mu)
    elif attention:
        replace_attention(model, **attention)
    return model


def train(model, batches, folder, config, measure=None, report=print, **data):
    """Train a model in place, or resume its interrupted run.

    Args:
        model: from :func:`build_model`, or another with a ``config`` and a ``loss``.
        batches: the model's arguments by step (from 0), arrays of ``config.batch``
            rows, such as :func:`text_batches`.
        folder: of this run alone, for its checkpoint, ``checkpoint.safetensors``, and
            at the end the model, if transformers can save it.
        config: settings.
        measure: function of the model to a number or a dict of them; default none.
        report: receives a line of progress after the first step, which says how long
            the run takes, and at each evaluation.
        data: what a checkpoint must agree on besides, such as the seed of the batches.

    Returns:
        ``step``, ``loss`` (mean since the last) and ``measure`` of each evaluation.

    Raises:
        ValueError: a batch that does not divide among the processes, or a folder with
            the checkpoint of another config, model or data.
        FloatingPointError: loss or gradient is not finite. The last checkpoint stays.
    """
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    if config.batch % (parts := accelerator.num_processes):
        raise ValueError(f"batch {config.batch} does not divide into {parts} parts")
    checkpoint = Path(folder) / "checkpoint.safetensors"
    model.to(accelerator.device).train()
    optimizer = _optimizer(model, config)
    model_config = model.config.to_diff_dict()
    others = "transformers_version", "dtype", "architectures", "attn_implementation"
    for name in others:
        model_config.pop(name, None)
    identity = {"config": asdict(config), "model": model_config, "data": data}
    identity = json.loads(json.dumps(identity))  # what a checkpoint must agree on
    state = _restore(checkpoint, identity, model, optimizer)
    total = torch.tensor(state["total"], device=accelerator.device)
    running, optimizer = accelerator.prepare(model, optimizer)
    first, started = state["step"], time.perf_counter()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        batch, done = batches(step), step + 1
        total += _gradients(running, batch, config, accelerator)
        norm = accelerator.clip_grad_norm_(running.parameters(), config.clip)
        if not math.isfinite(norm):
            raise _diverged("gradient", done)
        optimizer.step()
        optimizer.zero_grad()
        if step == first and accelerator.is_main_process:
            pace = time.perf_counter() - started
            report(_progress({"step": done}, config, batch, pace))
        measures = done % config.evaluate_every == 0 or done == config.steps
        saves = done % config.save_every == 0 or done == config.steps
        if not (measures or saves):
            continue
        loss = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(loss):
            raise _diverged("loss", done)
        if measures:
            row = {"step": done, "loss": loss / (done - state["since"])}
            pace = (time.perf_counter() - started) / (done - first)
            if measure is not None and accelerator.is_main_process:
                found = measure(model)
                row |= found if isinstance(found, dict) else {"measure": float(found)}
            state["history"].append(row)
            state["since"] = done
            total.zero_()
            if accelerator.is_main_process:
                report(_progress(row, config, batch, pace))
        state["step"], state["total"] = done, float(total)
        if saves and accelerator.is_main_process:
            _save(checkpoint, model, optimizer, state)
            if done == config.steps and isinstance(model, PreTrainedModel):
                model.save_pretrained(folder)  # what load_model reads
        accelerator.wait_for_everyone()
    model.eval()
    return state["history"]


@torch.no_grad()
def evaluate(model, tokens, length, batch=32) -> Float[np.ndarray, " W"]:
    """Mean nats per predicted token in the disjoint windows of ``length`` tokens."""
    most = min(len(tokens), model.config.max_position_embeddings)
    if not 1 < length <= most:
        raise ValueError(f"windows of {length} tokens do not fit into {most}")
    trained, found = model.training, []
    model.eval()
    windows = np.asarray(tokens[: len(tokens) // length * length], np.int64)
    for ids in torch.from_numpy(windows.reshape(-1, length)).split(batch):
        ids = ids.to(model.device)
        log_p = model(ids).logits[:, :-1].float().log_softmax(-1)
        right = log_p.gather(-1, ids[:, 1:, None])[..., 0]
        found.append(-right.double().mean(1).cpu())
    model.train(trained)
    return torch.cat(found).numpy()


def _optimizer(model, config):
    decayed, others = [], []
    for parameter in model.parameters():
        spared = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
        (others if spared else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    options = {"betas": (0.9, 0.95), "weight_decay": config.weight_decay}
    return torch.optim.AdamW(groups, config.learning_rate, fused=True, **options)


def _gradients(running, batch, config, accelerator):
    """Backward over this process's share of a batch; the mean loss."""
    size = config.batch // accelerator.num_processes
    first = accelerator.process_index * size
    rows = slice(first, first + size)
    part = {name: torch.from_numpy(array[rows]) for name, array in batch.items()}
    part = {name: tensor.to(accelerator.device) for name, tensor in part.items()}
    loss = running(**part).loss
    accelerator.backward(loss)
    return loss.detach()


def _diverged(what, step):
    hint = "lower learning_rate or warm up longer; the last checkpoint is kept"
    return FloatingPointError(f"the {what} is not finite at step {step}: {hint}")


def _progress(row, config, batch, pace):
    found = "".join(f", {k} {v:.4f}" for k, v in row.items() if k != "step")
    tokens = np.prod(next(iter(batch.values())).shape[:2]) / pace
    left = pace * (config.steps - row["step"]) / 60
    step = f"step {row['step']}/{config.steps}"
    return f"{step}{found}, {tokens:,.0f} tokens/s, {left:.1f} min left"


def _weights(model):
    return [*model.named_parameters(), *model.named_buffers()]


def _save(path, model, optimizer, state):
    """Write a checkpoint beside the last one, then let it take its place."""
    tensors = {name: weight.contiguous() for name, weight in _weights(model)}
    for n, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{n}.{name}": moment for name, moment in moments.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    save_file(tensors, scratch, {"state": json.dumps(state)})
    scratch.replace(path)


def _restore(path, identity, model, optimizer):
    """Load the checkpoint, if there is one; progress of the run."""
    if not path.is_file():
        return identity | {"step": 0, "since": 0, "total": 0.0, "history": []}
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    for part, ours in identity.items():
        for name in {*ours, *state[part]}:
            there, here = state[part].get(name), ours.get(name)
            if there != here:
                differ = f"it has {name}={there!r}, this run {here!r}"
                raise ValueError(f"{path} is of another {part}: {differ}")
    tensors, moments = load_file(path), {}
    for name, weight in _weights(model):
        weight.data.copy_(tensors.pop(name))
    for name, tensor in tensors.items():
        _, n, moment = name.split(".")
        moments.setdefault(int(n), {})[moment] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state
