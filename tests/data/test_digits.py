import hashlib

import pytest
import torch

from fewstep.data import digits
from fewstep.errors import UserError


def test_the_split_has_1437_and_360_images_each_class_in_proportion():
    for split, count in (("train", 1437), ("held_out", 360)):
        images, labels = digits(split)
        assert images.shape == (count, 1, 8, 8) and images.dtype == torch.float32
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
    share = (
        torch.bincount(digits("held_out")[1], minlength=10)
        / torch.cat([digits(s)[1] for s in ("train", "held_out")]).bincount()
    )
    assert ((share - 0.2).abs() < 0.004).all()  # 360 of 1797 with classes of 174 to 183: within one image of 20.03%


def test_the_splits_share_no_row_and_together_are_the_whole_set():
    from sklearn.datasets import load_digits

    rows = torch.cat([digits("train")[0], digits("held_out")[0]]).flatten(1)
    ours = sorted(map(bytes, rows.numpy()))
    whole = sorted(map(bytes, (torch.from_numpy(load_digits().data).float() / 8 - 1).numpy()))
    assert ours == whole


def test_the_split_never_changes():
    content = b"".join(digits("held_out")[i].numpy().tobytes() for i in (0, 1))
    assert hashlib.sha256(content).hexdigest() == "3033429d5a3954b11bf1c1f6f3364ac0df896da67ddcf5f1acfe232b9bbc3d36"


def test_an_unknown_split_is_one_sentence():
    with pytest.raises(UserError, match="held_out"):
        digits("heldout")
