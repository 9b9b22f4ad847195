"""A small trainer: GPT-2 with any attention of icl.attention, on text or else.

One loop for a processor, a graphics card or several processes: ``accelerate launch
-m icl.training`` runs it on whatever accelerate was told. A checkpoint holds weights,
optimizer and progress as safetensors and JSON; a killed run goes on from the last one,
on a CPU to the bit.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import GPT2Config, GPT2LMHeadModel

from icl.attention import equip, layerwise_momentum
from icl.models import use_onednn
from icl.results import write_atomically

#: Layers, width and heads, by the size in parameters without embeddings.
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
class Plan:
    """What a run does.

    Attributes:
        steps: of the optimizer.
        batch: sequences a step, over all processes and accumulated parts.
        accumulate: parts in which a process goes through its share of a batch.
        learning_rate: at its highest, after ``warm_up`` steps; from there a cosine
            goes down to a tenth of it.
        weight_decay: of matrices (AdamW).
        clip: largest norm of a gradient.
        save_every: steps from checkpoint to checkpoint.
        evaluate_every: steps from measurement to measurement.
    """

    steps: int = 600
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    warm_up: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    save_every: int = 500
    evaluate_every: int = 100

    def __post_init__(self):
        for name in (f.name for f in fields(self) if f.type is int):
            if getattr(self, name) < (0 if name == "warm_up" else 1):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate} is not positive")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class TextBatches:
    """Sequences from random places of a text: ``batches(step)`` for :func:`train`.

    Attributes:
        tokens: ids ``(N,)``, mapped (:func:`read_tokens`) or in memory.
        batch: sequences a step; as the plan's.
        length: tokens a sequence.
        seed: draws the places, together with the step, so that every run of a seed
            sees the same sequences in the same order.
        positions: of the model. If given, every sequence begins at a random one of
            them, so that all are trained and not the first ``length`` alone.
    """

    tokens: np.ndarray
    batch: int
    length: int
    seed: int = 0
    positions: int | None = None

    def __post_init__(self):
        if len(self.tokens) <= self.length:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, too few for a sequence of "
                f"{self.length}"
            )

    def __call__(self, step: int) -> dict:
        """Arguments of the model for a step, arrays ``(B, T)``."""
        rng = np.random.default_rng([self.seed, step])
        starts = rng.integers(0, len(self.tokens) - self.length, self.batch)
        ids = [self.tokens[start : start + self.length] for start in starts]
        ids = np.stack(ids).astype(np.int64)
        drawn = {"input_ids": ids, "labels": ids}
        if self.positions is not None:
            first = rng.integers(0, self.positions - self.length + 1, (self.batch, 1))
            drawn["position_ids"] = first + np.arange(self.length)
        return drawn


@dataclass(frozen=True)
class RecallBatches:
    """Pairs of tokens, then the first of some again: which was the second?

    ``batches(step)`` for :func:`train`.

    Attributes:
        batch: sequences a step.
        pairs: in a sequence, which has ``4 · pairs`` tokens.
        symbols: there are so many first tokens ``0 ..`` and as many second ones after
            them; the vocabulary is twice as large.
        seed: draws the pairs, together with the step.
    """

    batch: int
    pairs: int
    symbols: int
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.pairs <= self.symbols:
            raise ValueError(
                f"{self.pairs} pairs need as many different symbols, not {self.symbols}"
            )

    def __call__(self, step: int) -> dict:
        """``input_ids`` and ``labels`` ``(B, 4 · pairs)``; labels at answers alone."""
        rng = np.random.default_rng([self.seed, step])
        shape = self.batch, self.pairs
        keys = rng.permuted(np.tile(np.arange(self.symbols), (self.batch, 1)), axis=1)
        shown = np.stack(
            [
                keys[:, : self.pairs],
                self.symbols + rng.integers(0, self.symbols, shape),
            ],
            axis=-1,
        )
        asked = rng.integers(0, self.pairs, shape)  # none follows from the others
        asked = np.take_along_axis(shown, asked[..., None], axis=1)
        labels = np.full((2, *shown.shape), -100)
        labels[1, ..., 1] = asked[..., 1]
        ids = np.concatenate([shown, asked], axis=1).reshape(self.batch, -1)
        labels = np.concatenate(list(labels), axis=1).reshape(self.batch, -1)
        return {"input_ids": ids, "labels": labels}


# --- tokens and models --------------------------------------------------------------


def write_tokens(path, ids, vocabulary: int, **facts) -> Path:
    """Keep token ids ``(N,)`` in a file that is mapped into memory, not read.

    Args:
        path: of the file; a JSON file beside it says what it holds.
        ids: integers in ``0 .. vocabulary - 1``.
        facts: what else to note, such as the text's source.

    Raises:
        ValueError: no tokens, or ids outside the vocabulary.
    """
    path, ids = Path(path), np.asarray(ids)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids must be (N,), N >= 1, not {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"ids run from {ids.min()} to {ids.max()}, outside a vocabulary of "
            f"{vocabulary}"
        )
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    ids = ids.astype(dtype)
    ids.tofile(scratch)
    os.replace(scratch, path)
    about = {"tokens": len(ids), "vocabulary": vocabulary, "dtype": dtype.__name__}
    about["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()  # tells texts apart
    write_atomically(path.with_suffix(".json"), json.dumps(about | facts, indent=2))
    return path


def read_tokens(path):
    """The ids of :func:`write_tokens`, mapped, and what was noted beside them.

    Raises:
        ValueError: no such file, or one that is not as long as noted.
    """
    path = Path(path)
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise ValueError(f"no tokens in {path}: write_tokens makes it and its .json")
    about = json.loads(path.with_suffix(".json").read_text())
    ids = np.memmap(path, dtype=about["dtype"], mode="r")
    if len(ids) != about["tokens"]:
        raise ValueError(
            f"{path} holds {len(ids)} tokens, and {about['tokens']} were written: it "
            "is damaged; write it again"
        )
    return ids, about


def gpt(size, vocabulary, positions, seed=0, attention=None, inner=None):
    """A new GPT-2 of transformers, without dropout.

    Args:
        size: one of ``SIZES``.
        vocabulary: tokens there are.
        positions: tokens it can hold.
        seed: draws the weights; with another attention they stay the same.
        attention: arguments of :func:`icl.attention.equip` as a dict, or
            ``{"layerwise": mu}`` for momentum from block to block. Left out, softmax
            attention as it is.
        inner: width of the MLPs' hidden layers; left out, four times the model's.

    Raises:
        ValueError: an unknown size, or what :func:`icl.attention.equip` refuses.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=inner,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's, in one kernel
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return _with(attention or {}, model)


