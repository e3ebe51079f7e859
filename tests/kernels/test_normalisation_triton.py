"""The normalisation pairs in Triton without a GPU: values in its interpreter, machine code for three architectures.
Nothing here has run on a GPU."""

import pytest

from tests.kernels import ahead_of_time
from tests.kernels.ahead_of_time import ROOT, python

pytest.importorskip("triton")

KERNELS = ROOT / "kernels" / "fewstep_kernels"
SOURCES = [KERNELS / f"normalisation_{name}.py" for name in ("kernels", "row_kernels", "group_kernels")]

INTERPRETED = """
import sys
import torch, fewstep_kernels as fk
from fewstep_kernels import normalisation, normalisation_kernels as kernels, normalisation_raw
from fewstep_kernels import normalisation_group_kernels as group_kernels, normalisation_row_kernels as row_kernels
from fewstep_kernels.normalisation import Form, Parameters

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# float32 sums of at most a few hundred terms; the interpreter truncates bfloat16, so two units in its last place
BOUND = {F32: 2e-5, F16: 2e-3, BF16: 2**-6}
torch.manual_seed(0)

def close(found, truth, dtype):
    assert torch.isfinite(found).all()
    scale = truth.abs().max().item()
    torch.testing.assert_close(found.double(), truth, rtol=BOUND[dtype], atol=BOUND[dtype] * max(scale, 1))

def check(operator, shape, groups, dtype, full=True, last=False, silu=True):
    form = Form(operator, groups, 1e-5, bool(groups) and silu)
    channels = shape[1] if groups else shape[-1]
    x = (torch.randn(shape) + 0.5).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    assert normalisation.served(form, x) == "triton"
    gradient, tx = torch.randn_like(x), torch.randn_like(x)
    halves = torch.randn(shape[0], 3 * channels).chunk(3, 1)
    given = Parameters(torch.randn(channels), torch.randn(channels), *halves)
    given = given if groups else given._replace(input_shift=None)
    given = given if full else Parameters()
    moved = Parameters(*(None if p is None else torch.randn_like(p) for p in given))
    ta, tb = normalisation.coefficient_tangents(given, moved, F32)
    nan = lambda like: torch.full_like(like, float("nan"))
    mean = torch.full(normalisation_raw.statistics_shape(form, x), float("nan"))
    y, dx, ty, rstd = nan(x), nan(x), nan(x), nan(mean)
    da = torch.full((shape[0], channels), float("nan"))
    db = nan(da)
    kernels.forward(form, x, given, y, mean, rstd)
    kernels.backward(form, gradient, x, mean, rstd, given, dx, da, db)
    kernels.tangent(form, x, tx, given, ta, tb, moved.input_shift, ty)
    wide = Parameters(*(None if p is None else p.double() for p in given))
    wide_moved = Parameters(*(None if p is None else p.double() for p in moved))
    truth = normalisation.gradients(form, gradient.double(), x.double(), wide)
    close(y, normalisation.reference(form, x.double(), wide), dtype)
    close(dx, truth[0], dtype)
    close(da, truth[1], F32)
    close(db, truth[2], F32)
    close(ty, normalisation.plain_tangent(form, x.double(), tx.double(), wide, wide_moved), dtype)

GROUPED = "group_norm_silu"
for most, tile in ((8192, 4096), (0, 32)):  # one program a group; then tiles, several to a channel
    kernels.MOST, group_kernels.TILE = most, tile
    check(GROUPED, (2, 6, 5, 7), 3, F32)
    check(GROUPED, (2, 6, 5, 7), 3, BF16, last=True)
    check(GROUPED, (1, 6, 1, 1), 2, F16, last=not most)
    check(GROUPED, (1, 3, 5, 5), 1, F32, full=False, last=bool(most), silu=False)
for operator in ("layer_norm_modulate", "rms_norm_modulate"):
    check(operator, (2, 5, 63), 0, F32)
    check(operator, (1, 3, 500), 0, BF16)
    check(operator, (3, 1, 1), 0, F16)
    check(operator, (2, 5, 8), 0, F32, full=False)
    row_kernels.PROGRAMS = 4  # several rows to a program, the last one short
    check(operator, (2, 5, 8), 0, F32)
    row_kernels.PROGRAMS = 512

x, weight = torch.randn(2, 6, 3, 3), torch.randn(6)
found = torch.func.jvp(lambda x, w: fk.group_norm_silu(x, 3, w), (x, weight), (x, weight))
wide = x.double(), weight.double()
for a, b in zip(found, torch.func.jvp(lambda x, w: fk.group_norm_silu(x, 3, w), wide, wide)):
    close(a, b, F32)
long = torch.randn(1, 1, 20000)
assert normalisation.served(Form("layer_norm_modulate", 0, 1e-5, False), long) == "reference"
print("equal")
"""

