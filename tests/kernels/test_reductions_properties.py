"""Any shape, mix of dtypes and layout: the reductions against their formulas in float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep_kernels import gram, inner_products, l1, l2, multi_tensor_l2norm, normal, pseudo_huber, uniform
from fewstep_kernels.gram import reference
from fewstep_kernels.noise import normal_reference, uniform_reference

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
LAYOUTS = st.sampled_from(("contiguous", "turned", "every other", "one for all"))
C = 0.3


def properties(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def laid(shape, dtype, layout):
    x = torch.randn(shape).to(dtype)
    if layout == "turned":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    if layout == "every other":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x[:1].expand(shape) if layout == "one for all" and shape[0] else x


def close(found, exact, dtypes):
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    assert found.dtype == wide
    # sums of at most 6561 terms, in float32 by blocks, and the rounding of the result
    least = 64 * torch.finfo(wide).eps * max(1.0, float(exact.abs().max())) if exact.numel() else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=1e-5 if wide == torch.float32 else 1e-12, atol=least)


@properties(50)
@given(shape=SHAPES, dtypes=st.lists(DTYPES, min_size=1, max_size=6), layout=LAYOUTS, combined=st.booleans())
def test_gram(shape, dtypes, layout, combined):
    torch.manual_seed(0)
    inputs = [laid(shape, dtype, layout) for dtype in dtypes]
    table = torch.randn(3, len(inputs)).tolist() if combined else ()
    found, exact = gram(inputs, table or None), reference([x.double() for x in inputs], table)
    for part, true in zip(found, exact):
        # combinations may cancel: judged by what came in
        if combined:
            room = 1e-4 * max(1, inputs[0][:1].numel())
            torch.testing.assert_close(part.double(), true, rtol=1e-4, atol=room)
        else:
            close(part, true, dtypes)


@properties(30)
@given(shape=SHAPES, left=DTYPES, right=DTYPES, layout=LAYOUTS)
def test_inner_products(shape, left, right, layout):
    torch.manual_seed(0)
    a, b = laid(shape, left, layout), laid(shape, right, "contiguous")
    exact = (a.double() * b.double()).reshape(shape[0], math.prod(shape[1:])).sum(1)
    close(inner_products([a], [b])[:, 0, 0], exact, (left, right))


@properties(80)
@given(shape=SHAPES, dtypes=st.tuples(DTYPES, DTYPES), layout=LAYOUTS, name=st.sampled_from(("l2", "l1", "huber")))
def test_distances_and_their_gradients(shape, dtypes, layout, name):
    torch.manual_seed(0)
    a, b = (laid(shape, dtype, layout).detach().requires_grad_() for dtype in dtypes)
    ours = {"l2": l2, "l1": l1, "huber": lambda a, b: pseudo_huber(a, b, c=C)}[name]
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    d = (wide[0] - wide[1]).reshape(shape[0], math.prod(shape[1:]))
    exact = {
        "l2": lambda: d.square().mean(1),
        "l1": lambda: d.abs().mean(1),
        "huber": lambda: torch.sqrt(d.square().sum(1) + C * C) - C,
    }[name]()
    found = ours(a, b)
    if a.numel():  # the mean of nothing is not a number
        close(found.detach(), exact.detach(), dtypes)
    for x, true in zip(torch.autograd.grad(found.sum(), (a, b)), torch.autograd.grad(exact.sum(), wide)):
        eps = max(1e-5, 2 * torch.finfo(x.dtype).eps) if torch.float64 not in dtypes or x.dtype.itemsize < 8 else 1e-10
        torch.testing.assert_close(x.double(), true, rtol=eps, atol=eps)


@properties(50)
@given(shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=5), dtype=DTYPES)
def test_multi_tensor_l2norm(shapes, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype if i % 2 else torch.float32) for i, shape in enumerate(shapes)]
    exact = torch.cat([x.double().flatten() for x in tensors]).norm()
    found = multi_tensor_l2norm(tensors)
    # one rounding of the result; in float64 the sums of both sides, in different orders
    torch.testing.assert_close(found.double(), exact, rtol=max(1e-13, torch.finfo(found.dtype).eps), atol=0)


@properties(40)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    count=st.integers(0, 3000),
    stream=st.integers(0, 2**32 - 1),
    dtype=DTYPES,
)
def test_drawn_numbers_are_the_references_bits(seeds, count, stream, dtype):
    keys = torch.tensor(seeds, dtype=torch.int64)
    for draw, plain in ((normal, normal_reference), (uniform, uniform_reference)):
        assert torch.equal(draw(keys, (count,), stream=stream, dtype=dtype), plain(keys, count, stream, dtype))
