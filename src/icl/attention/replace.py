"""What a kind of attention is, and how it replaces that of a transformers model."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from icl.activations import attention_modules
from icl.attention.masks import Mask, causal_sdpa, to_bool_mask

#: The class of every kind of attention by its name.
KINDS = {}


class NoDecayParameter(torch.nn.Parameter):
    """A learned parameter that weight decay leaves alone."""

    no_weight_decay = True


def option(meaning, allowed=lambda value: True, default=MISSING):
    """An option of a kind: its meaning, a test of its values, and its default."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


class AttentionKind:
    """One kind of attention: options, learned parameters, forward pass.

    ``class Mine(AttentionKind, kind="mine")`` is a dataclass whose fields are options,
    registered as ``"mine"`` in ``KINDS`` and as ``"icl_mine"`` with transformers.
    """

    applies_dropout = False  # in training, as a model's own attention does
    needs_all_keys = False  # so that a sliding window is refused

    def __init_subclass__(cls, kind=None):
        dataclass(frozen=True, kw_only=True)(cls)
        if kind is not None:
            KINDS[kind], cls.kind = cls, kind
            cls.__doc__ += "\n\n    Args:\n        " + cls.describe("\n        ")
            AttentionInterface.register(f"icl_{kind}", partial(_attend, cls))
            AttentionMaskInterface.register(f"icl_{kind}", sdpa_mask)

    def __post_init__(self):
        for each in fields(self):
            value, meaning = getattr(self, each.name), each.metadata["meaning"]
            right = isinstance(value, int) or each.type is not int
            if not (right and each.metadata["allowed"](value)):
                raise ValueError(f"{each.name} = {value} is not allowed: {meaning}")

    @classmethod
    def describe(cls, separator="\n"):
        """The options with their meaning and default."""
        return separator.join(
            f"{each.name}: {each.metadata['meaning']}"
            + ("" if each.default is MISSING else f"; default {each.default!r}")
            for each in fields(cls)
        )

    @classmethod
    def from_config(cls, config):
        """The kind with the options that are saved in a model's configuration."""
        saved = getattr(config, "icl_attention", {})
        if saved.get("kind") != cls.kind:
            raise ValueError(
                f"the options of {cls.kind} attention are not set: call "
                "icl.attention.replace_attention(model, kind, ...)"
            )
        return cls(**{each.name: saved[each.name] for each in fields(cls)})

    def init_learned(self, model, layer):
        """New parameters or modules of a layer's attention, by name."""
        return {}

    @staticmethod
    def get_learned(module, name):
        """What an attention module has learned under this name."""
        if not hasattr(module, name):
            raise ValueError(
                f"this model has learned {name}, which is not loaded: load it by "
                "icl.models.load_model, or call icl.attention.restore_attention"
            )
        return getattr(module, name)

    def __call__(
        self,
        query: Float[Tensor, "B H T d_h"],
        key: Float[Tensor, "B H_kv S d_h"],
        value: Float[Tensor, "B H_kv S d_v"],
        mask: Mask = None,
        scaling: float | None = None,
        **views,
    ) -> Float[Tensor, "B H T d_v"]:
        """The output of each head.

        Args:
            query: of the last T of S tokens.
            key, value: ``H_kv`` divides ``H``.
            mask: boolean (True is attended to) or additive; causal, the same for all
                heads. Distances count the tokens that a query attends to, so they
                hold with padding on the left and in rows of several texts.
                Default: all tokens up to the query's own.
            scaling: of the scores; default ``1/√d_h``.
            views: functions ``of_key`` and ``of_value`` of augmented attention; for
                contrastive kinds as in an encoder ``is_causal=False`` and
                ``special_tokens_mask``.
        """
        (heads, tokens), (kv_heads, length) = query.shape[1:3], key.shape[1:3]
        fit = value.shape[1:3] == key.shape[1:3] and not heads % kv_heads
        fit &= mask is None or mask.shape[1:] == (1, tokens, length)
        if not fit or tokens > length:
            given = (query, key, value) if mask is None else (query, key, value, mask)
            raise ValueError(f"shapes do not fit: {[[*x.shape] for x in given]}")
        return self.forward(query, key, value, mask, scaling, **views)

    def forward(self, query, key, value, mask, scaling=None, module=None, **options):
        """The same; in a model with its attention module and transformers' options."""
        raise NotImplementedError


