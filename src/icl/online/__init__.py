r"""Sequence layers as online learners: a loss, and an optimizer.

A memory with weights W reads pairs :math:`(k_t, v_t)` one after another, takes one
step on each pair's loss, and answers the query :math:`q_t` with what it has learned.
:func:`recurrent` is that loop,

.. math::

   \tilde W = \gamma_t W_{t-1}, \qquad
   M_t = \mu_t M_{t-1} - \beta_t \nabla \ell_t(\tilde W), \qquad
   W_t = \tilde W + M_t, \qquad o_t = W_t q_t,

and published layers are settings of it:

======================== ============= =============================================
layer                    loss          optimizer
======================== ============= =============================================
linear attention         ``inner``     a constant step
RetNet, Mamba-2          ``inner``     decay: constant, or per token
momentum attention       ``inner``     momentum
DeltaNet                 ``squared``   a step per token
Gated DeltaNet           ``squared``   and decay
heavy ball               ``squared``   momentum
Titans                   ``squared``   momentum and decay, ``decayed=False``
TTT                      ``squared``   ``minibatch=16``, ``model=residual(...)``
Longhorn                 ``squared``   implicit step; as published, ``separable``
Preconditioned DeltaNet  ``squared``   ``precondition="diagonal"``
Mesa                     ``squared``   ``precondition="full"``, ``decayed=False``
======================== ============= =============================================

The inner-product loss :math:`-v^\top W k` has the gradient :math:`-v k^\top` (Ren & Liu
2024), the squared loss :math:`\tfrac12|Wk - v|^2` has :math:`(Wk - v)\,k^\top`.
:func:`chunkwise` computes the loop of a linear memory by products of matrices, and
:func:`mesa` that with the full preconditioner.
"""

# Each function after its module: `online.chunkwise` and the like are the functions.
from icl.online.chunkwise import chunkwise
from icl.online.mesa import conjugate_gradients, mesa
from icl.online.recurrent import linear, mlp, recurrent, residual
from icl.online.state import State

__all__ = ["State", "chunkwise", "conjugate_gradients", "linear", "mesa", "mlp"]
__all__ += ["recurrent", "residual"]
