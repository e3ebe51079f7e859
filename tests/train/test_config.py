"""A bad recipe is one sentence with the dotted key, the value and what is allowed."""

import json
import subprocess
import sys

import pytest
import yaml

from fewstep import config
from fewstep.errors import UserError

GOOD = {
    "name": "x",
    "teacher": "runs/teacher",
    "method": {"name": "consistency_distillation"},
    "data": {"source": "digits", "batch_size": 64},
    "train": {"updates": 10},
    "output": "runs/x",
}
NETWORK = {
    "network": {"name": "mlp", "dim": 64},
    "schedule": {"name": "edm"},
    "prediction": {"kind": "edm", "sigma_data": 0.5},
}


def load(tmp_path, text=None, *overrides, **changes):
    path = tmp_path / "recipe.yaml"
    content = {**GOOD, **changes}
    path.write_text(text if text is not None else yaml.safe_dump({k: v for k, v in content.items() if v != "absent"}))
    return config.load(path, overrides)


def sentence(call, *given, **changes):
    with pytest.raises(UserError) as caught:
        call(*given, **changes)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_a_recipe_survives_its_plain_values(tmp_path):
    recipe = load(tmp_path)
    assert config.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    training = load(tmp_path, teacher="absent", method={"name": "denoising"}, **NETWORK)
    assert config.from_dict(training.to_dict()) == training


def test_overrides_reach_any_depth_and_are_yaml(tmp_path):
    overrides = [
        "method.target_decay=0.99",
        "train.optimizer.lr=1e-4",
        "seed=3",
        "train.clip=null",
        "train.ema.decay=0.5",
    ]
    recipe = load(tmp_path, None, *overrides)
    assert recipe.method_config().target_decay == 0.99
    assert (recipe.train.optimizer.lr, recipe.seed, recipe.train.clip, recipe.train.ema.decay) == (1e-4, 3, None, 0.5)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.udpates=3", ["train", "'train.udpates'", "did you mean 'train.updates'", "accumulate"]),
        ("metod.name=x", ["'metod'", "did you mean 'method'"]),
        ("method.ema_decay=0.9", ["'method.ema_decay'", "target_decay"]),
        ("method.target_decay=2", ["method.target_decay", "2", "less than 1"]),
        ("method.name=consistency_distilation", ["method.name", "did you mean 'consistency_distillation'", "dmd2"]),
        ("train.updates=many", ["train.updates", "'many'", "whole number"]),
        ("train.updates=0", ["train.updates", "0", "at least 1"]),
        ("train.updates=1.5", ["train.updates", "1.5", "whole number"]),
        ("train.updates=true", ["train.updates", "True", "whole number"]),
        ("train.optimizer.name=adamm", ["train.optimizer.name", "'adamm'", "did you mean 'adam'", "sgd"]),
        ("train.optimizer.lr=fast", ["train.optimizer.lr", "'fast'", "number"]),
        ("train.strategy=dpp", ["train.strategy", "did you mean 'ddp'", "deepspeed"]),
        ("train.zero_stage=4", ["train.zero_stage", "4", "1, 2, 3"]),
        ("train.clip=-1", ["train.clip", "-1", "greater than 0"]),
        ("train.ema.decay=1.0", ["train.ema.decay", "1.0", "less than 1"]),
        ("method.distance={name: pseudo_huber, c: 0.0}", ["method.distance.c", "0.0", "greater than 0"]),
        ("data=digits", ["data", "'digits'", "section"]),
        ("data.loader=dalli", ["data.loader", "did you mean 'dali'"]),
        ("output=", ["output", "text"]),
        ("train.ranks=2", ["train.ranks 2", "ddp or deepspeed"]),
        ("network.name=mlp", ["network", "teacher"]),
        ("train.accumulate=3", ["data.batch_size 64", "not divisible", "3"]),
        ("train.optimizer.lr=-1", ["train.optimizer.lr is -1", "at least 0"]),
        ("train.optimizer.lr=.nan", ["train.optimizer.lr is nan", "finite"]),
        ("train.optimizer.betas=[0.9, 1]", ["train.optimizer.betas.1 is 1", "less than 1"]),
        ("train.optimizer.eps=0", ["train.optimizer.eps is 0", "greater than 0"]),
        ("method.guidance=.inf", ["method.guidance is inf", "finite"]),
        ("seed=99999999999999999999", ["seed", "at most 4294967295"]),
        ("data.batch_size=100000000", ["data.batch_size", "at most 1048576"]),
        ("method={name: dmd2, steps: [2, 0]}", ["method.steps.1 is 0", "at least 1"]),
        ("method={name: dmd2, times: {low: 0.5, high: 0.2}}", ["method.times", "low 0.5 is not below high 0.2"]),
        ("method={name: dmd2, times: {std: -1}}", ["method.times.std is -1", "greater than 0"]),
    ],
)
def test_each_mistake_is_named_with_its_key_value_and_choices(tmp_path, override, parts):
    text = sentence(load, tmp_path, None, override)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("override", ["train.updates", "=3", "train..updates=3"])
