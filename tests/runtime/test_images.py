"""Pictures show what is in the tensor."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.runtime import images


def test_the_range_maps_to_black_and_white_and_is_clipped():
    tensor = torch.tensor([[[-1.0, 1.0], [0.0, 7.0]]])
    assert np.asarray(images.picture(tensor)).tolist() == [[0, 255], [128, 255]]


def test_enlarging_repeats_pixels():
    tensor = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small, large = np.asarray(images.picture(tensor)), np.asarray(images.picture(tensor, (12, 12)))
    assert (large == small.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_a_grid_places_images_row_by_row(tmp_path):
    tensor = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 1.0, 1.0, -1.0, 1.0)])
    sheet = Image.open(images.save_grid(tensor, tmp_path / "deep" / "grid.png", columns=3, scale=1))
    assert sheet.size == (8, 5)
    assert [sheet.getpixel((x, y)) for y in (0, 3) for x in (0, 3, 6)] == [0, 255, 255, 0, 255, 255]


def test_png_bytes_read_back():
    tensor = torch.linspace(-1, 1, 64).view(1, 8, 8)
    drawn = images.picture(tensor)
    assert (np.asarray(Image.open(io.BytesIO(images.png(drawn)))) == np.asarray(drawn)).all()


def test_latents_and_unwritable_paths_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="1 or 3 channels"):
        images.picture(torch.zeros(4, 8, 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        images.save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "file" / "grid.png")
