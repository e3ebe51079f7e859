"""Tensors of more than 2^31 bytes: offsets are 64 bits wide.

Memory is mapped lazily and in large pages: what is only read as zeros takes none, and no test writes more than 3.3 GB.
The per-sample operators are tested with samples that far apart, in test_gram.py and test_lincomb_direct.py.
"""

import mmap

import pytest
import torch

from fewstep_kernels import adamw_ema_step, backend, ema_update, multi_tensor_l2norm, native, uniform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backend("ema_update", "cpu") != "cpu", reason="libfewstep_cpu.so was not built"),
]
COUNT = 2**29 + 77  # float32 elements: 2^31 + 308 bytes


def zeros(dtype=torch.float32):
    """Zeros that take memory only where they are written."""
    memory = mmap.mmap(-1, COUNT * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def ends(x):
    return [x[0].item(), x[COUNT // 2].item(), x[-1].item()]


def test_ema_update():
    average, parameter = zeros(torch.bfloat16), zeros()
    average[0], average[-1], parameter[-1] = 1.0, 1.0, 3.0
    ema_update([average], [parameter], 0.5)
    assert ends(average) == [0.5, 0.0, 2.0]


def test_adamw_ema_step():
    parameter, gradient = zeros(torch.bfloat16), zeros()
    moments = [zeros(torch.bfloat16) for _ in range(2)]
    parameter[0], parameter[-1], gradient[-1] = 1.0, 1.0, 2.0
    step = torch.zeros(())
    adamw_ema_step([parameter], [gradient], [moments[0]], [moments[1]], [step], lr=0.125, weight_decay=0.5)
    # the first step moves by lr against the gradient's sign, after a decay by 1 - lr / 2
    assert ends(parameter) == [0.9375, 0.0, 0.8125]
    assert ends(moments[0]) == pytest.approx([0.0, 0.0, 0.2], rel=2**-8)
    assert step == 1


def test_multi_tensor_l2norm():
    x = zeros()
    x[0], x[-1] = 3.0, 4.0
    assert multi_tensor_l2norm([x]) == 5.0


def test_drawn_numbers():
    seed, drawn = torch.tensor([5]), zeros()
    native.call("uniform", seed, seed.data_ptr(), 1, COUNT, 0, drawn.data_ptr(), native.DTYPES[torch.float32])
    assert torch.equal(drawn[:100], uniform(seed, (100,))[0])
    assert drawn[-1000:].std() == pytest.approx(12**-0.5, rel=0.1)  # 4 standard errors
    assert not torch.equal(drawn[-77:], drawn[:77])
