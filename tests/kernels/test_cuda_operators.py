"""Every operator's values on a GPU, by every backend it has there, against the reference on the CPU.

What promises the same bits everywhere is held to bits; the rest to twice torch's own error on that GPU. The tests
themselves are tried without one by FEWSTEP_TEST_DEVICE=cpu. Attention's tests on a GPU are in test_attention_jvp.py.
"""

import importlib

import pytest
import torch

import fewstep_kernels as fk
from fewstep_kernels import backends, distance, ema, normalisation, registration
from tests.kernels import normalisation_cases
from tests.kernels.on_device import DEVICE, MARKS, every, here, host
from tests.kernels.reductions import draw, error

pytestmark = MARKS
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
COUNTS = (1, 3, 63, 500, 1025, 8191)
EVERY_COUNT = pytest.mark.parametrize("count", COUNTS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", (F32, BF16, F16, F64))
lincomb_module, gram_module, threshold_module = (
    importlib.import_module(f"fewstep_kernels.{name}") for name in ("lincomb", "gram", "threshold")
)


def same(found, expected):
    for one, other in zip(host(found), expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if backends.interpreting() and one.dtype == BF16:  # Triton's interpreter truncates where hardware rounds
            torch.testing.assert_close(one, other, rtol=2**-7, atol=0)
        else:
            assert torch.equal(one, other), (one - other).abs().max()


@every("lincomb")
@EVERY_COUNT
@pytest.mark.parametrize("noise", (False, True))
def test_maps_have_the_bits_of_the_cpu(operator, way, count, noise):
    for inputs, outputs in (
        ([F32] * 3, [F32] * 2),
        ([BF16, F32, F16], [BF16, F32, F16]),
        ([F64, BF16], [F64, F32, F16, BF16]),
        ([F32] * 9, [F32] * 4),
    ):
        xs = [draw(3, count, dtype=dtype) for dtype in inputs]
        seeds = torch.tensor([1, 2**62 + 3, -5]) if noise else None
        for table in (draw(len(outputs), len(xs) + noise), draw(3, len(outputs), len(xs) + noise)):
            out = [torch.full((3, count), float("nan"), dtype=dtype, device=DEVICE) for dtype in outputs]
            given = {} if seeds is None else {"noise_seeds": seeds.to(DEVICE), "noise_stream": 2}
            with backends.asking(way):
                fk.lincomb(here(xs), table.to(DEVICE), out=out, **given)
            same(out, lincomb_module.reference(xs, table, seeds, 2, outputs))


@every("normal", "uniform")
@EVERY_COUNT
@EVERY_DTYPE
def test_noise_has_the_bits_of_the_cpu(operator, way, count, dtype):
    seeds = torch.tensor([1, 2**62 + 3, -5])
    with backends.asking("reference"):
        expected = getattr(fk, operator)(seeds, (count,), stream=3, dtype=dtype)
    with backends.asking(way):
        same([getattr(fk, operator)(seeds.to(DEVICE), (count,), stream=3, dtype=dtype)], [expected])


@every("lincomb")
def test_views_layouts_and_outputs_in_place(operator, way):
    both, columns = draw(4, 3, 5, 7), draw(2, 4, 3, 5, 7)
    last = draw(2, 3, 5, 7).to(memory_format=torch.channels_last)
    table, seeds = draw(2, 4), torch.tensor([5, -6])
    expected = lincomb_module.reference([both[:2], both[2:], columns[:, 1]], table, seeds, 0, [F32] * 2)
    on, apart, turned = here([both, columns, last])
    with backends.asking(way):
        found = fk.lincomb([on[:2], on[2:], apart[:, 1]], table.to(DEVICE), noise_seeds=seeds.to(DEVICE))
        same(found, expected)
        expected = lincomb_module.reference([last], table[:, :2], seeds, 0, [F32] * 2)
        same(fk.lincomb([turned], table[:, :2].to(DEVICE), noise_seeds=seeds.to(DEVICE)), expected)
        expected = lincomb_module.reference([both[:2], both[2:]], table[:1, :2], dtypes=[F32])
        fk.lincomb([on[:2], on[2:]], table[:1, :2].to(DEVICE), out=[on[:2]])
        same([on[:2]], expected)


@every("lincomb")
def test_memory_off_sixteen_bytes_after_memory_on_it(operator, way):
    """What was compiled to read sixteen bytes at once may not serve the second call."""
    memory, table = draw(2060), draw(2, 1)
    (on,) = here([memory])
    with backends.asking(way):
        for start in (0, 0, 1, 1, 4):
            found = fk.lincomb([on[start : start + 2048].view(2, 1024)], table.to(DEVICE))
            x = memory[start : start + 2048].view(2, 1024)
            same(found, lincomb_module.reference([x], table, dtypes=[F32] * 2))


def within(found, torchs, truth):
    """At most twice torch's own error; where torch happens to be exact, some roundings of the largest value."""
    for ours, theirs, exact in zip(host(found), host(torchs), truth, strict=True):
        eps = torch.finfo(ours.dtype).eps
        floor = eps * exact.abs().max() * (16 if ours.dtype == F64 else 2) if exact.numel() else 0.0
        assert torch.isfinite(ours).all() and ours.shape == exact.shape
        assert exact.numel() == 0 or error(ours, exact) <= 2 * error(theirs, exact) + floor


@every("gram", "inner_products")
@EVERY_COUNT
@EVERY_DTYPE
def test_products_are_as_exact_as_torchs(operator, way, count, dtype):
    xs = [draw(3, count, dtype=dtype), draw(3, count, dtype=dtype), draw(3, count, dtype=BF16)]
    wide = [x.double() for x in xs]
    if operator == "inner_products":
        reference = importlib.import_module("fewstep_kernels.inner_products").reference
        with backends.asking(way):
            found = [fk.inner_products(here(xs)[:2], here(xs))]
        within(found, [reference(here(xs)[:2], here(xs))], [reference(wide[:2], wide)])
        return
    for table in ((), ((1.0, -1.0, 0.0), (0.0, 1.0, 0.5))):
        with backends.asking(way):
            found = fk.gram(here(xs), table or None)
        within(found, gram_module.reference(here(xs), table), gram_module.reference(wide, table))


@every("distance")
@EVERY_COUNT
@EVERY_DTYPE
def test_distances_and_their_gradients_are_as_exact_as_torchs(operator, way, count, dtype):
    a, b, weight = (draw(3, count, dtype=dtype) for _ in range(3))
    scale = draw(3)
    for kind, of_elements in ((distance.SQUARE, None), (distance.ABSOLUTE, weight), (distance.PSEUDO_HUBER, weight)):
        tensors = [x for x in (a, b, of_elements) if x is not None]
        wide, moved = [x.double() for x in tensors], here(tensors)
        pad = [None] * (3 - len(tensors))
        with backends.asking(way):
            value = distance._sum(kind, 0.3, *moved, *pad, None, None)
            slopes = distance._gradient(kind, 0.3, scale.to(DEVICE), *moved, *pad, True, True)
            along = distance._sum(kind, 0.3, *moved, *pad, moved[1], moved[0])
        torchs = distance.reference(kind, 0.3, *moved), distance.reference(kind, 0.3, *wide)
        within([value], torchs[:1], torchs[1:])
        theirs = distance.gradient_reference(kind, 0.3, scale.to(DEVICE), *moved, *pad, True, True)
        within(slopes, theirs, distance.gradient_reference(kind, 0.3, scale.double(), *wide, *pad, True, True))
        theirs = distance.tangent_reference(kind, 0.3, *moved, *pad, moved[1], moved[0])
        within([along], [theirs], [distance.tangent_reference(kind, 0.3, *wide, *pad, wide[1], wide[0])])


@every("threshold")
@EVERY_COUNT
@EVERY_DTYPE
def test_thresholds_have_the_bits_of_the_cpu(operator, way, count, dtype):
    x = 3 * draw(3, count, dtype=dtype)
    for quantile in (0.0, 0.3, 0.995, 1.0):
        for given in (x, x.round(), torch.zeros_like(x)):
            with backends.asking(way):
                found = fk.threshold(given.to(DEVICE), quantile, least=0.05)
            same([found], [threshold_module.reference(given, quantile, 0.05)])


SIZES = ((63,), (5, 7), (8191,), (1,), (3, 0), (2, 3, 4, 5))


@every("ema_update")
@pytest.mark.parametrize(("of_average", "of_parameter"), ((F32, F32), (F32, BF16), (F64, F32), (F16, F32)))
def test_averages(operator, way, of_average, of_parameter):
    decays = [0.9, torch.tensor(0.999, dtype=F64)]
    profiles = [[draw(*size, dtype=of_average) for size in SIZES] for _ in decays]
    parameters = [draw(*size, dtype=of_parameter) for size in SIZES]
    wide = [[x.double() for x in profile] for profile in profiles]
    for profile, decay in zip(wide, decays):
        ema.reference(profile, [x.double() for x in parameters], decay)
    moved = [here(profile) for profile in profiles]
    with backends.asking(way):
        fk.ema_update(moved, here(parameters), [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in decays])
    for found, exact in zip(moved, wide):
        for one, other in zip(host(found), exact):
            # one rounding of a number below 5 to the average's dtype, and two float32 ones on the way
            bound = 8 * max(torch.finfo(of_average).eps, torch.finfo(F32).eps if of_average != F64 else 0)
            assert one.dtype == of_average and torch.allclose(one.double(), other, rtol=0, atol=bound)


@every("ema_update")
def test_stochastic_rounding_has_the_bits_of_the_cpu(operator, way):
    averages = [draw(*size, dtype=BF16) for size in SIZES]
    parameters = [draw(*size) for size in SIZES]
    expected, found = [x.clone() for x in averages], here(averages)
    with backends.asking("reference"):
        fk.ema_update(expected, parameters, 0.99, seed=7, update=3)
    with backends.asking(way):
        fk.ema_update(found, here(parameters), 0.99, seed=7, update=torch.tensor(3, device=DEVICE))
    for one, other in zip(host(found), expected):
        # a float32 value one ulp apart may fall on the other side of its random threshold: rarely, by one bfloat16 ulp
        assert (one != other).float().mean().nan_to_num() <= 1e-3
        torch.testing.assert_close(one, other, rtol=2**-7, atol=0)


@every("adamw_ema_step")
@pytest.mark.parametrize("finite", (True, False))
def test_steps_of_adamw(operator, way, finite):
    def state(dtype, device):
        torch.manual_seed(1)
        drawn = [[torch.randn(size, dtype=F64).float().to(device, dtype) for size in SIZES] for _ in range(4)]
        squares = [x.square() for x in drawn[2]]
        steps = [torch.full((), 4.0, device=device, dtype=dtype) for _ in SIZES]
        return [*drawn, squares, steps]

    def step(tensors, way, device):
        parameters, gradients, means, averages, squares, steps = tensors
        norm = torch.tensor(2.0 if finite else float("inf"), device=device)
        working = [x.to(BF16) for x in parameters]
        with backends.asking(way):
            fk.adamw_ema_step(
                parameters, [None, *gradients[1:]], means, squares, steps, lr=torch.tensor(0.1, device=device),
                weight_decay=0.1, gradient_scale=torch.tensor(0.5, device=device), guard=norm,
                averages=[averages], decays=[0.9], working=working,
            )  # fmt: skip
        return working

    expected, found = state(F64, "cpu"), state(F32, DEVICE)
    before = [x.clone() for x in found[0]]
    of_expected, of_found = step(expected, "reference", "cpu"), step(found, way, DEVICE)
    for ours, exact in zip(found, expected):
        for one, other in zip(host(ours), exact):
            torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)  # a few float32 roundings
    for one, other in zip(host(of_found), of_expected):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=0)  # one bfloat16 rounding
    assert torch.equal(found[0][1], before[1]) is not finite


