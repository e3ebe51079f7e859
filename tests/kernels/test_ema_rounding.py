"""bfloat16 averages: what nearest rounding loses, what stochastic rounding keeps, and that its bits are fixed."""

import torch

from fewstep_kernels import ema_update
from fewstep_kernels.ema import element_origins, reference, round_stochastically

SHAPES = ((1,), (63,), (0,), (500, 7), (8191,), (8, 1030))


def tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def test_every_instruction_set_rounds_to_the_references_bits(instructions):
    profiles, expected = ([tensors(torch.bfloat16, s) for s in (2, 3)] for _ in range(2))
    decays, seed, update = [0.5, 0.0], -(1 << 40) - 7, 123_456
    # sums of bfloat16 halves are exact in float32, so that only the rounding can differ
    parameters = [p.bfloat16().float() for p in tensors(torch.float32, 1)]
    ema_update(profiles, parameters, decays, seed=seed, update=update)
    for k, (averages, decay) in enumerate(zip(expected, decays)):
        reference(averages, parameters, decay, seed=seed, update=update, profile=k, origins=element_origins(parameters))
    for found, true in zip(profiles, expected):
        assert all(torch.equal(a, b) for a, b in zip(found, true))


def test_rounding_is_unbiased_and_lands_on_a_neighbour():
    fractions = torch.linspace(0, 1, 65)[:-1]
    value = (1.0 + fractions * 2.0**-7).repeat_interleave(4096)  # between neighbours 1 and 1 + 2^-7
    rounded = round_stochastically(value, seed=3, update=0).float().view(64, 4096)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    up = (rounded > 1.0).double().mean(1)
    # a share of 4096 draws: standard deviation at most 1/128; five of them
    assert (up - fractions.double()).abs().max() < 5 / 128
    assert abs((up - fractions.double()).mean()) < 5 / 128 / 8
    assert (up[0], rounded[0].max()) == (0, 1)  # representable values never move


def test_special_values_survive():
    value = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, float("nan"), 2.0**-126, -3.5])
    for update in range(50):
        rounded = round_stochastically(value, 1, update)
        torch.testing.assert_close(rounded, value.bfloat16(), rtol=0, atol=0, equal_nan=True)
        average = torch.zeros(5, dtype=torch.bfloat16)
        ema_update([average], [value[2:]], 0.0, seed=1, update=update)  # infinities: inf - inf is nan, as in lerp
        torch.testing.assert_close(average, value[2:].bfloat16(), rtol=0, atol=0, equal_nan=True)


def once(seed, update, threads=1, origins=None, pick=slice(None)):
    averages, parameters = tensors(torch.bfloat16, 1)[pick], tensors(torch.float32, 2)[pick]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ema_update(averages, parameters, 0.9, seed=seed, update=update, origins=origins)
    finally:
        torch.set_num_threads(before)
    return averages


def test_bits_depend_on_seed_and_update_alone():
    first = once(7, 11)
    again, threaded, other_seed, other_update = once(7, 11), once(7, 11, threads=2), once(8, 11), once(7, 12)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(a, b) for a, b in zip(first, threaded))
    assert not torch.equal(first[4], other_seed[4])
    assert not torch.equal(first[4], other_update[4])
    from_device = once(7, torch.tensor(11))
    assert all(torch.equal(a, b) for a, b in zip(first, from_device))


def test_shards_round_as_the_whole_does():
    whole, parameter = torch.zeros(8192, dtype=torch.bfloat16), torch.randn(8192)
    shards = whole.clone().split(4096)
    ema_update([whole], [parameter], 0.9, seed=5, update=2)
    for rank, (shard, part) in enumerate(zip(shards, parameter.split(4096))):
        ema_update([shard], [part], 0.9, seed=5, update=2, origins=[4096 * rank])
    assert torch.equal(whole, torch.cat(shards))


def test_profiles_draw_apart():
    parameters = [torch.randn(4096)]
    a, b = [torch.zeros(4096, dtype=torch.bfloat16)], [torch.zeros(4096, dtype=torch.bfloat16)]
    ema_update([a, b], parameters, [0.7, 0.7], seed=1)
    assert not torch.equal(a[0], b[0])


def test_layouts_without_one_flat_loop_round_too():
    parameter = torch.randn(4, 3, 5, 6)
    average = torch.zeros(4, 3, 5, 12, dtype=torch.bfloat16)[..., ::2]
    ema_update([average], [parameter], 0.75, seed=1)
    torch.testing.assert_close(average.float(), parameter * 0.25, rtol=2.0**-7, atol=0)  # one bfloat16 ulp
    last = torch.zeros(4, 3, 5, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    twin = last.clone()
    parameter = parameter.to(memory_format=torch.channels_last)
    ema_update([last], [parameter], 0.75, seed=1)
    reference([twin], [parameter], 0.75, seed=1, origins=[0])
    assert torch.equal(last, twin)


def test_nearest_rounding_stalls_and_stochastic_rounding_tracks_for_100k_updates():
    """The bound of ema.py's docstring: sqrt(ulp E|parameter - average| / (1 + decay)) + ulp / 2."""
    decay, count, updates, block = 0.9999, 64, 100_000, 1000
    generator = torch.Generator().manual_seed(0)
    single, dithered = torch.zeros(count), torch.zeros(count, dtype=torch.bfloat16)
    nearest, exact = torch.zeros(count, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.float64)
    pair, gaps = [[single], [dithered]], []
    powers = decay ** torch.arange(block - 1, -1, -1, dtype=torch.float64)
    for start in range(0, updates, block):
        values = 1.5 + 0.1 * torch.randn(block, count, generator=generator)
        for i in range(block):
            ema_update(pair, [values[i]], [decay, decay], seed=1, update=start + i)
        nearest_wide = nearest.float()
        for i in range(0, block, 10):  # a stalled average stays stalled: a tenth of the steps shows it
            nearest = nearest_wide.lerp(values[i], 1 - decay).bfloat16()
            nearest_wide = nearest.float()
        exact = exact * decay**block + (1 - decay) * powers @ values.double()
        if start >= updates // 2:
            gaps.append(((values[-1] - dithered.float()).abs().mean(), (dithered.double() - exact).square().mean()))
    ulp = 2.0**-7  # of bfloat16 in [1, 2)
    distance, square = (torch.tensor([float(g[k]) for g in gaps]).mean().item() for k in (0, 1))
    bound = (ulp * distance / (1 + decay)) ** 0.5 + ulp / 2
    assert square**0.5 < bound
    assert bound < 0.03
    # float32 loses steps below its own half ulp: at most 2^-24 |average| / (1 - decay) away
    assert (single.double() - exact).abs().max() < 1.5 * 2.0**-24 / (1 - decay) + 1e-6
    # nearest rounding stops where a step falls below half a bfloat16 ulp: far from 1.5
    assert nearest.float().max() < 0.2
    assert (exact - 1.5).abs().max() < 0.05
