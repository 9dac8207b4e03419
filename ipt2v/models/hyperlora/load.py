"""A published HyperLoRA folder -> photos of one person -> LoRA. Legend as in network.py; H, W = 224, 224, C=3 RGB.

Strict: a tensor that is missing, left over or of another shape is an error. Knows neither detectors nor pipelines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from ipt2v.models.hyperlora.layout import CLIP_FOLDER, PROCESSOR_FOLDER, VARIANT_FOLDER
from ipt2v.models.hyperlora.network import (
    TOKENS_PER_MODULE,
    IdentityLoRA,
    Resampler,
    Sizes,
    average,
    basis_keys,
    basis_shapes,
    id_projector,
    mix,
)
from ipt2v.models.hyperlora.slots import attentions, in_out, module_entry, projection_paths

Variant = Literal["fidelity", "edit"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperLoRA:
    """HyperLoRA, loaded for one UNet. The coefficients are half a megabyte a person, the LoRA 46: keep the first.

    `mix` holds none of the networks, so they are gone once the rest of this is.
    """

    preprocess: Callable[[Sequence[NDArray[np.uint8]]], Tensor]  # crops of faces, each [H,W,3] RGB -> pixels [N,3,224,224]
    look: Callable[[Tensor, Tensor], Tensor]  # pixels, ArcFace embeddings [N,E] of length 1 -> coefficients [Q,C] float32
    mix: Callable[[Sequence[Tensor]], list[IdentityLoRA]]  # coefficients of some people -> their LoRAs, float32


def load_hyperlora(root: Path, unet: UNet2DConditionModel, *, variant: Variant, device: torch.device) -> HyperLoRA:
    """The networks of a published folder, in float32; of the UNet only names and sizes are used, so it may be on "meta".

    The bases, 3 GB of float16, stay in their file: each call of `mix` reads them once, one basis at a time.
    Raises ValueError if the files do not fit each other or the UNet.
    """
    folder = root / VARIANT_FOLDER.format(variant=variant)
    clip = load_clip(root / CLIP_FOLDER).to(device)
    projector, resampler, sizes = load_networks(folder, clip_width=clip.config.hidden_size)
    paths = read_paths(folder / "hyper_lora_modules.json", unet, queries=sizes.queries)
    bases = folder / "hyper_lora_modules.safetensors"
    check_bases(bases, sizes, [in_out(unet, path) for path in paths])
    projector, resampler = projector.to(device), resampler.to(device)
    processor = CLIPImageProcessorPil.from_pretrained(root / PROCESSOR_FOLDER)

    def preprocess(crops: Sequence[NDArray[np.uint8]]) -> Tensor:
        return processor(list(crops), return_tensors="pt", input_data_format="channels_last").pixel_values

    @torch.no_grad()  # not inference_mode: its tensors would not run where gradients are on
    def look(pixels_NCHW: Tensor, embeddings_NE: Tensor) -> Tensor:
        check_photos(pixels_NCHW, embeddings_NE, embedding=sizes.embedding)
        id_NKX = projector(embeddings_NE.to(device, torch.float32))
        # HyperLoRA was trained on the output of CLIP's last but one layer, without the norm behind the last
        clip_NPW = clip(pixels_NCHW.to(device, torch.float32), output_hidden_states=True).hidden_states[-2]
        return average(resampler(id_NKX, clip_NPW))

    @torch.no_grad()
    def mix_bases(people_PQC: Sequence[Tensor]) -> list[IdentityLoRA]:
        with safe_open(bases, framework="pt", device=str(device)) as file:
            return mix(file.get_tensor, [coefficients_QC.to(device) for coefficients_QC in people_PQC], paths)

    return HyperLoRA(preprocess=preprocess, look=look, mix=mix_bases)


def load_clip(folder: Path) -> CLIPVisionModelWithProjection:
    """CLIP's vision tower in float32; the file may hold the text tower too."""
    clip, info = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):  # transformers only warns, and draws them at random
        raise ValueError(f"{folder}: tensor {missing[0]} missing ({len(missing)} in all); expected CLIP's vision tower")
    return clip.eval()


def load_networks(folder: Path, *, clip_width: int) -> tuple[nn.Sequential, Resampler, Sizes]:
    """ID projector and resampler in float32, on the CPU, and the sizes that their tensors tell."""
    files = (folder / "id_projector.safetensors", folder / "resampler.safetensors")
    projector_state, resampler_state = (load_file(path) for path in files)
    sizes = read_sizes(shapes_of(projector_state), shapes_of(resampler_state), files)
    if sizes.clip_width != clip_width:
        raise ValueError(f"{files[1]}: proj_in_2.weight takes CLIP width {sizes.clip_width}, found a tower of {clip_width}")
    with torch.device("meta"):
        projector, resampler = id_projector(sizes), Resampler(sizes)
    _fill(projector, projector_state, files[0])
    _fill(resampler, resampler_state, files[1])
    return projector, resampler, sizes


