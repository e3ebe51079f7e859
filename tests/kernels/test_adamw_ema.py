"""adamw_ema_step: values against float64, masks, missing gradients, skipped steps, averages and copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep_kernels import adamw_ema_step, ema_update
from fewstep_kernels.adamw_ema import reference
from fewstep_kernels.ema import element_origins

SHAPES = ((1,), (63,), (0,), (), (500, 7), (8191,), (3, 8192))
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "epsilon": 1e-8}


def problem(dtype=torch.float32, gradient=None, state=None, average=torch.float32, profiles=1, seed=0, shapes=SHAPES):
    """Tensors in the middle of training, with `step` 3."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kind, scale=1.0):
        return [scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(kind) for shape in shapes]

    return {
        "parameters": draw(dtype),
        "gradients": draw(gradient or dtype),
        "exp_avgs": draw(state or dtype, 0.1),
        "exp_avg_sqs": [x.square() for x in draw(state or dtype, 0.3)],
        "steps": [torch.tensor(3.0) for _ in shapes],
        "averages": [draw(average) for _ in range(profiles)],
    }


def copied(tensors, dtype=None):
    if isinstance(tensors, dict):
        return {name: copied(values, dtype) for name, values in tensors.items()}
    if isinstance(tensors, list):
        return [copied(x, dtype) for x in tensors]
    return tensors if tensors is None else tensors.clone().to(dtype or tensors.dtype)


def everything(tensors):
    for values in tensors.values():
        for x in values:
            yield from x if isinstance(x, list) else (() if x is None else (x,))


def take(step, tensors, decays=(0.9,), **options):
    lists = [tensors[name] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "steps")]
    step(*lists, averages=tensors["averages"], decays=decays, **{**OPTIONS, **options})


def by_torch(tensors, weight_decay, fused=True):
    """torch.optim.AdamW, then a foreach average, on the same tensors."""
    parameters = [torch.nn.Parameter(p) for p in tensors["parameters"]]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay, fused=fused
    )
    for i, p in enumerate(parameters):
        p.grad = tensors["gradients"][i]
        optimizer.state[p] = {
            "step": tensors["steps"][i],
            "exp_avg": tensors["exp_avgs"][i],
            "exp_avg_sq": tensors["exp_avg_sqs"][i],
        }
    optimizer.step()
    with torch.no_grad():
        values = [p.to(a.dtype) for p, a in zip(tensors["parameters"], tensors["averages"][0])]
        torch._foreach_lerp_(tensors["averages"][0], values, 0.1)


@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_error_is_at_most_twice_that_of_torch(dtype, weight_decay):
    ours = problem(dtype)
    torchs, true = copied(ours), copied(ours, torch.float64)
    take(adamw_ema_step, ours, weight_decay=weight_decay)
    by_torch(torchs, weight_decay)
    by_torch(true, weight_decay)
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        for found, other, exact in zip(ours[name], torchs[name], true[name]):
            if found.numel():
                # where torch happens to be exact, one rounding of the values themselves
                floor = torch.finfo(dtype).eps * exact.abs().max()
                error, bar = (found.double() - exact).abs().max(), (other.double() - exact).abs().max()
                assert error <= 2 * bar + floor, name
    for average, before, parameter in zip(ours["averages"][0], problem(dtype)["averages"][0], ours["parameters"]):
        expected = before.double() * 0.9 + parameter.double() * 0.1
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)  # a few float32 roundings below 6
    assert all(step == 4 for step in ours["steps"])


def test_the_reference_is_torchs_adamw_in_float64():
    ours = problem(torch.float64, average=torch.float64)
    torchs = copied(ours)
    extra = {"weight_decays": [0.1] * len(SHAPES), "working": [None] * len(SHAPES)}
    take(reference, ours, origins=element_origins(ours["parameters"]), **extra)
    by_torch(torchs, 0.1, fused=False)
    for found, expected in zip(everything(ours), everything(torchs)):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)  # a few roundings of numbers below 6


