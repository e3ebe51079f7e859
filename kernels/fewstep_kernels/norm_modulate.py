"""LayerNorm or RMSNorm with the modulation of adaptive normalisation (AdaLN) in one pass over rows of D:

    y = (weight xhat + bias) (1 + scale) + shift,   xhat = (x - mean) / sqrt(var + eps) or x / sqrt(mean(x^2) + eps).

scale and shift [B, D] hold for all rows of a sample. Peebles and Xie 2022, arXiv:2212.09748, section 3.2; Zhang and
Sennrich 2019, arXiv:1910.07467. Bytes moved at best: x read once, y written once; plain torch moves three times that.
It does not help where a compiler fuses the expression: there the reference is used.
"""

from __future__ import annotations

from torch import Tensor

from . import normalisation
from .normalisation import Form, Parameters


def layer_norm_modulate_reference(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The defining implementation, in plain torch operations; float32 inside (float64 for float64 x)."""
    return normalisation.reference(
        Form("layer_norm_modulate", 0, eps, False), x, Parameters(weight, bias, scale, shift)
    )


def rms_norm_modulate_reference(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The defining implementation, in plain torch operations; float32 inside (float64 for float64 x)."""
    return normalisation.reference(Form("rms_norm_modulate", 0, eps, False), x, Parameters(weight, bias, scale, shift))


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over the last dimension of x [B, ..., D], times (1 + scale), plus shift; x's dtype.

    scale, shift: [B, D] or None; weight, bias: [D] or None. Any mix of floating dtypes; float32 inside (float64 for
    float64 x). Differentiable in every tensor, forward and reverse, twice. Raises TypeError/ValueError naming what does
    not fit.
    """
    form, given = Form("layer_norm_modulate", 0, float(eps), False), Parameters(weight, bias, scale, shift)
    normalisation.check(form, x, given)
    return normalisation.normalise(form, x, given)


def rms_norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """x [B, ..., D] divided by its root mean square over the last dimension, times (1 + scale), plus shift; x's dtype.

    Arguments and errors as in `layer_norm_modulate`.
    """
    form, given = Form("rms_norm_modulate", 0, float(eps), False), Parameters(weight, bias, scale, shift)
    normalisation.check(form, x, given)
    return normalisation.normalise(form, x, given)