def replace_attention(
    model: PreTrainedModel, kind: str, learned: bool = False, layers=None, **options
) -> PreTrainedModel:
    """Replace the attention of a model in place.

    Args:
        model: a gpt2, opt, gpt_neox, llama, qwen or gemma; if contrastive, also a bert
            or roberta, which takes its tokenizer's ``special_tokens_mask`` too. Its
            configuration keeps the options: of a saved model
            :func:`icl.models.load_model` restores them with the learned parameters;
            ``from_pretrained`` fails unless :mod:`icl.attention` is imported.
        kind: a name in ``KINDS``, or ``"softmax"``, which restores softmax
            attention and removes momentum from block to block. (The library's own
            ``attn_implementation="icl_..."`` has no options, and is refused.)
        learned: let every head learn its rates, of a kind that has some. They are
            parameters of the attention modules (``rate_logits``, ``gate_weights``,
            ``convolution_weights``, ``strengths``), marked ``no_weight_decay``.
        layers: indices, from 0, of the layers to replace; default all.
        options: of the kind, see ``help(KINDS[kind])``.

    Raises:
        ValueError: an unknown kind, option or layer, an option that is missing or not
            allowed, or an architecture whose attention cannot be replaced.
    """
    modules = attention_modules(model)
    if kind == "softmax":
        return _restore_softmax(model, modules)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of softmax, {', '.join(KINDS)}")
    if learned:
        options["learned"] = True
    try:
        attention = KINDS[kind](**options)
    except TypeError as wrong:
        options = KINDS[kind].describe()
        raise ValueError(f"{wrong}; options of {kind}:\n{options}") from wrong
    if not (modules and model._supports_attention_backend):
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be replaced; that of "
            "gpt2, opt, gpt_neox, llama, qwen, gemma, bert and roberta can"
        )
    causal = all(getattr(module, "is_causal", True) for module in modules)
    if getattr(attention, "demonstrations", 1) and not causal:
        raise ValueError(f"{type(model).__name__} is not causal, but {attention} is")
    capped = getattr(model.config, "attn_logit_softcapping", None)
    if capped or any(hasattr(module, "sinks") for module in modules):
        raise ValueError(
            f"the attention of {type(model).__name__} has sinks, or a cap on its "
            "scores, which would be lost"
        )
    layers = [*range(len(modules))] if layers is None else [*layers]
    if not {*layers} <= {*range(len(modules))}:
        raise ValueError(f"layers are 0 to {len(modules) - 1}, not {layers}")
    chosen = {"kind": kind, "learned": learned, "layers": layers}
    saved = {
        n: v.tolist() if isinstance(v, Tensor) else v
        for n, v in asdict(attention).items()
    }
    parts_of = [
        attention.init_learned(model, layer) if layer in layers else {}
        for layer in range(len(modules))
    ]
    model.config.icl_attention = saved | chosen
    for module, parts in zip(modules, parts_of, strict=True):
        _forget(module)
        for name, part in parts.items():
            setattr(module, name, part)
        module.icl_learned = [*parts]
    model.set_attn_implementation(f"icl_{kind}")
    model.config.attn_implementation = f"icl_{kind}"  # what from_pretrained reads
    return model


def _restore_softmax(model, modules):
    for module in modules:
        _forget(module)
    for hook in model.__dict__.pop("icl_layerwise", ()):
        hook.remove()
    for name in ("icl_attention", "icl_layerwise", "attn_implementation"):
        vars(model.config).pop(name, None)
    model.set_attn_implementation("sdpa")
    return model


def _forget(module):
    """Delete what the kind before has learned."""
    for name in module.__dict__.pop("icl_learned", ()):
        delattr(module, name)