MIXES = {
    "bfloat16 gradients of float32 parameters": {"gradient": torch.bfloat16},
    "bfloat16 parameters, float32 states": {"dtype": torch.bfloat16, "state": torch.float32},
    "float16 gradients, bfloat16 averages": {"gradient": torch.float16, "average": torch.bfloat16},
    "float64 parameters, float32 averages": {"dtype": torch.float64, "average": torch.float32},
    "float32 parameters, float64 averages": {"average": torch.float64},
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("seed", (None, 9))
def test_mixed_dtypes_scales_and_copies_equal_the_reference(mix, seed):
    ours = problem(profiles=3, **mix)
    expected = copied(ours)
    options = {"gradient_scale": torch.tensor(0.25), "guard": torch.tensor(1.0), "lr": torch.tensor(1e-2)}
    options |= {"seed": seed, "update": torch.tensor(5.0), "decays": (0.9, torch.tensor(0.999), 0.0)}
    masks = [0.1 if p.ndim > 1 else 0.0 for p in ours["parameters"]]
    copies = [[p.new_full(p.shape, float("nan"), dtype=torch.bfloat16) for p in ours["parameters"]] for _ in "ab"]
    take(adamw_ema_step, ours, weight_decay=masks, working=copies[0], **options)
    origins = element_origins(ours["parameters"])
    take(reference, expected, weight_decays=masks, working=copies[1], origins=origins, **options)
    for found, other in zip(everything(ours), everything(expected)):
        # a few roundings of float32, then at most one step of a 16-bit result
        tolerance = max(8 * 2.0**-24, 1.01 * torch.finfo(found.dtype).eps)
        torch.testing.assert_close(found, other, rtol=tolerance, atol=2e-6)
    for copy, parameter in zip(copies[0], ours["parameters"]):
        torch.testing.assert_close(copy.double(), parameter.double(), rtol=2.0**-7, atol=0)
        if parameter.dtype != torch.bfloat16:
            assert torch.equal(copy, parameter.bfloat16())


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("step", ("C++", "reference"))
def test_a_guard_that_is_not_finite_leaves_everything_untouched(bad, step):
    ours = problem(profiles=2)
    before = copied(ours)
    ours["gradients"][4][:] = bad
    copies = [torch.full_like(p, 7.0) for p in ours["parameters"]]
    common = {"decays": (0.9, 0.0), "guard": torch.tensor(bad), "gradient_scale": torch.tensor(bad)}
    if step == "C++":
        take(adamw_ema_step, ours, weight_decay=0.1, working=copies, **common)
    else:
        extra = {"weight_decays": [0.1] * len(SHAPES), "origins": element_origins(ours["parameters"])}
        take(reference, ours, working=copies, **common, **extra)
    del ours["gradients"], before["gradients"]
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(before)))
    assert all((copy == 7.0).all() for copy in copies)


def test_a_missing_gradient_misaligns_nothing():
    whole, partial = problem(profiles=1), problem(profiles=1)
    missing = (1, 4)
    for i in missing:
        for name in ("gradients", "exp_avgs", "exp_avg_sqs", "steps"):
            partial[name][i] = None
    before = copied(partial)
    take(adamw_ema_step, whole, weight_decay=0.1, seed=3)
    take(adamw_ema_step, partial, weight_decay=0.1, seed=3)
    for i in range(len(SHAPES)):
        if i in missing:
            assert torch.equal(partial["parameters"][i], before["parameters"][i])
            ema_update([before["averages"][0][i]], [before["parameters"][i]], 0.9)
            assert torch.equal(partial["averages"][0][i], before["averages"][0][i])
        else:
            for name in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
                assert torch.equal(partial[name][i], whole[name][i])
            assert torch.equal(partial["averages"][0][i], whole["averages"][0][i])


def test_weight_decay_masks_choose_tensors():
    masked, decayed, free = problem(), problem(), problem()
    mask = [i % 2 for i in range(len(SHAPES))]
    take(adamw_ema_step, masked, weight_decay=[0.5 * m for m in mask])
    take(adamw_ema_step, decayed, weight_decay=0.5)
    take(adamw_ema_step, free, weight_decay=0.0)
    for i, m in enumerate(mask):
        assert torch.equal(masked["parameters"][i], (decayed if m else free)["parameters"][i])
    assert not torch.equal(decayed["parameters"][4], free["parameters"][4])


def test_averages_equal_ema_update_after_the_step():
    ours, apart = problem(average=torch.bfloat16, profiles=4), problem(average=torch.bfloat16, profiles=4)
    decays, profiles = (0.9, 0.99, 0.4, 1.0), apart["averages"]
    take(adamw_ema_step, ours, decays=decays, seed=5, update=17)
    apart["averages"] = []
    take(adamw_ema_step, apart, decays=())
    ema_update(profiles, apart["parameters"], list(decays), seed=5, update=17)
    assert all(torch.equal(a, b) for x, y in zip(ours["averages"], profiles) for a, b in zip(x, y))


def test_the_same_bits_on_any_number_of_threads():
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(problem(average=torch.bfloat16, profiles=2))
            take(adamw_ema_step, found[-1], decays=(0.9, 0.99), seed=1)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(everything(found[0]), everything(other)))


def test_layouts_with_holes_and_other_orders():
    tensors = problem(shapes=((4, 6), (2, 3, 4, 5)))
    expected = copied(tensors)
    wide = torch.zeros(4, 12)
    wide[:, ::2] = tensors["parameters"][0]
    tensors["parameters"][0] = wide[:, ::2]
    for name in ("parameters", "gradients", "exp_avgs"):
        tensors[name][1] = tensors[name][1].to(memory_format=torch.channels_last)
    take(adamw_ema_step, tensors)
    take(adamw_ema_step, expected)
    for found, other in zip(everything(tensors), everything(expected)):
        torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-6)  # the reference serves them: other roundings
    assert (wide[:, 1::2] == 0).all()


