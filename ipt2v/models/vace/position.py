"""Where the denoising of one video stands: latents and the scheduler's memory, so that another process can go on from there.

The latents are whole on every rank, so a position does not know how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:  # the launcher's side of an element must not wait for diffusers
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    Scheduler: TypeAlias = UniPCMultistepScheduler | DPMSolverMultistepScheduler

# What step() of diffusers' two multistep schedulers keeps for the next: set_timesteps() makes the rest, from the config.
_LISTS = ("model_outputs", "timestep_list")
_TENSORS = ("last_sample",)
_NUMBERS = ("lower_order_nums", "this_order", "_step_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """After which step a denoising is."""

    num_done: int  # steps
    num_steps: int
    latents_BCthw: torch.Tensor
    tensors: dict[str, torch.Tensor]  # of the scheduler; a list's as "name.0", "name.1"
    numbers: dict[str, int]


def position_of(scheduler: Scheduler, latents_BCthw: torch.Tensor, num_done: int) -> Position:
    """The position after a step. It refers to the tensors, which no scheduler changes in place."""
    tensors = {name: getattr(scheduler, name) for name in _TENSORS if getattr(scheduler, name, None) is not None}
    for name in _LISTS:
        values = getattr(scheduler, name, ())
        tensors |= {f"{name}.{index}": value for index, value in enumerate(values) if value is not None}
    numbers = {name: getattr(scheduler, name) for name in _NUMBERS if getattr(scheduler, name, None) is not None}
    return Position(
        num_done=num_done,
        num_steps=len(scheduler.timesteps),
        latents_BCthw=latents_BCthw,
        tensors=tensors,
        numbers=numbers,
    )


def go_to(scheduler: Scheduler, position: Position) -> None:
    """Put a scheduler whose timesteps are set where it was at a position."""
    device = scheduler.timesteps.device
    for name, value in position.numbers.items():
        setattr(scheduler, name, value)
    for name, tensor in position.tensors.items():
        field, _, index = name.partition(".")
        if index:
            getattr(scheduler, field)[int(index)] = tensor.to(device)
        else:
            setattr(scheduler, field, tensor.to(device))
