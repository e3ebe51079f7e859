import json

import pytest
import torch

from fewstep.data import digits, loader, write_image_folder
from fewstep.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images") / "held_out", "held_out")


def loaders(folder, **options):
    """The same 360 held-out digits through each loader: memory, PyTorch's, DALI's."""
    yield loader("digits", split="held_out", **options)
    yield loader({"source": folder}, **options)
    pytest.importorskip("nvidia.dali")
    yield loader({"source": folder, "loader": "dali"}, **options)


def same(left, right):
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("index", "x0", "cond", "null"))


def test_all_loaders_give_equal_batches_in_equal_order_across_an_epoch_end(folder):
    memory, through_torch, through_dali = loaders(folder, batch_size=100, seed=3)
    assert [each.kind for each in (memory, through_torch, through_dali)] == ["memory", "torch", "dali"]
    for step in range(5):  # 360 images: steps 3 straddles the first epoch's end
        batch = next(memory)
        assert batch.index.tolist() == list(range(step * 100, step * 100 + 100))
        assert batch.null.eq(10).all() and batch.x0.dtype == torch.float32
        assert same(batch, next(through_torch)) and same(batch, next(through_dali))


def test_batches_hold_the_images_their_labels_belong_to(folder):
    images, labels = digits("held_out")
    for each in loaders(folder, batch_size=360, seed=0):
        batch = next(each)
        place = torch.cdist(batch.x0.flatten(1), images.flatten(1)).argmin(1)
        assert torch.equal(images[place], batch.x0) and torch.equal(labels[place], batch.cond)
        assert len(place.unique()) == 360


def test_two_ranks_together_serve_what_one_process_serves(folder):
    for whole, first, second in zip(
        loaders(folder, batch_size=64),
        loaders(folder, batch_size=64, rank=0, world=2),
        loaders(folder, batch_size=64, rank=1, world=2),
    ):
        for _ in range(3):
            batch, halves = next(whole), (next(first), next(second))
            for name in ("index", "x0", "cond"):
                assert torch.equal(getattr(batch, name), torch.cat([getattr(half, name) for half in halves]))


def test_a_loader_resumes_in_the_middle_of_an_epoch(folder):
    for straight, stopped, resumed in zip(*(loaders(folder, batch_size=50, seed=9) for _ in range(3))):
        for _ in range(3):
            next(straight), next(stopped)
        state = json.loads(json.dumps(stopped.state()))
        for _ in range(2):
            next(stopped)  # batches handed out after the state was taken must not count
        resumed.load_state(state)
        for _ in range(6):
            assert same(next(straight), next(resumed))


def test_loaders_draw_nothing_from_torchs_generator(folder):
    """Else the dropout masks of the first update after resuming differ from those of a run that was not cut."""
    for each in loaders(folder):
        state = torch.get_rng_state()
        next(each)
        assert torch.equal(torch.get_rng_state(), state), each.kind


def test_any_loader_goes_on_where_another_stopped_on_another_number_of_ranks(folder):
    pytest.importorskip("nvidia.dali")
    one = {"source": folder}, {"source": folder, "loader": "dali"}
    for before, after in (one, one[::-1], one[1:] * 2):
        halves = [loader(before, batch_size=40, rank=rank, world=2) for rank in range(2)]
        for _ in range(2):
            next(halves[0]), next(halves[1])
        resumed = loader(after, batch_size=40)
        resumed.load_state(halves[0].state())
        wanted = torch.cat([next(half).x0 for half in halves])
        assert torch.equal(next(resumed).x0, wanted)


def test_the_dali_state_is_dalis_own_checkpoint_and_its_position_rules(folder):
    pytest.importorskip("nvidia.dali")
    through_dali = loader({"source": folder, "loader": "dali"}, batch_size=10)
    next(through_dali)
    early = through_dali.state()
    next(through_dali)
    late = through_dali.state()
    assert early["dali"]["checkpoint"] != late["dali"]["checkpoint"]
    with pytest.raises(UserError, match="DALI's position is not step 2"):
        through_dali.load_state({**late, "dali": early["dali"]})
        next(through_dali)
    with pytest.raises(UserError, match="cannot be restored"):
        through_dali.load_state({**late, "dali": {"first": 0, "checkpoint": "AAAA"}})


def test_workers_serve_the_same_batches_and_can_be_stopped(folder):
    alone, helped = loader({"source": folder}, batch_size=30), loader({"source": folder, "workers": 1}, batch_size=30)
    for _ in range(2):
        assert same(next(alone), next(helped))
    helped.close()
    assert same(next(alone), next(helped))


def test_a_state_of_other_data_or_another_seed_is_refused(folder):
    state = loader({"source": folder}, batch_size=50, seed=1).state()
    for other in ({"seed": 2, "batch_size": 50}, {"seed": 1, "batch_size": 60}):
        with pytest.raises(UserError, match="resume with the data, seed and batch size"):
            loader({"source": folder}, **other).load_state(state)
    with pytest.raises(UserError, match="fingerprint"):
        loader("digits", split="held_out", batch_size=50, seed=1).load_state(state)


def test_an_unknown_loader_and_a_missing_folder_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="choose one of: dali, torch"):
        loader({"source": "digits", "loader": "tensorflow"}, batch_size=4)
    with pytest.raises(UserError, match="there is no image folder"):
        loader({"source": tmp_path / "nowhere"}, batch_size=4)


def test_the_digits_through_dali_come_from_a_folder_in_the_cache(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    config = {"source": "digits", "loader": "dali", "batch_size": 20}
    through_dali, memory = loader(config, split="held_out"), loader("digits", split="held_out", batch_size=20)
    assert same(next(through_dali), next(memory)) and (tmp_path / "digits").is_dir()
    memory.load_state(through_dali.state())
    assert same(next(through_dali), next(memory))
