"""A small trainer of language models: GPT-2 with any attention of icl.attention.

One loop for a processor, a graphics card or several processes: ``accelerate launch
-m icl.training`` runs it on whatever accelerate was told. A checkpoint holds weights,
optimizer and progress as safetensors and JSON; a killed run goes on from the last one,
on a CPU to the bit.
"""

import argparse
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
    "1m": (4, 128, 4),
    "3m": (6, 192, 6),
    "10m": (6, 384, 6),
    "25m": (8, 512, 8),
    "85m": (12, 768, 12),
    "300m": (24, 1024, 16),
}


@dataclass(frozen=True)
class Plan:
    """What a run does; two runs of the same plan see the same tokens in the same order.

    Attributes:
        steps: of the optimizer.
        batch: sequences a step, over all processes and accumulated parts.
        length: tokens a sequence.
        accumulate: parts in which a process goes through its share of a batch.
        learning_rate: at its highest, after ``warm_up`` steps; from there a cosine
            goes down to a tenth of it.
        weight_decay: of matrices (AdamW).
        clip: largest norm of a gradient.
        spread: begin every sequence at a random position, so that all positions of
            the model are trained and not the first ``length`` alone.
        seed: draws the batches.
        save_every, evaluate_every: steps.
    """

    steps: int = 600
    batch: int = 32
    length: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-3
    warm_up: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    spread: bool = False
    seed: int = 0
    save_every: int = 500
    evaluate_every: int = 100

    def __post_init__(self):
        whole = [f.name for f in fields(self) if f.type is int and f.name != "seed"]
        for name in whole:
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

    def drawn(self, step: int, tokens: int, positions: int):
        """Where a step's sequences begin: in the text, and in position, ``(B,)``."""
        rng = np.random.default_rng([self.seed, step])
        text = rng.integers(0, tokens - self.length, self.batch)
        last = positions - self.length if self.spread else 0
        return text, rng.integers(0, last + 1, self.batch)


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
    ids.astype(dtype).tofile(scratch)
    os.replace(scratch, path)
    about = {"tokens": len(ids), "vocabulary": vocabulary, "dtype": dtype.__name__}
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


