import json

import pytest
import torch
from PIL import Image

from fewstep.data import digits, loader, open_folder, write_image_folder
from fewstep.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "digits", "held_out")


def test_the_folder_holds_the_digits_exactly(folder):
    opened, (images, labels) = open_folder(folder), digits("held_out")
    read = opened.normalised(torch.stack([opened.read(number) for number in range(len(opened))]))
    assert torch.equal(read, images) and torch.equal(opened.labels, labels)
    assert opened.classes == tuple("0123456789") and opened.image_shape == (1, 8, 8)


def test_writing_twice_changes_nothing_and_writing_over_something_else_is_refused(folder):
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert write_image_folder(folder, "held_out") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds something else"):
        write_image_folder(folder, "train")
    assert not [entry for entry in folder.parent.iterdir() if entry != folder]


def test_a_folder_without_a_manifest_is_read_by_its_class_names(tmp_path):
    for name, level in (("cat", 255), ("ant", 0)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 4), (level, level, level)).save(tmp_path / name / "a.png")
    opened = open_folder(tmp_path)
    assert opened.classes == ("ant", "cat") and opened.image_shape == (3, 4, 5)
    batch = next(loader(tmp_path, batch_size=2))
    assert torch.equal(batch.x0, (batch.cond * 2.0 - 1).view(2, 1, 1, 1).expand(2, 3, 4, 5))


def spoil_bytes(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])


def spoil_size(folder, file):
    Image.new("L", (9, 8)).save(folder / file)


@pytest.mark.parametrize("kind", ["torch", "dali"])
@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_size])
def test_a_bad_file_is_named_in_one_sentence(folder, kind, spoil):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    each = loader({"source": folder, "loader": kind}, batch_size=120)
    file = open_folder(folder).files[7]
    spoil(folder, file)
    with pytest.raises(UserError) as raised:
        for _ in range(3):
            next(each)
    assert file in str(raised.value) and "\n" not in str(raised.value)


def test_a_bad_file_met_by_a_worker_is_named_without_a_traceback(folder):
    each = loader({"source": folder, "workers": 1}, batch_size=360)
    file = open_folder(folder).files[7]
    spoil_bytes(folder, file)
    with pytest.raises(UserError) as raised:
        next(each)
    assert file in str(raised.value) and "\n" not in str(raised.value)


def test_missing_and_escaping_files_are_refused_at_opening(folder):
    (folder / open_folder(folder).files[3]).unlink()
    with pytest.raises(UserError, match="is missing though its manifest names it"):
        open_folder(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["file"] = "../../etc/passwd"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside its folder"):
        open_folder(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is no manifest of this version"):
        open_folder(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no image"):
        open_folder(tmp_path)