@every("multi_tensor_l2norm")
def test_norms(operator, way):
    tensors = [draw(*size, dtype=dtype) for size in SIZES for dtype in (F32, BF16)]
    true = torch.stack([x.double().square().sum() for x in tensors]).sum().sqrt()
    with backends.asking(way):
        torch.testing.assert_close(fk.multi_tensor_l2norm(here(tensors)).cpu().double(), true, rtol=1e-6, atol=0)
        bad = [*here(tensors), torch.full((3,), float("inf"), device=DEVICE)]
        assert fk.multi_tensor_l2norm(bad).isinf()


@every("group_norm_silu")
@EVERY_DTYPE
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(("shape", "groups"), (((2, 6, 5, 5), 3), ((3, 63, 7, 9), 7), ((1, 64, 65, 64), 2)))
def test_group_normalisation_is_as_exact_as_torchs(operator, way, dtype, last, shape, groups, monkeypatch):
    tensors = normalisation_cases.inputs(shape, shape[1], dtype, dtype, last=last)
    gradient = draw(*shape, dtype=dtype)
    ours, theirs = normalisation_cases.group(groups), normalisation_cases.group_torch(groups)
    _as_accurate(ours, theirs, theirs, tensors, gradient, way, monkeypatch)


@every("layer_norm_modulate", "rms_norm_modulate")
@EVERY_DTYPE
@pytest.mark.parametrize("shape", ((2, 7, 63), (3, 1, 1), (2, 600, 1152), (2, 5, 8192), (1, 2, 9001)))
def test_row_normalisation_is_as_exact_as_torchs(operator, way, dtype, shape, monkeypatch):
    kind = operator.partition("_")[0]
    tensors = normalisation_cases.inputs(shape, shape[-1], dtype, dtype)[:5]
    functions = (getattr(normalisation_cases, name)(kind) for name in ("row", "row_torch_own", "row_torch"))
    _as_accurate(*functions, tensors, draw(*shape, dtype=dtype), way, monkeypatch)