COMPILED = """
import triton
from triton.compiler import ASTSource
from fewstep_kernels import normalisation_group_kernels as groups, normalisation_row_kernels as rows
from tests.kernels.ahead_of_time import report

POINTERS = ("x", "moved", "gradient", "out", "dx")
FLOATS = ("mean", "rstd", "first", "second", "parts", "ta", "tb", "tadded")
PARAMETERS = ("weight", "bias", "scale", "shift", "added")

def variant(kernel, dtype, constants, absent=(), aligned=True, warps=4):
    signature, values, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        if name in absent:
            values[name] = None
        if name in values:
            signature[name] = "constexpr"
            continue
        pointer = name in (*POINTERS, *FLOATS, *PARAMETERS)
        kind = dtype if name in POINTERS else "fp32"
        signature[name] = "*" + kind if pointer else "fp32" if name == "eps" else "i32"
        if aligned and (pointer or name in ("n", "channels", "positions") or name.endswith("_stride")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    place = kernel.arg_names.index
    source = ASTSource(kernel, signature, {(place(name),): value for name, value in values.items()}, attributes)
    return source, {"num_warps": warps, **rows.OPTIONS}

TANGENTS = ("ta", "tb", "tadded")
ROW = {"LAYOUT": 0, "INNER": 1, "CENTRED": True, "SILU": False, "BLOCK": 2048}
GROUP = {"TANGENT": False, "SILU": True, "LAST": False, "TS": 4096, "TC": 1}
LAST = GROUP | {"LAST": True, "TS": 64, "TC": 64}
CUT = {name: GROUP[name] for name in ("LAST", "TS", "TC")}
still = ("moved", *TANGENTS, "added")
forward = ("moved", "first", "second", "parts", *TANGENTS)
row, group = rows.row_kernel, groups.group_kernel
variants = {
    "layer rows bf16": variant(row, "bf16", ROW, still),
    "layer rows fp32": variant(row, "fp32", ROW, still),
    "rms rows bf16": variant(row, "bf16", ROW | {"CENTRED": False}, still),
    "layer rows tangent bf16": variant(row, "bf16", ROW, ("added", "tadded")),
    "odd rows fp32": variant(row, "fp32", ROW, still, aligned=False),
    "layer rows backward bf16": variant(rows.row_backward_kernel, "bf16", {"CENTRED": True, "BLOCK": 2048}),
    "small groups bf16": variant(
        row, "bf16", ROW | {"LAYOUT": 1, "INNER": 1024, "SILU": True, "BLOCK": 8192}, still, warps=16
    ),
    "longest rows backward fp32": variant(
        rows.row_backward_kernel, "fp32", {"CENTRED": True, "BLOCK": 8192}, warps=16
    ),
    "moments bf16": variant(groups.moments_kernel, "bf16", CUT, warps=8),
    "moments last bf16": variant(groups.moments_kernel, "bf16", CUT | {"LAST": True, "TS": 64, "TC": 64}, warps=8),
    "combine": variant(groups.combine_kernel, "fp32", {"TS": 4096, "BLOCK": 1024}),
    "groups bf16": variant(group, "bf16", GROUP, forward, warps=8),
    "groups last bf16": variant(group, "bf16", LAST, forward, warps=8),
    "groups last fp32": variant(group, "fp32", LAST, forward, warps=8),
    "groups sums last bf16": variant(group, "bf16", LAST, ("first", "second", *TANGENTS), warps=8),
    "groups backward last bf16": variant(group, "bf16", LAST, ("parts", *TANGENTS), warps=8),
    "groups tangent last bf16": variant(group, "bf16", LAST | {"TANGENT": True}, ("parts",), warps=8),
    "groups tangent bf16": variant(group, "bf16", GROUP | {"TANGENT": True}, ("parts",), warps=8),
}
report({name: lambda capability, built=built: built for name, built in variants.items()})
"""


def test_values_in_the_interpreter_are_the_references():
    assert python(INTERPRETED, TRITON_INTERPRET="1", FEWSTEP_KERNELS="triton").endswith("equal\n")


@pytest.fixture(scope="module")
def compiled():
    return ahead_of_time.compiled(COMPILED, SOURCES)


@pytest.mark.timeout(240)
def test_nothing_spills_and_registers_stay_within_the_budget(compiled):
    assert len(compiled) == 18 * 3
    assert [row for row in compiled if row["spills"]] == []
    over = [(row["variant"], row["capability"], row["registers"]) for row in compiled if row["registers"] > 128]
    assert over == []


def test_aligned_tensors_move_in_vectors(compiled):
    for row in compiled:
        if "odd" in row["variant"]:
            assert row["vector_stores"] == 0, row
        elif row["variant"] != "combine":
            assert row["vector_loads"] > 0, row
