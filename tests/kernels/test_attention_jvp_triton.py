"""attention_jvp's Triton kernel without a GPU: values in Triton's interpreter, and machine code for three
architectures. Nothing here has run on a GPU."""

import pytest

from tests.kernels import ahead_of_time
from tests.kernels.ahead_of_time import ROOT, python

pytest.importorskip("triton")

SOURCES = [ROOT / "kernels" / "fewstep_kernels" / "attention_jvp_kernels.py"]

INTERPRETED = """
import itertools
import torch, fewstep_kernels as fk
from fewstep_kernels import attention_jvp_kernels as kernels
from fewstep_kernels.attention_reference import reference
from tests.kernels.test_attention_jvp import draw, make_mask

assert fk.backend("attention_jvp", "cpu") == "triton"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

def check(shape, dtype, mask=None, causal=False, missing=(), value_width=None, turned=False, scale=0.3):
    primals, tangents = draw(*shape, value_width, dtype=dtype)
    tangents = [None if i in missing else t for i, t in enumerate(tangents)]
    if turned:  # [B, N, H, D] in memory, and columns that are no neighbours
        primals = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in primals]
        tangents = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tangents]
    mask = make_mask(mask, *shape[:2], *shape[3:5])
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    width = shape[5] if value_width is None else value_width
    out = torch.full((*shape[:2], shape[3], width), float("nan"), dtype=dtype)
    outputs = out, out.clone(), torch.full(shape[:2] + shape[3:4], float("nan"))
    kernels.call(*primals, *tangents, mask, causal, scale, outputs)
    expected = reference(*primals, *tangents, mask, causal, scale)
    # float32 sums of at most 130 products; the interpreter truncates bfloat16, so two units in its last place
    bound = {F32: 2e-5, F16: 2e-3, BF16: 2**-6}[dtype]
    for found, truth in zip(outputs, expected):
        assert found.dtype == truth.dtype
        torch.testing.assert_close(found, truth, rtol=bound, atol=bound * 2)

for mask, causal in itertools.product((None, "dead", "dead added"), (False, True)):
    check((1, 2, 1, 7, 37, 40), F32, mask, causal)
check((1, 1, 1, 1, 1, 16), F32)
check((1, 1, 1, 130, 63, 16), F32, "dead", True)
check((1, 1, 1, 63, 130, 72), F32)
check((2, 4, 2, 7, 9, 16), F32, "added")
check((2, 2, 2, 7, 9, 16), F32, "padding")
for dtype in (BF16, F16):
    check((1, 2, 1, 7, 63, 80), dtype)
    check((1, 1, 1, 7, 63, 160), dtype, "random", True)
for missing in ((0, 1), (1, 2), (0, 2), (0, 1, 2)):
    check((1, 2, 1, 7, 9, 24), F32, missing=missing)
check((1, 2, 1, 7, 9, 24), F32, value_width=40)
check((2, 2, 1, 7, 9, 32), F32, turned=True)
for width in (1, 17, 88, 96, 112, 128, 192, 256):
    check((1, 1, 1, 3, 5, width), F16)
check((2, 2, 1, 7, 9, 24), F32, "dead added", True, scale=-0.4)
check((1, 2, 2, 3, 67, 16), F32, "added", scale=-1.0)

# heads further apart than 2^31 elements, in memory that is never touched between them
apart = torch.empty(2**31 + 4096, dtype=BF16)
far = apart.as_strided((1, 2, 3, 16), (2**31 + 3000, 2**31 + 512, 16, 1))
(near, k, v), tangents = draw(1, 2, 2, 3, 5, 16, dtype=BF16)
far.copy_(near)
for found, other in zip(fk.attention_jvp(far, k, v, *tangents), fk.attention_jvp(near, k, v, *tangents)):
    assert torch.equal(found, other)
del apart, far

(q, k, v), (tq, tk, tv) = draw(1, 2, 1, 7, 9, 24, dtype=F32)
out, tangent = torch.func.jvp(fk.attention, (q, k, v), (tq, tk, tv))
expected = reference(q, k, v, tq, tk, tv, scale=24**-0.5)
torch.testing.assert_close((out, tangent), expected[:2], rtol=2e-5, atol=4e-5)
wide = [x.double() for x in (q, k, v, tq, tk, tv)]
found = fk.attention_jvp(*wide, scale=0.3)[1]
nothing = fk.attention_jvp(q, k, v, tq, tk, tv, scale=0.0)[0]
torch.testing.assert_close(nothing, v.mean(2, keepdim=True).expand_as(nothing), rtol=1e-5, atol=1e-6)
assert torch.equal(found, reference(*wide, scale=0.3)[1])  # float64: the reference serves
print("equal")
"""

