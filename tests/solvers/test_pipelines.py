"""Stable Diffusion XL's own pipelines run on any plan, and give the pictures of diffusers' schedulers.

Networks are tiny and random, the vocabulary is made here: nothing is downloaded.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
import torch

from fewstep import solvers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers==0.42.1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

PlanScheduler = pytest.importorskip("fewstep.solvers.diffusers").PlanScheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
DROPPED = {"name": "linspace", "drop_last": True}
# DPM-Solver and UniPC of diffusers start from noise of variance 1 and not of sigma^2 = 0.9953
LOWERED = {"lower_order_final": True, "initial_scale": 1.0}


@functools.cache
def parts() -> dict[str, Any]:
    """SDXL's networks with the fewest and thinnest layers that its pipelines accept."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=8 + 6 * 4,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdef")]
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=8)
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": transformers.CLIPTextModel(text).eval(),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(text).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }


def pipeline(scheduler, kind: str = "StableDiffusionXLPipeline"):
    made = getattr(diffusers, kind)(**parts(), scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def pictures(made, **options) -> numpy.ndarray:
    """Two guided pictures [2, 16, 16, 3] in [0, 1], of one prompt and two seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    given = {"guidance_scale": 6.0, "num_inference_steps": 6, **options}
    if "image" not in given:
        given |= {"height": 16, "width": 16}
    return made(["a b c", "d"], negative_prompt=["e", "f a"], generator=generators, output_type="np", **given).images


CASES = [
    # diffusers' scheduler, its options, our solver, grid and options
    ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", DROPPED, LOWERED),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m", DROPPED, {**LOWERED, "curvature": "half_weight"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", DROPPED, LOWERED),
    ("UniPCMultistepScheduler", {}, "unipc", DROPPED, LOWERED),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, "euler", "linspace", {}),
    ("EulerDiscreteScheduler", LEADING, "euler", "leading", {"initial_scale": 1.0}),
    ("DDIMScheduler", {**LEADING, "clip_sample": False}, "ddim", "leading", {"initial_scale": 1.0, "stride": 166}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler_a", "trailing", {}),
    (
        "DPMSolverMultistepScheduler",
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8},
        "dpmpp_2m",
        DROPPED,
        {**LOWERED, "threshold": {"quantile": 0.8, "most": 1.0}},
    ),
    (
        "DDIMScheduler",
        {**LEADING, "clip_sample": True},
        "ddim",
        "leading",
        {"initial_scale": 1.0, "stride": 166, "clip": 1.0, "unbounded_noise": True},
    ),
]


@pytest.mark.parametrize(("theirs", "made", "solver", "grid", "options"), CASES)
def test_sdxls_pictures_are_those_of_diffusers_schedulers(theirs, made, solver, grid, options):
    expected = pictures(pipeline(getattr(diffusers, theirs)(**BETAS, **made)))
    found = pictures(pipeline(PlanScheduler(**BETAS, solver=solver, grid=grid, options=options)))
    assert expected.std() > 0.01
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # both in float32, 6 guided steps


@pytest.mark.parametrize(
    ("theirs", "made", "solver", "grid", "options"),
    [case for case in CASES if case[2] in ("dpmpp_2m", "euler", "ddim")],
)
def test_image_to_image_starts_in_the_middle_as_diffusers_schedulers_do(theirs, made, solver, grid, options):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, found = (
        pictures(pipeline(scheduler, "StableDiffusionXLImg2ImgPipeline"), image=image, strength=0.7)
        for scheduler in (
            getattr(diffusers, theirs)(**BETAS, **made),
            PlanScheduler(**BETAS, solver=solver, grid=grid, options=options),
        )
    )
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_pipeline_saves_and_loads_its_plan(tmp_path):
    made = pipeline(PlanScheduler(**BETAS, solver="dpmpp_3m", grid="align_your_steps", options={"slope": "exact"}))
    made.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, PlanScheduler)
    assert numpy.array_equal(pictures(again), pictures(made))
    assert again.scheduler.plan == made.scheduler.plan
    assert again.scheduler.plan.options == {"grid": "align_your_steps", "slope": "exact"}


@pytest.mark.parametrize("solver", solvers.names(alone=True))
def test_every_solver_paints_the_same_picture_for_a_seed_whatever_ran_before(solver):
    made = pipeline(PlanScheduler(**BETAS, solver=solver))
    first = pictures(made, num_inference_steps=4)
    pictures(made, num_inference_steps=3)
    assert numpy.isfinite(first).all() and first.std() > 0.01
    assert numpy.array_equal(pictures(made, num_inference_steps=4), first)
