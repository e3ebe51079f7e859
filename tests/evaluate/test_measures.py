import pytest
import torch

from fewstep.data import digits
from fewstep.errors import UserError
from fewstep.evaluate import features
from fewstep.evaluate.bootstrap import compare, resample
from fewstep.evaluate.fidelity import fidelity
from fewstep.evaluate.frechet import Moments, frechet_distance, moments
from fewstep.evaluate.nearest import copying
from fewstep.evaluate.precision_recall import diversity, precision_recall


def draw(count, mean, spread, seed=0):
    """`count` samples of a Gaussian in 8 dimensions, mean and standard deviations [8], in a fixed rotated frame."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    return (torch.randn(count, 8, dtype=torch.float64, generator=generator) * spread + mean) @ rotation


def test_training_the_classifier_twice_gives_the_same_bits_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    again = features.train()
    assert torch.equal(before, torch.get_rng_state())
    for name, value in features.digit_classifier().state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_the_classifier_knows_held_out_digits():
    images, labels = digits("held_out")
    network = features.digit_classifier()
    rows = network.features(images)
    assert rows.shape == (360, 64)
    assert (network.classes(rows) == labels).float().mean() >= 0.96


def test_a_damaged_cached_classifier_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "RECIPE", {**features.RECIPE, "updates": 3})
    file = tmp_path / "features" / f"digits-{features.recipe_hash()}.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"damaged")
    made = features.digit_classifier.__wrapped__()
    assert torch.equal(features.digit_classifier.__wrapped__().head.weight, made.head.weight)
    assert file.stat().st_size > 10_000 and len(list(file.parent.iterdir())) == 1


def test_the_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    spread = torch.arange(1, 9, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    a = Moments(torch.zeros(8, dtype=torch.float64), rotation.T @ torch.diag(spread**2) @ rotation, 2)
    b = Moments(torch.ones(8, dtype=torch.float64), rotation.T @ torch.diag((2 * spread) ** 2) @ rotation, 2)
    # |m|^2 + sum (s - 2 s)^2; float64 with condition number 64, so twelve digits are left
    assert frechet_distance(a, b) == pytest.approx(8 + float((spread**2).sum()), rel=1e-12)


def test_the_frechet_distance_agrees_with_the_matrix_square_root():
    scipy = pytest.importorskip("scipy.linalg")
    a, b = moments(draw(50, 0.3, 1.0, 3)), moments(draw(60, -0.2, torch.linspace(0.5, 2, 8).double(), 4).flip(1))
    root = torch.from_numpy(scipy.sqrtm((a.covariance @ b.covariance).numpy()).real)
    wanted = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) < 1e-9


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        moments(torch.full((4, 2), float("nan")))


def test_precision_falls_with_outliers_and_recall_with_lost_modes():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 4, generator=generator) + 20 * torch.arange(400).remainder(2)[:, None]  # two modes
    both = torch.randn(800, 4, generator=generator) + 20 * torch.arange(800).remainder(2)[:, None]
    one = torch.randn(800, 4, generator=generator)
    outliers = torch.where(torch.arange(800).remainder(4).eq(0)[:, None], both - 100, both)
    precision, recall = precision_recall(both, real)
    assert precision > 0.8 and recall > 0.8
    assert (
        precision_recall(one, real)[1] == pytest.approx(recall / 2, abs=0.06) and precision_recall(one, real)[0] > 0.8
    )
    assert precision_recall(outliers, real)[0] == pytest.approx(0.75 * precision, abs=0.03)
    assert precision_recall(real, real) == (1.0, 1.0)


def test_diversity_is_the_variance_ratio_within_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000).remainder(2)
    real = torch.randn(4000, 4, generator=generator) + 50 * labels[:, None]
    narrow = 0.5 * torch.randn(4000, 4, generator=generator) + 80 * labels[:, None]
    assert diversity(narrow, labels, real, labels) == pytest.approx(
        0.25, rel=0.05
    )  # 8000 values a class: 1.6% at one sigma


def test_bootstrap_intervals_cover_a_known_difference_and_ratio():
    reference = moments(draw(360, 0.0, 1.0, 99))
    wide, shifted = torch.full((8,), 1.5, dtype=torch.float64), torch.full((8,), 0.4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    one, identity = torch.ones(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    true_a = frechet_distance(Moments(0 * one, 2.25 * identity, 2), reference)
    true_b = frechet_distance(Moments(shifted @ rotation, identity, 2), reference)
    covered_difference = covered_ratio = 0
    for trial in range(60):
        a, b = draw(2000, 0.0, wide, 2 * trial), draw(2000, shifted, 1.0, 2 * trial)  # the same noise: pairs
        result = compare(resample(a, reference, 100), resample(b, reference, 100))
        covered_difference += result.difference_interval[0] < true_a - true_b < result.difference_interval[1]
        covered_ratio += result.ratio_interval[0] < true_a / true_b < result.ratio_interval[1]
    # a 95% interval covers 57 of 60 on average; fewer than 51 has probability 0.2%
    assert covered_difference >= 51 and covered_ratio >= 51


def test_pairing_narrows_the_interval_of_two_alike_sets():
    reference = moments(draw(360, 0.0, 1.0, 99))
    a = draw(2000, 0.1, 1.1, 0)
    twin, stranger = a + 0.01, draw(2000, 0.11, 1.1, 7)

    def width(other):
        low, high = compare(resample(a, reference), resample(other, reference)).difference_interval
        return high - low

    assert width(twin) < 0.3 * width(stranger)


def test_sets_of_two_sizes_are_not_compared():
    reference = moments(draw(100, 0.0, 1.0))
    with pytest.raises(UserError, match="equal sizes"):
        compare(resample(draw(50, 0, 1.0), reference, 10), resample(draw(60, 0, 1.0), reference, 10))


def test_a_replayed_training_set_fails_the_nearest_neighbour_check_and_unseen_digits_pass():
    train, held_out = digits("train")[0], digits("held_out")[0]
    generator = torch.Generator().manual_seed(0)
    one, other = held_out[::2], held_out[1::2]
    assert not copying(train, train, held_out).passes and copying(train, train, held_out).copied > 0.99
    assert not copying(train + 0.02 * torch.randn(train.shape, generator=generator), train, held_out).passes
    assert not copying(
        torch.cat([train[:100], one[:170], other[:170]]), train, torch.cat([one[170:], other[170:]])
    ).passes
    assert copying(one, train, other).passes
    assert copying(torch.randn(1000, 1, 8, 8, generator=generator), train, held_out).passes
    typical = torch.stack([train[digits("train")[1] == label].mean(0) for label in range(10)])
    assert copying(typical, train, held_out).passes  # near every image of its class, a copy of none


def test_fidelity_measures_the_error_planted():
    teacher = torch.zeros(100, 1, 8, 8)
    classes = torch.zeros(100, dtype=torch.int64)
    found = fidelity(teacher + 0.2, teacher, classes, torch.arange(100).clamp(max=1))
    assert found.rmse == pytest.approx(0.2) and found.psnr == pytest.approx(20.0) and found.class_agreement == 0.01
    assert fidelity(teacher, teacher, classes, classes).psnr is None
    with pytest.raises(UserError, match="no pairs"):
        fidelity(teacher[:3], teacher, classes, classes)
