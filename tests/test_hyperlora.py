"""A LoRA made from photos is the published formula's, and in its slots it does what merging into the weights would do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from helpers import SDXL_UNET
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from ipt2v.models.hyperlora.load import HyperLoRA, check_bases, load_clip, load_hyperlora, read_paths
from ipt2v.models.hyperlora.network import (
    PROJECTIONS,
    IdentityLoRA,
    Resampler,
    Sizes,
    average,
    basis_keys,
    basis_shapes,
    id_projector,
    mix,
)
from ipt2v.models.hyperlora.slots import Slots, attentions, in_out, install_slots, module_entry, projection_paths
from ipt2v.models.hyperlora.toy import write_toy_hyperlora

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SDXL = "RealVisXL_V4.0"
WEIGHT = 0.85
VARIANT = "hyper_lora/hyper_lora/sdxl_hyper_id_lora_v1_fidelity"

PUBLISHED = Sizes(
    embedding=512,
    id_tokens=16,
    id_width=1024,
    clip_width=1024,
    dim=1024,
    inner=768,
    feed_forward=4096,
    depth=4,
    queries=1120,
    coefficients=128,
)


@pytest.fixture(scope="module")
def root(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy HyperLoRA for the toy SDXL; not to be written to."""
    folder = tmp_path_factory.mktemp("hyperlora")
    write_toy_hyperlora(folder, load_unet(toy_weights), seed=1)
    return folder


@pytest.fixture
def own_root(toy_weights: Path, tmp_path: Path) -> Path:
    """One that the test may spoil."""
    write_toy_hyperlora(tmp_path, load_unet(toy_weights), seed=1)
    return tmp_path


@pytest.fixture
def unet(toy_weights: Path) -> UNet2DConditionModel:
    return load_unet(toy_weights)


@pytest.fixture
def slots(unet: UNet2DConditionModel) -> Slots:
    return install_slots(unet)


@pytest.fixture(scope="module")
def hyperlora(root: Path, toy_weights: Path) -> HyperLoRA:
    return load_hyperlora(root, load_unet(toy_weights), variant="fidelity", device=CPU)


def generate(hyperlora: HyperLoRA, pixels_NCHW: Tensor, embeddings_NE: Tensor) -> IdentityLoRA:
    (lora,) = hyperlora.mix([hyperlora.look(pixels_NCHW, embeddings_NE)])
    return lora


@pytest.fixture(scope="module")
def lora(hyperlora: HyperLoRA) -> IdentityLoRA:
    return generate(hyperlora, *photos(1, seed=1))


@pytest.fixture(scope="module")
def other_lora(hyperlora: HyperLoRA) -> IdentityLoRA:
    return generate(hyperlora, *photos(1, seed=2))


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    """The full-size UNet without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


def load_unet(toy_weights: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(toy_weights / SDXL / "unet").eval().requires_grad_(False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photos(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels and embeddings of `count` people."""
    embeddings_NE = functional.normalize(random(count, 512, seed=seed), dim=-1)
    return random(count, 3, 224, 224, seed=seed + 100), embeddings_NE


