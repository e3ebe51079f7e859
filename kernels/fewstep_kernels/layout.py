"""Memory as the kernels see it: samples of contiguous elements in one order, a batch stride apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides inside a sample; 0 where the size is 1 and the stride means nothing."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[1:], x.stride()[1:]))


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_row_major(x: Tensor) -> bool:
    """Whether every sample is contiguous in the usual order."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def like_sample(model: Tensor, x: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x copied into a new tensor (empty when x is None) whose samples are laid out like model's dense ones."""
    size = math.prod(model.shape[1:])
    made = torch.empty_strided(model.shape, (size, *model.stride()[1:]), dtype=dtype, device=model.device)
    return made if x is None else made.copy_(x)


def match(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs with one dense sample layout, the first output's; what differs is replaced by a copy.

    An output is also replaced when it overlaps an input or another output other than exactly. The caller copies
    replaced outputs back.
    """
    if all(x.is_contiguous() for x in inputs) and all(y.is_contiguous() for y in outputs):
        read, write = list(inputs), list(outputs)
    else:
        model = (
            outputs[0]
            if is_dense(outputs[0].shape[1:], outputs[0].stride()[1:])
            else torch.empty(outputs[0].shape, device="meta")
        )
        wanted = _strides(model)
        if model.device.type == "meta":
            model = torch.empty(outputs[0].shape, dtype=outputs[0].dtype, device=outputs[0].device)
        read = [x if _strides(x) == wanted else like_sample(model, x, x.dtype) for x in inputs]
        write = [y if _strides(y) == wanted else like_sample(model, None, y.dtype) for y in outputs]
    for i, y in enumerate(write):
        if any(_clash(y, other) for other in read) or any(_clash(y, z, same=True) for z in write[:i]):
            write[i] = like_sample(y, None, y.dtype)
        elif y.stride(0) < math.prod(y.shape[1:]) and y.shape[0] > 1:
            raise ValueError(
                f"an output's samples overlap each other (batch stride {y.stride(0)}); pass a tensor with room for all."
            )
    return read, write


def _clash(y: Tensor, x: Tensor, same: bool = False) -> bool:
    """Whether writing y could disturb reading x; sharing exactly is harmless unless `same`, which refuses that too."""
    size = math.prod(y.shape[1:])
    y_stride, x_stride = y.stride(0) * y.element_size(), x.stride(0) * x.element_size()
    y_sample, x_sample = size * y.element_size(), size * x.element_size()
    y_start, x_start = y.data_ptr(), x.data_ptr()
    y_end = y_start + y_stride * (y.shape[0] - 1) + y_sample
    x_end = x_start + x_stride * (x.shape[0] - 1) + x_sample
    if y_end <= x_start or x_end <= y_start or size == 0 or y.shape[0] == 0:
        return False
    if y_start == x_start and y_sample == x_sample and (y_stride == x_stride or y.shape[0] == 1):
        return same or y.dtype != x.dtype
    if y_stride == x_stride and y_stride > 0:  # interleaved samples, such as neighbouring columns of one buffer
        apart = (x_start - y_start) % y_stride
        return not (y_sample <= apart <= y_stride - x_sample)
    return True
