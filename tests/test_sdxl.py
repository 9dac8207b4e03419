"""A painted first frame depends on prompt, seed and settings alone, and is what diffusers' stock pipeline paints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

from ipt2v.config import FirstFrameConfig
from ipt2v.models.sdxl import load_painter
from ipt2v.models.sdxl_text import embed_prompt

pytestmark = pytest.mark.slow

MODEL = "RealVisXL_V4.0"
CPU = torch.device("cpu")
PROMPT = "a young woman on the beach, red umbrella, close-up"
SEED = 20250131
Paint = Callable[[str, int], np.ndarray]


def settings(**changes: Any) -> FirstFrameConfig:
    defaults = {"dtype": "float32", "width": 64, "height": 48, "num_inference_steps": 3, "negative_prompt": "blurry, dark"}
    return FirstFrameConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def load(toy_weights: Path) -> Callable[[FirstFrameConfig], Paint]:
    return lambda config: load_painter(toy_weights / MODEL, config, device=CPU).paint


@pytest.fixture(scope="module")
def paint(load: Callable[[FirstFrameConfig], Paint]) -> Paint:
    return load(settings())


# ---- depends on its inputs, and on nothing else


def test_the_same_input_gives_the_same_picture_whatever_was_painted_between(paint: Paint, load) -> None:
    picture_HWC = paint(PROMPT, SEED)
    paint("an old man reads a book", 1)
    assert np.array_equal(paint(PROMPT, SEED), picture_HWC)
    assert np.array_equal(load(settings())(PROMPT, SEED), picture_HWC)


def test_seed_prompt_and_negative_prompt_each_change_the_picture(paint: Paint, load) -> None:
    picture_HWC = paint(PROMPT, SEED)
    assert not np.array_equal(paint(PROMPT, SEED + 1), picture_HWC)
    assert not np.array_equal(paint("an old man reads a book", SEED), picture_HWC)
    assert not np.array_equal(load(settings(negative_prompt="red"))(PROMPT, SEED), picture_HWC)


def test_the_global_random_state_neither_matters_nor_moves(paint: Paint) -> None:
    picture_HWC = paint(PROMPT, SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        assert np.array_equal(paint(PROMPT, SEED), picture_HWC)
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_any_seed_of_an_item_is_taken(paint: Paint, seed: int) -> None:
    assert paint(PROMPT, seed).std() > 5


@pytest.mark.parametrize("prompt", ["", "色调艳丽", "a woman " * 100])
def test_any_prompt_is_painted(paint: Paint, prompt: str) -> None:
    assert paint(prompt, SEED).std() > 5


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (16, 16), (80, 32)])
def test_the_picture_has_the_size_of_the_settings(load, width: int, height: int) -> None:
    picture_HWC = load(settings(width=width, height=height))(PROMPT, SEED)
    assert picture_HWC.shape == (height, width, 3)
    assert picture_HWC.dtype == np.uint8


def test_half_precision_starts_from_the_same_noise(paint: Paint, load) -> None:
    half_HWC = load(settings(dtype="bfloat16"))(PROMPT, SEED)
    full_HWC, other_HWC = paint(PROMPT, SEED), paint(PROMPT, SEED + 1)
    to_same, to_other = (np.abs(half_HWC.astype(float) - picture).mean() for picture in (full_HWC, other_HWC))
    assert to_same < to_other / 3


# ---- equal to diffusers


@pytest.mark.parametrize(
    "changes", [{}, {"num_inference_steps": 8, "guidance_scale": 1.0}, {"guidance_scale": 7.5, "width": 96}]
)
def test_the_picture_equals_that_of_the_stock_pipeline_bit_for_bit(toy_weights: Path, load, changes: dict[str, Any]) -> None:
    config = settings(**changes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_weights / MODEL, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    expected = pipeline(
        PROMPT,
        negative_prompt=config.negative_prompt,
        width=config.width,
        height=config.height,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    assert np.array_equal(load(config)(PROMPT, SEED), np.asarray(expected))


@pytest.mark.parametrize("num_steps", [3, 20])
def test_the_noise_levels_are_those_of_karras(load, num_steps: int) -> None:
    pipeline = inspect.getclosurevars(load(settings())).nonlocals["pipeline"]
    pipeline.scheduler.set_timesteps(num_steps)

    # equation 5 of arXiv 2206.00364 with rho 7, over the noise levels that SDXL was trained with (scaled linear beta)
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - beta)
    low, high = (((1 - alpha_bar[index]) / alpha_bar[index]) ** 0.5 for index in (0, -1))
    ramp = np.linspace(0, 1, num_steps)
    expected = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(pipeline.scheduler.sigmas.numpy(), [*expected, 0], rtol=2e-5)  # diffusers sums in float32
    assert len(pipeline.scheduler.timesteps) == num_steps


def test_the_sampler_is_second_order_dpm_solver_plus_plus(load) -> None:
    scheduler = inspect.getclosurevars(load(settings())).nonlocals["pipeline"].scheduler
    assert (scheduler.config.algorithm_type, scheduler.config.solver_order) == ("dpmsolver++", 2)


# ---- prompts of any length


@pytest.fixture(scope="module")
def pipeline(toy_weights: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(toy_weights / MODEL, add_watermarker=False)


@pytest.mark.parametrize("negative", ["", "blurry, dark"])
def test_a_prompt_of_one_chunk_is_embedded_as_the_pipeline_does_bit_for_bit(
    pipeline: StableDiffusionXLPipeline, negative: str
) -> None:
    ours = embed_prompt(pipeline, PROMPT, negative)
    with torch.inference_mode():
        theirs = pipeline.encode_prompt(PROMPT, negative_prompt=negative, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, tensor in zip(names, theirs, strict=True):
        assert torch.equal(getattr(ours, name), tensor), name


def test_the_end_of_a_long_prompt_counts_and_its_start_is_embedded_as_alone(pipeline: StableDiffusionXLPipeline) -> None:
    # letters apart are a token each in both tokenizers: 75 of them fill a chunk
    start = " ".join("abcdefghij"[i % 10] for i in range(75))
    alone, long, other = (embed_prompt(pipeline, start + end, "dark") for end in ("", " close up", " wide shot"))
    assert alone.prompt_embeds.shape[1] == alone.negative_prompt_embeds.shape[1] == 77
    assert long.prompt_embeds.shape[1] == long.negative_prompt_embeds.shape[1] == 2 * 77
    torch.testing.assert_close(long.prompt_embeds[:, :77], alone.prompt_embeds)
    torch.testing.assert_close(long.pooled_prompt_embeds, alone.pooled_prompt_embeds)
    assert not torch.allclose(long.prompt_embeds[:, 77:], other.prompt_embeds[:, 77:])


def test_the_end_of_a_long_prompt_changes_the_picture(paint: Paint) -> None:
    start = " ".join("abcdefghij"[i % 10] for i in range(75))
    assert not np.array_equal(paint(f"{start} close up", SEED), paint(f"{start} wide shot", SEED))
