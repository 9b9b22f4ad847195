"""The attentions of this package in a transformers model."""

import math

import torch
from torch.nn import Parameter
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from icl.attention.contrastive import (
    Scale,
    View,
    augmented_attention,
    differential_attention,
    negative_attention,
    regularised_attention,
)
from icl.attention.memory import memory_attention
from icl.attention.momentum import convolved, decayed_sum, heavy_ball_bias
from icl.attention.shared import fine, repeated, softmax_attention, visible
from icl.heads import attention_modules

#: What each kind of attention is told; None stands for what has no default.
KINDS = {
    "momentum": {"eta": None, "normalise": False, "softmax": True},
    "heavy_ball": {"mu": None},
    "convolution": {"eta": None, "reach": None},
    "regularised": {"alpha": None, "demonstrations": 0, "matched": False},
    "augmented": {
        "hidden": 0,
        "depth": 1,
        "residual": True,
        "demonstrations": 0,
        "matched": False,
    },
    "negative": {
        "beta": None,
        "k": None,
        "by": "keys",
        "demonstrations": 0,
        "matched": False,
    },
    "differential": {"lam": None},
    "linear": {"beta": 1.0, "decay": 1.0, "momentum": 0.0},
    "delta": {"beta": 1.0, "decay": 1.0, "momentum": 0.0},
}
RATED = ("momentum", "heavy_ball", "convolution")
MEMORIES = {"linear": "inner", "delta": "squared"}  # and their losses


def equip(model, kind, learned=False, layers=None, **options):
    """Give layers of a model one of the attentions of this package.

    Args:
        model: a gpt2, opt, gpt_neox, llama or qwen of transformers. It is changed.
        kind: ``"momentum"``, ``"heavy_ball"``, ``"convolution"``, ``"regularised"``,
            ``"augmented"``, ``"negative"``, ``"differential"``, ``"linear"`` or
            ``"delta"``.
        learned: of the first three kinds, let every head of every layer learn its own
            rate, from the given one on. The parameters are called ``momentum`` and
            live in the attention modules: the logits of ``eta`` or ``mu``, or a
            convolution's weights. Of the last two kinds, let every head read the rates
            from each token's key, by a linear map to logits which begins at the given
            ones; a rate at the end of its range stays there.
        layers: which, as numbers from 0 on; left out, all. The others keep their own.
        options: by the names of the function that the kind has, such as ``eta`` for
            :func:`momentum_attention`; a convolution's ``reach``, J, and ``eta``,
            whose powers are its weights. ``demonstrations`` is a number here: so many
            tokens at the front are demonstrations. They read each other by the model's
            own attention, and what comes after reads them by this one, so that nothing
            learns of a later token. 0, the default, is every token's reading of all
            before it. An augmented attention is told ``hidden``, ``depth`` and
            ``residual`` of its two :class:`View` a layer, which all heads share and
            which are called ``of_key`` and ``of_value``, or ``matched=True`` to have
            :class:`Scale` instead. Linear attention and the delta rule are told
            ``momentum`` in [0, 1), ``decay`` in (0, 1] and ``beta`` in [0, 2 (1 -
            momentum)] of :func:`memory_attention`. They learn all tokens anew at every
            step of decoding, and cannot read texts that are packed in one row.

    Returns:
        the model. Its configuration keeps the choices as ``icl_attention``, so that a
        saved model without learned parameters comes back with them.

    Raises:
        ValueError: an unknown kind or option, one that is missing, a rate outside
            (0, 1), or an architecture whose attention cannot be replaced.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    settings = KINDS[kind] | options
    missing = [name for name, value in settings.items() if value is None]
    if missing or len(settings) > len(KINDS[kind]):
        raise ValueError(
            f"{kind} is told {', '.join(KINDS[kind])}; given were "
            f"{', '.join(options) or 'none'}"
        )
    for name in {"eta", "mu"} & {*settings}:
        if not 0 < settings[name] < 1:
            raise ValueError(f"{name} must lie in (0, 1), not {settings[name]}")
    for name in {"alpha", "beta", "lam"} & {*settings}:
        if not math.isfinite(settings[name]):
            raise ValueError(f"{name} must be finite, not {settings[name]}")
    for name in {"reach", "k"} & {*settings}:
        if settings[name] < 1:
            raise ValueError(f"{name} is 1 token or more, not {settings[name]}")
    if 0 < settings.get("demonstrations", 0) <= settings.get("k", 0):
        raise ValueError(
            f"k must be less than the {settings['demonstrations']} demonstrations, "
            f"not {settings['k']}"
        )
    if kind in MEMORIES:
        b, a, mu = (settings[name] for name in ("beta", "decay", "momentum"))
        if not (0 <= mu < 1 and 0 < a <= 1 and 0 <= b <= 2 * (1 - mu)):
            raise ValueError(
                "momentum must lie in [0, 1), decay in (0, 1] and beta in "
                f"[0, 2 (1 - momentum)]; given were {mu}, {a} and {b}"
            )
    if learned and kind not in (*RATED, *MEMORIES):
        raise ValueError(
            f"learned is for {', '.join((*RATED, *MEMORIES))}, not for {kind}"
        )
    if not model._supports_attention_backend:
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be replaced: it does not "
            "go through transformers' attention interface; that of gpt2, opt, "
            "gpt_neox, llama and qwen does"
        )
    modules = attention_modules(model)
    layers = range(len(modules)) if layers is None else layers
    if not {*layers} <= {*range(len(modules))}:
        raise ValueError(
            f"layers are numbers from 0 to {len(modules) - 1}, not {[*layers]}"
        )
    settings |= {"kind": kind, "learned": learned, "layers": [*layers]}
    model.config.icl_attention = settings
    for layer, module in enumerate(modules):
        for name in ("momentum", "of_key", "of_value"):
            if hasattr(module, name):  # of what it was equipped with before
                delattr(module, name)
        if layer not in layers:
            continue
        if learned and kind in MEMORIES:
            module.momentum = Parameter(_gates(model, settings).to(model.device))
        elif learned:
            start = _given(settings)
            start = start if kind == "convolution" else start.logit()
            start = start.repeat(model.config.num_attention_heads, 1).squeeze(1)
            module.momentum = Parameter(start.float().to(model.device))
        if kind == "augmented":
            for number, name in enumerate(("of_key", "of_value")):
                view = _view(model, settings, seed=2 * layer + number)
                setattr(module, name, view.to(model.device, model.dtype))
    model.set_attn_implementation(f"icl_{kind}")
    return model


def _view(model, settings, seed):
    config = model.config
    if settings["matched"]:
        heads = getattr(config, "num_key_value_heads", None)
        return Scale(heads or config.num_attention_heads)
    options = {name: settings[name] for name in ("hidden", "depth", "residual")}
    return View(_width(config), seed=seed, **options)


def _width(config):
    heads = config.num_attention_heads
    return getattr(config, "head_dim", None) or config.hidden_size // heads


def _shares(settings):
    """A memory's rates as shares of the most that they may be."""
    mu = settings["momentum"]
    step = settings["beta"] / (2 * (1 - mu))
    return {"beta": step, "decay": settings["decay"], "momentum": mu}


