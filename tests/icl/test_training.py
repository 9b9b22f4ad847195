"""The trainer, against a plain loop written here, and what a kill leaves."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from icl.attention import rates
from icl.training import (
    TrainConfig,
    build_model,
    evaluate,
    text_batches,
    train,
)

VOCABULARY, LENGTH = 11, 16
CONFIG = TrainConfig(steps=6, batch=4, warm_up=2, save_every=3, evaluate_every=2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, 300)


def small(attention=None, positions=LENGTH, seed=3, rotary=True):
    return build_model("0.1m", VOCABULARY, positions, seed, attention, rotary)


def changed(config, **changes):
    return TrainConfig(**(vars(config) | changes))


def run(model, tokens, folder, config=CONFIG, report=lambda line: None, seed=7):
    """Train on the text and measure on its first 40 tokens."""

    def measure(model):
        return evaluate(model, tokens[:40], LENGTH).mean()

    batches = text_batches(tokens, config.batch, LENGTH, seed)
    return train(model, batches, folder, config, measure, report, seed=seed)


def state_of(folder):
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])


@pytest.fixture(scope="module")
def straight(tokens, tmp_path_factory):
    """A run from start to end: its model, history and folder."""
    model = small()
    folder = tmp_path_factory.mktemp("straight")
    return model, run(model, tokens, folder), folder


def test_it_is_adamw_with_warm_up_and_cosine(tokens, straight):
    model = small()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0)],
        betas=(0.9, 0.95),
    )
    seen = []
    for step in range(6):
        ramp = [
            0.5,
            1.0,
            1.0,
            *(0.55 + 0.45 * math.cos(math.pi * x) for x in (0.25, 0.5, 0.75)),
        ]  # of six steps, two warm up
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * ramp[step]
        starts = np.random.default_rng([7, step]).integers(0, 300 - LENGTH, 4)
        ids = torch.tensor(np.array([tokens[s : s + LENGTH] for s in starts]))
        logits = model(ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    trained, history, _ = straight
    assert [row["step"] for row in history] == [2, 4, 6]
    np.testing.assert_allclose(
        [row["loss"] for row in history], np.reshape(seen, (3, 2)).mean(1), rtol=1e-6
    )
    for ours, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ids = torch.tensor(tokens[:32]).reshape(2, LENGTH)
    logits = model(ids).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert history[-1]["measure"] == pytest.approx(loss.item(), rel=1e-5)


def test_several_numbers_are_measured_by_name(tokens, tmp_path):
    """Also by a run that resumes: those of before it are kept."""
    said = iter(range(99))

    def measure(model):
        n = next(said)
        return {"first": n, "second": -n}

    def stopped(model):
        return measure(model) if model.training and next(said) < 2 else 1 / 0

    batches = text_batches(tokens, 4, LENGTH, 7)
    config = changed(CONFIG, save_every=2)
    with pytest.raises(ZeroDivisionError):
        train(small(), batches, tmp_path, config, stopped)
    history = train(small(), batches, tmp_path, config, measure)
    found = [(row["first"], row["second"]) for row in history]
    assert found == [(1, -1), (3, -3), (4, -4)]


@pytest.mark.parametrize("arm", ["learned", "convolution", "delta", "released"])
def test_learned_rates_are_not_decayed(arm, tokens, tmp_path):
    model = small(ARMS[arm], rotary=False)
    plain = {name for name, _ in small(rotary=False).named_parameters()}
    learned = {n: p for n, p in model.named_parameters() if n not in plain}
    assert learned
    before = {name: weight.detach().clone() for name, weight in learned.items()}
    run(model, tokens, tmp_path, changed(CONFIG, steps=1, warm_up=0, weight_decay=90.0))
    # a first step of Adam is at most the learning rate; decay would be 90 times it
    for name, weight in learned.items():
        assert (weight - before[name]).abs().max() < 1.1e-3
    # and a matrix of the model is decayed: 1e-3 * 90 of it
    old = small(rotary=False).transformer.wpe.weight
    weight = model.transformer.wpe.weight
    assert (weight - 0.91 * old).abs().max() < 1.1e-3


@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_killed_run_resumes_to_the_bit(tokens, straight, tmp_path, stop_at):
    def killed(line):
        if line.startswith(f"step {stop_at}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(), tokens, tmp_path, report=killed)
    assert state_of(tmp_path)["step"] == 3
    # half a checkpoint, of a kill while saving
    (tmp_path / "checkpoint.new").write_bytes(b"half")
    model = small(seed=99)  # its weights must not matter
    assert run(model, tokens, tmp_path) == straight[1]
    for ours, theirs in zip(model.parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    names = {"checkpoint.safetensors", "config.json", "generation_config.json"}
    assert {p.name for p in tmp_path.iterdir()} == {*names, "model.safetensors"}
    whole = (straight[2] / "checkpoint.safetensors").read_bytes()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == whole
    assert run(small(), tokens, tmp_path, report=pytest.fail) == straight[1]


SCRIPT = f"""
import sys
import numpy as np
from icl.training import TrainConfig, build_model, evaluate, text_batches, train