def test_an_override_that_is_none_is_refused(tmp_path, override):
    assert "key=value" in sentence(load, tmp_path, None, override)


def test_an_override_below_a_value_is_refused(tmp_path):
    assert "name is a value, not a section" in sentence(load, tmp_path, None, "name.first=x")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: [", "not valid YAML at line"),
        ("- a\n- b", "holds no recipe"),
        ("name: a\nname: b", "line 2: the key 'name' is given twice"),
        ("", "holds no recipe"),
        ("name: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, text, part):
    assert part in sentence(load, tmp_path, text)


@pytest.mark.parametrize("key", ["name", "method", "output"])
def test_a_missing_key_is_named(tmp_path, key):
    assert f"{key} is missing" in sentence(load, tmp_path, **{key: "absent"})


def test_neither_teacher_nor_network(tmp_path):
    text = sentence(load, tmp_path, teacher="absent")
    assert "network is missing" in text and "teacher" in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"network": {"name": "mpl"}}, ["network.name", "did you mean 'mlp'"]),
        ({"network": {"name": "mlp", "dim": 64, "witdh": 3}}, ["network", "did you mean 'width'"]),
        ({"network": {"name": "mlp", "dim": 64, "width": -3}}, ["network", "negative dimension -3"]),
        ({"network": {"name": "mlp", "dim": 64, "width": 0}}, ["network", "would be empty"]),
        ({"network": {"name": "mlp", "dim": "wide"}}, ["network", "wide"]),
        ({"schedule": {"name": "edmm"}}, ["schedule.name", "did you mean 'edm'"]),
        ({"schedule": {"name": "edm", "t_mx": 3}}, ["schedule", "t_mx"]),
        ({"prediction": {"kind": "epss"}}, ["prediction", "epss"]),
    ],
)
def test_network_schedule_and_prediction_are_checked(tmp_path, changes, parts):
    given = {"teacher": "absent", "method": {"name": "denoising"}, **NETWORK, **changes}
    text = sentence(load, tmp_path, **given)
    assert all(part in text for part in parts), text


def test_an_unreadable_recipe_is_one_sentence(tmp_path):
    assert "no such file" in sentence(config.load, tmp_path / "absent.yaml")
    assert "is a directory" in sentence(config.load, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in sentence(config.load, tmp_path / "binary.yaml")


def test_numbers_written_without_a_point_are_numbers(tmp_path):
    text = yaml.safe_dump(GOOD).replace("updates: 10", "updates: 10\n  optimizer: {lr: 1e-3}")
    assert load(tmp_path, text).train.optimizer.lr == 1e-3


def test_reading_a_recipe_makes_no_weights_and_imports_no_compiler():
    """2 CPU-seconds of every start; and a network too large for this machine may be trained on another."""
    program = (
        "import sys; from fewstep import config\n"
        "recipe = config.load('recipes/digits_teacher.yaml', ['network.widths=[16, 400000]'])\n"
        "assert 'torch._dynamo' not in sys.modules, 'torch._dynamo'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