def restore_attention(model: PreTrainedModel, folder=None) -> PreTrainedModel:
    """Give a loaded model the attention and learned parameters it was saved with.

    Without a folder, learned parameters are newly initialised.

    Raises:
        ValueError: learned parameters that the model's safetensors files do not hold.
    """
    if mu := getattr(model.config, "icl_layerwise", None):
        layerwise_momentum(model, mu)
    if not (saved := getattr(model.config, "icl_attention", None)):
        return model
    own = {*model.state_dict()}
    replace_attention(model, **saved)
    missing = {n: part for n, part in model.state_dict().items() if n not in own}
    if folder is None:
        return model
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in missing.keys() & {*file.keys()}:
                if missing[name].shape == (found := file.get_tensor(name)).shape:
                    missing.pop(name).copy_(found)
    if missing:
        raise ValueError(f"{folder} has no weights {', '.join(missing)} of this shape")
    return model


def rates(model: PreTrainedModel) -> Float[Tensor, "L H"] | Float[Tensor, "L H J"]:
    """Rates of each head of the replaced layers, or a convolution's J weights."""
    saved = getattr(model.config, "icl_attention", {"kind": "softmax"})
    kind, heads = KINDS.get(saved["kind"]), model.config.num_attention_heads
    if not hasattr(kind, "rates"):
        raise ValueError(f"{saved['kind']} attention has no rates")
    attention = kind.from_config(model.config)
    found = [
        attention.rates(model.device, module).detach()
        for module in attention_modules(model)
        if module.layer_idx in saved["layers"]
    ]
    return torch.stack([rate.expand(heads, *rate.shape[1:]) for rate in found])


def layerwise_momentum(model: PreTrainedModel, mu: float) -> None:
    """Nesterov's momentum from block to block, across layers and not tokens.

    A residual network moves its hidden state ``x_l`` by one step per block. Here block
    l starts from ``x_l + μ (x_l - x_{l-1})``, μ in (0, 1). The configuration keeps μ;
    a second call replaces the first, ``replace_attention(model, "softmax")`` ends it.
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must lie in (0, 1), not {mu}")
    modules = {*attention_modules(model)}
    blocks = [block for block in model.modules() if modules & {*block.children()}]
    for hook in model.__dict__.get("icl_layerwise", ()):
        hook.remove()
    model.config.icl_layerwise, last = mu, {}
    model.icl_layerwise = [
        block.register_forward_pre_hook(partial(_ahead, mu, n, len(blocks) - 1, last))
        for n, block in enumerate(blocks)
    ]


def _ahead(mu, n, final, last, block, inputs):
    """The hook of block ``n``; all blocks share ``last``, the state before."""
    if block.training and getattr(block, "gradient_checkpointing", False):
        raise ValueError("momentum from block to block bars gradient checkpointing")
    x, *rest = inputs
    start = x if n == 0 else x + mu * (x - last["x"])
    last["x"] = x if n < final else None
    return start, *rest


def softmax_attention(query, key, value, mask, scaling, module=None, **options):
    """Softmax attention; in a model, the model's own."""
    if module is None:
        return causal_sdpa(query, key, value, mask, scaling)
    options["scaling"] = scaling
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return out.transpose(1, 2)


def _attend(cls, module, query, key, value, attention_mask, **options):
    """The attention of a layer, as transformers calls it."""
    tokens, length = query.shape[2], key.shape[2]
    end = length
    if attention_mask is not None:  # a cache of fixed size ends behind the last query
        own = to_bool_mask(attention_mask)[:, :, -1].flatten(0, 1).any(0)
        end = int(own.nonzero().amax()) + 1 if tokens < length and own.any() else length
        attention_mask = attention_mask[..., :end]
    elif 1 < tokens < length:  # it is yet empty
        end = tokens
    key, value = key[:, :, :end], value[:, :, :end]
    kind, inputs = cls.from_config(module.config), (query, key, value, attention_mask)
    module.config.attn_implementation = f"icl_{cls.kind}"  # saved, also if loaded
    if module.layer_idx not in module.config.icl_attention["layers"]:
        return sdpa_attention_forward(module, *inputs, **options)
    window = getattr(module, "sliding_window", None) or options.get("sliding_window")
    if kind.needs_all_keys and window and end >= window:
        raise ValueError(f"{cls.kind} attention needs all keys, no window of {window}")
    if options.get("dropout") and not cls.applies_dropout:
        raise ValueError(f"{cls.kind} attention has no dropout: set attention's to 0")
    return kind.forward(*inputs, module=module, **options).transpose(1, 2), None
