"""Attentions that gradient descent suggests: to call, and to put into a model.

Each kind is one class (:class:`AttentionKind`) with its options, what it learns and
what it computes. ``KINDS`` holds them by name; :func:`replace_attention` puts one into
a model.

- With momentum (Dai et al. 2023, section 5): the paper's formula, the learned long
  convolution that its authors released, and as controls a heavy ball or a short
  convolution. Sums are added to each head's output, before the output projection.
- Contrastive (Ren & Liu 2023), from losses with weight decay, augmented pairs or
  negatives. Their text was not at hand, so the forms here are derived.
- Memories that learn online (:mod:`icl.online`): linear attention, the delta rule.
"""

from icl.attention.contrastive import (
    AugmentedAttention,
    DifferentialAttention,
    NegativeAttention,
    RegularisedAttention,
)
from icl.attention.delta import DeltaAttention, LinearAttention
from icl.attention.momentum import (
    ConvolutionAttention,
    HeavyBallAttention,
    MomentumAttention,
)
from icl.attention.released import (
    ReleasedMomentumAttention,
    convolve_chunked,
    convolve_fft,
    convolve_recurrent,
    ema_kernel,
)
from icl.attention.replace import (
    KINDS,
    AttentionKind,
    layerwise_momentum,
    option,
    rates,
    replace_attention,
    restore_attention,
)

__all__ = ["KINDS", "AttentionKind", "AugmentedAttention", "ConvolutionAttention"]
__all__ += ["DeltaAttention", "DifferentialAttention", "HeavyBallAttention"]
__all__ += ["LinearAttention", "MomentumAttention", "NegativeAttention"]
__all__ += ["RegularisedAttention", "ReleasedMomentumAttention", "convolve_chunked"]
__all__ += ["convolve_fft", "convolve_recurrent", "ema_kernel", "layerwise_momentum"]
__all__ += ["option", "rates", "replace_attention", "restore_attention"]