def _as_accurate(ours, theirs, exact, tensors, gradient, way, monkeypatch):
    with_gradients = normalisation_cases.with_gradients
    truth = with_gradients(exact, normalisation_cases.double(tensors), gradient.double())
    torchs = with_gradients(theirs, here(tensors), gradient.to(DEVICE))
    with monkeypatch.context() as patch, backends.asking(way):
        normalisation_cases.nan_filled_allocations(patch)
        found = with_gradients(ours, here(tensors), gradient.to(DEVICE))
    normalisation_cases.assert_as_accurate(host(found), host(torchs), truth, gradient)


@pytest.fixture
def giving_memory_back():
    """What a process keeps of the device's memory, others that run tests beside it cannot have."""
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@every("lincomb", "gram", "threshold", "distance")
@pytest.mark.usefixtures("giving_memory_back")
def test_samples_further_apart_than_two_gigabytes(operator, way):
    apart = torch.empty(2**29 + 101, device=DEVICE)
    x = apart.as_strided((2, 63), (2**29 + 5, 1))
    x.copy_(draw(2, 63))
    calls = {
        "lincomb": lambda x: fk.lincomb([x], torch.full((1, 1), 0.7, device=DEVICE)),
        "gram": lambda x: fk.gram([x]),
        "threshold": lambda x: [fk.threshold(x, 0.9, least=0.1)],
        "distance": lambda x: [fk.l2(x, x + 1)],
    }
    with backends.asking(way):
        same(calls[operator](x), host(calls[operator](x.clone())))


