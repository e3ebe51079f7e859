"""An artefact comes back as it was saved, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fewstep import artefact, nets
from fewstep.diffusion import Denoiser
from fewstep.errors import UserError


@pytest.fixture
def folder(student_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student_folder, tmp_path / "copy"))


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        artefact.load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    for word in words:
        assert word in sentence


def rewrite(folder: Path, **changes: object) -> None:
    """Change manifest entries as a careful forger would: with a matching digest."""
    content = json.loads((folder / "artefact.json").read_text())
    content.update(changes)
    del content["sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (folder / "artefact.json").write_text(json.dumps({**content, "sha256": hashlib.sha256(canonical).hexdigest()}))


def save_again(loaded: artefact.Artefact, path: Path, **changes: object) -> Path:
    facts = {
        "denoiser": loaded.denoiser,
        "plans": loaded.plans,
        "image_shape": loaded.image_shape,
        "classes": loaded.classes,
        "provenance": loaded.provenance,
    }
    return artefact.save(path, **{**facts, **changes})  # type: ignore[arg-type]


def test_everything_comes_back_bit_for_bit(student_folder, tmp_path):
    first = artefact.load(student_folder)
    again = artefact.load(save_again(first, tmp_path / "again"))
    assert again.plans == first.plans and sorted(again.plans) == [1, 2, 4]
    assert (again.image_shape, again.classes, again.provenance, again.kind) == (
        (1, 8, 8),
        10,
        {"method": "none", "seed": 0},
        "student",
    )
    assert again.denoiser.schedule == first.denoiser.schedule
    assert again.denoiser.prediction == first.denoiser.prediction
    for name, value in first.denoiser.net.state_dict().items():
        assert torch.equal(value, again.denoiser.net.state_dict()[name]), name
    assert again.digest == first.digest


@pytest.mark.parametrize(
    "provenance,method,guidance",
    [
        ({"recipe": {"method": {"name": "dmd2", "guidance": 3}}}, "dmd2", 3.0),
        ({"recipe": {"method": {"name": "dmd2", "guidance": None}}}, "dmd2", 1.0),
        ({"recipe": {"method": {"name": "dmd2", "guidance": {"name": "apg", "scale": 2}}}}, "dmd2", 2.0),
        ({"recipe": None, "method": "none"}, None, 1.0),
        ({"recipe": "recipes/mine.yaml"}, None, 1.0),
    ],
)
def test_method_and_guidance_are_what_the_recipe_says(student_folder, tmp_path, provenance, method, guidance):
    folder = save_again(artefact.load(student_folder), tmp_path / "again", provenance=provenance)
    again = artefact.load(folder)
    assert (again.method, again.guidance) == (method, guidance)


def test_a_loaded_network_is_frozen_and_in_eval_mode(student_folder):
    denoiser = artefact.load(student_folder).denoiser
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_saving_keeps_a_runs_other_files_and_leaves_no_partial_ones(folder):
    (folder / "log.jsonl").write_text("{}\n")
    save_again(artefact.load(folder), folder, provenance={"round": 2})
    assert sorted(file.name for file in folder.iterdir()) == ["artefact.json", "log.jsonl", "weights.safetensors"]
    assert artefact.load(folder).provenance == {"round": 2}


def test_a_failed_save_leaves_the_old_artefact(folder):
    loaded = artefact.load(folder)
    with pytest.raises(UserError, match="cannot be stored as JSON"):
        save_again(loaded, folder, provenance={"score": object()})
    assert artefact.load(folder).digest == loaded.digest
    assert sorted(file.name for file in folder.iterdir()) == ["artefact.json", "weights.safetensors"]


@pytest.mark.parametrize("file", ["weights.safetensors", "artefact.json"])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_byte_is_refused(folder, file, place):
    content = bytearray((folder / file).read_bytes())
    content[int(len(content) * place)] ^= 0x01
    (folder / file).write_bytes(bytes(content))
    refuse(folder, file)


def test_a_cut_off_file_is_refused(folder):
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(folder, "weights.safetensors", "damaged")


def test_a_missing_folder_file_or_manifest_is_named(folder, tmp_path):
    refuse(tmp_path / "nowhere", "nowhere")
    (folder / "weights.safetensors").unlink()
    refuse(folder, "weights.safetensors", "lacks")
    (folder / "artefact.json").unlink()
    refuse(folder, "artefact.json")


def test_an_unknown_format_version_is_refused(folder):
    rewrite(folder, version=99)
    refuse(folder, "99", "version 1")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"network": {"name": "os.system", "command": "true"}}, "os.system"),
        ({"network": {"name": "mlp", "dim": 64, "widthh": 8}}, "widthh"),
        ({"network": {"name": "mlp", "dim": 64, "width": 16}}, "weights"),
        ({"schedule": {"name": "edn"}}, "edn"),
        ({"classes": "ten"}, "classes"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../weights.safetensors": {"sha256": "0" * 64, "bytes": 1}}}, "outside"),
        ({"plans": {"1": {"format": "other"}}}, "other"),
        ({"image_shape": [1, -8, 8]}, "image_shape"),
        ({"image_shape": [1, 8]}, "image_shape is [1, 8]"),
        ({"image_shape": [1, 4, 8]}, "image_size of its network is 8"),
        ({"network": {"name": "mlp", "dim": 63}}, "weights"),
        ({"network": {"name": "dit", "channels": 1, "image_size": 8, "dropout": float("nan")}}, "not JSON"),
        ({"provenance": {"loss": float("inf")}}, "not JSON"),
        ({"image_shape": [3, 8, 8]}, "channels of its network is 1"),
        ({"image_shape": [1, 16, 16]}, "image_size of its network is 8"),
        ({"classes": 3}, "classes of its network is 10"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder, changes, word):
    rewrite(folder, **changes)
    refuse(folder, word)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("stages", 0, "matrix", 0, 0), "x"),
        (("stages", 0, "matrix", 0, 0), float("nan")),
        (("stages", 0, "network_time"), [1]),
        (("stages", 0, "guidance"), [[]]),
        (("stages", 0, "noise"), -1),
        (("stages", 0, "noise"), 2**70),
        (("stages", 0, "inputs", 0), ""),
        (("stages",), []),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(folder, path, value):
    plans = json.loads((folder / "artefact.json").read_text())["plans"]
    place = plans["2"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    rewrite(folder, plans=plans)
    refuse(folder)


def test_a_manifest_nested_without_end_is_refused(folder):
    (folder / "artefact.json").write_text("[" * 100_000)
    refuse(folder, "not JSON")


def test_weights_that_are_a_device_or_a_pipe_are_not_waited_for(folder):
    weights = folder / "weights.safetensors"
    weights.unlink()
    weights.symlink_to("/dev/zero")
    refuse(folder, "no plain file")
    weights.unlink()
    os.mkfifo(weights)
    refuse(folder, "no plain file")


def test_pickled_weights_are_never_opened(folder):
    torch.save({"weight": torch.zeros(1)}, folder / "weights.safetensors")
    content = (folder / "weights.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    rewrite(folder, files={"weights.safetensors": {"sha256": digest, "bytes": len(content)}})
    refuse(folder, "weights")


class Own(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, x, t, cond=None):
        return self.layer(x)


def test_a_network_of_ones_own_is_saved_under_its_registered_name(student_folder, tmp_path, monkeypatch):
    facts = {"plans": {}, "image_shape": (1, 1, 4), "classes": None}
    loaded = artefact.load(student_folder)
    nameless = Denoiser(Own(), loaded.denoiser.schedule, loaded.denoiser.prediction)
    with pytest.raises(UserError, match=r"a Own cannot be saved as an artefact.*fewstep\.nets\.register\('NAME'\)"):
        save_again(loaded, tmp_path, denoiser=nameless, **facts)
    monkeypatch.setattr(nets.registry, "_CLASSES", dict(nets.registry._CLASSES))
    nets.register("own")(Own)
    named = Denoiser(nets.build({"name": "own"}), loaded.denoiser.schedule, loaded.denoiser.prediction)
    again = artefact.load(save_again(loaded, tmp_path, denoiser=named, **facts))
    assert torch.equal(again.denoiser.net.layer.weight, named.net.layer.weight)
    with pytest.raises(ValueError, match="two networks are called 'mlp'"):
        nets.register("mlp")(Own)
    monkeypatch.undo()
    refuse(tmp_path, "own", "mlp")


class Wide(Own):
    def __init__(self, dim, channels, image_size):
        super().__init__(dim)


def test_options_of_ones_own_network_mean_what_its_author_says(student_folder, tmp_path, monkeypatch):
    """`dim` and `channels` are sizes of the picture in this package's networks, and hidden widths in many others."""
    monkeypatch.setattr(nets.registry, "_CLASSES", dict(nets.registry._CLASSES))
    nets.register("wide")(Wide)
    loaded = artefact.load(student_folder)
    net = nets.build({"name": "wide", "dim": 6, "channels": 32, "image_size": 7})
    named = Denoiser(net, loaded.denoiser.schedule, loaded.denoiser.prediction)
    folder = save_again(loaded, tmp_path, denoiser=named, plans={}, image_shape=(1, 4, 6), classes=None)
    assert artefact.load(folder).image_shape == (1, 4, 6)


