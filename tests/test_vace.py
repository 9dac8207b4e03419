"""Our way through VACE gives what diffusers' WanVACEPipeline gives, bit for bit, and depends on nothing but its inputs.

Legend: B=1, C channels, T frames, H W pixels, t h w latent frames and pixels, L tokens, D width of a text embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanVACEPipeline
from PIL import Image

from ipt2v.config import VideoConfig
from ipt2v.models.umt5 import load_text_encoder, padded
from ipt2v.models.vace.condition import condition, empty_video, encode, first_frame_video, fit, fold_mask, letterbox
from ipt2v.models.vace.load import Animator, draw_noise, load_animator, load_scheduler
from ipt2v.models.vace.position import Position
from ipt2v.parallel import Group, group_from_environment
from ipt2v.records import FirstFrame

pytestmark = pytest.mark.slow

MODEL = "Wan2.1-VACE-14B-diffusers"
SMALL_MODEL = "Wan2.1-VACE-1.3B-diffusers"
TEMPORAL = "A person walks slowly along the beach, then laughs."
NEGATIVE = "色调艳丽, blurred, three legs"
SEED = 20250131
CPU = torch.device("cpu")

FirstFrames = Callable[..., FirstFrame]


def settings(size: str = "48x32x5", **changes: Any) -> VideoConfig:
    width, height, num_frames = map(int, size.split("x"))
    defaults = {"model": MODEL, "dtype": "float32", "num_inference_steps": 3, "max_text_tokens": 32}
    return VideoConfig(width=width, height=height, num_frames=num_frames, **(defaults | changes))


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Group]:
    with group_from_environment() as group:
        yield group


@pytest.fixture(scope="module")
def pipelines(toy_weights: Path) -> Callable[[VideoConfig], WanVACEPipeline]:
    """diffusers' own pipeline, in the settings' dtypes and with their flow shift."""

    def load(config: VideoConfig) -> WanVACEPipeline:
        folder = toy_weights / config.model
        vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=getattr(torch, config.vae_dtype))
        pipeline = WanVACEPipeline.from_pretrained(folder, vae=vae, dtype=getattr(torch, config.dtype))
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=config.flow_shift)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="module")
def first_frames(toy_weights: Path) -> FirstFrames:
    """first_frames(config, image_HWC=..., temporal=..., negative=...), with embeddings of the toy text encoder."""

    def make(
        config: VideoConfig, *, image_HWC: np.ndarray | None = None, temporal: str = TEMPORAL, negative: str = NEGATIVE
    ) -> FirstFrame:
        embed = load_text_encoder(toy_weights / config.model, config, device=CPU)
        return FirstFrame(
            key="identity/prompt",
            subject="A person",
            spatial_prompt="a beach",
            temporal_prompt=temporal,
            image_HWC=picture(config.width, config.height) if image_HWC is None else image_HWC,
            reference_HWC=picture(config.width, config.height),
            similarity=None,
            attempts=(),
            notes=(),
            temporal=embed(temporal),
            negative=embed(negative),
        )

    return make


@pytest.fixture(scope="module")
def animators(toy_weights: Path, one_rank: Group) -> Callable[[VideoConfig], Animator]:
    return lambda config: load_animator(toy_weights / config.model, config, one_rank)


@pytest.fixture(scope="module")
def animator(animators: Callable[[VideoConfig], Animator]) -> Animator:
    return animators(settings())


@pytest.fixture(scope="module")
def vae(toy_weights: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(toy_weights / MODEL / "vae").eval()


def conditions(image_HWC: np.ndarray, num_frames: int) -> dict[str, torch.Tensor]:
    """What WanVACEPipeline is given, 0..1: 0.5 is gray, exactly 0.0 in -1..1; in the mask 0 is kept."""
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1).float() / 255
    video_BTCHW = torch.full((1, num_frames, *image_CHW.shape), 0.5)
    video_BTCHW[:, 0] = image_CHW
    mask_BTCHW = torch.ones_like(video_BTCHW)
    mask_BTCHW[:, 0] = 0
    return {"video": video_BTCHW, "mask": mask_BTCHW}


def by_pipeline(pipeline: WanVACEPipeline, config: VideoConfig, image_HWC: np.ndarray | None, **inputs: Any) -> np.ndarray:
    num_references = len(inputs.get("reference_images", ()))
    with torch.inference_mode():
        video = pipeline(
            **({} if image_HWC is None else conditions(image_HWC, config.num_frames)),
            **inputs,
            latents=draw_noise(config, 16, SEED, num_references=num_references),
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            conditioning_scale=config.conditioning_scale,
            max_sequence_length=config.max_text_tokens,
        ).frames[0]
    return np.asarray(video)


def embeddings(config: VideoConfig, first_frame: FirstFrame) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, config.dtype)
    texts = {"prompt_embeds": first_frame.temporal, "negative_prompt_embeds": first_frame.negative}
    return {name: padded(text, config.max_text_tokens, dtype=dtype, device=CPU) for name, text in texts.items()}


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    assert np.array_equal(found, expected), f"largest difference {difference:.3g}, largest value {np.abs(expected).max():.3g}"


# ---- equal to diffusers


@pytest.mark.parametrize("size", ["48x32x5", "64x48x9"])
@pytest.mark.parametrize(
    ("guidance_scale", "flow_shift", "conditioning_scale"), [(5.0, 3.0, 1.0), (1.0, 3.0, 0.5), (5.0, 5.0, 0.5), (1.0, 5.0, 1.0)]
)
def test_latents_equal_the_pipelines_bit_for_bit(
    pipelines, animators, first_frames, size: str, guidance_scale: float, flow_shift: float, conditioning_scale: float
) -> None:
    config = settings(size, guidance_scale=guidance_scale, flow_shift=flow_shift, conditioning_scale=conditioning_scale)
    first_frame = first_frames(config)

    latents_CTHW = animators(config).animate(first_frame, SEED)

    expected = by_pipeline(
        pipelines(config), config, first_frame.image_HWC, output_type="latent", **embeddings(config, first_frame)
    )
    assert_same_bits(latents_CTHW, expected)
    assert np.isfinite(latents_CTHW).all() and latents_CTHW.std() > 0.1


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("96x64x17", {}),
        ("32x80x13", {"num_inference_steps": 6}),
        ("16x16x5", {"num_inference_steps": 1}),
        ("48x32x9", {"model": SMALL_MODEL}),
        ("64x48x9", {"speed": {"fuse_qkv": True, "best_attention": True}}),
        ("48x32x9", {"dtype": "bfloat16"}),  # with a float32 VAE, as the published weights are run
        ("48x32x5", {"dtype": "bfloat16", "vae_dtype": "bfloat16", "conditioning_scale": 0.3}),
    ],
)
def test_other_sizes_models_and_dtypes_equal_the_pipelines_bit_for_bit(
    pipelines, animators, first_frames: FirstFrames, size: str, changes: dict[str, Any]
) -> None:
    config = settings(size, **changes)
    first_frame = first_frames(config)

    latents_CTHW = animators(config).animate(first_frame, SEED)

    expected = by_pipeline(
        pipelines(config), config, first_frame.image_HWC, output_type="latent", **embeddings(config, first_frame)
    )
    assert_same_bits(latents_CTHW, expected)


@pytest.mark.parametrize("mode", ["reference", "both"])
@pytest.mark.parametrize(
    ("size", "reference_size", "changes"),
    [
        ("48x32x5", (30, 52), {}),
        ("64x48x9", (120, 48), {"guidance_scale": 1.0}),
        ("32x80x13", (16, 16), {"conditioning_scale": 0.5, "flow_shift": 5.0}),
        ("48x32x9", (33, 21), {"dtype": "bfloat16", "model": SMALL_MODEL}),
    ],
)
def test_latents_from_a_reference_equal_the_pipelines_bit_for_bit(
    pipelines, animators, first_frames, mode: str, size: str, reference_size: tuple[int, int], changes: dict[str, Any]
) -> None:
    config = settings(size, condition=mode, **changes)
    first_frame = replace(first_frames(config), reference_HWC=picture(*reference_size, seed=3))
    if mode == "reference":
        first_frame = replace(first_frame, image_HWC=None)

    latents_CTHW = animators(config).animate(first_frame, SEED)

    references = [Image.fromarray(first_frame.reference_HWC)]
    inputs = embeddings(config, first_frame) | {"reference_images": references, "output_type": "latent"}
    expected = by_pipeline(pipelines(config), config, first_frame.image_HWC, **inputs)
    assert_same_bits(latents_CTHW, expected[:, 1:])  # the pipeline leaves the reference's latent frame in front
    assert latents_CTHW.shape[1] == (config.num_frames - 1) // 4 + 1


def test_the_step_cache_saves_steps_and_forgets_each_video(animators, first_frames: FirstFrames) -> None:
    rule = {"threshold": 10.0, "num_first_blocks": 1, "warmup_steps": 2, "max_skips": 1}
    exact = settings(num_inference_steps=6)
    cached = settings(num_inference_steps=6, step_cache=rule)
    first_frame, other = first_frames(exact), replace(first_frames(exact), image_HWC=picture(48, 32, seed=7))
    animator = animators(cached)
    latents_CTHW = animator.animate(first_frame, SEED)
    animator.animate(other, SEED + 1)
    assert_same_bits(animator.animate(first_frame, SEED), latents_CTHW)
    assert not np.array_equal(latents_CTHW, animators(exact).animate(first_frame, SEED))


def test_a_record_without_a_first_frame_cannot_be_animated_from_one(animator: Animator, first_frames: FirstFrames) -> None:
    with pytest.raises(ValueError, match=r"identity/prompt: .* no first frame, and video\.condition is 'first_frame'"):
        animator.animate(replace(first_frames(settings()), image_HWC=None), SEED)


@pytest.mark.parametrize("num_references", [0, 1, 2])
def test_any_control_video_mask_and_references_are_conditioned_as_the_pipeline_does(
    pipelines, vae: AutoencoderKLWan, num_references: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    video_BCTHW = torch.rand(1, 3, 9, 32, 48, generator=generator)
    mask_BCTHW = torch.rand(1, 1, 9, 32, 48, generator=generator).round()
    pictures = [picture(30, 20, seed=index) for index in range(num_references)]

    references = [letterbox(one, width=48, height=32) for one in pictures]
    empty = encode(vae, empty_video(9, width=48, height=32)[0])
    found = condition(vae, 2 * video_BCTHW - 1, mask_BCTHW, references, empty_latents=empty)

    pipeline = pipelines(settings())
    given = video_BCTHW.transpose(1, 2), mask_BCTHW.expand(-1, 3, -1, -1, -1).transpose(1, 2)
    images = [Image.fromarray(one) for one in pictures] or None
    video, mask, canvases = pipeline.preprocess_conditions(*given, images, 1, 32, 48, 9, torch.float32, CPU)
    expected = torch.cat([pipeline.prepare_video_latents(video, mask, canvases), pipeline.prepare_masks(mask, canvases)], 1)
    assert found.shape == (1, 96, num_references + 3, 4, 6)
    assert_same_bits(found.detach().numpy(), expected.detach().numpy())


@pytest.mark.parametrize("changes", [{}, {"flow_shift": 5.0, "num_inference_steps": 6}, {"guidance_scale": 1.0}])
def test_latents_of_dpm_solver_equal_the_pipelines_bit_for_bit(
    pipelines, animators, first_frames: FirstFrames, changes: dict[str, Any]
) -> None:
    config, positions = settings("64x48x9", scheduler="dpm++", **changes), list[Position]()
    first_frame, pipeline = first_frames(config), pipelines(config)
    texts = embeddings(config, first_frame)

    latents_CTHW = animators(config).animate(first_frame, SEED, positions.append)

    unipc = by_pipeline(pipeline, config, first_frame.image_HWC, output_type="latent", **texts)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    expected = by_pipeline(pipeline, config, first_frame.image_HWC, output_type="latent", **texts)
    assert_same_bits(latents_CTHW, expected)
    assert np.abs(expected - unipc).max() > 1e-3
    assert [one.num_done for one in positions] == list(range(1, config.num_inference_steps + 1))
    assert_same_bits(animators(config).animate(first_frame, SEED, start=positions[0]), latents_CTHW)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_the_flow_shift_reaches_the_timesteps_of_each_scheduler(toy_weights: Path, name: Literal["unipc", "dpm++"]) -> None:
    schedulers = [load_scheduler(toy_weights / MODEL, name, flow_shift) for flow_shift in (3.0, 5.0)]
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    lower, higher = (scheduler.timesteps for scheduler in schedulers)
    assert len(lower) == len(higher) == 10 and (higher[1:] > lower[1:]).all()
    # s t / (1 + (s - 1) t), the shift of a flow's noise levels (arXiv 2403.03206, section 5.3.2)
    sigmas = schedulers[1].sigmas[:-1].double()
    unshifted = sigmas / (5.0 - 4.0 * sigmas)
    torch.testing.assert_close(unshifted.diff(), unshifted.diff().mean().expand(9), atol=1e-5, rtol=0)


def test_frames_equal_the_pipelines_from_prompts_to_pixels(pipelines, animators, first_frames: FirstFrames) -> None:
    config = settings("64x48x9")
    first_frame, animator = first_frames(config), animators(config)

    frames_THWC = animator.decode(animator.animate(first_frame, SEED))

    texts = {"prompt": TEMPORAL, "negative_prompt": NEGATIVE}
    expected_THWC = by_pipeline(pipelines(config), config, first_frame.image_HWC, output_type="np", **texts)
    assert_same_bits(frames_THWC, (expected_THWC * 255).round().astype(np.uint8))
    assert frames_THWC.shape == (9, 48, 64, 3)
    assert frames_THWC.std() > 10


@pytest.mark.parametrize(("width", "height", "num_frames"), [(48, 32, 5), (64, 48, 13)])
def test_the_condition_equals_the_pipelines_for_a_kept_first_frame(
    pipelines, vae: AutoencoderKLWan, width: int, height: int, num_frames: int
) -> None:
    image_HWC, pipeline = picture(width, height), pipelines(settings())
    empty = encode(vae, torch.zeros(1, 3, num_frames, height, width))

    found = condition(vae, *first_frame_video(image_HWC, num_frames), empty_latents=empty)

    given = conditions(image_HWC, num_frames).values()
    video, mask, references = pipeline.preprocess_conditions(*given, None, 1, height, width, num_frames, torch.float32, CPU)
    expected = torch.cat([pipeline.prepare_video_latents(video, mask, references), pipeline.prepare_masks(mask, references)], 1)
    assert found.shape == (1, 96, (num_frames - 1) // 4 + 1, height // 8, width // 8)
    assert_same_bits(found.detach().numpy(), expected.detach().numpy())


@pytest.mark.parametrize(("width", "height", "num_frames"), [(48, 32, 5), (16, 64, 17), (32, 32, 81)])
def test_any_mask_is_folded_as_the_pipeline_folds_it(pipelines, width: int, height: int, num_frames: int) -> None:
    mask_BCTHW = torch.rand(1, 1, num_frames, height, width, generator=torch.Generator().manual_seed(1)).round()

    folded = fold_mask(mask_BCTHW)

    expected = pipelines(settings()).prepare_masks(mask_BCTHW.expand(1, 3, -1, -1, -1), [[]])
    assert_same_bits(folded.numpy(), expected.numpy())


def test_what_is_not_the_first_frame_is_exactly_gray_and_to_be_made() -> None:
    video_BCTHW, mask_BCTHW = first_frame_video(picture(48, 32), 5)
    assert (video_BCTHW[:, :, 1:] == 0.0).all()
    assert (mask_BCTHW[:, :, 0] == 0).all() and (mask_BCTHW[:, :, 1:] == 1).all()
    np.testing.assert_allclose((video_BCTHW[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5, picture(48, 32), atol=1e-4)


# ---- depends on its inputs, and on nothing else


def test_the_same_input_gives_the_same_latents_whatever_was_made_between(animator: Animator, first_frames: FirstFrames) -> None:
    first_frame = first_frames(settings())
    other = replace(first_frame, image_HWC=picture(48, 32, seed=1), temporal=first_frame.negative)

    latents = [animator.animate(first_frame, SEED), animator.animate(other, 7), animator.animate(first_frame, SEED)]

    assert_same_bits(latents[2], latents[0])
    assert not np.array_equal(latents[1], latents[0])


def test_the_global_random_state_neither_matters_nor_moves(animator: Animator, first_frames: FirstFrames) -> None:
    first_frame = first_frames(settings())
    expected = animator.animate(first_frame, SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        found = animator.animate(first_frame, SEED)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_bits(found, expected)


def test_seed_first_frame_and_both_texts_each_change_the_latents(animator: Animator, first_frames: FirstFrames) -> None:
    config = settings()
    first_frame = first_frames(config)
    variants = [
        animator.animate(first_frame, SEED),
        animator.animate(first_frame, SEED + 1),
        animator.animate(replace(first_frame, image_HWC=picture(48, 32, seed=1)), SEED),
        animator.animate(replace(first_frame, temporal=first_frames(config, temporal="the dog jumps").temporal), SEED),
        animator.animate(replace(first_frame, negative=first_frames(config, negative="the dog jumps").negative), SEED),
    ]
    for index, changed in enumerate(variants[1:], start=1):
        assert np.abs(changed - variants[0]).max() > 1e-3, index


def test_without_guidance_the_negative_prompt_has_no_say(animators, first_frames: FirstFrames) -> None:
    config = settings(guidance_scale=1.0)
    animate = animators(config).animate
    assert_same_bits(animate(first_frames(config, negative="red"), SEED), animate(first_frames(config), SEED))


def test_at_conditioning_scale_0_the_first_frame_has_no_say(animators, first_frames: FirstFrames) -> None:
    config = settings(conditioning_scale=0.0)
    animate = animators(config).animate
    other = first_frames(config, image_HWC=picture(48, 32, seed=1))
    assert_same_bits(animate(other, SEED), animate(first_frames(config), SEED))


def test_a_first_frame_of_another_size_is_fitted_first(animator: Animator, first_frames: FirstFrames) -> None:
    config, image_HWC = settings(), picture(100, 70)
    large = first_frames(config, image_HWC=image_HWC)
    fitted = first_frames(config, image_HWC=fit(image_HWC, width=48, height=32))
    assert_same_bits(animator.animate(large, SEED), animator.animate(fitted, SEED))


def test_decoding_leaves_the_latents_alone_and_repeats(animator: Animator) -> None:
    latents_CTHW = np.random.default_rng(0).normal(size=(16, 2, 4, 6)).astype(np.float32)
    before = latents_CTHW.copy()
    frames_THWC = animator.decode(latents_CTHW)
    assert_same_bits(animator.decode(latents_CTHW), frames_THWC)
    assert_same_bits(latents_CTHW, before)
    assert frames_THWC.shape == (5, 32, 48, 3)


# ---- noise


def test_noise_comes_from_the_seed_alone() -> None:
    config = settings("96x64x17")
    expected = torch.randn((1, 16, 5, 8, 12), generator=torch.Generator().manual_seed(SEED))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert torch.equal(draw_noise(config, 16, SEED), expected)
    other = settings("96x64x17", dtype="bfloat16", vae_dtype="bfloat16", num_inference_steps=9, flow_shift=9.0)
    assert torch.equal(draw_noise(other, 16, SEED), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_every_seed_of_an_item_draws_noise_of_its_own(seed: int) -> None:
    noise = draw_noise(settings(), 16, seed)
    assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1
    assert not torch.equal(noise, draw_noise(settings(), 16, seed ^ 4))


# ---- fit


@pytest.mark.parametrize(("width", "height"), [(48, 32), (32, 48), (16, 16), (832, 480)])
def test_an_image_of_the_right_size_is_not_touched(width: int, height: int) -> None:
    image_HWC = picture(width, height)
    assert_same_bits(fit(image_HWC, width=width, height=height), picture(width, height))


SIZES = [(100, 100), (33, 200), (200, 33), (47, 32), (48, 33), (20, 12), (96, 64)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_other_image_gets_exactly_the_size(width: int, height: int) -> None:
    assert fit(picture(width, height), width=48, height=32).shape == (32, 48, 3)


@pytest.mark.parametrize(("width", "height"), [(400, 400), (240, 400), (600, 250), (120, 96)])
def test_a_circle_in_the_centre_stays_round_and_in_the_centre(width: int, height: int) -> None:
    y_H1, x_1W = np.ogrid[:height, :width]
    circle_HW = np.hypot(x_1W - (width - 1) / 2, y_H1 - (height - 1) / 2) <= min(width, height) / 4
    image_HWC = np.where(circle_HW[..., None], 0, 255).astype(np.uint8).repeat(3, axis=2)

    dark_HW = fit(image_HWC, width=192, height=128)[..., 0] < 128

    rows, columns = np.flatnonzero(dark_HW.any(axis=1)), np.flatnonzero(dark_HW.any(axis=0))
    radius = min(width, height) / 4 * max(192 / width, 128 / height)  # scaled to cover
    assert abs(len(columns) - 2 * radius) <= 2 and abs(len(rows) - 2 * radius) <= 2
    assert abs(columns.mean() - 95.5) <= 0.5 and abs(rows.mean() - 63.5) <= 0.5


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_image_covers_all_of_the_frame(width: int, height: int) -> None:
    plain_HWC = np.full((height, width, 3), (10, 200, 90), dtype=np.uint8)
    assert (fit(plain_HWC, width=48, height=32) == (10, 200, 90)).all()