def gpt(size: str, vocabulary: int, positions: int, seed: int = 0, attention=None):
    """A new GPT-2 of transformers, without dropout.

    Args:
        size: one of ``SIZES``.
        vocabulary: tokens there are.
        positions: tokens it can hold.
        seed: draws the weights; with another attention they stay the same.
        attention: arguments of :func:`icl.attention.equip` as a dict, or
            ``{"layerwise": mu}`` for momentum from block to block. Left out, softmax
            attention as it is.

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


def train(model, tokens, folder, plan, held_out=None, report=print):
    """Train a model and keep it in ``folder``; go on where a killed run stopped.

    Args:
        model: from :func:`gpt`; it is trained in place.
        tokens: ids ``(N,)``, mapped (:func:`read_tokens`) or in memory.
        folder: of the checkpoints, one run's own. The newest whole one is kept.
        plan: a :class:`Plan`.
        held_out: ids to measure the loss on, every ``evaluate_every`` steps.
        report: is called with a line of progress at each of these.

    Returns:
        list of dicts, one a measurement: ``step``, ``loss`` (the mean since the last
        one), ``held_out`` (nats a token, over all windows of ``plan.length``; NaN
        without such ids).

    Raises:
        ValueError: a text too short for a sequence, a batch that does not divide
            among the processes, more tokens a sequence than the model holds, or a
            folder with the checkpoint of another plan or model.
        FloatingPointError: the loss is not finite. The last checkpoint stays.
    """
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(mixed_precision="bf16" if half else "no")
    _check(plan, tokens, model.config.n_positions, accelerator.num_processes)
    folder = Path(folder)
    model.to(accelerator.device).train()
    decayed = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        decayed, plan.learning_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay
    )
    state = _restore(folder, plan, model, optimizer)
    total = torch.tensor(state["total"], device=accelerator.device)
    running, optimizer = accelerator.prepare(model, optimizer)
    first, started = state["step"], time.perf_counter()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        for n, part in enumerate(_parts(plan, step, tokens, model, accelerator)):
            last = n == plan.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(running):
                loss = running(**part).loss / plan.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.clip_grad_norm_(running.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        done, end = step + 1, step + 1 == plan.steps
        measures = done % plan.evaluate_every == 0 or end
        saves = done % plan.save_every == 0 or end
        if not (measures or saves):
            continue
        shared = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(shared):
            raise FloatingPointError(
                f"the loss is not finite at step {done} (learning rate "
                f"{plan.rate(step):.1e}): lower learning_rate, or warm up for longer. "
                f"The last checkpoint in {folder} is whole"
            )
        if measures:
            row = {"step": done, "loss": shared / (done - state["since"])}
            row["held_out"] = math.nan
            if held_out is not None:
                row["held_out"] = float(losses(model, held_out, plan.length).mean())
            state["history"].append(row)
            state["since"] = done
            total.zero_()
            if accelerator.is_main_process:
                pace = (time.perf_counter() - started) / (done - first)
                report(_line(row, plan, pace))
        state["step"], state["total"] = done, float(total)
        if saves and accelerator.is_main_process:
            _save(folder, plan, model, optimizer, state)
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
    _check_length(tokens, length, model.config.n_positions)
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


def _parts(plan, step, tokens, model, accelerator):
    """A process's share of a batch, in parts: arguments of the model."""
    text, place = plan.drawn(step, len(tokens), model.config.n_positions)
    share = plan.batch // accelerator.num_processes
    mine = slice(accelerator.process_index * share, None)
    size = share // plan.accumulate
    text, place = (x[mine][:share].reshape(-1, size) for x in (text, place))
    for starts, positions in zip(text, place, strict=True):
        ids = np.stack([tokens[s : s + plan.length] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(ids).to(accelerator.device)
        part = {"input_ids": ids, "labels": ids}
        if plan.spread:
            positions = torch.from_numpy(positions)[:, None] + torch.arange(plan.length)
            part["position_ids"] = positions.to(accelerator.device)
        yield part


def _check(plan, tokens, positions, processes):
    _check_length(tokens, plan.length, positions)
    if plan.batch % (processes * plan.accumulate):
        raise ValueError(
            f"a batch of {plan.batch} does not divide into {plan.accumulate} parts for "
            f"each of {processes} processes"
        )


def _check_length(tokens, length, positions):
    if len(tokens) <= length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for a sequence of {length}"
        )
    if length > positions:
        raise ValueError(f"{length} tokens a sequence, but the model holds {positions}")


def _line(row, plan, pace):
    left = pace * (plan.steps - row["step"])
    speed = plan.batch * plan.length / pace
    held_out = "" if math.isnan(row["held_out"]) else f" held out {row['held_out']:.4f}"
    return (
        f"step {row['step']}/{plan.steps} loss {row['loss']:.4f}{held_out} "
        f"{speed:,.0f} tokens/s, {left / 60:.1f} min left"
    )


def _identity(plan, model):
    """What a checkpoint must agree on, as JSON has it."""
    config = model.config.to_diff_dict()
    for name in ("transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    return json.loads(json.dumps({"plan": asdict(plan), "model": config}))


def _newest(folder):
    return max(folder.glob("step-*"), default=None)


def _save(folder, plan, model, optimizer, state):
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
    (scratch / "state.json").write_text(json.dumps(state | _identity(plan, model)))
    whole = folder / f"step-{state['step']:07d}"
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(scratch, whole)
    for old in folder.glob("step-*"):
        if old != whole:
            shutil.rmtree(old)


def _restore(folder, plan, model, optimizer):
    """Load the newest checkpoint, if there is one, and return where it stood."""
    last = _newest(folder)
    if last is None:
        return {"step": 0, "since": 0, "total": 0.0, "history": []}
    state = json.loads((last / "state.json").read_text())
    for name, ours in _identity(plan, model).items():
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
    parser.add_argument("--positions", type=int, help="that the model holds")
    parser.add_argument("--attention", default="{}", help="of gpt, as JSON")
    for field in fields(Plan):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=field.type, default=field.default)
    options = vars(parser.parse_args(arguments))
    plan = Plan(**{f.name: options[f.name] for f in fields(Plan)})
    tokens, about = read_tokens(options["tokens"])
    held_out = options["held_out"] and read_tokens(options["held_out"])[0]
    model = gpt(
        options["size"],
        about["vocabulary"],
        options["positions"] or plan.length,
        plan.seed,
        json.loads(options["attention"]),
    )
    train(model, tokens, options["folder"], plan, held_out)


if __name__ == "__main__":
    main(sys.argv[1:])
