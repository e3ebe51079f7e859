"""The loop: accumulation, leaks, averages, stages, signals, and what it refuses."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from fewstep import artefact, config, methods, solvers
from fewstep.diffusion import Denoiser
from fewstep.errors import UserError
from fewstep.methods import Average, Method, NetworkSpec, OptimizerConfig, Pairs, TrainingStage, Update
from fewstep.nets.genie import Genie
from fewstep.nets.mlp import MLP
from fewstep.train import Interrupted, Trainer, progress
from tests.train import small


class Toy(Method):
    """Denoising at one time, with an average and a critic that judges nothing in particular."""

    networks = {"student": NetworkSpec(), "critic": NetworkSpec(), "slow": NetworkSpec("student", average=Average(0.5))}
    name = "toy"

    def iteration(self, batch, rng):
        t = rng.uniform(batch, "time", 0.5, 2.0)
        x_t, _ = self.noised(batch.x0, t, rng)
        yield Update("student", (self.student(x_t, t, batch.cond) - batch.x0).square().mean(), {"time": t.mean()})
        yield Update(
            "critic", (self.critic(x_t, t, batch.cond) - self.student.value(x_t, t, batch.cond)).square().mean()
        )

    def sampling(self, steps, **options):
        return solvers.plan("euler", self.schedule, steps, prediction=self.prediction, **options)


def trainer(folder, method=None, *, fault=None, resume=False, **train):
    recipe = small.recipe(folder, **train)
    given = None if method is None else method(method.Config())
    return Trainer(recipe, teacher=small.teacher(), loader=small.Digits(fault=fault), method=given, resume=resume)


def trained(folder, method=None, **options):
    run = trainer(folder, method, **options)
    run.fit()
    return run


def largest_difference(first, second):
    return max(
        (value - second[network][name]).abs().max().item()
        for network, state in first.items()
        for name, value in state.items()
    )


def test_four_micro_batches_equal_one_batch(tmp_path):
    """Plain SGD, so that a difference in a gradient is a difference in the weights; 1e-5: sums in another order."""
    plain = {"optimizer": {"name": "sgd", "lr": 0.1, "betas": [0.0, 0.9]}}
    one = small.weights(trained(tmp_path / "one", Toy, **plain))
    four = small.weights(trained(tmp_path / "four", Toy, accumulate=4, **plain))
    start = small.weights(trainer(tmp_path / "start", Toy))
    assert largest_difference(one, four) < 1e-5
    assert largest_difference(one, start) > 1e-3


def test_a_step_clips_the_norm_over_the_whole_engine(tmp_path):
    """SGD at rate 1 moves the weights by the clipped gradient: by exactly the clip."""
    plain = {"optimizer": {"name": "sgd", "lr": 1.0, "betas": [0.0, 0.9]}, "clip": 0.05, "updates": 1}
    before = small.weights(trainer(tmp_path / "a", Toy))["student"]
    run = trained(tmp_path / "a", Toy, **plain)
    after = small.weights(run)["student"]
    moved = torch.stack([(after[name] - before[name]).square().sum() for name in before]).sum().sqrt()
    assert moved.item() == pytest.approx(0.05, rel=1e-4)


def test_warmup_raises_the_learning_rate_linearly(tmp_path):
    run = trained(tmp_path, Toy, warmup=4, updates=6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    assert run.engines["student"].updates == 6


def test_an_average_follows_its_network_after_each_step(tmp_path):
    """average <- 0.5 average + 0.5 network, from the same start."""
    states = [small.weights(trainer(tmp_path / "0", Toy))]
    states += [small.weights(trained(tmp_path / str(n), Toy, updates=n)) for n in (1, 2)]
    for name, expected in states[0]["slow"].items():
        for state in states[1:]:
            expected = 0.5 * expected + 0.5 * state["student"][name]
        assert torch.allclose(states[-1]["slow"][name], expected, atol=1e-6)


def test_networks_of_one_engine_share_its_optimiser_and_norm(tmp_path):
    run = trainer(tmp_path, methods.get("dmd2"))
    assert set(run.engines) == {"student", "critic"}
    assert set(run.engines["critic"].networks) == {"critic", "head"}


def test_a_run_says_at_once_what_it_trains_and_where_and_soon_how_fast(tmp_path, monkeypatch, capsys):
    """No line of the log comes before update 5; a slow first update is told all the same, and only now and then."""
    monkeypatch.setattr(progress, "FIRST_WORD", 0.0)
    run = trainer(tmp_path, Toy, updates=5, log_every=5)
    capsys.readouterr()
    run.fit()
    first, second, *rest = capsys.readouterr().err.splitlines()
    count = sum(p.numel() for p in run.modules["student"].parameters())
    assert first == (
        f"small: toy trains student ({count:,} parameters) and critic ({count:,} parameters) on cpu, "
        f"updates 1 to 5 of 16 images, into {tmp_path}"
    )
    assert second.startswith("small: update 1/5 | ") and "updates/s" in second and "left" in second
    assert len(rest) == 1 and rest[0].startswith("small: update 5/5 | ") and "loss/student" in rest[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps_offered": 4}, "method 'toy' has steps_offered 4; it must be a list"),
        ({"steps_offered": [1, 0]}, r"steps_offered \[1, 0\]"),
        ({"steps_offered": ()}, r"steps_offered \(\)"),
        ({"result": "studnet"}, r"result of method 'toy', 'studnet' is not known \(did you mean 'student'\?\)"),
        ({"networks": NetworkSpec()}, "it must be a mapping from names to NetworkSpec"),
        ({"iteration": Method.iteration}, "defines neither loss"),
        ({"sampling": Method.sampling}, r"'toy' defines no sampling\(steps\)"),
        ({"sampling": lambda self, steps: None}, r"answers sampling\(1\) with NoneType; it must be a Plan"),
        (
            {"result": "bare", "networks": {"student": NetworkSpec(), "bare": NetworkSpec(read_out="plain")}},
            "no denoiser",
        ),
    ],
)
def test_what_the_artefact_needs_of_a_method_is_asked_for_before_any_training(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        trainer(tmp_path, type("Lacking", (Toy,), changes)).run()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not (tmp_path / "log.jsonl").exists()


def test_an_option_called_steps_means_nothing_to_the_trainer(tmp_path):
    class Stepping(Toy):
        steps_offered = (1, 3)

        class Config(methods.MethodConfig):
            steps: int = 4

    trainer(tmp_path, Stepping, updates=1).run()
    assert sorted(artefact.load(tmp_path).plans) == [1, 3]


DESCRIBED = {
    "teacher": None,
    "network": {"name": "unet", "channels": 1, "image_size": 8, "widths": [8, 8], "embedding": 8, "classes": 10},
    "schedule": {"name": "edm"},
    "prediction": {"kind": "edm", "sigma_data": 0.5},
    "method": {"name": "denoising"},
}


def described(folder, **network):
    content = {**small.recipe(folder, updates=1).to_dict(), **DESCRIBED, "adapters": {}}
    return config.from_dict({**content, "network": {**content["network"], **network}})


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        ({"classes": 5}, "the network knows 5 classes and the data has 10"),
        ({"channels": 3}, "network.channels is 3 and the data has images of 1 x 8 x 8; set it to 1"),
        ({"image_size": 16}, "network.image_size is 16 and the data has images of 1 x 8 x 8; set it to 8"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused_before_the_loop(tmp_path, network, sentence):
    with pytest.raises(UserError, match=sentence):
        Trainer(described(tmp_path, **network), loader=small.Digits())


def test_a_described_network_that_cannot_run_is_refused_before_the_loop(tmp_path):
    content = described(tmp_path).to_dict()
    perceptron = {"name": "mlp", "dim": 10, "width": 8, "classes": 10}
    with pytest.raises(UserError, match="network: it cannot take images of 1 x 8 x 8"):
        Trainer(config.from_dict({**content, "network": perceptron}), loader=small.Digits())


def test_a_network_without_classes_is_trained_without_conditions(tmp_path):
    run = Trainer(described(tmp_path, classes=None), loader=small.Digits())
    run.run()
    saved = artefact.load(tmp_path)
    assert saved.classes is None and saved.denoiser.net.config["classes"] is None


@pytest.mark.parametrize("name", ("consistency_distillation", "dmd2"))
def test_a_teacher_guided_in_a_form_is_another_teacher(tmp_path, name):
    forms = (None, 3.0, {"name": "interval", "scale": 3.0, "sigma_high": 1.0}, {"name": "rescale", "scale": 3.0})
    found = []
    for number, form in enumerate(forms):
        method = {**small.METHODS[name], "guidance": form, **({"critic_updates": 1} if name == "dmd2" else {})}
        run = Trainer(
            small.recipe(tmp_path / str(number), method, updates=2), teacher=small.teacher(), loader=small.Digits()
        )
        run.fit()
        found.append(small.weights(run))
    for one in range(len(forms)):
        assert all(largest_difference(found[one], found[other]) > 0 for other in range(one))


def guided_by_another(folder, weak, **further):
    content = small.recipe(folder, checkpoint_every=1, updates=2).to_dict()
    method = {**small.METHODS["consistency_distillation"], "guidance": {"name": "autoguidance", "scale": 2.0}}
    return config.from_dict({**content, "method": method, "others": {"weak": str(weak)}, **further})


def test_a_teacher_is_guided_by_another_artefact(tmp_path, teacher_folder):
    recipe = guided_by_another(tmp_path / "guided", teacher_folder)
    run = Trainer(recipe, teacher=small.teacher(), loader=small.Digits())
    run.run()
    assert run.provenance["others"]["weak"] == {"path": str(teacher_folder)} | {
        "sha256": artefact.load(teacher_folder).digest
    }
    plain = trained(tmp_path / "plain", updates=2)
    assert largest_difference(small.weights(run), small.weights(plain)) > 0
    saved = artefact.load(tmp_path / "guided")
    assert saved.guidance == 2.0 and "weak" not in run.modules
    resumed = Trainer(recipe, teacher=small.teacher(), loader=small.Digits(), resume=True)
    assert resumed.step == 2
    other = artefact.load(teacher_folder)
    artefact.save(
        tmp_path / "other",
        denoiser=other.denoiser,
        plans=other.plans,
        image_shape=other.image_shape,
        classes=other.classes,
        provenance={"seed": 1},
        kind="teacher",
    )
    changed = guided_by_another(tmp_path / "guided", tmp_path / "other")
    with pytest.raises(UserError, match=r"the network others\.weak is not the one of the checkpoint of update 2"):
        Trainer(changed, teacher=small.teacher(), loader=small.Digits(), resume=True)


def test_what_guides_a_teacher_must_go_with_it(tmp_path, teacher_folder):
    class Nine(small.Digits):
        classes = 9

    teacher = small.teacher()
    teacher.net = MLP(64, width=16, classes=9)
    with pytest.raises(UserError, match=r"others.weak is .*, whose number of classes 10 is not the teacher's 9"):
        Trainer(guided_by_another(tmp_path, teacher_folder), teacher=teacher, loader=Nine())
    with pytest.raises(UserError, match="there is no artefact folder"):
        Trainer(guided_by_another(tmp_path, tmp_path / "no"), teacher=small.teacher(), loader=small.Digits())
    method = {**small.METHODS["dmd2"], "guidance": {"name": "perp_neg", "scale": 2.0}}
    away = guided_by_another(tmp_path, teacher_folder, method=method, others={}, negatives=[12])
    with pytest.raises(UserError, match="negatives holds 12, it must hold classes of the teacher from 0 to 9"):
        Trainer(away, teacher=small.teacher(), loader=small.Digits())


def test_an_artefact_that_answers_more_than_the_clean_sample_teaches_and_guides_nobody(tmp_path):
    teacher = small.teacher()
    headed = Denoiser(Genie(teacher.net, width=16, blocks=0), teacher.schedule, teacher.prediction)
    facts = {"image_shape": (1, 8, 8), "classes": 10, "plans": {}, "provenance": {}}
    artefact.save(tmp_path / "headed", denoiser=headed, **facts)
    words = (
        r" is .*headed, which is no plain denoiser \(its network answers \[4, 8, 8\] to an image \[1, 8, 8\]\); name"
    )
    taught = {**small.recipe(tmp_path / "run").to_dict(), "teacher": str(tmp_path / "headed")}
    with pytest.raises(UserError, match="teacher" + words):
        Trainer(config.from_dict(taught), loader=small.Digits())
    with pytest.raises(UserError, match=r"others\.weak" + words):
        Trainer(guided_by_another(tmp_path, tmp_path / "headed"), teacher=small.teacher(), loader=small.Digits())


def test_guidance_of_a_teacher_that_knows_no_classes_is_refused(tmp_path):
    plain = small.teacher()
    plain.net = MLP(64, width=16, classes=None)
    for guidance, refused in (({"name": "apg", "scale": 2.0}, True), (2.0, True), (1.0, False), (None, False)):
        recipe = small.recipe(tmp_path, {**small.METHODS["dmd2"], "guidance": guidance})
        if refused:
            with pytest.raises(UserError, match=r"method.guidance is .* and the teacher knows no classes"):
                Trainer(recipe, teacher=plain, loader=small.Digits())
        else:
            Trainer(recipe, teacher=plain, loader=small.Digits())


def test_a_teacher_of_other_images_is_refused(tmp_path, teacher_folder):
    class Large(small.Digits):
        image_shape = (1, 16, 16)

    content = small.recipe(tmp_path).to_dict()
    with pytest.raises(UserError, match="images of 1 x 16 x 16 and the teacher makes images of 1 x 8 x 8"):
        Trainer(config.from_dict({**content, "teacher": str(teacher_folder)}), loader=Large())


class Leaking(Toy):
    def iteration(self, batch, rng):
        t = torch.ones(len(batch))
        yield Update("student", self.critic(self.student(batch.x0, t), t).square().mean())


def test_a_loss_that_leaks_into_another_engine_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"leaked gradients into engine 'critic'.*fixed or .value"):
        trained(tmp_path, Leaking)


class Unequal(Toy):
    def iteration(self, batch, rng):
        t = torch.ones(len(batch))
        name = "student" if batch.index[0] % 8 == 0 else "critic"
        yield Update(name, getattr(self, name)(batch.x0, t).square().mean())


def test_micro_batches_that_yield_unequal_updates_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"yield 'student' and 'critic'.*same_for_all"):
        trained(tmp_path, Unequal, accumulate=4)


class Misnamed(Toy):
    def iteration(self, batch, rng):
        yield Update("studnet", self.student(batch.x0, torch.ones(len(batch))).mean())


def test_an_update_of_a_network_that_is_not_trained_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'studnet' is not known \(did you mean 'student'\?\)"):
        trained(tmp_path, Misnamed)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    expected = small.weights(trained(tmp_path / "two", Toy, updates=2))
    run = trainer(tmp_path / "fault", Toy, fault=2, checkpoint_every=1)
    with pytest.raises(UserError, match=r"not finite at update 2 \(the last checkpoint is .*step_000002\)"):
        run.fit()
    assert largest_difference(small.weights(run), expected) == 0.0


def test_a_gradient_that_is_not_finite_is_skipped_where_the_recipe_says_so(tmp_path):
    run = trained(tmp_path, Toy, fault=2, non_finite="skip")
    assert all(torch.isfinite(value).all() for state in small.weights(run).values() for value in state.values())
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 2  # student and critic


class Staged(Toy):
    networks = {"student": NetworkSpec()}

    def stages(self):
        yield TrainingStage("first", updates=2, values={"goal": 0.0})
        plan = self.sampling(1)
        yield TrainingStage("second", 3, {"teacher": "student"}, ("student",), Pairs(20, plan), {"goal": 1.0})

    @property
    def needs(self):
        return methods.Needs(data="pairs")

    def loss(self, batch, rng):
        self.__dict__.setdefault("seen", []).append((self.stage.name, self.stage.values["goal"], batch.pair))
        x = batch.x0 if batch.pair is None else batch.pair[1]
        return (self.student(x, torch.ones(len(x)), batch.cond) - self.stage.values["goal"]).square().mean()

    def iteration(self, batch, rng):
        yield Update("student", self.loss(batch, rng))


def test_stages_copy_restart_make_pairs_and_set_values(tmp_path):
    run = trained(tmp_path, Staged)
    assert [name for name, *_ in run.method.seen] == ["first"] * 2 + ["second"] * 3
    assert run.method.seen[-1][1] == 1.0
    z, x0_hat = run.method.seen[-1][2]
    assert z.shape == x0_hat.shape == (16, 1, 8, 8)
    assert run.engines["student"].updates == 3  # restarted after two
    assert not torch.equal(run.modules["teacher"].net.last.weight, small.teacher().net.last.weight)


def test_resuming_inside_a_later_stage_is_bit_for_bit(tmp_path):
    expected = small.weights(trained(tmp_path / "whole", Staged))
    run = trainer(tmp_path / "cut", Staged)
    iterate = run.iterate

    def interrupted():
        iterate()
        run._stop = run.step == 3

    run.iterate = interrupted
    with pytest.raises(Interrupted):
        run.fit()
    again = trained(tmp_path / "cut", Staged, resume=True)
    assert largest_difference(small.weights(again), expected) == 0.0
    assert [name for name, *_ in again.method.seen] == ["second"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_update_and_leaves_a_checkpoint(tmp_path, number):
    expected = small.weights(trained(tmp_path / "whole", Toy))
    run = trainer(tmp_path / "cut", Toy)
    iterate = run.iterate

    def interrupted():
        if run.step == 1:
            os.kill(os.getpid(), number)
        iterate()

    run.iterate = interrupted
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run.fit()
    assert caught.value.code == 130
    assert "after update 2 of 4" in str(caught.value) and "--resume" in str(caught.value)
    assert (tmp_path / "cut/checkpoints/step_000002/manifest.json").exists()
    assert signal.getsignal(number) is before
    again = trained(tmp_path / "cut", Toy, resume=True)
    assert largest_difference(small.weights(again), expected) == 0.0


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    run = trainer(tmp_path, Toy)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        iterate = run.iterate
        run.iterate = lambda: (os.kill(os.getpid(), signal.SIGHUP), iterate())
        run.fit()
        assert run.step == 4 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_artefact_holds_the_students_average_with_its_plans(tmp_path):
    run = trainer(tmp_path, updates=2, sample_every=2)
    assert run.run() == tmp_path
    saved = artefact.load(tmp_path)
    assert sorted(saved.plans) == [1, 2, 4] and saved.kind == "student" and saved.classes == 10
    average = run.modules["sampling_average"].state_dict()
    assert all(torch.equal(value, average[name]) for name, value in saved.denoiser.state_dict().items())
    assert (tmp_path / "samples/step_000002.png").stat().st_size > 1000
    assert any((tmp_path / "tensorboard").iterdir())


def test_the_optimiser_of_a_network_overrides_the_recipes(tmp_path):
    class Slow(Toy):
        networks = {"student": NetworkSpec(), "critic": NetworkSpec(optimizer=OptimizerConfig(lr=5e-5))}

    run = trained(tmp_path, Slow, updates=1)
    assert run.engines["critic"].torch_optimizer.param_groups[0]["lr"] == 5e-5
    assert run.engines["student"].torch_optimizer.param_groups[0]["lr"] == 1e-3


def test_dropout_masks_do_not_depend_on_where_a_run_was_cut(tmp_path):
    class Dropping(Toy):
        networks = {"student": NetworkSpec(start=lambda built: MLP(64, width=16, classes=10, dropout=0.5))}

        def iteration(self, batch, rng):
            x = self.student(batch.x0, torch.ones(len(batch)), batch.cond)
            yield Update("student", (x - batch.x0).square().mean())

    expected = small.weights(trained(tmp_path / "whole", Dropping))
    trained(tmp_path / "cut", Dropping, updates=2)
    assert largest_difference(small.weights(trained(tmp_path / "cut", Dropping, resume=True)), expected) == 0.0


def test_modules_are_plain_where_nothing_is_sharded(tmp_path):
    run = trainer(tmp_path, Toy)
    assert isinstance(run.method.student.module, nn.Module) and run.method.student.engine is None


def test_an_adapted_student_is_saved_as_one_plain_network(tmp_path):
    recipe = small.recipe(tmp_path, "adapted_dmd2", ema=None, updates=6, optimizer={"lr": 0.05})
    given = small.teacher()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    run = Trainer(recipe, teacher=given, loader=small.Digits())
    run.run()
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert all("correction" in name for name, _ in run.modules["student"].named_parameters())
    loaded = artefact.load(tmp_path).denoiser
    x, t, cond = torch.randn(5, 1, 8, 8), torch.full((5,), 2.0), torch.arange(5)
    with torch.no_grad():
        mine, theirs = run.modules["student"](x, t, cond), loaded(x, t, cond)
        assert (mine - given(x, t, cond)).abs().max() > 1e-2
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)  # W + BA is rounded once to float32
