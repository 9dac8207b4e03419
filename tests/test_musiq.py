"""MUSIQ has the published keys, shapes and size, and computes what its description says, whatever its width.

Not compared with pyiqa, whose licence keeps it out of this project, nor run on the published weights.
Legend: B images, C=3 RGB, H W pixels, N tokens, P=32 side of a patch, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ipt2v.metrics.musiq import MUSIQ, MUSIQSize, build, hashed_positions, load_musiq, multi_scale_patches, same_padded
from ipt2v.metrics.toy_quality import TOY_MUSIQ, toy_musiq

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

SPAQ = MUSIQSize(stem_width=64, block_width=256, width=384, mlp_width=1152, num_blocks=14, num_heads=6)
# of the sorted lines "key 64,3,7,7" of musiq_spaq_ckpt-358bb6af.pth, joined by newlines;
# shared/facts/checkpoints/musiq_spaq.tsv
NUM_KEYS, KEYS_SHA256 = 248, "573a456ac47939387cf2100a76a4850d6b3740f077ce66093f8da5ef4e938aa0"
ENCODER = "transformer_encoder."


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return toy_musiq(3)


@pytest.fixture(scope="module")
def network(tensors: Tensors) -> MUSIQ:
    return build(tensors)


def images(height: int, width: int, num_images: int = 1, seed: int = 0) -> torch.Tensor:
    """Blobs of colour with some noise, 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_images, 3, 4, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


# ---- the layout


def test_the_published_size_has_the_published_keys_shapes_and_number_of_parameters() -> None:
    with torch.device("meta"):
        published = MUSIQ(SPAQ)
    lines = sorted(f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in published.state_dict().items())
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    assert sum(parameter.numel() for parameter in published.parameters()) == 27_125_825


def test_the_published_size_is_read_off_the_shapes() -> None:
    with torch.device("meta"):
        tensors = MUSIQ(SPAQ).state_dict()
    loaded = build(tensors)
    assert len(loaded.transformer_encoder.transformer) == 14
    assert loaded.transformer_encoder.transformer["encoderblock_0"].attention.num_heads == 6


@pytest.mark.parametrize(
    "size",
    [TOY_MUSIQ, MUSIQSize(stem_width=64, block_width=96, width=128, mlp_width=40, num_blocks=1, num_heads=2)],
)
def test_a_narrow_network_loads_through_the_same_code(save: Save, size: MUSIQSize) -> None:
    made = MUSIQ(size).eval()
    loaded = load_musiq(save(made.state_dict()))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.inference_mode():
        assert torch.equal(loaded(images(40, 50)), made(images(40, 50)))


@pytest.mark.parametrize(
    "key",
    [
        "conv_root.weight",
        "block1.gn_proj.bias",
        f"{ENCODER}cls",
        f"{ENCODER}scaleembed_input.scale_emb",
        f"{ENCODER}transformer.encoderblock_1.attention.out.bias",
        "head.weight",
    ],
)
def test_a_missing_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    path = save({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(ValueError, match=key) as error:
        load_musiq(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["extra.weight", f"{ENCODER}transformer.encoderblock_x.norm1.weight", "block2.conv1.weight"])
def test_an_unknown_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 unknown: {key}"):
        load_musiq(save(tensors | {key: torch.ones(2)}))


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        # a MUSIQ trained on AVA gives ten numbers
        ("head.weight", (10, 64), r"head\.weight \(found \(10, 64\), expected \(1, 64\)\)"),
        (f"{ENCODER}posembed_input.position_emb", (1, 144, 64), r"expected \(1, 100, 64\)"),
        (f"{ENCODER}scaleembed_input.scale_emb", (2, 64), r"expected \(3, 64\)"),
        ("embedding.weight", (64, 64), r"expected \(64, 4096\)"),
        (f"{ENCODER}cls", (1, 1, 65), "width 65, expected a multiple of 64"),
        (f"{ENCODER}cls", (64,), r"cls is of shape \(64,\)"),
        ("conv_root.weight", (33, 3, 7, 7), "stem of widths 33, 64, expected multiples of 32"),
    ],
)
def test_a_misshapen_key_is_named(tensors: Tensors, save: Save, key: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_musiq(save(tensors | {key: torch.ones(shape)}))


def test_the_toy_is_the_same_for_a_seed_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, same, other = toy_musiq(0), toy_musiq(0), toy_musiq(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv_root.weight"], other["conv_root.weight"])


# ---- the tokens


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (2, 3), (4, 7), (7, 12), (9, 16), (10, 10), (16, 9), (23, 40)])
def test_the_hash_is_the_nearest_of_ten_by_ten(num_rows: int, num_columns: int) -> None:
    grid = torch.arange(100.0).view(1, 1, 10, 10)
    expected = F.interpolate(grid, size=(num_rows, num_columns), mode="nearest").flatten().long()
    assert hashed_positions(num_rows, num_columns).tolist() == expected.tolist()


