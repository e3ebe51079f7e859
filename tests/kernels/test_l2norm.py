"""The norm of many tensors: values, order, non-finite numbers, derivatives."""

import pytest
import torch

from fewstep_kernels import clip_coefficient, multi_tensor_l2norm
from fewstep_kernels.l2norm import reference

SHAPES = ((1,), (63,), (0,), (), (500, 7), (8191,), (8193,), (3, 8192))


def tensors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_error_is_at_most_twice_that_of_torch(dtype):
    values = tensors(dtype)
    true = torch.cat([x.double().flatten() for x in values]).norm()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torchs = torch.nn.utils.get_total_norm([x.to(wide) for x in values])
    found = multi_tensor_l2norm(values)
    assert found.dtype == wide
    assert found.shape == ()
    floor = torch.finfo(wide).eps * true  # one rounding of the result, where torch happens to be exact
    assert (found.double() - true).abs() <= 2 * (torchs.double() - true).abs() + floor


def test_mixed_dtypes_strides_and_emptiness():
    mixed = [torch.randn(7, 5).t(), torch.randn(4, 6)[:, ::2], torch.randn(3).bfloat16(), torch.empty(0)]
    true = torch.cat([x.double().flatten() for x in mixed]).norm().float()
    torch.testing.assert_close(multi_tensor_l2norm(mixed), true, rtol=1e-6, atol=0)  # one float32 rounding
    assert multi_tensor_l2norm([torch.empty(0)]) == 0


def test_the_same_bits_on_any_number_of_threads():
    values = [torch.randn(300_001), torch.randn(77)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(multi_tensor_l2norm(values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_large_numbers_do_not_overflow_and_nonfinite_ones_show():
    assert multi_tensor_l2norm([torch.full((10_000,), 1e30)]) == pytest.approx(1e32)
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = tensors(torch.bfloat16)
        values[5][-1] = bad
        assert not torch.isfinite(multi_tensor_l2norm(values))


def test_the_clip_coefficient_is_torchs():
    for scale in (1e-3, 1.0, 1e3):
        values = [scale * x for x in tensors(torch.float32)]
        parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in values]
        for p, x in zip(parameters, values):
            p.grad = x.clone()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        factor = clip_coefficient(multi_tensor_l2norm(values), 2.0)
        for p, x in zip(parameters, values):
            torch.testing.assert_close(x * factor, p.grad, rtol=1e-6, atol=0)


def test_derivatives_and_compiled_code():
    values = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: multi_tensor_l2norm(x), values)
    plain = [x.detach() for x in values]
    _, tangent = torch.func.jvp(lambda *x: multi_tensor_l2norm(x), tuple(plain), tuple(plain))
    torch.testing.assert_close(tangent, reference(plain))  # the norm is homogeneous
    torch.library.opcheck(torch.ops.fewstep_kernels._multi_tensor_l2norm.default, ([x.float() for x in plain],))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="at least one tensor"):
        multi_tensor_l2norm([])
    with pytest.raises(ValueError, match="one device; got cpu, meta"):
        multi_tensor_l2norm([torch.zeros(2), torch.zeros(2, device="meta")])