tokens = np.random.default_rng(0).integers(0, {VOCABULARY}, 300)
config = TrainConfig(steps=6, batch=4, warm_up=2, save_every=1, evaluate_every=1)
attention = dict(kind="momentum", eta=0.5, learned=True)
for folder in sys.argv[1:]:
    model = build_model("0.1m", {VOCABULARY}, {LENGTH}, 3, attention)
    batches = text_batches(tokens, config.batch, {LENGTH}, 7)
    measure = lambda model: evaluate(model, tokens[:40], {LENGTH}).mean()
    train(model, batches, folder, config, measure, seed=7)
"""
TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
TWO += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
TWO += ["--main_process_port=0"]


@pytest.mark.slow
def test_processes_killed_outright_and_two_of_them(tmp_path):
    """A run that is killed, and one by two processes, against one that is neither."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def call(*words):
        return [sys.executable, "-u", *map(str, words)]

    folders = [tmp_path / name for name in ("whole", "killed", "two")]
    words = call(script, *folders[:2])
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE)
    thirds = 0
    for line in process.stdout:
        thirds += line.startswith(b"step 3/")
        if thirds == 2:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert state_of(folders[1])["step"] in (2, 3, 4)
    subprocess.run(call(script, folders[1]), env=environment, check=True)
    whole, killed = ((f / "checkpoint.safetensors").read_bytes() for f in folders[:2])
    assert killed == whole

    done = subprocess.run(
        call(*TWO, script, folders[2]), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6, loss") == 1
    assert "tokens/s" in done.stdout
    alone, shared = (state_of(folder)["history"] for folder in folders[::2])
    for column in ("loss", "measure"):
        found = [[row[column] for row in history] for history in (alone, shared)]
        np.testing.assert_allclose(*found, rtol=1e-5)
    one, two = (load_file(f / "checkpoint.safetensors") for f in folders[::2])
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if not name.startswith("adam."):
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_loss_that_diverges_stops_and_keeps_the_last_checkpoint(tokens, tmp_path):
    config = changed(
        CONFIG, steps=40, save_every=1, evaluate_every=1, learning_rate=1e20
    )
    with pytest.raises(FloatingPointError, match=r"step \d+"):
        run(small(), tokens, tmp_path, config)
    assert all(math.isfinite(row["loss"]) for row in state_of(tmp_path)["history"])
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(p.isfinite().all() for n, p in kept.items() if not n.startswith("adam"))


def test_a_gradient_that_is_not_finite_is_not_applied(tokens, tmp_path):
    """The loss of the step is finite, and so are all checkpoints."""
    model, config = small(), changed(CONFIG, save_every=1, evaluate_every=1)
    weight = model.get_input_embeddings().weight

    def spoil(gradient):
        step = state_of(tmp_path)["step"] if any(tmp_path.iterdir()) else 0
        return gradient * (math.inf if step == 2 else 1)

    weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="gradient .* step 3"):
        run(model, tokens, tmp_path, config)
    assert state_of(tmp_path)["step"] == 2
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_trained_model_is_read_by_transformers(tokens, straight):
    again = AutoModelForCausalLM.from_pretrained(straight[2]).eval()
    ids = torch.tensor(tokens[:LENGTH])[None]
    torch.testing.assert_close(again(ids).logits, straight[0](ids).logits)


def test_a_model_of_another_kind_is_trained(tmp_path):
    """As a regressor around a body of transformers; it has no save_pretrained."""

    class Regressor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.slope = small().config, torch.nn.Linear(1, 1)

        def forward(self, x):
            return SimpleNamespace(loss=(self.slope(x) - 2 * x).square().mean())

    x = np.linspace(-1, 1, CONFIG.batch, dtype="float32")[:, None]
    config = changed(CONFIG, learning_rate=0.1, weight_decay=0.0)
    history = train(Regressor(), lambda step: {"x": x}, tmp_path, config)
    assert history[-1]["loss"] < history[0]["loss"]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_progress_begins_with_the_first_step(tokens, tmp_path):
    lines = []
    run(small(), tokens, tmp_path, report=lines.append)
    assert lines[0].startswith("step 1/6")
    assert "min left" in lines[0]
    assert len(lines) == 4