def test_the_hash_of_two_by_three_patches_is_known() -> None:
    assert hashed_positions(2, 3).tolist() == [0, 3, 6, 50, 53, 56]


@pytest.mark.parametrize(
    ("height", "width", "grids"),
    [
        (288, 512, ((4, 7), (7, 12), (9, 16))),  # 224x126, 384x216, as it is
        (295, 512, ((5, 7), (7, 12), (10, 16))),  # 224x129 (5 rows), 384x221
        (512, 512, ((7, 7), (12, 12), (16, 16))),
        (20, 30, ((5, 7), (8, 12), (1, 1))),  # enlarged
    ],
)
def test_three_scales_are_cut_into_patches(height: int, width: int, grids: tuple[tuple[int, int], ...]) -> None:
    patches_BNCPP, position_N, scale_N = multi_scale_patches(torch.zeros(2, 3, height, width))
    assert patches_BNCPP.shape == (2, sum(rows * columns for rows, columns in grids), 3, 32, 32)
    assert scale_N.tolist() == [scale for scale, (rows, columns) in enumerate(grids) for _ in range(rows * columns)]
    assert position_N.tolist() == [10 * (10 * i // r) + 10 * j // c for r, c in grids for i in range(r) for j in range(c)]


def test_the_patches_of_an_image_are_its_pixels_row_by_row_with_grey_around() -> None:
    image_BCHW = torch.rand(1, 3, 50, 97, generator=torch.Generator().manual_seed(0)) + 1  # 64x128 with a border
    patches_BNCPP, _, scale_N = multi_scale_patches(image_BCHW)
    patches = patches_BNCPP[0, scale_N == 2]
    canvas = torch.zeros(3, 64, 128)
    canvas[:, 7:57, 15:112] = image_BCHW[0]  # 14 rows and 31 columns too few, the smaller half first
    expected = [canvas[:, top : top + 32, left : left + 32] for top in (0, 32) for left in (0, 32, 64, 96)]
    assert torch.equal(patches, torch.stack(expected))


def test_a_scale_is_resized_without_antialias_and_without_clamp() -> None:
    """A checkerboard of single pixels at a quarter of its size: each sample falls on the same place of it, so all are equal."""
    board = ((torch.arange(896)[:, None] + torch.arange(896)) % 2).float() * 2 - 1
    patches_BNCPP, _, scale_N = multi_scale_patches(board.expand(1, 3, -1, -1))
    # bicubic half way between pixels weighs -3/32 19/32 19/32 -3/32 of four neighbours, which cancel out in both directions
    assert patches_BNCPP[0, scale_N == 0].abs().max() < 1e-6
    stripes = (torch.arange(896) % 4 < 2).float() * 2 - 1  # two on, two off: not cancelled, but overshot
    row = multi_scale_patches(stripes.expand(1, 3, 896, -1))[0][0, scale_N == 0]
    assert torch.allclose(row, torch.full_like(row, row[0, 0, 0, 0].item()), atol=1e-5)
    weights = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    assert row[0, 0, 0, 0].item() == pytest.approx(float(weights @ stripes[:4]), abs=1e-5)


def test_an_image_that_vanishes_is_refused() -> None:
    with pytest.raises(ValueError, match="image 1000x1: vanishes"):
        multi_scale_patches(torch.zeros(1, 3, 1, 1000))


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before", "after"), [(32, 7, 2, 2, 3), (16, 3, 2, 0, 1), (8, 3, 1, 1, 1), (8, 1, 1, 0, 0)]
)
def test_same_padding_puts_the_odd_pixel_last(side: int, kernel: int, stride: int, before: int, after: int) -> None:
    padded = same_padded(torch.ones(1, 1, side, side + 1 - 1), kernel, stride)
    assert padded.shape[-1] == side + before + after
    assert padded[0, 0, 0, 0] == (before == 0)
    assert padded[0, 0, -1, -1] == (after == 0)
    assert padded[0, 0, before : side + before, before : side + before].all()


# ---- the network, against a slow one that is written from the description, filling and masks included


@pytest.mark.parametrize(("height", "width"), [(70, 100), (130, 64), (20, 30)])
def test_the_score_is_that_of_the_description(network: MUSIQ, tensors: Tensors, height: int, width: int) -> None:
    image_BCHW = images(height, width, seed=height)
    exact = build({key: tensor.double() for key, tensor in tensors.items()})
    with torch.inference_mode():
        expected = naive_score(tensors, image_BCHW)
        assert exact(image_BCHW.double()).item() == pytest.approx(expected, abs=1e-8)
        assert network(image_BCHW).item() == pytest.approx(expected, abs=1e-3)
    assert expected != pytest.approx(50, abs=1e-2)


def naive_score(state: Tensors, image_BCHW: torch.Tensor) -> float:
    """Section 2 of the description in float64, patch by patch, with the filled-up tokens and their masks."""
    state = {key: tensor.double() for key, tensor in state.items()}
    x = 2 * (image_BCHW.double() - 0.5)
    tokens, masks = [], []
    for scale, (longer, filled) in enumerate(((224, 49), (384, 144), (None, 0))):
        before = len(tokens)
        for patch, position in naive_patches(x, longer):
            tokens.append(naive_token(state, patch, position, scale))
            masks.append(True)
        for _ in range(before + filled - len(tokens)):
            tokens.append(naive_token(state, torch.zeros(3, 32, 32, dtype=torch.float64), 0, 0))
            masks.append(False)
    x_ND = torch.stack([state[f"{ENCODER}cls"][0, 0], *tokens])
    return naive_encoder(state, x_ND, torch.tensor([True, *masks])).item()


def naive_patches(x: torch.Tensor, longer: int | None) -> list[tuple[torch.Tensor, int]]:
    if longer:
        ratio = longer / max(x.shape[-2:])
        size = [round(n * ratio) for n in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    rows, columns = (math.ceil(n / 32) for n in x.shape[-2:])
    canvas = torch.zeros(3, rows * 32, columns * 32, dtype=x.dtype)
    top, left = (rows * 32 - x.shape[-2]) // 2, (columns * 32 - x.shape[-1]) // 2
    canvas[:, top : top + x.shape[-2], left : left + x.shape[-1]] = x[0]
    return [
        (canvas[:, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32], 10 * math.floor(10 * i / rows) + math.floor(10 * j / columns))
        for i in range(rows)
        for j in range(columns)
    ]


def naive_token(state: Tensors, patch: torch.Tensor, position: int, scale: int) -> torch.Tensor:
    def conv(x: torch.Tensor, key: str, stride: int, before: int, after: int) -> torch.Tensor:
        weight = state[f"{key}.weight"]
        rows = weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, correction=1, keepdim=True) + 1e-5)
        return F.conv2d(F.pad(x, (before, after, before, after)), rows.view_as(weight), stride=stride)

    def norm(x: torch.Tensor, key: str, eps: float) -> torch.Tensor:
        groups = x.view(32, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, correction=0, keepdim=True) + eps).sqrt()
        return groups.view_as(x) * state[f"{key}.weight"].view(1, -1, 1, 1) + state[f"{key}.bias"].view(1, -1, 1, 1)

    x = norm(conv(patch[None], "conv_root", 2, 2, 3), "gn_root", 1e-6).clamp(min=0)
    x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2)
    y = norm(conv(x, "block1.conv1", 1, 0, 0), "block1.gn1", 1e-4).clamp(min=0)
    y = norm(conv(y, "block1.conv2", 1, 1, 1), "block1.gn2", 1e-4).clamp(min=0)
    y = norm(conv(y, "block1.conv3", 1, 0, 0), "block1.gn3", 1e-4)
    y = (y + norm(conv(x, "block1.conv_proj", 1, 0, 0), "block1.gn_proj", 1e-4)).clamp(min=0)
    flat = torch.stack([y[0, :, i, j] for i in range(8) for j in range(8)]).flatten()
    token = state["embedding.weight"] @ flat + state["embedding.bias"]
    token = token + state[f"{ENCODER}posembed_input.position_emb"][0, position]
    return token + state[f"{ENCODER}scaleembed_input.scale_emb"][scale]


