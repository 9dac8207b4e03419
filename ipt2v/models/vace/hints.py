"""VACE's hints one at a time: diffusers' forward computes all of them first and keeps them; here each waits until it is used.

A hint is as large as the hidden states; VACE-14B has 8. diffusers uses each once, after its main block, as
`hint.to(device) * scale`: what its loop over `vace_blocks` gets are promises, and that multiplication runs the block. The
forward's code, parameters and their names stay as they are, and blocks are called as modules, with all their hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanVACETransformer3DModel


def make_hints_lazy(transformer: WanVACETransformer3DModel) -> None:
    """From now on a VACE block runs when the main block that takes its hint has run. Once, after loading, for inference."""
    transformer.register_forward_pre_hook(_begin)
    transformer.register_forward_hook(_end, always_call=True)


def _begin(transformer: WanVACETransformer3DModel, _args: Any) -> None:
    # an attribute of the instance is found before its submodules; those are not touched, and are back after the forward
    transformer.__dict__["vace_blocks"] = [_promising(block) for block in transformer._modules["vace_blocks"]]


def _end(transformer: WanVACETransformer3DModel, _args: Any, _output: Any) -> None:
    transformer.__dict__.pop("vace_blocks", None)


@dataclass(slots=True)
class _ControlStream:
    """The control states on their way through the VACE blocks: as the last one that has run has left them."""

    tensor: torch.Tensor


@dataclass(slots=True)
class _PromisedHint:
    """Stands for the hint until the forward multiplies it with its scale."""

    block: Any
    hidden: torch.Tensor | None  # None unless the block reads it
    text: torch.Tensor
    stream: _ControlStream
    rest: tuple[Any, ...]
    device: torch.device | None = None

    def to(self, device: torch.device) -> _PromisedHint:
        self.device = device
        return self

    def __mul__(self, scale: torch.Tensor) -> torch.Tensor:
        control = self.stream.tensor
        hidden, self.hidden = control if self.hidden is None else self.hidden, None
        hint, self.stream.tensor = self.block(hidden, self.text, control, *self.rest)
        return (hint if self.device is None else hint.to(self.device)) * scale


def _promising(block: Any) -> Callable[..., tuple[_PromisedHint, _ControlStream]]:
    """`block` as the forward calls it: (hidden states, text, control, ...) -> (hint, next control), nothing computed."""

    def call(
        hidden: torch.Tensor, text: torch.Tensor, control: torch.Tensor | _ControlStream, *rest: Any
    ) -> tuple[_PromisedHint, _ControlStream]:
        stream = control if isinstance(control, _ControlStream) else _ControlStream(control)
        # only the first block has a proj_in and reads the hidden states; the other promises must not keep them alive
        read = None if block.proj_in is None else hidden
        return _PromisedHint(block, read, text, stream, rest), stream

    return call
