"""Per-sample inner products: values, order of summation, derivatives."""

import numpy as np
import pytest
import torch

from fewstep_kernels import inner_products
from fewstep_kernels.inner_products import reference

GENERATOR = torch.Generator().manual_seed(5)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


@pytest.mark.parametrize("count", (1, 17, 63, 500, 1025, 8191))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_error_is_at_most_twice_that_of_torch(count, dtype):
    left = [draw(3, count, dtype=dtype) for _ in range(2)]
    right = [draw(3, count), draw(3, count, dtype=dtype), draw(3, count, dtype=torch.bfloat16)]
    wide = [[x.double().numpy().astype(np.longdouble) for x in side] for side in (left, right)]
    truth = torch.from_numpy(np.einsum("mbi,kbi->bmk", *map(np.stack, wide)).astype(np.float64))
    found, torchs = inner_products(left, right), reference(left, right)
    assert found.dtype == torchs.dtype
    # the sum may land half a unit from the truth where torch's happens to hit it
    floor = torch.finfo(found.dtype).eps * truth.abs().max()
    assert (found.double() - truth).abs().max() <= 2 * (torchs.double() - truth).abs().max() + floor


def test_a_sample_does_not_depend_on_its_batch_nor_on_threads():
    left, right = [draw(16, 4099)], [draw(16, 4099)]
    together = inner_products(left, right)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(inner_products(left, right), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(inner_products([left[0][5:6]], [right[0][5:6]])[0], together[5])


def test_layouts():
    x, y = draw(2, 3, 5, 7), draw(2, 3, 5, 7)
    expected = reference([x], [y])
    mixed = inner_products([x.to(memory_format=torch.channels_last)], [y])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)  # 105 float32 products in another order
    assert inner_products([draw(0, 3)], [draw(0, 3)]).shape == (0, 1, 1)
    assert torch.equal(inner_products([draw(2, 0)], [draw(2, 0)]), torch.zeros(2, 1, 1))


def test_derivatives():
    x, y = draw(2, 5, dtype=torch.float64).requires_grad_(), draw(2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: inner_products([x, y], [y]), (x, y), check_forward_ad=True)
    _, tangent = torch.func.jvp(lambda x: inner_products([x], [y.detach()]), (x.detach(),), (y.detach(),))
    torch.testing.assert_close(tangent[:, 0, 0], y.detach().square().sum(1))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="at least one tensor"):
        inner_products([], [draw(2, 3)])
    with pytest.raises(ValueError, match="one device; got cpu and meta"):
        inner_products([torch.ones(2, 3)], [torch.ones(2, 3, device="meta")])
    with pytest.raises(ValueError, match="one shape"):
        inner_products([draw(2, 3)], [draw(2, 4)])


def test_opcheck():
    torch.library.opcheck(torch.ops.fewstep_kernels._gram.default, ([draw(2, 3)], [draw(2, 3), draw(2, 3)], [], False))