def naive_encoder(state: Tensors, x_ND: torch.Tensor, mask_N: torch.Tensor) -> torch.Tensor:
    def linear(x: torch.Tensor, key: str) -> torch.Tensor:
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{key}.weight"] + state[f"{key}.bias"]

    for index in range(TOY_MUSIQ.num_blocks):
        key = f"{ENCODER}transformer.encoderblock_{index}."
        y = norm(x_ND, f"{key}norm1")
        parts = (linear(y, f"{key}attention.{name}").split(64, dim=1) for name in ("query", "key", "value"))
        outs = []
        for q, k, v in zip(*parts, strict=True):
            logits = (q @ k.T / 8).masked_fill(~(mask_N[:, None] & mask_N), -1000)
            outs.append(logits.softmax(1) @ v)
        x_ND = x_ND + linear(torch.cat(outs, 1), f"{key}attention.out")
        y = linear(norm(x_ND, f"{key}norm2"), f"{key}mlp.fc1")
        x_ND = x_ND + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), f"{key}mlp.fc2")
    return linear(norm(x_ND[0], f"{ENCODER}encoder_norm"), "head")


def test_two_heads_split_the_width() -> None:
    """One block of two heads, against torch's own attention."""
    size = MUSIQSize(stem_width=32, block_width=32, width=128, mlp_width=8, num_blocks=1, num_heads=2)
    torch.manual_seed(0)
    attention = MUSIQ(size).transformer_encoder.transformer["encoderblock_0"].attention
    theirs = torch.nn.MultiheadAttention(128, 2, batch_first=True)
    parts = (attention.query, attention.key, attention.value)
    state = {
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    }
    theirs.load_state_dict({key: tensor.detach() for key, tensor in state.items()})
    x_BND = torch.randn(2, 5, 128)
    assert torch.allclose(attention(x_BND), theirs(x_BND, x_BND, x_BND)[0], atol=1e-6)


def test_a_batch_scores_what_its_images_score_one_by_one(network: MUSIQ) -> None:
    batch_BCHW = images(60, 80, num_images=3)
    with torch.inference_mode():
        together = network(batch_BCHW)
        alone = torch.cat([network(image[None]) for image in batch_BCHW])
    assert together.shape == (3,)
    assert torch.allclose(together, alone, atol=1e-4)
    assert together.std() > 1e-2
