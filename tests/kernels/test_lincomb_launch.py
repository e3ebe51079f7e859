"""Which of lincomb's launches ask Triton for a kernel, and which take the one that it made for calls of their kind."""

import pytest
import torch

pytest.importorskip("triton")

from fewstep_kernels import lincomb_kernels


class Kernel:
    """In place of the kernel and of what Triton makes of it: writes down who was launched."""

    def __init__(self, heard, name):
        self.heard, self.name = heard, name

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.heard.append((self.name, grid[0]))
            return Kernel(self.heard, "compiled")

        return launch


@pytest.fixture
def heard(monkeypatch):
    launches = []
    monkeypatch.setattr(lincomb_kernels, "lincomb_kernel", Kernel(launches, "Triton"))
    monkeypatch.setattr(lincomb_kernels, "_compiled", {})
    return launches


def launch(x, outputs=1, seeds=None, stream=0, table=None):
    table = torch.ones(outputs, 1 + (seeds is not None)) if table is None else table
    out = [torch.empty_like(x) for _ in range(outputs)]
    lincomb_kernels.launch("triton", [x], out, table, seeds, stream)


MEMORY = torch.zeros(4100)  # starts at a multiple of 64 bytes
SEEDS = torch.arange(2)


def test_a_second_call_of_a_kind_takes_what_was_compiled_for_the_first(heard):
    for _ in range(2):
        launch(MEMORY[:2048].view(2, 1024))
    launch(MEMORY[64:2112].view(2, 1024))
    assert heard == [("Triton", 2), ("compiled", 2), ("compiled", 2)]
    launch(MEMORY[:4096].view(4, 1024))  # more samples: a larger grid of the same kernel
    assert heard[-1] == ("compiled", 4)


def test_addresses_off_sixteen_bytes_never_do(heard):
    launch(MEMORY[:2048].view(2, 1024))
    for _ in range(2):
        launch(MEMORY[1:2049].view(2, 1024))
        assert heard[-1][0] == "Triton"


@pytest.mark.parametrize(
    "other",
    (
        lambda: launch(MEMORY[:2046].view(2, 1023)),
        lambda: launch(MEMORY[:4096].view(2, 2048)[:, :1024]),
        lambda: launch(MEMORY[:2048].view(2, 1024).bfloat16()),
        lambda: launch(MEMORY[:2048].view(2, 1024), outputs=2),
        lambda: launch(MEMORY[:2048].view(2, 1024), seeds=SEEDS),
        lambda: launch(MEMORY[:2048].view(2, 1024), table=torch.ones(2, 1, 1)),
        lambda: launch(MEMORY[:2048].view(2, 1024), table=torch.ones(1, 1, dtype=torch.float64)),
    ),
)
def test_another_kind_asks_triton(heard, other):
    launch(MEMORY[:2048].view(2, 1024))
    other()
    assert [name for name, _ in heard] == ["Triton", "Triton"]


def test_wide_noise_streams_are_a_kind_and_others_are_not(heard):
    for stream in (0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1):
        launch(MEMORY[:2048].view(2, 1024), seeds=SEEDS, stream=stream)
    assert [name for name, _ in heard] == ["Triton", "compiled", "compiled", "compiled", "Triton", "compiled"]