def test_the_raw_operator_keeps_torch_s_rules():
    raw = torch.ops.fewstep_kernels._adamw_ema_step.default
    for seed, missing in ((None, ()), (3, (1,))):
        tensors = problem(average=torch.bfloat16, profiles=2, shapes=((3,), (2, 5), (0,)))
        moving = [i for i in range(3) if i not in missing]
        states = [[tensors[name][i] for i in moving] for name in ("gradients", "exp_avgs", "exp_avg_sqs", "steps")]
        flat = [average for profile in tensors["averages"] for average in profile]
        scalars = [1e-2, 0.9, 0.99, 1e-8, 0.5, 0.0, 4.0, 0.9, 0.0]
        on_device = [None] * 8 + [torch.tensor(0.99)]
        copy = [torch.zeros(2, 5, dtype=torch.bfloat16)]
        rest = (moving, [1], [0.1, 0.0, 0.1], scalars, on_device, seed, element_origins(tensors["parameters"]))
        torch.library.opcheck(raw, (tensors["parameters"], *states, flat, copy, *rest))


def test_a_compiled_step_and_a_watched_one_equal_the_eager_one():
    def step(tensors, lr):
        take(adamw_ema_step, tensors, decays=(0.9, 0.5), lr=lr, weight_decay=0.1, guard=torch.ones(()))

    shapes = ((63,), (5, 7))
    eager, compiled, watched = (problem(profiles=2, shapes=shapes) for _ in range(3))
    step(eager, torch.tensor(1e-2))
    torch.compile(step, fullgraph=True)(compiled, torch.tensor(1e-2))
    with torch.profiler.profile() as profile:
        step(watched, torch.tensor(1e-2))
    assert any(event.key == "fewstep_kernels::_adamw_ema_step" for event in profile.key_averages())
    for found, seen, generated in zip(everything(eager), everything(watched), everything(compiled)):
        assert torch.equal(found, seen)
        torch.testing.assert_close(generated, found, rtol=1e-5, atol=1e-6)  # a few float32 roundings


def test_autograd_notices_what_moved():
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        tensors = problem(shapes=((3,),))
        weight = torch.ones(3, requires_grad=True)
        answer = (weight * tensors[name][0]).sum()
        take(adamw_ema_step, tensors)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            answer.backward()


def test_function_transforms_are_refused():
    fixed = problem(shapes=((3,),))

    def stepped(gradient):
        tensors = copied(fixed) | {"gradients": [gradient]}
        take(adamw_ema_step, tensors)
        return gradient.sum()

    for transform, argument in ((torch.func.grad, torch.ones(3)), (torch.func.vmap, torch.ones(2, 3))):
        with pytest.raises(RuntimeError, match="adamw_ema_step writes in place and has no derivatives"):
            transform(stepped)(argument)


KINDS = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=4),
    dtypes=st.tuples(KINDS, KINDS, KINDS, KINDS),
    decays=st.lists(st.floats(0.0, 1.0), max_size=4),
    missing=st.sets(st.integers(0, 3)),
    seed=st.sampled_from((None, 7)),
)
def test_any_shapes_and_dtypes_equal_the_reference(shapes, dtypes, decays, missing, seed):
    dtype, gradient, state, average = dtypes
    ours = problem(dtype, gradient, state, average, profiles=len(decays), shapes=shapes)
    for name in ("gradients", "exp_avgs", "exp_avg_sqs", "steps"):
        ours[name] = [None if i in missing else x for i, x in enumerate(ours[name])]
    before, expected = copied(ours), copied(ours)
    take(adamw_ema_step, ours, decays=decays, seed=seed, update=3)
    extra = {"weight_decays": [0.0] * len(shapes), "working": [None] * len(shapes)}
    take(reference, expected, decays=decays, seed=seed, update=3, origins=element_origins(ours["parameters"]), **extra)
    for found, other, old in zip(everything(ours), everything(expected), everything(before)):
        # a few float32 roundings of the value and of the step, then at most one unit of a 16-bit result
        eps = max(8 * 2.0**-24, 1.01 * torch.finfo(found.dtype).eps)
        least = float(old.abs().max()) * 4e-7 + 2e-6 if old.numel() else 0.0
        torch.testing.assert_close(found, other, rtol=eps, atol=least)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    (
        ({"gradients": []}, {}, "got 0 gradients for 2 parameters"),
        ({"exp_avgs": [None, None]}, {}, "parameter 0 has a gradient, so it needs exp_avg"),
        ({"gradients": [torch.zeros(3), torch.zeros(2)]}, {}, "copy of parameter 0 must be"),
        ({"gradients": [torch.zeros(2).to_sparse(), torch.zeros(2)]}, {}, "dense gradients"),
        ({"steps": [torch.zeros(1), torch.zeros(())]}, {}, "step must be a 0-d"),
        ({}, {"decays": ()}, "1 lists of averages for 0 decays"),
        ({}, {"decays": (1.5,)}, r"decay must be in \[0, 1\]"),
        ({}, {"lr": -1.0}, "lr must be in"),
        ({}, {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({}, {"weight_decay": [0.1]}, "got 1 weight_decay for 2"),
        ({}, {"guard": torch.zeros(1)}, "guard as a tensor must be 0-d"),
        ({}, {"guard": 3.0}, "guard must be"),
    ),
)
def test_what_does_not_fit_is_said(change, options, words):
    tensors = problem(shapes=((2,), (2,))) | change
    with pytest.raises(ValueError, match=words):
        take(adamw_ema_step, tensors, **options)