def _gates(model, settings):
    """A row for every head and share inside (0, 1), its logit last: (H, n, d_h + 1)."""
    inside = [share for share in _shares(settings).values() if 0 < share < 1]
    rows = torch.tensor(inside).logit()[:, None]
    heads = model.config.num_attention_heads
    return pad(rows, (_width(model.config), 0)).repeat(heads, 1, 1)


def rates(model):
    """Rates of each head of the equipped layers: ``(L, H)``, a convolution's
    ``(L, H, J)``.

    Raises:
        ValueError: it is not equipped, or with an attention that has no rates.
    """
    heads = model.config.num_attention_heads
    found = [
        _settled(module, model.device)
        for module in attention_modules(model)
        if module.layer_idx in _told(module)["layers"]
    ]
    return torch.stack([rate.detach().expand(heads, *rate.shape[1:]) for rate in found])


def layerwise_momentum(model, mu):
    """Nesterov's momentum from block to block of a transformers model.

    A residual network moves its hidden state ``x_l`` by one step a block. Here block
    l starts from ``x_l + μ (x_l - x_{l-1})``: momentum across layers, where
    :func:`momentum_attention` has it across tokens.

    Args:
        model: as for :func:`equip`; hooks are put on its blocks.
        mu: in (0, 1).

    Returns:
        the hooks; ``remove()`` of each takes the momentum away again.

    Raises:
        ValueError: ``mu`` outside (0, 1).
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must lie in (0, 1), not {mu}")
    ours = {id(module) for module in attention_modules(model)}
    blocks = [
        block
        for block in model.modules()
        if any(id(child) in ours for child in block.children())
    ]
    last = {}

    def ahead(block, inputs):
        x, *rest = inputs
        start = x if block is blocks[0] else x + mu * (x - last["x"])
        last["x"] = x if block is not blocks[-1] else None
        return start, *rest

    return [block.register_forward_pre_hook(ahead) for block in blocks]


def _given(settings):
    """The rate ``(1,)``, or a convolution's weights ``(J,)``."""
    if "reach" in settings:
        distance = torch.arange(1, settings["reach"] + 1)
        return settings["eta"] ** distance.double()
    rate = settings["mu"] if settings["kind"] == "heavy_ball" else settings["eta"]
    return torch.tensor([rate], dtype=torch.float64)


def _told(module):
    settings = getattr(module.config, "icl_attention", None)
    if settings is None:
        raise ValueError(
            "this attention has not been told its numbers: call "
            "icl.attention.equip(model, kind, ...)"
        )
    return settings


