"""LoRA slots on a UNet's attention projections: put in once, then one person after the other. Knows no HyperLoRA files.

Slots are forward hooks: the UNet's modules, parameter names and weights stay as they are, so it loads, saves and moves
between devices as before, and with no person set its output is the base model's bit for bit. Merging into the weights
would be rounded to their dtype, and would not come off exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from ipt2v.models.hyperlora.network import PROJECTIONS, Factors, IdentityLoRA

PREFIX = "lora_unet_"  # what kohya's names of a UNet's modules begin with


def attentions(unet: UNet2DConditionModel) -> dict[str, str]:
    """kohya name -> path of each attention of a diffusers UNet, in the order of its attn_processors."""
    paths = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {PREFIX + path.replace(".", "_"): path for path in paths}


def projection_paths(attention: str) -> list[str]:
    """Paths of an attention's Linears, in the order of PROJECTIONS."""
    # diffusers keeps the output projection in a list, with the dropout behind it
    return [f"{attention}.{name}.0" if name == "to_out" else f"{attention}.{name}" for name in PROJECTIONS]


def module_entry(unet: UNet2DConditionModel, attention: str) -> dict[str, int | None]:
    """What hyper_lora_modules.json says of an attention: its width, and that of the text if it looks at text."""
    to_q, to_k = (unet.get_submodule(f"{attention}.{name}") for name in ("to_q", "to_k"))
    crosses = attention.endswith("attn2")  # diffusers' blocks: attn1 looks at the picture, attn2 at the text
    return {"hidden_size": to_q.in_features, "cross_attention_dim": to_k.in_features if crosses else None}


def in_out(unet: UNet2DConditionModel, path: str) -> tuple[int, int]:
    """Input and output width of a Linear."""
    linear = unet.get_submodule(path)
    return linear.in_features, linear.out_features


@dataclass(slots=True, eq=False)
class Slot:
    """A forward hook of one Linear, which adds B @ A @ x to its output while a person is set."""

    factors: Factors | None = None

    def __call__(self, _linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.factors is None:
            return None  # the output stays the base model's
        down_RI, up_OR = self.factors
        return output + functional.linear(functional.linear(inputs[0], down_RI), up_OR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Slots that are in a UNet; install_slots makes them."""

    linears: dict[str, nn.Linear]
    slots: dict[str, Slot]

    @torch.no_grad()
    def set_identity(self, lora: IdentityLoRA, weight: float) -> None:
        """From now on the UNet computes with W + weight * scale * B @ A, on the device and in the dtype that W has now.

        Raises ValueError, and changes nothing, if the LoRA is not one for this UNet.
        """
        check_fits(lora, self.linears)
        for path, (down_RI, up_OR) in lora.factors.items():
            kept = self.linears[path].weight
            # the product of the numbers goes into B here, not at each of the UNet's steps
            self.slots[path].factors = (down_RI.to(kept), (weight * lora.scale * up_OR).to(kept))

    def clear(self) -> None:
        """From now on the UNet is the base model."""
        for slot in self.slots.values():
            slot.factors = None


def install_slots(unet: UNet2DConditionModel) -> Slots:
    """Empty slots around the Linears of all attentions. Raises ValueError if the UNet has some already."""
    linears = {path: unet.get_submodule(path) for one in attentions(unet).values() for path in projection_paths(one)}
    for path, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"UNet: {path} is a {type(linear).__name__}, expected a Linear; unload its other adapters first")
        if any(isinstance(hook, Slot) for hook in linear._forward_hooks.values()):
            raise ValueError(f"UNet: {path} has a slot already, and two would add up; keep what install_slots gave first")
    slots = {path: Slot() for path in linears}
    for path, linear in linears.items():
        linear.register_forward_hook(slots[path])
    return Slots(linears=linears, slots=slots)


def check_fits(lora: IdentityLoRA, linears: dict[str, nn.Linear]) -> None:
    """Raises ValueError if the LoRA and the Linears differ in their paths or sizes."""
    _check_same(lora.factors.keys(), linears.keys())
    for path, (down_RI, up_OR) in lora.factors.items():
        linear = linears[path]
        found = (*down_RI.shape, *up_OR.shape)
        expected = (len(down_RI), linear.in_features, linear.out_features, len(down_RI))
        if found != expected:
            raise ValueError(f"identity LoRA: {path} has factors of {found}, expected {expected}; make it for this UNet")


def _check_same(found: Iterable[str], expected: Iterable[str]) -> None:
    if stray := sorted({*found} ^ {*expected}):
        which = "only the LoRA" if stray[0] in found else "only the UNet"
        raise ValueError(f"identity LoRA: {which} has {stray[0]} ({len(stray)} differ); make the LoRA for this UNet")
