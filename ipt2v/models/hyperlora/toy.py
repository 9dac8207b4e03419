"""Tiny random HyperLoRA files for any diffusers UNet, in the published layout. Must not know who loads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ipt2v.models.hyperlora.layout import CLIP_FOLDER, PROCESSOR_FOLDER, VARIANT_FOLDER
from ipt2v.models.hyperlora.network import TOKENS_PER_MODULE, Resampler, Sizes, basis_shapes, id_projector
from ipt2v.models.hyperlora.slots import attentions, in_out, module_entry, projection_paths

RANK = 4
CLIP_WIDTH = 16

# preprocessor_config.json of openai/clip-vit-large-patch14
_PROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def write_toy_hyperlora(root: Path, unet: UNet2DConditionModel, *, seed: int) -> None:
    """CLIP, its processor and both variants below `root`; the same seed gives the same bytes, the random state stays."""
    generator = torch.Generator().manual_seed(seed)
    modules = {name: module_entry(unet, path) for name, path in attentions(unet).items()}
    widths = [in_out(unet, path) for one in attentions(unet).values() for path in projection_paths(one)]
    sizes = Sizes(
        embedding=512,
        id_tokens=4,
        id_width=16,
        clip_width=CLIP_WIDTH,
        dim=16,
        inner=128,
        feed_forward=32,
        depth=2,
        queries=TOKENS_PER_MODULE * len(modules),
        coefficients=8,
    )
    _write_clip(root / CLIP_FOLDER, generator)
    processor = root / PROCESSOR_FOLDER
    processor.mkdir(parents=True)
    (processor / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2), encoding="utf-8")
    for variant in ("fidelity", "edit"):
        folder = root / VARIANT_FOLDER.format(variant=variant)
        folder.mkdir(parents=True)
        (folder / "hyper_lora_modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
        _save(folder / "hyper_lora_modules.safetensors", _draw_bases(basis_shapes(sizes, RANK, widths), generator))
        _save(folder / "id_projector.safetensors", _drawn(lambda: id_projector(sizes), generator))
        _save(folder / "resampler.safetensors", _drawn(lambda: Resampler(sizes), generator))


def _write_clip(folder: Path, generator: torch.Generator) -> None:
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    config.save_pretrained(folder)
    _save(folder / "model.safetensors", _drawn(lambda: CLIPVisionModelWithProjection(config), generator), torch.float32)


def _drawn(make: Callable[[], nn.Module], generator: torch.Generator) -> dict[str, Tensor]:
    """A network's tensors, so large that each input matters to the output; torch's own are made for training."""
    with torch.random.fork_rng(devices=[]):  # the modules draw weights of their own first
        state = make().state_dict()
    for name, tensor in state.items():
        if "norm" in name or name == "2.weight":  # the ID projector has its norm at place 2
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name == "latents":
            tensor.normal_(generator=generator)
        else:
            tensor.normal_(std=1.5 / math.sqrt(tensor[0].numel()) if tensor.dim() > 1 else 0.1, generator=generator)
    return state


def _draw_bases(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Bases that mix to a LoRA of about half the strength of the weights that it changes."""
    bases = {}
    for key, shape in shapes.items():
        std = 0.5 if key.endswith("up_basis") else 1 / math.sqrt(shape[1])
        bases[key] = torch.empty(shape).normal_(std=std, generator=generator)
    return bases


def _save(path: Path, state: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(state, path, metadata={"format": "pt"})