def _settled(module, device):
    """The rate ``(1,)`` or ``(H,)`` of a layer, or a convolution's ``(1 or H, J)``."""
    settings = _told(module)
    if settings["kind"] not in RATED:
        raise ValueError(f"{settings['kind']} attention has no rates")
    if not settings["learned"]:
        rate = _given(settings)
        return fine(rate[None] if "reach" in settings else rate, device)
    rate = fine(_learned(module), device)
    return rate if "reach" in settings else rate.sigmoid()


def _learned(module):
    if not hasattr(module, "momentum"):
        raise ValueError(
            "this model learned its rates, and they are not loaded: call "
            "icl.attention.equip first, then load its weights"
        )
    return module.momentum


def _attend(kind):
    def attend(module, query, key, value, attention_mask, **options):
        tokens, length = query.shape[2], key.shape[2]
        if attention_mask is None and 1 < tokens < length:  # a cache to be filled
            key, value = key[:, :, :tokens], value[:, :, :tokens]
        asked, mask = query.shape[1:3], attention_mask
        if module.layer_idx not in _told(module)["layers"]:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        if kind in MEMORIES:
            return _remember(module, query, key, value, mask, **options)
        if kind not in RATED:
            return _contrast(module, query, key, value, mask, **options)
        rate, settings = _settled(module, value.device), module.config.icl_attention
        if kind == "heavy_ball":
            mask = heavy_ball_bias(rate, query, key, mask)
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        if kind == "convolution":
            past = convolved(value, rate, asked, mask)
        else:
            past = decayed_sum(value, rate, asked, mask, settings["normalise"])
        past = past.transpose(1, 2).to(value.dtype)
        if kind == "momentum" and not settings["softmax"]:
            return past, None
        usual, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return usual + past, None

    return attend


def _contrast(module, query, key, value, mask, scaling=None, **options):
    settings = {**_told(module)}
    kind, front = settings.pop("kind"), settings.pop("demonstrations", 0)
    del settings["learned"], settings["layers"]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if options.get("dropout"):
        raise ValueError(f"{kind} attention has no dropout: set attention's to 0")
    given = query, key, value
    shown, reads_among = _in_front(front, query, key, mask) if front else (None, None)
    if kind == "differential":
        out = differential_attention(
            *given, settings["lam"], mask=mask, scaling=scaling * 2**0.5
        )
    elif key.shape[2] == 1 or (front and reads_among.all()):  # all in one part
        out = softmax_attention(*given, mask, scaling)
    else:
        options = {"demonstrations": shown, "mask": mask, "scaling": scaling}
        if kind == "augmented":
            if not hasattr(module, "of_key"):
                raise ValueError(
                    "this model learned its views, and they are not loaded: call "
                    "icl.attention.equip first, then load its weights"
                )
            views = module.of_value, module.of_key
            out = augmented_attention(*given, *views, **options)
        elif kind == "negative":
            settings["k"] = min(settings["k"], (front or key.shape[2]) - 1)
            out = negative_attention(*given, **settings, **options)
        else:
            out = regularised_attention(*given, **settings, **options)
        if front and reads_among.any():
            own = softmax_attention(*given, mask, scaling)
            out = torch.where(reads_among[:, None, :, None], own, out)
    return out.transpose(1, 2), None


def _remember(module, query, key, value, mask, **options):
    settings = module.config.icl_attention
    if options.get("dropout"):
        raise ValueError(f"{settings['kind']} attention has no dropout: set it to 0")
    shares = _shares(settings)
    if settings["learned"]:
        gates = _learned(module)
        read = repeated(key, query.shape[1]).float() @ gates[..., :-1].mT
        read = (read + gates[:, None, :, -1]).sigmoid().clamp(1e-6, 1 - 1e-6)
        inside = [name for name, share in shares.items() if 0 < share < 1]
        shares |= dict(zip(inside, read.unbind(-1), strict=True))
    beta = 2 * (1 - shares["momentum"]) * shares["beta"]
    rates = beta, shares["decay"], shares["momentum"], MEMORIES[settings["kind"]]
    out = memory_attention(query, key, value, *rates, mask)
    return out.transpose(1, 2), None


def _in_front(front, query, key, mask):
    """Which tokens are demonstrations, ``(B, P + T)``, and which of those that ask
    are, or are padding, ``(B, T)``. Padding stands before a sequence."""
    place = torch.arange(key.shape[2], device=key.device).expand(len(key), -1)
    begin = 0
    if mask is not None:
        begin = visible(mask).any(2)[:, 0].int().argmax(-1, keepdim=True)
    early = place < begin + front
    return early & (place >= begin), early[:, key.shape[2] - query.shape[2] :]


for _kind in KINDS:
    AttentionInterface.register(f"icl_{_kind}", _attend(_kind))
    AttentionMaskInterface.register(f"icl_{_kind}", sdpa_mask)