COMPILED = """
import triton.language as tl
from triton.compiler import ASTSource
from fewstep_kernels.attention_jvp_kernels import attention_jvp_kernel, pieces, tile
from tests.kernels.ahead_of_time import report

ALL = (True, True, True, 0, False)

def variant(dtype, width, value_width=None, flags=ALL, unit=None, aligned=True, on=(80, 90, 100)):
    value_width = value_width or width
    size = 4 if dtype == "fp32" else 2

    def build(capability):
        if capability not in on:
            return None
        options = tile(width, value_width, size, capability, flags[3] != 0)
        constants = {
            "WIDTHS": (width, *pieces(width), value_width, *pieces(value_width)),
            "FLAGS": flags,
            "UNIT": unit or 16 // size,
            "BLOCK_N": options.pop("BLOCK_N"),
            "BLOCK_M": options.pop("BLOCK_M"),
            "DOT": {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype],
            "PRECISION": "ieee",
        }
        names = attention_jvp_kernel.arg_names
        signature = dict.fromkeys(names, "i32")
        signature |= dict.fromkeys(("q", "k", "v", "tq", "tk", "tv", "out", "tangent"), "*" + dtype)
        signature |= {"mask": ("*" + dtype, "*u8", "*fp32")[flags[3]], "lse": "*fp32", "scale": "fp32"}
        signature |= dict.fromkeys(("batch_strides", "head_strides", "row_strides"), ("i32",) * 6)
        signature |= {"mask_strides": ("i32",) * 4, "out_strides": ("i32",) * 3}
        signature |= dict.fromkeys(constants, "constexpr")
        pointers = [name for name, kind in signature.items() if kind[0] == "*"] if aligned else []
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
        values = {(names.index(name),): value for name, value in constants.items()}
        return ASTSource(attention_jvp_kernel, signature, values, attributes), options

    return build

report({
    **{f"bf16 {width}": variant("bf16", width) for width in (64, 72, 128)},
    "fp16 40": variant("fp16", 40, on=(90,)),
    **{f"bf16 {width}": variant("bf16", width, on=(90,)) for width in (96, 160, 192)},
    "bf16 256": variant("bf16", 256, on=(90, 100)),
    "fp32 64": variant("fp32", 64, on=(90,)),
    "causal and masked": variant("bf16", 64, flags=(True, True, True, 1, True), on=(90,)),
    "added mask, fixed keys": variant("bf16", 128, flags=(True, False, False, 2, False), on=(90,)),
    "odd strides": variant("fp16", 24, unit=1, aligned=False, on=(90,)),
})
"""

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def test_values_in_the_interpreter_equal_the_reference():
    assert python(INTERPRETED, TRITON_INTERPRET="1", FEWSTEP_KERNELS="triton").endswith("equal\n")


@pytest.fixture(scope="module")
def compiled():
    return ahead_of_time.compiled(COMPILED, SOURCES)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_variant_compiles_to_matrix_instructions_and_fits(compiled):
    """Triton compiles a trap, without a word, where a block asks for more tensor memory than sm_100 has."""
    assert len(compiled) == 19
    for row in compiled:
        assert row["matrix_instructions"] > 0 or row["variant"] == "fp32 64", row
        assert row["fused"] > 0, row
        assert row["shared_bytes"] <= SHARED_LIMITS[row["capability"]], row
        assert row["tensor_memory_columns"] <= 512, row


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_spills_is_known(compiled):
    """Bytes of stack a thread. Widths beyond 128 hold two accumulators of more than 128 columns."""
    spills = {(row["variant"], row["capability"]): row["spills"] for row in compiled if row["spills"]}
    wide = {key: spills.pop(key) for key in list(spills) if key[0] in ("bf16 160", "bf16 192", "bf16 256")}
    assert max(wide.values(), default=0) <= 192, wide
    assert max(spills.values(), default=0) <= 32, spills


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_move_in_pieces_of_sixteen_bytes(compiled):
    whole = [row for row in compiled if row["variant"] in ("bf16 64", "bf16 128")]
    assert len(whole) == 6
    assert all(row["vector_loads"] and row["copies"] and not row["narrow_loads"] for row in whole)
    assert all(row["narrow_copies"] == 0 for row in whole)