class Configured(Own):
    """A `config` of its own, as diffusers' networks have one: read-only, and of other words."""

    @property
    def config(self):
        return {"sample_size": 4, "name": "theirs"}


def test_a_network_with_a_config_of_its_own_is_saved_under_its_registered_name(student_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nets.registry, "_CLASSES", dict(nets.registry._CLASSES))
    nets.register("configured")(Configured)
    loaded = artefact.load(student_folder)
    net = nets.build({"name": "configured", "width": 5})
    assert net.config == {"sample_size": 4, "name": "theirs"}
    named = Denoiser(net, loaded.denoiser.schedule, loaded.denoiser.prediction)
    folder = save_again(loaded, tmp_path, denoiser=named, plans={}, image_shape=(1, 1, 5), classes=None)
    again = artefact.load(folder).denoiser.net
    assert torch.equal(again.layer.weight, net.layer.weight)
    assert nets.registry.described(again) == {"name": "configured", "width": 5}


class Failing(Own):
    def __init__(self, width=4):
        super().__init__(width)
        raise RuntimeError(f"no more than {width - 1}\nand no less")


def test_a_networks_own_exception_is_told_with_its_name(student_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nets.registry, "_CLASSES", dict(nets.registry._CLASSES))
    nets.register("own")(Own)
    loaded = artefact.load(student_folder)
    named = Denoiser(nets.build({"name": "own"}), loaded.denoiser.schedule, loaded.denoiser.prediction)
    folder = save_again(loaded, tmp_path, denoiser=named, plans={}, image_shape=(1, 1, 4), classes=None)
    nets.registry._CLASSES["own"] = Failing
    for made in (lambda: nets.build({"name": "own"}), lambda: artefact.load(folder)):
        with pytest.raises(
            UserError, match=r"network 'own' cannot be built from \{\} \(RuntimeError: no more"
        ) as error:
            made()
        assert "\n" not in str(error.value)


def test_two_networks_of_one_class_name_in_two_modules_are_two(monkeypatch):
    monkeypatch.setattr(nets.registry, "_CLASSES", dict(nets.registry._CLASSES))
    nets.register("twice")(type("Net", (Own,), {"__module__": "one"}))
    with pytest.raises(ValueError, match="two networks are called 'twice': one:Net and other:Net"):
        nets.register("twice")(type("Net", (Own,), {"__module__": "other"}))


def test_an_unwritable_path_is_one_sentence(student_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the artefact to .*file/run") as caught:
        save_again(artefact.load(student_folder), tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)