@pytest.mark.skipif(DEVICE != "cuda", reason="touches eight gigabytes")
@every("lincomb", "ema_update", "group_norm_silu", reference=False)
@pytest.mark.usefixtures("giving_memory_back")
def test_a_sample_of_more_than_two_to_the_31_elements(operator, way):
    """Its last elements, beyond 32-bit numbering, by themselves."""
    count = 2**31 + 2048
    x = torch.zeros(1, 8, count // 8, dtype=BF16, device=DEVICE)
    x[0, -1, -8:] = torch.arange(8, dtype=BF16, device=DEVICE)
    with backends.asking(way):
        if operator == "lincomb":
            (y,) = fk.lincomb([x], torch.full((1, 1), 2.0, device=DEVICE))
            assert torch.equal(y[0, -1, -8:], 2 * x[0, -1, -8:]) and not y[0, 0, :8].any()
        elif operator == "ema_update":
            y = torch.zeros_like(x)
            fk.ema_update([y], [x], 0.0)
            assert torch.equal(y[0, -1, -8:], x[0, -1, -8:]) and not y[0, 0, :8].any()
        else:
            y = fk.group_norm_silu(x, 8, shift=torch.full((1, 8), 2.0, device=DEVICE), activation=None)
            assert torch.isfinite(y[0, 0, :8]).all() and (y[0, -1, -1] > y[0, -1, 0]) and (y[0, 0, 0] == 2)


@every("lincomb", "gram", "threshold", "ema_update", "multi_tensor_l2norm", "group_norm_silu", "layer_norm_modulate")
@pytest.mark.skipif(DEVICE != "cuda", reason="streams are a GPU's")
def test_kernels_wait_for_the_current_stream(operator, way):
    """The input is written late, on a stream of its own: a launch on another stream would read zeros."""
    calls = {
        "lincomb": lambda x: fk.lincomb([x], torch.ones(1, 1, device=DEVICE))[0],
        "gram": lambda x: fk.gram([x]).products,
        "threshold": lambda x: fk.threshold(x, 0.9),
        "ema_update": lambda x: (y := torch.zeros_like(x), fk.ema_update([y], [x], 0.5))[0],
        "multi_tensor_l2norm": lambda x: fk.multi_tensor_l2norm([x]),
        "group_norm_silu": lambda x: fk.group_norm_silu(x, 4),
        "layer_norm_modulate": lambda x: fk.layer_norm_modulate(x, None, None),
    }
    value = draw(2, 8, 16, 64).to(DEVICE)
    with backends.asking(way):
        expected = calls[operator](value)
        calls[operator](torch.zeros_like(value))
        late, stream = torch.zeros_like(value), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(value)
            found = calls[operator](late)
        stream.synchronize()
    assert torch.equal(found, expected)


def test_empty_tensors():
    nothing = torch.empty(0, 3, 4, 4, device=DEVICE)
    assert fk.lincomb([nothing], torch.ones(1, 1, device=DEVICE))[0].shape == nothing.shape
    assert fk.gram([nothing]).products.shape == (0, 1, 1)
    assert fk.l2(nothing, nothing).shape == (0,)
    assert fk.threshold(nothing).shape == nothing.shape
    assert fk.group_norm_silu(nothing, 3).shape == nothing.shape
    assert fk.layer_norm_modulate(nothing, None, None).shape == nothing.shape
    fk.ema_update([], [], 0.5)
    form = normalisation.Form("group_norm_silu", 3, 1e-5, True)
    assert normalisation.served(form, nothing) == "reference" and not registration.tracing()