def forward(unet: UNet2DConditionModel) -> Tensor:
    """What the toy UNet says of a noisy picture."""
    dtype = unet.dtype
    conditions = {"text_embeds": random(1, 32).to(dtype), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return unet(random(1, 4, 8, 8).to(dtype), 500, random(1, 7, 64, seed=1).to(dtype), added_cond_kwargs=conditions).sample


def merged(lora: IdentityLoRA, unet: UNet2DConditionModel, weight: float) -> UNet2DConditionModel:
    for path, (down_RI, up_OR) in lora.factors.items():
        unet.get_submodule(path).weight += weight * 0.5 * up_OR @ down_RI
    return unet


def equal(one: IdentityLoRA, other: IdentityLoRA, **tolerance: float) -> bool:
    pairs = [(a, b) for path in one.factors for a, b in zip(one.factors[path], other.factors[path], strict=True)]
    return one.factors.keys() == other.factors.keys() and all(torch.allclose(a, b, **tolerance) for a, b in pairs)


# ---- the network


def einsum_attention(state: dict[str, Tensor], name: str, query_NQD: Tensor, key_NKD: Tensor) -> Tensor:
    """Multi-head attention with heads of 64, written out."""

    def heads(projection: str, x: Tensor) -> Tensor:
        return torch.einsum("nld,hed->nhle", x, state[f"{name}.{projection}.weight"].unflatten(0, (-1, 64)))

    q, k, v = heads("to_q", query_NQD), heads("to_k", key_NKD), heads("to_v", key_NKD)
    shares = torch.einsum("nhqe,nhke->nhqk", q, k).div(8).softmax(-1)  # 8 = sqrt(64)
    out = state[f"{name}.to_out.0.weight"].unflatten(1, (-1, 64))
    return torch.einsum("nhqk,nhke,dhe->nqd", shares, v, out)


def einsum_resampler(state: dict[str, Tensor], id_NKX: Tensor, clip_NPW: Tensor, depth: int) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return torch.einsum("nld,ed->nle", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]
        )

    x, y = linear("proj_in", id_NKX), linear("proj_in_2", clip_NPW)
    latents = state["latents"].repeat(len(x), 1, 1)
    for at in (f"layers.{index}." for index in range(depth)):
        normed = norm(f"{at}norm_attn1", latents)
        latents = latents + einsum_attention(state, f"{at}attn1", normed, normed)
        for attention, condition, letter in (("2", x, "x"), ("3", y, "y")):
            query, key = norm(f"{at}norm_attn{attention}_l", latents), norm(f"{at}norm_attn{attention}_{letter}", condition)
            latents = latents + einsum_attention(state, f"{at}attn{attention}", query, key)
        hidden = linear(f"{at}ff.net.0.proj", norm(f"{at}norm_ff", latents))
        latents = latents + linear(f"{at}ff.net.2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    return linear("proj_out", latents)


def test_the_resampler_equals_its_formula() -> None:
    changes = {"queries": 10, "dim": 24, "inner": 128, "feed_forward": 40, "depth": 3, "coefficients": 6}
    sizes = Sizes(embedding=9, id_tokens=3, id_width=20, clip_width=12, **changes)
    resampler = Resampler(sizes)
    state = {key: 0.5 * random(*one.shape, seed=index) for index, (key, one) in enumerate(resampler.state_dict().items())}
    resampler.load_state_dict(state)
    id_NKX, clip_NPW = random(2, 3, 20), random(2, 5, 12)
    expected = einsum_resampler(state, id_NKX, clip_NPW, depth=3)
    torch.testing.assert_close(resampler(id_NKX, clip_NPW), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_a_lora_equals_the_formula_applied_to_the_files(root: Path, hyperlora: HyperLoRA, count: int) -> None:
    pixels_NCHW, embeddings_NE = photos(count, seed=5)
    files = ("id_projector", "resampler", "hyper_lora_modules")
    projector, resampler, bases = (
        {k: v.float() for k, v in load_file(root / VARIANT / f"{f}.safetensors").items()} for f in files
    )
    id_NKX = (embeddings_NE @ projector["0.weight"].T + projector["0.bias"]).reshape(count, -1, 16)
    id_NKX = functional.layer_norm(id_NKX, (16,), projector["2.weight"], projector["2.bias"])
    # the tower without its last layer: its last output is the whole tower's last but one
    clip = CLIPVisionModelWithProjection.from_pretrained(root / "hyper_lora/clip_vit/clip_vit_large_14", num_hidden_layers=2)
    clip_NPW = clip.vision_model(pixels_NCHW).last_hidden_state
    coefficients_QC = einsum_resampler(resampler, id_NKX, clip_NPW, depth=2).mean(0)
    coefficients_QC /= (coefficients_QC.square().sum(-1, keepdim=True) + 1e-8).sqrt()

    made = generate(hyperlora, pixels_NCHW, embeddings_NE)
    names = json.loads((root / VARIANT / "hyper_lora_modules.json").read_text())
    assert len(made.factors) == 4 * len(names)
    found = iter(made.factors.items())
    for index, name in enumerate(names):
        for place, projection in enumerate(PROJECTIONS):
            path, (down_RI, up_OR) = next(found)
            suffix = "to_out_0" if projection == "to_out" else projection
            assert "lora_unet_" + path.replace(".", "_") == f"{name}_{suffix}"
            down_C, up_C = coefficients_QC[8 * index + 2 * place : 8 * index + 2 * place + 2]
            down = torch.einsum("i,ijr->jr", down_C, bases[f"{index}.{projection}.id_down_basis"]).T
            up = torch.einsum("i,iro->ro", up_C, bases[f"{index}.{projection}.id_up_basis"]).T
            torch.testing.assert_close(down_RI, down, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(up_OR, up, rtol=1e-4, atol=1e-5)


def test_the_files_order_and_not_the_unets_says_which_bases_belong_to_which_module(own_root: Path, unet) -> None:
    path = own_root / VARIANT / "hyper_lora_modules.json"
    entries = json.loads(path.read_text())
    in_order = read_paths(path, unet, queries=8 * len(entries))
    path.write_text(json.dumps(dict(reversed(entries.items()))))
    backwards = read_paths(path, unet, queries=8 * len(entries))
    assert [backwards[start : start + 4] for start in range(0, len(backwards), 4)] == [
        in_order[start : start + 4] for start in reversed(range(0, len(in_order), 4))
    ]


def test_pixels_are_resized_cropped_and_normalised_as_for_clip(hyperlora: HyperLoRA) -> None:
    crop_HWC = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    resized_HWC = np.asarray(Image.fromarray(crop_HWC).resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    expected_HWC = (resized_HWC - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    pixels_NCHW = hyperlora.preprocess([crop_HWC, crop_HWC[:230]])
    assert (pixels_NCHW.shape, pixels_NCHW.dtype) == ((2, 3, 224, 224), torch.float32)
    np.testing.assert_allclose(pixels_NCHW[0].permute(1, 2, 0), expected_HWC, atol=1e-5)


# ---- several photos of one person


def test_the_mean_is_taken_first_and_brought_to_length_one_second() -> None:
    coefficients_NQC = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])
    torch.testing.assert_close(average(coefficients_NQC), torch.tensor([[3.0, 1.0]]) / math.sqrt(10))  # not [1, 1] / sqrt(2)


def test_the_same_photo_twice_counts_once(hyperlora: HyperLoRA, lora: IdentityLoRA) -> None:
    pixels_NCHW, embeddings_NE = photos(1, seed=1)
    twice = generate(hyperlora, pixels_NCHW.repeat(2, 1, 1, 1), embeddings_NE.repeat(2, 1))
    assert equal(twice, lora, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_photos_does_not_matter_and_each_photo_does(hyperlora: HyperLoRA) -> None:
    pixels_NCHW, embeddings_NE = photos(3, seed=3)
    three = generate(hyperlora, pixels_NCHW, embeddings_NE)
    assert equal(generate(hyperlora, pixels_NCHW.flip(0), embeddings_NE.flip(0)), three, rtol=1e-4, atol=1e-5)
    assert not equal(generate(hyperlora, pixels_NCHW[:2], embeddings_NE[:2]), three, rtol=1e-2, atol=1e-2)


def test_people_mixed_together_are_who_they_are_alone(
    hyperlora: HyperLoRA, lora: IdentityLoRA, other_lora: IdentityLoRA
) -> None:
    coefficients = [hyperlora.look(*photos(1, seed=seed)) for seed in (1, 2, 3)]
    made = hyperlora.mix(coefficients)
    assert len(made) == 3
    assert equal(made[0], lora, rtol=0, atol=0) and equal(made[1], other_lora, rtol=0, atol=0)


def test_pixels_and_embedding_each_change_the_lora(hyperlora: HyperLoRA, lora: IdentityLoRA) -> None:
    pixels_NCHW, embeddings_NE = photos(1, seed=1)
    other_NCHW, other_NE = photos(1, seed=2)
    assert not equal(generate(hyperlora, other_NCHW, embeddings_NE), lora, rtol=1e-2, atol=1e-2)
    assert not equal(generate(hyperlora, pixels_NCHW, other_NE), lora, rtol=1e-2, atol=1e-2)
    assert equal(generate(hyperlora, pixels_NCHW, embeddings_NE), lora, rtol=0, atol=0)


def test_the_variants_have_weights_of_their_own(root: Path, unet, lora: IdentityLoRA) -> None:
    edit = load_hyperlora(root, unet, variant="edit", device=CPU)
    assert not equal(generate(edit, *photos(1, seed=1)), lora, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("pixels", "embeddings", "message"),
    [(0, 0, "at least one picture"), (2, 1, "found 2 pictures and embeddings of shape"), (1, "twice as long", "divide each")],
)
def test_photos_without_their_embeddings_are_refused(hyperlora: HyperLoRA, pixels: int, embeddings: Any, message: str) -> None:
    embeddings_NE = 2 * photos(1, seed=0)[1] if isinstance(embeddings, str) else photos(embeddings, seed=0)[1]
    with pytest.raises(ValueError, match=message):
        generate(hyperlora, photos(pixels, seed=0)[0], embeddings_NE)


# ---- in the UNet


@pytest.mark.parametrize("weight", [WEIGHT, 0.3, -1.0])
def test_a_lora_in_its_slots_equals_one_merged_into_the_weights(unet, slots: Slots, toy_weights, lora, weight: float) -> None:
    slots.set_identity(lora, weight)
    expected = forward(merged(lora, load_unet(toy_weights), weight))
    torch.testing.assert_close(forward(unet), expected, rtol=1e-5, atol=1e-5)
    assert (forward(unet) - forward(load_unet(toy_weights))).std() > 0.1 * expected.std()


def test_a_lora_in_its_slots_equals_one_that_diffusers_loads(unet, slots: Slots, toy_weights: Path, lora: IdentityLoRA) -> None:
    pytest.importorskip("peft")
    kohya = {}
    for path, (down_RI, up_OR) in lora.factors.items():
        name = "lora_unet_" + path.replace(".", "_")
        kohya[f"{name}.alpha"] = torch.tensor(0.5 * len(down_RI))
        kohya[f"{name}.lora_down.weight"], kohya[f"{name}.lora_up.weight"] = down_RI, up_OR
    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_weights / SDXL, add_watermarker=False)
    pipeline.load_lora_weights(kohya, adapter_name="identity")
    pipeline.set_adapters(["identity"], [WEIGHT])
    slots.set_identity(lora, WEIGHT)
    with torch.no_grad():
        torch.testing.assert_close(forward(unet), forward(pipeline.unet), rtol=1e-5, atol=1e-5)


def test_empty_and_cleared_slots_leave_the_base_model_bit_for_bit(unet, lora: IdentityLoRA) -> None:
    base = forward(unet)
    slots = install_slots(unet)
    assert torch.equal(forward(unet), base)
    slots.set_identity(lora, WEIGHT)
    assert not torch.equal(forward(unet), base)
    slots.clear()
    assert torch.equal(forward(unet), base)


def test_a_person_comes_back_bit_for_bit_after_another(
    unet, slots: Slots, lora: IdentityLoRA, other_lora: IdentityLoRA
) -> None:
    outputs = []
    for person in (lora, other_lora, lora):
        slots.set_identity(person, WEIGHT)
        outputs.append(forward(unet))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_the_unet_keeps_its_modules_names_and_weights(unet, toy_weights: Path, lora: IdentityLoRA) -> None:
    fresh = load_unet(toy_weights)
    install_slots(unet).set_identity(lora, WEIGHT)
    assert [(name, type(one)) for name, one in unet.named_modules()] == [(n, type(one)) for n, one in fresh.named_modules()]
    assert all(torch.equal(one, fresh.state_dict()[key]) for key, one in unet.state_dict().items())
    unet.load_state_dict(fresh.state_dict(), strict=True)


def test_in_half_precision_the_lora_takes_the_unets_dtype(unet, slots: Slots, toy_weights: Path, lora: IdentityLoRA) -> None:
    slots.set_identity(lora, WEIGHT)
    full, base = forward(unet), forward(load_unet(toy_weights))
    unet.to(torch.bfloat16)
    slots.set_identity(lora, WEIGHT)
    half = forward(unet)
    assert half.dtype == torch.bfloat16
    assert (half - full).std() < 0.2 * (full - base).std()
    assert lora.factors[next(iter(lora.factors))][0].dtype == torch.float32


def test_a_lora_of_another_unet_is_refused_and_changes_nothing(unet, slots: Slots, lora: IdentityLoRA) -> None:
    *others, last = lora.factors
    base = forward(unet)
    down_RI, up_OR = lora.factors[last]
    wrong = {
        f"only the UNet has {last}": {path: lora.factors[path] for path in others},
        "only the LoRA has conv_in": lora.factors | {"conv_in": (down_RI, up_OR)},
        f"{last} has factors of": lora.factors | {last: (down_RI[:, 1:], up_OR)},
        f"{last} has factors": lora.factors | {last: (down_RI[1:], up_OR)},
    }
    for message, factors in wrong.items():
        with pytest.raises(ValueError, match=message):
            slots.set_identity(IdentityLoRA(factors=factors), WEIGHT)
    assert torch.equal(forward(unet), base)


def test_slots_are_put_in_once(unet, slots: Slots) -> None:
    assert len(slots.slots) == 4 * len(unet.attn_processors)
    with pytest.raises(ValueError, match=r"to_q has a slot already"):
        install_slots(unet)


# ---- the files


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    text = "\n".join(sorted(f"{key} {','.join(map(str, shape))}" for key, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("make", "num_tensors", "num_parameters", "expected"),
    [
        (id_projector, 4, 8_407_040, "6959865edab66353f3186107888b58eae558796f00a9c0c1d895c83e4eae5e3c"),
        (Resampler, 119, 74_750_080, "2b7c7fa323ace7cf078d534ca366a7c0322b5fc10d0a4a95a1d9294641a0a791"),
    ],
)
def test_the_networks_have_the_published_tensors(make: Callable[..., Any], num_tensors, num_parameters, expected) -> None:
    with torch.device("meta"):
        state = make(PUBLISHED).state_dict()
    assert len(state) == num_tensors
    assert sum(one.numel() for one in state.values()) == num_parameters
    assert digest({key: tuple(one.shape) for key, one in state.items()}) == expected


def test_the_bases_of_full_size_sdxl_are_the_published_ones(sdxl, tmp_path: Path) -> None:
    widths = [in_out(sdxl, one) for name in attentions(sdxl).values() for one in projection_paths(name)]
    shapes = basis_shapes(PUBLISHED, 8, widths)
    assert (len(attentions(sdxl)), len(widths), len(shapes)) == (140, 560, 1120)
    assert digest(shapes) == "91d696fd3b64e42df96580ceea2481aaca4701c0e6105c2f057e77dc40c684e9"
    path = tmp_path / "hyper_lora_modules.safetensors"
    num_bytes = write_hollow(path, shapes)
    assert num_bytes == 2_972_712_960
    check_bases(path, PUBLISHED, widths)


def test_the_module_list_of_full_size_sdxl_is_as_long_as_the_published_one(sdxl, tmp_path: Path) -> None:
    entries = {name: module_entry(sdxl, path) for name, path in attentions(sdxl).items()}
    path = tmp_path / "hyper_lora_modules.json"
    path.write_text(json.dumps(entries, indent=2))
    assert (len(entries), path.stat().st_size) == (140, 18_378)
    assert list(entries.items())[:2] == [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1", {"hidden_size": 640, "cross_attention_dim": None}),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2", {"hidden_size": 640, "cross_attention_dim": 2048}),
    ]
    assert len(read_paths(path, sdxl, queries=1120)) == 560


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A float16 safetensors file whose data takes no room on the disk; gives the number of bytes of the data."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def drop(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: one for name, one in state.items() if name != key}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("id_projector", "0.weight"),
        ("id_projector", "2.bias"),
        ("resampler", "latents"),
        ("resampler", "layers.1.attn3.to_out.0.weight"),
        ("resampler", "layers.0.attn1.to_q.weight"),
        ("hyper_lora_modules", "0.to_q.id_down_basis"),
        ("hyper_lora_modules", "33.to_out.id_up_basis"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_a_tensor_that_is_missing_left_over_or_misshapen_is_named(
    own_root: Path, unet, name: str, key: str, fault: str
) -> None:
    path = own_root / VARIANT / f"{name}.safetensors"
    state = load_file(path)
    if fault == "missing":
        del state[key]
    elif fault == "extra":
        key = f"{key}.more"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.cat([state[key], state[key]])
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        load_hyperlora(own_root, unet, variant="fidelity", device=CPU)
    assert str(path) in str(caught.value)
    # of two tensors whose shapes do not fit each other, either may be the one that is named
    assert (f"tensor {key} {fault}" if fault != "shape" else "has shape") in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "extra", "width"])
def test_a_module_that_the_unet_does_not_have_so_is_named(own_root: Path, unet, fault: str) -> None:
    path = own_root / VARIANT / "hyper_lora_modules.json"
    entries = json.loads(path.read_text())
    name = list(entries)[3]
    if fault == "missing":
        del entries[name]
    elif fault == "extra":
        name = f"{name}_more"
        entries[name] = {"hidden_size": 16, "cross_attention_dim": None}
    else:
        entries[name]["hidden_size"] += 1
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=name) as caught:
        load_hyperlora(own_root, unet, variant="fidelity", device=CPU)
    assert str(path) in str(caught.value)


def test_the_queries_must_be_eight_a_module(root: Path, unet) -> None:
    with pytest.raises(ValueError, match="34 modules need 272 queries, the resampler has 280"):
        read_paths(root / VARIANT / "hyper_lora_modules.json", unet, queries=280)


def test_a_whole_clip_is_taken_and_one_with_a_tensor_missing_is_not(tmp_path: Path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=tower | {"vocab_size": 99}, vision_config=tower | {"image_size": 28, "patch_size": 14})
    CLIPModel(config).save_pretrained(tmp_path)
    assert load_clip(tmp_path).config.hidden_size == 16
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file(drop(load_file(tmp_path / "model.safetensors"), key), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key):
        load_clip(tmp_path)


def test_each_basis_is_read_once_and_dropped_before_the_next(root: Path, hyperlora: HyperLoRA, lora: IdentityLoRA) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, read = 0, []
    with safe_open(root / VARIANT / "hyper_lora_modules.safetensors", framework="pt") as file:

        def get(key: str) -> Tensor:
            nonlocal most
            most = max(most, sum(one() is not None for one in alive))
            tensor = file.get_tensor(key)
            alive.append(weakref.ref(tensor))
            read.append(key)
            return tensor

        mix(get, [random(272, 8)], list(lora.factors))
    assert read == [key for index in range(136) for key in basis_keys(index)]
    assert most == 0


def test_making_a_lora_takes_a_small_part_of_the_bases_memory(sdxl, tmp_path: Path) -> None:
    paths = [path for name in attentions(sdxl).values() for path in projection_paths(name)]
    half_as_many = dataclasses.replace(PUBLISHED, coefficients=64)
    shapes = basis_shapes(half_as_many, 8, [in_out(sdxl, path) for path in paths])
    path = tmp_path / "hyper_lora_modules.safetensors"
    assert write_hollow(path, shapes) > 1_400_000_000
    taken_mb = []
    with safe_open(path, framework="pt") as file:

        def get(key: str) -> Tensor:
            taken_mb.append(resident_mb())
            return file.get_tensor(key)

        (made,) = mix(get, [random(1120, 64)], paths)
    assert sum(one.numel() for factors in made.factors.values() for one in factors) == 11_612_160  # 46 MB
    assert max(taken_mb) - taken_mb[0] < 150


def resident_mb() -> int:
    """What this process has in memory, but for pages of files, which the system may drop."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1000


# ---- the toy


def test_the_same_seed_gives_the_same_toy_and_leaves_the_random_state(unet, root: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    write_toy_hyperlora(tmp_path / "same", unet, seed=1)
    write_toy_hyperlora(tmp_path / "other", unet, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert len(names) == 11
    contents = {one: [(one / name).read_bytes() for name in names] for one in (root, tmp_path / "same", tmp_path / "other")}
    assert contents[root] == contents[tmp_path / "same"]
    assert contents[root] != contents[tmp_path / "other"]
