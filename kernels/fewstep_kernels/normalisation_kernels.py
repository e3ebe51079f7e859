"""The normalisation pairs in Triton: rows, and groups that fit on chip, take one launch; larger groups three for a
value, and two more for a gradient or a tangent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import normalisation_group_kernels as groups
from .normalisation_formulas import LONGEST_ROW, Form, Parameters
from .normalisation_row_kernels import rows, rows_backward

MOST = LONGEST_ROW  # elements of a group that one program holds


def _fits(form: Form, x: Tensor) -> bool:
    return not form.groups or x.numel() // (x.shape[0] * form.groups) <= MOST


def forward(form: Form, x: Tensor, given: Parameters, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    if _fits(form, x):
        rows(form, x, None, y, mean, rstd, given, (None, None, None))
        return
    tiles = groups.Tiles(x)
    groups.statistics(form, x, given.input_shift, tiles, mean, rstd)
    groups.apply(form, x, None, y, mean, rstd, (None, None), None, given, (None, None, None), tiles, False)


def backward(
    form: Form,
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    given: Parameters,
    dx: Tensor,
    da: Tensor,
    db: Tensor,
) -> None:
    if form.groups:
        tiles = groups.Tiles(x)
        parts = tiles.parts(x)
        arguments = (given, (None, None, None), tiles, False)
        groups.apply(form, x, gradient, dx, mean, rstd, (None, None), parts, *arguments)
        sums = parts.sum(1)  # [B, 2, C]
        a = torch.ones_like(da) if given.weight is None else given.weight.float().expand_as(da)
        a = a if given.scale is None else a * (1 + given.scale.float())
        means = groups.means_of(form, sums, a, x.numel() // (x.shape[0] * form.groups))
        groups.apply(form, x, gradient, dx, mean, rstd, means, None, *arguments)
    else:
        sums = rows_backward(form, gradient, x, mean, rstd, given, dx)
    da.copy_(sums[:, 0])
    db.copy_(sums[:, 1])


def tangent(
    form: Form,
    x: Tensor,
    tx: Tensor,
    given: Parameters,
    ta: Tensor | None,
    tb: Tensor | None,
    tadded: Tensor | None,
    ty: Tensor,
) -> None:
    changes = (ta, tb, tadded)
    if _fits(form, x):
        rows(form, x, tx, ty, None, None, given, changes)
        return
    tiles = groups.Tiles(x)
    mean = x.new_empty((x.shape[0], form.groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    groups.statistics(form, x, given.input_shift, tiles, mean, rstd)
    parts = tiles.parts(x)
    groups.apply(form, x, tx, ty, mean, rstd, (None, None), parts, given, changes, tiles, True)
    means = groups.means_of(form, parts.sum(1), None, x.numel() // (x.shape[0] * form.groups))
    groups.apply(form, x, tx, ty, mean, rstd, means, None, given, changes, tiles, True)
