"""A memory that learns online in the place of softmax attention."""

import torch
from torch.nn.functional import normalize, pad, rms_norm

from icl.attention.masks import relative_positions, repeat_kv, to_bool_mask, upcast
from icl.attention.replace import AttentionKind, NoDecayParameter, option
from icl.online import chunkwise


class _Memory(AttentionKind):
    """Output of a linear memory that has learned the pairs of key and value so far.

    :func:`icl.online.chunkwise` on queries and keys of unit length, so that without
    momentum every step β in [0, 2] is stable, with outputs divided by their root mean
    square, as those of DeltaNet are (Yang et al. 2024). Every call recomputes the
    memory from all tokens, in decoding too. Padding on either side writes nothing;
    packed texts are refused.
    """

    needs_all_keys = True

    beta: float | int = option("step, in [0, 2 (1 - momentum)]", default=1.0)
    decay: float | int = option("in (0, 1]", lambda decay: 0 < decay <= 1, default=1.0)
    momentum: float | int = option("in [0, 1)", lambda mu: 0 <= mu < 1, default=0.0)
    learned: bool = option("learn rates inside their range, from keys", default=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta <= 2 * (1 - self.momentum):
            raise ValueError(f"{self.beta=} is not in [0, 2 (1 - {self.momentum=})]")

    def _shares(self):
        """The rates as shares of the most that they may be."""
        step = self.beta / (2 * (1 - self.momentum))
        return {"beta": step, "decay": self.decay, "momentum": self.momentum}

    def init_learned(self, model, layer):
        """Weights ``(H, n, d_h + 1)`` for n shares inside (0, 1), the logit last."""
        if not self.learned:
            return {}
        config, heads = model.config, model.config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        inside = [share for share in self._shares().values() if 0 < share < 1]
        rows = pad(torch.tensor(inside).logit()[:, None], (width, 0))
        weights = rows.repeat(heads, 1, 1).to(model.device)
        return {"gate_weights": NoDecayParameter(weights)}

    def forward(self, query, key, value, mask, scaling=None, module=None, **options):
        (heads, tokens), length = query.shape[1:3], key.shape[2]
        shares = self._shares()
        if self.learned:
            keys = upcast(repeat_kv(key, heads))
            gates = self.get_learned(module, "gate_weights").to(keys.dtype)
            read = keys @ gates[..., :-1].mT
            read = (read + gates[:, None, :, -1]).sigmoid().clamp(1e-6, 1 - 1e-6)
            inside = [name for name, share in shares.items() if 0 < share < 1]
            shares |= dict(zip(inside, read.unbind(-1), strict=True))
        beta = 2 * (1 - shares["momentum"]) * shares["beta"]
        q, k, v = (upcast(repeat_kv(x, heads)) for x in (query, key, value))
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        q = torch.cat([torch.zeros_like(k[:, :, : length - tokens]), q], 2)
        if mask is not None:
            beta = beta * _no_padding(mask, tokens, length).to(k.dtype)
        rates = {"decay": shares["decay"], "momentum": shares["momentum"]}
        with torch.autocast(query.device.type, enabled=False):  # sums need all digits
            out, _ = chunkwise(q, k, v, beta, loss=self.loss, **rates)
        return rms_norm(out[:, :, length - tokens :], out.shape[-1:]).to(value.dtype)


class LinearAttention(_Memory, kind="linear"):
    """Linear attention: a memory that descends the inner-product loss."""

    loss = "inner"


class DeltaAttention(_Memory, kind="delta"):
    """The delta rule: a memory that descends the squared loss."""

    loss = "squared"


def _no_padding(mask, tokens, length):
    """Which tokens are not padding, ``(B or 1, 1, S)``; ValueError for other masks."""
    seen = to_bool_mask(mask)
    real = seen.any(2)
    causal = relative_positions(None, tokens, length, mask.device) >= 0
    asks = real[..., length - tokens :]
    pieces = real[..., :1] + (real[..., 1:] & ~real[..., :-1]).sum(-1, keepdim=True)
    if not (seen == (causal & real[:, :, None]))[asks].all() or (pieces > 1).any():
        raise ValueError(
            "the mask of a memory must be causal, over one piece of tokens with "
            "padding before or behind: no packed texts, no window"
        )
    return real
