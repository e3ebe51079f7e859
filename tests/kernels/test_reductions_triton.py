"""The reductions' Triton kernels without a GPU: values in the interpreter, machine code for three architectures.

Sums come in another order than the reference's, so they agree to a few roundings; thresholds are equal bit for bit.
Nothing here has run on a GPU.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.kernels import ahead_of_time
from tests.kernels.ahead_of_time import python, triton_before

KERNELS = Path(__file__).parents[2] / "kernels" / "fewstep_kernels"
SOURCES = [KERNELS / f"{name}.py" for name in ("reductions", "inner_products", "distance_kernels", "threshold")]

INTERPRETED = """
import torch, fewstep_kernels as fk
from fewstep_kernels import distance, layout
from fewstep_kernels.gram import reference as gram_reference
from fewstep_kernels.inner_products import products, products_reference
from fewstep_kernels.threshold import reference as threshold_reference
from tests.kernels.reductions import draw, nan_filled

layout.like_sample = nan_filled(layout.like_sample)
assert {fk.backend(name, "cpu") for name in ("gram", "inner_products", "distance", "threshold")} == {"triton"}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

def near(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    # a few roundings of the largest result; bfloat16 is truncated, not rounded, by the interpreter
    unit = {F64: 1e-13, F32: 3e-6, F16: 2**-10, BF16: 2**-7}[found.dtype]
    assert ((found - expected).abs() <= unit * (1 + expected.abs().max())).all(), (found - expected).abs().max()

for count in (1, 63, 4500):
    for dtypes in ([F32] * 3, [BF16, F16, F32], [F64, F32, BF16])[: 3 if count == 63 else 1]:
        a, b, w = xs = [draw(2, count, dtype=dtype) for dtype in dtypes]
        for table in ((), ((1.0, -1.0, 0.0), (0.0, 1.0, 0.5))):
            for found, expected in zip(fk.gram(xs, table or None), gram_reference(xs, table)):
                near(found, expected)
            for found, expected in zip(products(xs, xs[::-1], table, True), products_reference(xs, xs[::-1], table)):
                near(found, expected)
        near(fk.inner_products(xs[:1], xs), products_reference(xs[:1], xs, (), False)[0])
        for kind, weight in ((0, w), (1, None), (2, w)):
            near(distance._total(kind, 0.3, a, b, weight), distance.reference(kind, 0.3, a, b, weight))
            for along in ((b, None), (None, a), (b, w)):
                found = distance._sum(kind, 0.3, a, b, weight, *along)
                near(found, distance.tangent_reference(kind, 0.3, a, b, weight, *along))
            scale = draw(2)
            for wanted in ((True, True), (True, False), (False, True)):
                found = distance._gradient(kind, 0.3, scale, a, b, weight, *wanted)
                expected = distance.gradient_reference(kind, 0.3, scale, a, b, weight, *wanted)
                for one, other in zip(found, expected, strict=True):
                    near(one, other)

six = [draw(3, 300) for _ in range(6)]
for found, alone, expected in zip(fk.gram(six), fk.gram([x[1:2] for x in six]), gram_reference(six)):
    near(found, expected)
    assert torch.equal(found[1], alone[0])
both = draw(4, 3, 5)
near(fk.gram([both[:2], both[2:]]).products, gram_reference([both[:2], both[2:]]).products)
for count, dtype in ((1, F32), (2, F16), (63, F32), (63, F64), (63, F16), (1500, F32)):
    for quantile in (0.0, 0.5, 0.995, 1.0)[:: 3 if count == 1500 else 1]:
        for x in (3 * draw(1, count, dtype=dtype), (3 * draw(1, count, dtype=dtype)).round()):
            assert torch.equal(fk.threshold(x, quantile), threshold_reference(x, quantile)), (count, dtype, quantile)
print("equal")
"""

COMPILED = """
import torch
import triton.language as tl
from triton.compiler import ASTSource
from tests.kernels.ahead_of_time import report
from fewstep_kernels.distance_kernels import distance_gradient_kernel, distance_kernel
from fewstep_kernels.inner_products import block_for, products_kernel
from fewstep_kernels.reductions import finish_kernel
from fewstep_kernels.threshold import clamp_kernel, quantile_kernel

def source(kernel, constants, aligned=True, **signature):
    place = kernel.arg_names.index
    signature = {n: signature.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    sixteen = [["tt.divisibility", 16]]
    attributes = {}
    for name, given in signature.items() if aligned else ():
        if isinstance(given, tuple):
            attributes |= {(place(name), i): sixteen for i in range(len(given))}
        elif given.startswith("*") or name in ("count", "stride", "out_stride"):
            attributes[(place(name),)] = sixteen
    return ASTSource(kernel, signature, {(place(n),): v for n, v in constants.items()}, attributes)

WIDE = {"fp32": tl.float32, "fp64": tl.float64}

def products(dtypes, rows=0, right=0, sums=True, wide="fp32", aligned=True):
    M = rows or len(dtypes)
    results = M * (rows or right or M) + 2 * M * sums
    others = dtypes[:right] if right else dtypes
    block = block_for(results, torch.float64 if wide == "fp64" else torch.float32)
    constants = dict(RECTANGULAR=right > 0, ROWS=rows, SUMS=sums, WIDE=WIDE[wide], STEPS=4, BLOCK=block)
    return source(
        products_kernel, constants, aligned, left=tuple("*" + d for d in dtypes), right=tuple("*" + d for d in others),
        left_strides=("i32",) * len(dtypes), right_strides=("i32",) * len(others), combinations="*fp64",
        partials="*" + wide,
    )

def distance(dtypes, kind, weight=False, along=(False, False), wide="fp32"):
    constants = dict(KIND=kind, WEIGHT=weight, ALONG_A=along[0], ALONG_B=along[1], WIDE=WIDE[wide], STEPS=4, BLOCK=1024)
    tensors = tuple("*" + d for d in dtypes)
    return source(
        distance_kernel, constants, tensors=tensors, strides=("i32",) * len(dtypes), partials="*" + wide, c="*fp64"
    )

def gradient(dtypes, kind, weight=False, wide="fp32", aligned=True):
    constants = dict(KIND=kind, WEIGHT=weight, OF_A=True, WIDE=WIDE[wide], BLOCK=1024)
    return source(
        distance_gradient_kernel, constants, aligned, tensors=tuple("*" + d for d in dtypes),
        strides=("i32",) * len(dtypes), gradients=tuple("*" + d for d in dtypes[:2]), gradient_strides=("i32",) * 2,
        scales="*" + wide, c="*fp64",
    )

fused, apart = {"num_warps": 4, "enable_fp_fusion": True}, {"num_warps": 4, "enable_fp_fusion": False}
variants = {
    "gram of one fp32": (lambda: products(["fp32"]), fused),
    "gram of two fp32": (lambda: products(["fp32"] * 2), fused),
    "gram of a difference bf16": (lambda: products(["bf16"] * 2, rows=2), fused),
    "gram of six bf16": (lambda: products(["bf16"] * 6), fused),
    "gram of two fp64": (lambda: products(["fp64"] * 2, wide="fp64"), fused),
    "gram of six fp64": (lambda: products(["fp64"] * 6, wide="fp64"), fused),
    "gram of odd length": (lambda: products(["fp32"] * 2, aligned=False), fused),
    "inner products 3 by 2 fp32": (lambda: products(["fp32"] * 3, right=2, sums=False), fused),
    "l2 fp32": (lambda: distance(["fp32"] * 2, 0), apart),
    "weighted pseudo-huber bf16": (lambda: distance(["bf16", "bf16", "fp32"], 2, True), apart),
    "l1 tangent fp32": (lambda: distance(["fp32"] * 4, 1, along=(True, True)), apart),
    "pseudo-huber fp64": (lambda: distance(["fp64"] * 2, 2, wide="fp64"), apart),
    "l2 gradients fp32": (lambda: gradient(["fp32"] * 2, 0), apart),
    "weighted pseudo-huber gradients bf16": (lambda: gradient(["bf16"] * 3, 2, True), apart),
    "gradients of odd length": (lambda: gradient(["fp32"] * 2, 1, aligned=False), apart),
    "second stage": (
        lambda: source(
            finish_kernel, dict(FIRST=36, SECOND=6, COLUMNS=64, BLOCK=32),
            partials="*fp32", first="*fp32", second="*fp32", third="*fp32",
        ), apart,
    ),
    "quantile fp32": (
        lambda: source(quantile_kernel, dict(DOUBLE=False, BLOCK=1024), x="*fp32", out="*fp32", numbers="*fp64"),
        apart | {"num_warps": 8},
    ),
    "clamp bf16": (
        lambda: source(clamp_kernel, dict(DOUBLE=False, BLOCK=1024), x="*bf16", out="*bf16", thresholds="*fp32"), apart,
    ),
}
report({name: lambda _capability, make=make, given=given: (make(), given) for name, (make, given) in variants.items()})
"""


@pytest.mark.timeout(120)
def test_values_in_the_interpreter_equal_the_reference():
    assert python(INTERPRETED, TRITON_INTERPRET="1", FEWSTEP_KERNELS="triton").endswith("equal\n")


@pytest.fixture(scope="module")
def compiled():
    return ahead_of_time.compiled(COMPILED, SOURCES)


@pytest.mark.timeout(300)
def test_nothing_spills(compiled):
    assert len(compiled) == 54
    assert [row for row in compiled if row["spills"]] == []


def test_registers_stay_within_the_budget(compiled):
    budget = {"gram of six bf16": 255, "gram of six fp64": 255}  # 33 running sums of four words a thread
    if triton_before(3, 7):
        budget["inner products 3 by 2 fp32"] = 160
    over = [row for row in compiled if row["registers"] > budget.get(row["variant"], 128)]
    assert [(row["variant"], row["capability"], row["registers"]) for row in over] == []


def test_aligned_tensors_move_in_128_bit_pieces(compiled):
    # 1024 elements over 128 threads, four times, are eight 128-bit loads of a float32 tensor
    whole = {"gram of one fp32": (8, 0), "gram of two fp32": (16, 0), "l2 fp32": (16, 0), "l2 gradients fp32": (4, 4)}
    for row in compiled:
        if row["variant"] in whole:
            assert (row["vector_loads"], row["vector_stores"]) == whole[row["variant"]], row
        if "odd" in row["variant"]:
            assert row["vector_loads"] == 0, row