def _with(attention, model):
    use_onednn(model)
    if mu := attention.get("layerwise"):
        layerwise_momentum(model, mu)
        model.config.icl_layerwise = mu
    elif attention:
        equip(model, **attention)
    return model


# --- the loop -----------------------------------------------------------------------


def train(model, batches, folder, plan, measure=None, report=print, **data):
    """Train a model and keep it in ``folder``; go on where a killed run stopped.

    Args:
        model: from :func:`gpt`, or any module with a ``config`` whose call returns a
            ``loss``; it is trained in place.
        batches: a function of the step (from 0) that returns the model's arguments as
            arrays, all with ``plan.batch`` rows: :class:`TextBatches`.
        folder: of the checkpoints, one run's own. The newest whole one is kept.
        plan: a :class:`Plan`.
        measure: a function of the model that returns a number, called every
            ``evaluate_every`` steps on the main process.
        report: is called with a line of progress at each of these.
        data: what else a checkpoint must agree on, such as the seed of the batches.

    Returns:
        list of dicts, one a measurement: ``step``, ``loss`` (the mean since the last
        one), and ``measure`` where there is one.

    Raises:
        ValueError: a batch that does not divide among the processes, or a folder with
            the checkpoint of another plan, model or data.
        FloatingPointError: the loss is not finite. The last checkpoint stays.
    """
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(mixed_precision="bf16" if half else "no")
    if plan.batch % (accelerator.num_processes * plan.accumulate):
        raise ValueError(
            f"a batch of {plan.batch} does not divide into {plan.accumulate} parts for "
            f"each of {accelerator.num_processes} processes"
        )
    folder, identity = Path(folder), _identity(plan, model, data)
    model.to(accelerator.device).train()
    optimizer = _optimizer(model, plan)
    state = _restore(folder, identity, model, optimizer)
    total = torch.tensor(state["total"], device=accelerator.device)
    running, optimizer = accelerator.prepare(model, optimizer)
    first, started = state["step"], time.perf_counter()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        batch, done = batches(step), step + 1
        total += _gradients(running, batch, plan, accelerator)
        accelerator.clip_grad_norm_(running.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        measures = done % plan.evaluate_every == 0 or done == plan.steps
        saves = done % plan.save_every == 0 or done == plan.steps
        if not (measures or saves):
            continue
        loss = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is not finite at step {done} (learning rate "
                f"{plan.rate(step):.1e}): lower learning_rate, or warm up for longer. "
                f"The last checkpoint in {folder} is whole"
            )
        if measures:
            row = {"step": done, "loss": loss / (done - state["since"])}
            pace = (time.perf_counter() - started) / (done - first)
            if measure is not None and accelerator.is_main_process:
                row["measure"] = float(measure(model))
            state["history"].append(row)
            state["since"] = done
            total.zero_()
            if accelerator.is_main_process:
                report(_line(row, plan, batch, pace, accelerator.num_processes))
        state["step"], state["total"] = done, float(total)
        if saves and accelerator.is_main_process:
            _save(folder, identity, model, optimizer, state)
        accelerator.wait_for_everyone()
    model.eval()
    return state["history"]


@torch.no_grad()
def losses(model, tokens, length: int, batch: int = 32) -> np.ndarray:
    """Mean nats a token in windows of ``length`` side by side: one each, ``(W,)``.

    Raises:
        ValueError: fewer tokens than one window, or more a window than the model
            holds.
    """
    if not 1 < length <= min(len(tokens), model.config.n_positions):
        raise ValueError(
            f"windows of {length} tokens do not fit: the text has {len(tokens)}, the "
            f"model holds {model.config.n_positions}"
        )
    trained, found = model.training, []
    model.eval()
    windows = np.asarray(tokens[: len(tokens) // length * length]).reshape(-1, length)
    for start in range(0, len(windows), batch):
        ids = torch.from_numpy(windows[start : start + batch].astype(np.int64))
        ids = ids.to(model.device)
        log_p = model(ids).logits[:, :-1].float().log_softmax(-1)
        right = log_p.gather(-1, ids[:, 1:, None])[..., 0]
        found.append(-right.double().mean(1).cpu())
    model.train(trained)
    return torch.cat(found).numpy()


def _optimizer(model, plan):
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.endswith("momentum")
        (decayed if matrix else others).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, plan.learning_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay
    )


def _gradients(running, batch, plan, accelerator):
    """Backward over this process's share of a batch; the mean loss."""
    size = plan.batch // accelerator.num_processes // plan.accumulate
    first = accelerator.process_index * plan.accumulate
    total = 0.0
    for n in range(plan.accumulate):
        rows = slice((first + n) * size, (first + n + 1) * size)
        part = {
            name: torch.from_numpy(array[rows]).to(accelerator.device)
            for name, array in batch.items()
        }
        last = n == plan.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(running):
            loss = running(**part).loss / plan.accumulate
            accelerator.backward(loss)
        total += loss.detach()
    return total


def _line(row, plan, batch, pace, processes):
    tokens = np.prod(next(iter(batch.values())).shape[:2])
    measured = f" measure {row['measure']:.4f}" if "measure" in row else ""
    left = pace * (plan.steps - row["step"]) / 60
    return (
        f"step {row['step']}/{plan.steps} loss {row['loss']:.4f}{measured} "
        f"{tokens / pace:,.0f} tokens/s, {left:.1f} min left"
        + (f", {processes} processes" if processes > 1 else "")
    )


def _identity(plan, model, data):
    """What a checkpoint must agree on, as JSON has it."""
    config = model.config.to_diff_dict()
    for name in ("transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    about = {"plan": asdict(plan), "model": config, "data": data}
    return json.loads(json.dumps(about))


def _newest(folder):
    return max(folder.glob("step-*"), default=None)


def _save(folder, identity, model, optimizer, state):
    """Write a checkpoint beside the last one, then let it take its place."""
    scratch = folder / f".new.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_model(model, scratch / "model.safetensors")
    moments = optimizer.state_dict()["state"]
    save_file(
        {f"{n}.{name}": t for n, of in moments.items() for name, t in of.items()},
        scratch / "optimizer.safetensors",
    )
    (scratch / "state.json").write_text(json.dumps(state | identity))
    whole = folder / f"step-{state['step']:07d}"
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(scratch, whole)
    for old in folder.glob("step-*"):
        if old != whole:
            shutil.rmtree(old)


def _restore(folder, identity, model, optimizer):
    """Load the newest checkpoint, if there is one, and return where it stood."""
    last = _newest(folder)
    if last is None:
        return {"step": 0, "since": 0, "total": 0.0, "history": []}
    state = json.loads((last / "state.json").read_text())
    for name, ours in identity.items():
        theirs = state.pop(name)
        if differ := [k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)]:
            raise ValueError(
                f"{last} is a checkpoint of another {name}: it has "
                + ", ".join(f"{k}={theirs.get(k)!r}" for k in sorted(differ))
                + ", this run "
                + ", ".join(f"{k}={ours.get(k)!r}" for k in sorted(differ))
                + "; give another folder, or the same settings"
            )
    load_model(model, last / "model.safetensors")
    moments = {}
    for name, tensor in load_file(last / "optimizer.safetensors").items():
        n, moment = name.split(".", 1)
        moments.setdefault(int(n), {})[moment] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state


def load_trained(folder):
    """The model of the newest checkpoint of a run, and its ``history``.

    Raises:
        ValueError: there is none.
    """
    last = _newest(Path(folder))
    if last is None:
        raise ValueError(f"no checkpoint in {folder}")
    state = json.loads((last / "state.json").read_text())
    config = GPT2Config.from_dict(state["model"])
    mu = getattr(config, "icl_layerwise", None)
    attention = {"layerwise": mu} if mu else getattr(config, "icl_attention", {})
    model = _with(attention, GPT2LMHeadModel(config))
    load_model(model, last / "model.safetensors")
    return model.eval(), state["history"]


def main(arguments):
    """``python -m icl.training``: one run from files of tokens."""
    parser = argparse.ArgumentParser(prog="icl.training", description=main.__doc__)
    parser.add_argument("tokens", type=Path, help="of write_tokens")
    parser.add_argument("folder", type=Path, help="for checkpoints")
    parser.add_argument("--held-out", type=Path, help="tokens to measure on")
    parser.add_argument("--size", choices=SIZES, default="1m")
    parser.add_argument("--attention", default="{}", help="of gpt, as JSON")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    for field in fields(Plan):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=field.type, default=field.default)
    options = vars(parser.parse_args(arguments))
    plan = Plan(**{f.name: options[f.name] for f in fields(Plan)})
    tokens, about = read_tokens(options["tokens"])
    length, seed = options["length"], options["seed"]
    attention = json.loads(options["attention"])
    model = gpt(options["size"], about["vocabulary"], length, seed, attention)
    measure = None
    if options["held_out"]:
        held_out, _ = read_tokens(options["held_out"])
        measure = lambda model: losses(model, held_out, length).mean()  # noqa: E731
    batches = TextBatches(tokens, plan.batch, length, seed)
    train(model, batches, options["folder"], plan, measure, seed=seed, **about)


if __name__ == "__main__":
    main(sys.argv[1:])
