"""Going on inside a video: the same latents as without a break, whatever the scheduler; no fault of what was saved harms."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ipt2v.models.vace.denoise import denoise
from ipt2v.models.vace.position import Position
from ipt2v.position_file import load_position, save_position

NUM_STEPS, DIGEST = 12, "d" * 64
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "unipc order 3": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=3
    ),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    ),
}


def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Some function of both, not linear in either."""
    return torch.sin(latents * 3 + timestep / 300)


def positions(scheduler: object, noise: torch.Tensor) -> tuple[list[Position], torch.Tensor]:
    """Where it was after each step, and the latents at the end."""
    noted: list[Position] = []
    return noted, denoise(velocity, scheduler, noise, NUM_STEPS, noted.append)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_from_every_step_the_rest_gives_the_same_latents(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    noise = torch.randn((1, 16, 3, 4, 4), generator=torch.Generator().manual_seed(1)).to(dtype)
    noted, expected = positions(SCHEDULERS[name](), noise)
    assert [(one.num_done, one.num_steps) for one in noted] == [(step, NUM_STEPS) for step in range(1, NUM_STEPS + 1)]
    for position in noted[:-1]:
        path = tmp_path / f"{position.num_done}.safetensors"
        save_position(path, position, key="a/b", run_digest=DIGEST, seconds=1.5)
        found = load_position(path, key="a/b", run_digest=DIGEST)
        assert found is not None and found[1] == 1.5
        made: list[Position] = []
        latents = denoise(velocity, SCHEDULERS[name](), torch.zeros_like(noise), NUM_STEPS, made.append, found[0])
        assert [one.num_done for one in made] == list(range(position.num_done + 1, NUM_STEPS + 1))  # no step twice
        assert torch.equal(latents, expected)


def test_a_scheduler_that_has_made_another_video_goes_on_all_the_same() -> None:
    noise = torch.randn((1, 16, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    noted, expected = positions(SCHEDULERS["unipc"](), noise)
    used = SCHEDULERS["unipc"]()
    denoise(velocity, used, noise + 1, NUM_STEPS)
    assert torch.equal(denoise(velocity, used, noise, NUM_STEPS, start=noted[6]), expected)
    assert torch.equal(denoise(velocity, used, noise, NUM_STEPS), expected)


@pytest.mark.parametrize("fault", ["cut short", "no safetensors", "of another video", "of another run"])
def test_saved_steps_that_do_not_fit_are_left_alone_with_a_warning(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "position.safetensors"
    noted, _ = positions(SCHEDULERS["unipc"](), torch.zeros((1, 16, 1, 2, 2)))
    save_position(path, noted[3], key="a/b", run_digest=DIGEST, seconds=1.0)
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "no safetensors":
        path.write_bytes(b"\x00" * 40)
    key, digest = {"of another video": ("a/c", DIGEST), "of another run": ("a/b", "e" * 64)}.get(fault, ("a/b", DIGEST))
    with caplog.at_level(logging.WARNING):
        assert load_position(path, key=key, run_digest=digest) is None
    assert f"{path}: found " in caplog.text and f"expected the saved steps of {key}; it starts again at step 0" in caplog.text


def test_nothing_saved_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_position(tmp_path / "none", key="a/b", run_digest=DIGEST) is None
    assert not caplog.text
