"""A lincomb that is called again and again with the same coefficients and mostly the same tensors: looked at once.

What `lincomb` finds out about its arguments at every call is found out when it is prepared; a call fills in the few
addresses that change. The bits are lincomb's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, native
from .lincomb_kernels import MOST, launch_triton
from .native import HEAD, OVERLAP, SEEDS


class Share(NamedTuple):
    """Part number `part` of the `parts` equal ones along the batch of the tensor `given` (its number) of each call."""

    given: int
    part: int = 0
    parts: int = 1


class PreparedLincomb:
    """`lincomb(inputs, coefficients, out=out)` of tensors of the shape of a contiguous `like` [B, ...].

    inputs, out: tensors, kept and not looked at again, or a `Share` of what each call gives. stream: None, or the
    stream of noise drawn for the last column from the seeds of each call. Holds one table: for one thread at a time.
    `ready` says whether calls can succeed at all; they cannot where the reference serves or something is not plain.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor | Share],
        coefficients: Tensor,
        out: Sequence[Tensor | Share],
        like: Tensor,
        stream: int | None = None,
    ) -> None:
        self.backend, _ = backends.choose("lincomb", like.device.type)
        self._inputs, self._out, self._coefficients, self._stream = [*inputs], [*out], coefficients, stream
        self._inner, self._device = like.stride()[1:], like.get_device()
        self._batch, self.like = like.shape[0], like
        self._count = like.numel() // max(1, self._batch)
        shares: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, x in enumerate((*inputs, *out)):
            if isinstance(x, Share):
                shares.setdefault((x.given, x.parts), []).append((HEAD + 3 * place, x.part))
        # of each given tensor its number, shape, and the places in the table of its parts
        self._given = [
            (number, torch.Size((parts * self._batch, *like.shape[1:])), places)
            for (number, parts), places in shares.items()
        ]
        columns, most = len(inputs) + (stream is not None), MOST.get(self.backend, (0, 0))
        self.ready = (
            (self.backend != "triton" or native.cpu().look is not None)
            and like.numel() >= 2
            and like.is_contiguous()
            and columns <= most[0]
            and len(out) <= most[1]
            and coefficients.dtype in (torch.float32, torch.float64)
            and coefficients.shape == (len(out), columns)
            and coefficients.get_device() == self._device
            and not coefficients.is_neg()
            and all(self._fits(x, like.shape) for x in (*inputs, *out) if isinstance(x, Tensor))
        )
        rows = [0] * 3 * (len(inputs) + len(out))
        for place, x in enumerate((*inputs, *out)):
            if self.ready and isinstance(x, Tensor):
                rows[3 * place : 3 * place + 3] = x.data_ptr(), x.stride(0), native.DTYPES[x.dtype]
        head = (len(inputs), len(out), self._batch, self._count, 0, stream or 0, coefficients.data_ptr(), 0)
        self._table = array("q", (*head, *coefficients.stride(), native.DTYPES.get(coefficients.dtype, 0), *rows))
        self._address = self._table.buffer_info()[0]

    def _fits(self, x: Tensor, shape: torch.Size) -> bool:
        """Whether the tensor's samples lie as the kernel reads them."""
        return (
            type(x) is Tensor
            and x.shape == shape
            and (x.is_contiguous() or (self._count > 1 and x.stride()[1:] == self._inner))
            and x.get_device() == self._device
            and x.dtype in native.DTYPES
            and not x.is_neg()
            and x.data_ptr() != 0
        )

    def __call__(self, given: Sequence[Any], seeds: Tensor | None = None) -> bool:
        """Write the outputs; False, and nothing was written, where a tensor given is not plain or overlaps another.

        Only where `registration.quiet()` and no derivative is wanted; no version counter moves. seeds: int64 [B].
        """
        if not self.ready:
            return False
        table = self._table
        for number, shape, places in self._given:
            x = given[number]
            if not self._fits(x, shape):
                return False
            address, stride, code = x.data_ptr(), x.stride(0), native.DTYPES[x.dtype]
            for place, part in places:
                table[place] = address + part * self._batch * stride * x.itemsize if part else address
                table[place + 1], table[place + 2] = stride, code
        if seeds is not None:
            if type(seeds) is not Tensor or seeds.is_neg() or not seeds.is_contiguous():
                return False
            if seeds.get_device() != self._device:
                return False
            table[SEEDS] = seeds.data_ptr()
        if self.backend == "triton":
            return self._through_triton(given, seeds)
        code = native.run("lincomb", self.like, self._address)
        if code == OVERLAP:
            return False
        native.check("lincomb", self.like, code)
        return True

    def tensors(self, given: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs, out) of a call, as `lincomb` takes them."""

        def found(x: Tensor | Share) -> Tensor:
            if isinstance(x, Tensor):
                return x
            whole = given[x.given]
            return whole if x.parts == 1 else whole[x.part * self._batch : (x.part + 1) * self._batch]

        return [found(x) for x in self._inputs], [found(x) for x in self._out]

    def _through_triton(self, given: Sequence[Tensor], seeds: Tensor | None) -> bool:
        if native.cpu().functions["overlaps"](self._address):
            return False
        inputs, out = self.tensors(given)
        launch_triton(inputs, out, self._table, self._coefficients, seeds)
        return True
