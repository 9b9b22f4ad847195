"""What all attentions share: precision, shared heads, masks, relative positions."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

#: Boolean (True is attended to) or additive.
Mask = Bool[Tensor, "#B _ T S"] | Float[Tensor, "#B _ T S"] | None


def to_float64(x, device: torch.device) -> Float[Tensor, "..."]:
    """In float64 where there is one: float32 is too coarse for powers of 0.9999."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(x, dtype=dtype, device=device)


def upcast(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """In the precision in which sums over tokens are taken, float32 or float64."""
    return x if x.dtype == torch.float64 else x.float()


def repeat_kv(x: Float[Tensor, "B H_kv S d"], heads: int) -> Float[Tensor, "B H S d"]:
    """Keys or values that several heads share, once for each head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def causal_sdpa(query, key, value, mask, scaling):
    """Softmax attention by PyTorch's fused kernels; causal without a mask."""
    tokens, length = query.shape[2], key.shape[2]
    if mask is None and 1 < tokens < length:
        mask = relative_positions(None, tokens, length, query.device) >= 0
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    options |= {"attn_mask": mask, "is_causal": mask is None and tokens > 1}
    return scaled_dot_product_attention(query, key, value, **options)


def to_bool_mask(mask: Mask) -> Bool[Tensor, "#B _ T S"]:
    """A mask as booleans, True where a query attends to a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def relative_positions(
    mask: Mask, tokens: int, length: int, device: torch.device
) -> Int[Tensor, "_ 1 T S"]:
    """Distance of each key from a query, counted in tokens that the query attends to.

    0 at the query's own token, -1 at masked keys.

    Raises:
        ValueError: a mask that is not causal, or with padding on the right.
    """
    if mask is None:
        place = torch.arange(length, device=device)
        return (place[length - tokens :, None] - place).clamp(min=-1)[None, None]
    mask = to_bool_mask(mask)
    after = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) - 1
    row, column = (torch.arange(n, device=mask.device) for n in (tokens, length))
    last = torch.where(mask, column, -1).amax(-1)  # (B, 1, T)
    own = last - row
    if not (own.amax(-1, keepdim=True) == own)[last >= 0].all():
        raise ValueError(
            "the last token that a query attends to must be its own: this mask is not "
            "causal, or pads on the right; pad on the left"
        )
    return after.long().masked_fill(~mask, -1)
