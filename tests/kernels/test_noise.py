"""Drawn noise: known vectors, the same bits everywhere, and the distribution it claims."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

from fewstep_kernels import backend, lincomb, native, normal, uniform
from fewstep_kernels.noise import normal_reference, philox, uniform_reference

SEEDS = torch.tensor([0, 1, -5, 2**62 + 3, -(2**63), 7919])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_cpu = pytest.mark.skipif(backend("normal", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")


@pytest.mark.parametrize(  # Random123's kat_vectors, philox4x32 10
    ("counter", "key", "expected"),
    (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ),
)
def test_philox_known_answers(counter, key, expected):
    words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in words] == expected


def test_uniform_is_the_words_of_the_block_in_order():
    seed, stream = torch.tensor([0x299F31D0_24093822]), 9
    words = []
    for group in range(2):
        words += philox(
            [torch.tensor(v) for v in (group, 0, stream, 0)], [torch.tensor(v) for v in (0x24093822, 0x299F31D0)]
        )
    found = uniform(seed, (7,), stream=stream, dtype=torch.float64)
    assert found[0].tolist() == [int(w) / 2**32 for w in words[:7]]


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", (1, 3, 63, 500, 1021, 1024, 4099))
def test_cpp_draws_the_references_bits(dtype, count):
    assert torch.equal(normal(SEEDS, (count,), stream=3, dtype=dtype), normal_reference(SEEDS, count, 3, dtype))
    assert torch.equal(uniform(SEEDS, (count,), stream=3, dtype=dtype), uniform_reference(SEEDS, count, 3, dtype))


@needs_cpu
@pytest.mark.parametrize("instructions", ("baseline", "avx2"))
def test_every_instruction_set_draws_the_same_bits(instructions):
    program = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.fewstep_cpu_instructions.restype = ctypes.c_char_p
seeds, out = (ctypes.c_int64 * 3)(7, -9, 2**40), (ctypes.c_float * 3063)()
arguments = [ctypes.c_int64(x) for x in (3, 1021, 5)]
assert library.fewstep_cpu_normal(seeds, *arguments, out, ctypes.c_int64(0), ctypes.c_int64(1)) == 0
print(library.fewstep_cpu_instructions().decode(), bytes(out).hex())
"""
    path = Path(native.__file__).parent / "_lib" / "libfewstep_cpu.so"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"FEWSTEP_INSTRUCTIONS": instructions},
    )
    used, bits = done.stdout.split()
    assert used in (instructions, "baseline")  # a processor without AVX2 has only the baseline
    expected = normal_reference(torch.tensor([7, -9, 2**40]), 1021, 5, torch.float32)
    assert bits == expected.numpy().tobytes().hex()


@pytest.mark.parametrize("draw", (normal, uniform))
def test_a_sample_does_not_depend_on_its_batch(draw):
    seeds = torch.arange(16) + 100
    together = draw(seeds, (4, 9, 5), stream=2)
    for i in (0, 7, 15):
        assert torch.equal(draw(seeds[i : i + 1], (4, 9, 5), stream=2)[0], together[i])
    assert torch.equal(draw(seeds, (4, 9), stream=2).flatten(1), together.flatten(1)[:, :36])


def test_lincomb_draws_what_normal_draws():
    seeds = torch.arange(16) + 5
    x = torch.zeros(16, 3, 7)
    (drawn,) = lincomb([x], torch.tensor([[0.0, 1.0]]), noise_seeds=seeds, noise_stream=4)
    assert torch.equal(drawn, normal(seeds, (3, 7), stream=4))
    (alone,) = lincomb([x[:1]], torch.tensor([[0.0, 1.0]]), noise_seeds=seeds[9:10], noise_stream=4)
    assert torch.equal(alone[0], drawn[9])


def test_normal_numbers_are_box_muller_of_the_uniform_ones():
    u = uniform(SEEDS, (4000,), dtype=torch.float64).view(len(SEEDS), -1, 4)
    radius = (-2 * (u[..., 0::2] + 2.0**-33).log()).sqrt()
    angle = 2 * math.pi * u[..., 1::2]
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)
    # both sides are float64; 1e-14 is some ten roundings of numbers below 7
    torch.testing.assert_close(normal(SEEDS, (4000,), dtype=torch.float64), expected, rtol=0, atol=1e-14)


def test_the_extreme_words_stay_finite():
    from fewstep_kernels.noise import _log_uniform, _square_root

    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    radius = _square_root(_log_uniform(words) * -2.0)
    expected = (-2 * ((words.double() + 0.5) * 2.0**-32).log()).sqrt()
    torch.testing.assert_close(radius, expected, rtol=1e-15, atol=0)


def test_moments_and_streams():
    z = normal(torch.arange(64), (4096,), dtype=torch.float64)
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)  # five standard errors
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    other = normal(torch.arange(64), (4096,), stream=1, dtype=torch.float64)
    assert abs((z * other).mean()) < 5 / math.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)
    u = uniform(torch.arange(64), (4096,), dtype=torch.bfloat16)
    assert u.min() >= 0
    assert u.max() < 1


def test_shapes():
    assert uniform(SEEDS).shape == (6,)
    assert normal(SEEDS, (0, 3)).shape == (6, 0, 3)
    assert normal(SEEDS[:0], (3,)).shape == (0, 3)
    assert normal(SEEDS[::2], (3,)).equal(normal(SEEDS, (3,))[::2])


@pytest.mark.parametrize(
    ("seeds", "options", "words"),
    (
        (torch.zeros(2), {}, "int64"),
        (torch.tensor(3), {}, r"\[B\]"),
        ([1, 2], {}, "list"),
        (SEEDS, {"stream": 2**32}, "stream"),
        (SEEDS, {"dtype": torch.int32}, "int32"),
    ),
)
def test_what_does_not_fit_is_said(seeds, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        normal(seeds, (3,), **options)


@pytest.mark.parametrize("draw", (normal, uniform))
def test_transforms_draw_the_same_bits(draw):
    seeds, x = SEEDS[:3], torch.randn(3, 5)
    expected = draw(seeds, (5,), stream=2)
    assert torch.equal(vmap(lambda x: x * 0 + draw(seeds, (5,), stream=2), out_dims=0)(x), expected.expand(3, 3, 5))
    assert torch.equal(grad(lambda x: (x * draw(seeds, (5,), stream=2)).sum())(x), expected)
    assert torch.equal(jvp(lambda x: x * draw(seeds, (5,), stream=2), (x,), (torch.ones_like(x),))[1], expected)
    pulled = vjp(lambda x: x * draw(seeds, (5,), stream=2), x)[1]
    assert torch.equal(vmap(pulled)(torch.ones(2, 3, 5))[0], expected.expand(2, 3, 5))


@pytest.mark.parametrize("draw", (normal, uniform))
def test_seeds_of_a_vmap_draw_the_same_bits(draw):
    seeds = SEEDS[:3]
    try:
        vmap(lambda x: x.view(torch.int64))(torch.ones(3, 1, dtype=torch.float64))
    except RuntimeError:
        pytest.skip("this torch cannot look at a float's bits under vmap (2.10 has no batching rule for view.dtype)")
    expected = draw(seeds, (5,), stream=2)
    assert torch.equal(vmap(lambda seed: draw(seed[None], (5,), stream=2)[0])(seeds), expected)


def test_opcheck():
    torch.library.opcheck(torch.ops.fewstep_kernels._draw.default, ("normal", SEEDS, 5, 1, torch.float32))