def test_a_batch_divides_among_processes(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="4 does not divide into 3"):
        run(small(), tokens, tmp_path)


def test_what_does_not_fit_is_refused_at_once(tokens):
    with pytest.raises(ValueError, match="300"):
        text_batches(tokens, 4, 300)
    with pytest.raises(ValueError, match="17"):
        evaluate(small(), tokens, 17)
    with pytest.raises(ValueError, match="16"):
        evaluate(small(), tokens[:10], 16)
    with pytest.raises(ValueError, match="2b"):
        build_model("2b", 10, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("save_every", 0),
        ("evaluate_every", -1),
        ("warm_up", -1),
        ("learning_rate", math.nan),
        ("learning_rate", 0.0),
        ("clip", math.nan),
        ("clip", 0.0),
        ("weight_decay", -1.0),
        ("weight_decay", math.nan),
    ],
)
def test_a_config_says_what_is_wrong(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["steps", "batch", "warm_up"])
def test_counts_are_whole(name):
    given = SimpleNamespace(**vars(CONFIG) | {name: 2.5})  # past the annotations
    with pytest.raises(ValueError, match=f"{name}=2.5"):
        TrainConfig.__post_init__(given)


def test_another_runs_checkpoint_is_refused(tokens, straight):
    folder = straight[2]
    with pytest.raises(ValueError, match="seed=7, this run 8"):
        run(small(), tokens, folder, seed=8)
    with pytest.raises(ValueError, match="icl_attention=None"):
        run(small(ARMS["momentum"]), tokens, folder)
    with pytest.raises(ValueError, match="batch=4, this run 8"):
        run(small(), tokens, folder, changed(CONFIG, batch=8))


ARMS = {
    "softmax": None,
    "momentum": dict(kind="momentum", eta=0.5),
    "learned": dict(kind="momentum", eta=0.5, learned=True),
    "heavy ball": dict(kind="heavy_ball", mu=0.9),
    "convolution": dict(kind="convolution", eta=0.5, reach=4, learned=True),
    "layerwise": dict(layerwise=0.3),
    "delta": dict(kind="delta", beta=0.5, learned=True),
    "released": dict(kind="released_momentum"),
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_alike_and_comes_back(arm, tokens, tmp_path):
    model = small(ARMS[arm])
    for name, weight in small().named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], weight)
    config = changed(CONFIG, steps=2)
    history = run(model, tokens, tmp_path, config)
    ids = torch.tensor(tokens[:LENGTH])[None]
    again = small(ARMS[arm], seed=99)
    assert run(again, tokens, tmp_path, config, pytest.fail) == history
    assert torch.equal(again(ids).logits, model(ids).logits)
    plain = small()
    plain.load_state_dict(model.state_dict(), strict=False)
    different = (plain.eval()(ids).logits - model(ids).logits).abs().max()
    assert (different == 0) == (arm == "softmax")


def test_learned_rates_begin_at_those_given():
    assert torch.allclose(rates(small(ARMS["learned"])), torch.tensor(0.5).double())


def test_spread_sequences_train_all_positions(tokens, tmp_path):
    config = changed(CONFIG, steps=8, batch=12, weight_decay=0.0)
    for positions, trained in [(None, LENGTH), (32, 32)]:
        model = small(positions=32, rotary=False)
        before = model.transformer.wpe.weight.clone()
        batches = text_batches(tokens, 12, LENGTH, positions=positions)
        train(model, batches, tmp_path / str(positions), config, report=str)
        moved = (model.transformer.wpe.weight != before).any(1)
        # the last token of a sequence predicts nothing
        assert moved.tolist() == [n < trained - 1 for n in range(32)]


def test_losses_are_those_of_windows_side_by_side(tokens):
    model = small().eval()
    found = evaluate(model, tokens[:100], LENGTH, batch=4)
    assert found.shape == (6,)
    for n, loss in enumerate(found):
        ids = torch.tensor(tokens[n * LENGTH : (n + 1) * LENGTH])
        exact = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
        assert loss == pytest.approx(exact.item(), rel=1e-5)
