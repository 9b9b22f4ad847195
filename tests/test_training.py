"""The trainer, against a plain loop written here, and what a kill leaves."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import cross_entropy

from icl.attention import rates
from icl.training import (
    Plan,
    RecallBatches,
    TextBatches,
    gpt,
    load_trained,
    losses,
    read_tokens,
    train,
    write_tokens,
)

VOCABULARY, LENGTH = 11, 16
PLAN = Plan(steps=6, batch=4, warm_up=2, save_every=3, evaluate_every=2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, 300)


def small(attention=None, positions=LENGTH):
    return gpt("1m", VOCABULARY, positions, 3, attention)


def changed(plan, **changes):
    return Plan(**(vars(plan) | changes))


def run(model, tokens, folder, plan=PLAN, report=lambda line: None, seed=7):
    """Train on the text and measure on its first 40 tokens."""

    def measure(model):
        return losses(model, tokens[:40], LENGTH).mean()

    batches = TextBatches(tokens, plan.batch, LENGTH, seed)
    return train(model, batches, folder, plan, measure, report, seed=seed)


@pytest.fixture(scope="module")
def straight(tokens, tmp_path_factory):
    """A run from start to end: its model and history."""
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


def test_parts_of_a_batch_make_the_same_step(tokens, straight, tmp_path):
    model = small()
    history = run(model, tokens, tmp_path, changed(PLAN, accumulate=2))
    for row, whole in zip(history, straight[1], strict=True):
        assert row == pytest.approx(whole, rel=1e-5)
    for ours, theirs in zip(model.parameters(), straight[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_learned_weights_are_not_decayed(tokens, tmp_path):
    model = small(ARMS["convolution"])
    before = rates(model)
    run(model, tokens, tmp_path, changed(PLAN, steps=1, warm_up=0, weight_decay=90.0))
    # a first step of Adam is at most the learning rate; decay would be 90 times it
    assert (rates(model) - before).abs().max() < 1.1e-3


@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_killed_run_goes_on_to_the_bit(tokens, straight, tmp_path, stop_at):
    def killed(line):
        if line.startswith(f"step {stop_at}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(), tokens, tmp_path, report=killed)
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-0000003"]
    (tmp_path / ".new.99").mkdir()  # half a checkpoint, of a kill while saving
    (tmp_path / ".new.99" / "model.safetensors").write_bytes(b"half")
    model = gpt("1m", VOCABULARY, LENGTH, seed=99)  # its weights must not matter
    history = run(model, tokens, tmp_path)
    assert history == straight[1]
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-0000006"]
    for ours, theirs in zip(model.parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert run(small(), tokens, tmp_path, report=pytest.fail) == history


def command(tmp_path, tokens, folder, *launcher):
    path = write_tokens(tmp_path / "text.bin", tokens, VOCABULARY, source="random")
    options = dict(steps=6, batch=4, length=LENGTH, warm_up=2, save_every=1, seed=3)
    options |= dict(evaluate_every=1, held_out=path, size="1m")
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    attention = json.dumps(dict(kind="momentum", eta=0.5, learned=True))
    words = [path, folder, *words, "--attention", attention]
    return [sys.executable, *launcher, *map(str, words)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def test_two_processes_take_the_steps_of_one(tokens, tmp_path):
    launched = [
        ["-m", "icl.training"],
        [
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
            *("--main_process_port=0", "-m", "icl.training"),
        ],
    ]
    runs = []
    for n, launcher in enumerate(launched):
        call = command(tmp_path, tokens, tmp_path / str(n), *launcher)
        done = subprocess.run(call, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "step 6/6 loss" in done.stdout
        assert "tokens/s" in done.stdout
        assert (", 2 processes" in done.stdout) == (n == 1)
        runs.append(load_trained(tmp_path / str(n)))
    (one, alone), (two, shared) = runs
    for column in ("loss", "measure"):
        found = [[row[column] for row in history] for history in (alone, shared)]
        np.testing.assert_allclose(*found, rtol=1e-5)
    torch.testing.assert_close(rates(two), rates(one), rtol=1e-4, atol=1e-5)


def test_a_process_killed_outright_goes_on_to_the_bit(tokens, tmp_path):
    calls = [
        command(tmp_path, tokens, tmp_path / name, "-u", "-m", "icl.training")
        for name in ("whole", "killed")
    ]
    subprocess.run(calls[0], env=environment(), check=True, capture_output=True)
    run = subprocess.Popen(calls[1], env=environment(), stdout=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith(b"step 3/"):
            break
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    kept = [f.name for f in (tmp_path / "killed").glob("step-*")]
    assert kept in (["step-0000002"], ["step-0000003"], ["step-0000004"])
    subprocess.run(calls[1], env=environment(), check=True, capture_output=True)
    (whole, first), (killed, second) = map(
        load_trained, (tmp_path / "whole", tmp_path / "killed")
    )
    assert first == second
    assert torch.equal(rates(whole), rates(killed))


def test_a_loss_that_diverges_stops_and_keeps_the_last_checkpoint(tokens, tmp_path):
    plan = changed(PLAN, steps=40, save_every=1, evaluate_every=1, learning_rate=1e20)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+ .*lower"):
        run(small(), tokens, tmp_path, plan)
    model, history = load_trained(tmp_path)
    assert all(math.isfinite(row["loss"]) for row in history)
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_does_not_fit_is_refused_at_once(tokens, tmp_path):
    with pytest.raises(ValueError, match="300 tokens, too few for a sequence of 300"):
        TextBatches(tokens, 4, 300)
    with pytest.raises(ValueError, match="batch of 4 does not divide into 3 parts"):
        run(small(), tokens, tmp_path, changed(PLAN, accumulate=3))
    with pytest.raises(ValueError, match="windows of 17 .* the model holds 16"):
        losses(small(), tokens, 17)
    with pytest.raises(ValueError, match="windows of 16 .* the text has 10"):
        losses(small(), tokens[:10], 16)


def test_a_plan_says_what_is_wrong():
    with pytest.raises(ValueError, match="steps must be positive, not 0"):
        Plan(steps=0)
    with pytest.raises(ValueError, match="learning_rate nan is not positive"):
        Plan(learning_rate=math.nan)


def test_another_runs_checkpoint_is_refused(tokens, straight):
    folder = straight[2]
    with pytest.raises(
        ValueError, match="another data: it has seed=7, this run seed=8"
    ):
        run(small(), tokens, folder, seed=8)
    other = small(dict(kind="momentum", eta=0.5))
    with pytest.raises(ValueError, match="another model: it has icl_attention=None"):
        run(other, tokens, folder)


ARMS = {
    "softmax": None,
    "momentum": dict(kind="momentum", eta=0.5),
    "learned": dict(kind="momentum", eta=0.5, learned=True),
    "heavy ball": dict(kind="heavy_ball", mu=0.9),
    "convolution": dict(kind="convolution", eta=0.5, reach=4, learned=True),
    "layerwise": dict(layerwise=0.3),
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_alike_and_comes_back(arm, tokens, tmp_path):
    model = small(ARMS[arm])
    for name, weight in small().named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], weight)
    plan = changed(PLAN, steps=2)
    run(model, tokens, tmp_path, plan)
    ids = torch.tensor(tokens[:LENGTH])[None]
    again, _ = load_trained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    plain = small()
    plain.load_state_dict(model.state_dict(), strict=False)
    different = (plain.eval()(ids).logits - model(ids).logits).abs().max()
    assert (different == 0) == (arm == "softmax")


def test_spread_sequences_train_all_positions(tokens, tmp_path):
    plan = changed(PLAN, steps=20, batch=12, weight_decay=0.0)
    for positions, trained in [(None, LENGTH), (64, 64)]:
        model = small(positions=64)
        before = model.transformer.wpe.weight.clone()
        batches = TextBatches(tokens, 12, LENGTH, positions=positions)
        train(model, batches, tmp_path / str(positions), plan, report=str)
        moved = (model.transformer.wpe.weight != before).any(1)
        # the last token of a sequence predicts nothing
        assert moved.tolist() == [n < trained - 1 for n in range(64)]


def test_losses_are_those_of_windows_side_by_side(tokens):
    model = small().eval()
    found = losses(model, tokens[:100], LENGTH, batch=4)
    assert found.shape == (6,)
    for n, loss in enumerate(found):
        ids = torch.tensor(tokens[n * LENGTH : (n + 1) * LENGTH])
        exact = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
        assert loss == pytest.approx(exact.item(), rel=1e-5)


def test_tokens_come_back_and_damage_is_seen(tmp_path):
    ids = np.array([0, 5, 69999, 3])
    path = write_tokens(tmp_path / "a.bin", ids, 70000, source="here")
    found, about = read_tokens(path)
    assert found.tolist() == ids.tolist()
    assert about["vocabulary"] == 70000
    assert about["source"] == "here"
    other = read_tokens(write_tokens(tmp_path / "d.bin", ids[::-1], 70000))[1]
    assert other["sha256"] != about["sha256"]  # or a run would go on with another text
    assert write_tokens(tmp_path / "b.bin", ids[:2], 6).stat().st_size == 4
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="holds 3 tokens, and 4 were written"):
        read_tokens(path)
    with pytest.raises(ValueError, match="no tokens in"):
        read_tokens(tmp_path / "c.bin")
    with pytest.raises(ValueError, match="from 0 to 69999, outside a vocabulary of 9"):
        write_tokens(tmp_path / "c.bin", ids, 9)
    with pytest.raises(ValueError, match="not one of 0.1m, 1m"):
        gpt("2b", 10, 10)


def test_recall_asks_for_pairs_that_were_shown():
    batch = RecallBatches(5, pairs=6, symbols=9, seed=2)(step=3)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        shown = dict(zip(ids[:12:2], ids[1:12:2], strict=True))
        assert len(shown) == 6
        assert set(shown) <= set(range(9))
        assert set(shown.values()) <= set(range(9, 18))
        for first, second in zip(ids[12::2], ids[13::2], strict=True):
            assert shown[first] == second
        answers = np.flatnonzero(labels >= 0)
        assert answers.tolist() == list(range(13, 24, 2))
        assert (labels[answers] == ids[answers]).all()
    # every one of them is asked as often, at every place, whatever was asked before
    many = RecallBatches(9000, pairs=3, symbols=3, seed=2)(step=0)["input_ids"]
    place = (many[:, :6:2, None] == many[:, None, 6::2]).argmax(1)
    counts = np.bincount(place @ [9, 3, 1], minlength=27)
    assert chisquare(counts).pvalue > 1e-3
    other = RecallBatches(5, 6, 9, seed=2)(step=4)["input_ids"]
    assert (other != batch["input_ids"]).any()
    with pytest.raises(ValueError, match="10 pairs need as many different symbols"):
        RecallBatches(5, 10, 9)