def read_sizes(projector: Shapes, resampler: Shapes, files: tuple[Path, Path]) -> Sizes:
    """Sizes from the tensors' shapes. Raises ValueError if a tensor that tells one is missing."""
    id_rows, embedding = _shape(projector, "0.weight", 2, files[0])
    dim, id_width = _shape(resampler, "proj_in.weight", 2, files[1])
    layers = {match[1] for match in (re.match(r"layers\.(\d+)\.", key) for key in resampler) if match}
    return Sizes(
        embedding=embedding,
        id_tokens=id_rows // id_width,
        id_width=id_width,
        clip_width=_shape(resampler, "proj_in_2.weight", 2, files[1])[1],
        dim=dim,
        inner=_shape(resampler, "layers.0.attn1.to_q.weight", 2, files[1])[0],
        feed_forward=_shape(resampler, "layers.0.ff.net.0.proj.weight", 2, files[1])[0],
        depth=len(layers),
        queries=_shape(resampler, "latents", 3, files[1])[1],
        coefficients=_shape(resampler, "proj_out.weight", 2, files[1])[0],
    )


def read_paths(path: Path, unet: UNet2DConditionModel, *, queries: int) -> list[str]:
    """Paths in the UNet of all projections, in the file's order: i-th entry, i-th module, i-th share of the queries.

    Raises ValueError if the file's attentions are not the UNet's, or are not one for each 8 queries.
    """
    entries: dict[str, dict[str, int | None]] = json.loads(path.read_text(encoding="utf-8"))
    known = attentions(unet)
    _check_keys(path, "module", entries, known)
    if queries != TOKENS_PER_MODULE * len(entries):
        expected = TOKENS_PER_MODULE * len(entries)
        raise ValueError(f"{path}: {len(entries)} modules need {expected} queries, the resampler has {queries}; take its own")
    for name, entry in entries.items():
        if entry != (expected_entry := module_entry(unet, known[name])):
            raise ValueError(f"{path}: {name} is {entry}, the UNet's is {expected_entry}; take an SDXL UNet")
    return [path for name in entries for path in projection_paths(known[name])]


def check_bases(path: Path, sizes: Sizes, widths: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError if the bases are not those of projections with these (in, out); reads the file's header only."""
    with safe_open(path, framework="pt") as file:
        found: Shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    rank = _shape(found, basis_keys(0)[0], 3, path)[2]
    check_shapes(path, found, basis_shapes(sizes, rank, widths))


def check_photos(pixels_NCHW: Tensor, embeddings_NE: Tensor, *, embedding: int) -> None:
    """Raises ValueError if these are not the CLIP pixels and the ArcFace embeddings of one or more photos."""
    if embeddings_NE.shape != (len(pixels_NCHW), embedding) or not len(pixels_NCHW):
        raise ValueError(
            f"photos: found {len(pixels_NCHW)} pictures and embeddings of shape {tuple(embeddings_NE.shape)}, expected one "
            f"embedding of {embedding} numbers per picture, and at least one picture"
        )
    lengths = embeddings_NE.float().norm(dim=-1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
        raise ValueError(f"photos: embeddings have lengths {lengths.tolist()}, expected 1; divide each by its length")


def check_shapes(path: Path, found: Shapes, expected: Shapes) -> None:
    """Raises ValueError, naming file and key, unless the two are equal."""
    _check_keys(path, "tensor", found, expected)
    for key, shape in expected.items():
        if found[key] != shape:
            raise ValueError(f"{path}: {key} has shape {found[key]}, expected {shape}; download the file again")


def shapes_of(state: dict[str, Any]) -> Shapes:
    """Key -> shape."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    check_shapes(path, shapes_of(state), shapes_of(network.state_dict()))
    network.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    network.eval().requires_grad_(False)


def _shape(shapes: Shapes, key: str, num_dims: int, path: Path) -> tuple[int, ...]:
    if len(shapes.get(key, ())) != num_dims:
        found = f"has shape {shapes[key]}" if key in shapes else "missing"
        raise ValueError(f"{path}: tensor {key} {found}, expected {num_dims} dimensions; download the file again")
    return shapes[key]


def _check_keys(path: Path, kind: str, found: Iterable[str], expected: Iterable[str]) -> None:
    missing = [key for key in expected if key not in set(found)]
    extra = [key for key in found if key not in set(expected)]
    problems = [
        f"{kind} {keys[0]} {what} ({len(keys)} in all)" for keys, what in ((missing, "missing"), (extra, "extra")) if keys
    ]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}; take the published file that belongs to this model")
