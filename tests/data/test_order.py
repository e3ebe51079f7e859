import pytest
import torch

from fewstep.data import Order
from fewstep.data.order import permutation
from fewstep.errors import UserError


def test_every_epoch_shows_every_image_once_in_a_new_order():
    order = Order(
        count=30, batch_size=7, seed=5
    )  # 30 batches of 7 are seven epochs exactly, most batches straddling none
    stream = torch.cat([order.images(step) for step in range(30)]).view(7, 30)
    assert all(torch.equal(epoch.sort().values, torch.arange(30)) for epoch in stream)
    assert len({tuple(epoch.tolist()) for epoch in stream}) == 7


def test_ranks_together_serve_the_global_batch():
    for step in (0, 3, 11):
        whole = Order(count=30, batch_size=12, seed=1)
        parts = [Order(count=30, batch_size=12, seed=1, rank=rank, world=3) for rank in range(3)]
        assert torch.equal(torch.cat([part.images(step) for part in parts]), whole.images(step))
        assert torch.equal(torch.cat([part.samples(step) for part in parts]), torch.arange(step * 12, step * 12 + 12))


def test_the_order_is_fixed_by_philox_and_not_by_a_library_version():
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 0, 1).tolist() != permutation(8, 0, 0).tolist() != permutation(8, 1, 0).tolist()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"count": 0, "batch_size": 1}, "no image"),
        ({"count": 5, "batch_size": 3, "world": 2}, "multiple of the 2 processes"),
        ({"count": 5, "batch_size": 2, "rank": 2, "world": 2}, "rank 2 of 2"),
    ],
)
def test_impossible_orders_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        Order(**arguments)
