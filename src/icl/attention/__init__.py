"""Attentions that gradient descent suggests: to call, and to put into a model.

With momentum. Dai et al. (2023, section 5) add to softmax attention a sum of the values
before the current token, with weights that decay with its distance; what a heavy ball
would really add, and a short convolution as a control, stand beside it. The paper
leaves open the value of ``eta``, whether it is learned and one or many, and where the
sum is added; here it joins each head's output, before the heads are mixed.

Contrastive. Softmax attention is a gradient step on a loss that draws pairs together
(Ren & Liu 2023). With weight decay, augmented pairs or negatives in that loss, the
step becomes another attention. Their text was not at hand: the forms here are derived,
and where there is more than one reading both can be had.

Memories. Linear attention and the delta rule, which learn online (:mod:`icl.memory`),
stand in the place of softmax attention.

Importing this package registers all of them with transformers under ``icl_`` and the
names of ``KINDS``, for ``attn_implementation=...`` and
``model.set_attn_implementation(...)``. :func:`equip` says with which numbers.
"""

from icl.attention.contrastive import (
    Scale,
    View,
    augmented_attention,
    differential_attention,
    negative_attention,
    regularised_attention,
)
from icl.attention.memory import memory_attention
from icl.attention.models import KINDS, equip, layerwise_momentum, rates
from icl.attention.momentum import (
    convolution_attention,
    heavy_ball_attention,
    momentum_attention,
)

__all__ = [
    "KINDS",
    "Scale",
    "View",
    "augmented_attention",
    "convolution_attention",
    "differential_attention",
    "equip",
    "heavy_ball_attention",
    "layerwise_momentum",
    "memory_attention",
    "momentum_attention",
    "negative_attention",
    "rates",
    "regularised_attention",
]
