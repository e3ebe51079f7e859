"""GroupNorm, the time embedding's scale and shift, and SiLU in one operator:

    y = silu(u),   u = (weight xhat + bias) (1 + scale) + shift,   xhat = (z - mean_g) / sqrt(var_g + eps),
    z = x + input_shift.

The two places where networks add the embedding have two names: `shift` (with `scale`) acts AFTER the normalisation
(Dhariwal and Nichol 2021, arXiv:2105.05233, AdaGN), `input_shift` is added to x BEFORE it (Ho et al. 2020,
arXiv:2006.11239; diffusers' ResnetBlock2D with time_embedding_norm "default").

Bytes moved at best: x read once, y written once; where a group does not fit on chip x is read twice. Plain torch moves
four times that with scale and shift. It does not help where a compiler fuses the pointwise part: there the reference is
used.
"""

from __future__ import annotations

from torch import Tensor

from . import normalisation
from .normalisation import Form, Parameters


def _form(groups: int, eps: float, activation: str | None) -> Form:
    if activation not in ("silu", None):
        raise ValueError(f'group_norm_silu takes activation "silu" or None; got {activation!r}.')
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"group_norm_silu takes a positive number of groups; got {groups!r}.")
    return Form("group_norm_silu", groups, float(eps), activation == "silu")


def reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """The defining implementation, in plain torch operations; float32 inside (float64 for float64 x)."""
    given = Parameters(weight, bias, scale, shift, input_shift)
    return normalisation.reference(_form(groups, eps, activation), x, given)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """Group normalisation of x [B, C, ...], modulated and activated, in x's dtype and memory layout.

    weight, bias: [C]. scale, shift: [B, C], applied after the normalisation as (1 + scale) and shift. input_shift:
    [B, C], added to x before it. activation: "silu" or None. Any mix of floating dtypes; float32 inside (float64 for
    float64 x). Contiguous and channels-last x are read in place; another layout is copied to contiguous. Differentiable
    in every tensor, forward and reverse, twice. Raises TypeError/ValueError naming what does not fit.
    """
    form, given = _form(groups, eps, activation), Parameters(weight, bias, scale, shift, input_shift)
    normalisation.check(form, x, given)
    return normalisation.normalise(form, x, given)
