"""Inception-v3 has the published keys, shapes and size, computes what its paper's blocks say, and sees what ConsisID shows it.

Not run on the published weights, nor with torchvision, whose numbers are in the module's heading. Legend: B faces, C=3 RGB,
H W pixels, D width of a feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ipt2v.metrics.identity import consisid_distance
from ipt2v.metrics.inception import (
    Inception,
    InceptionSize,
    build,
    convolutions,
    inception_features,
    load_inception,
    pixels,
    read_size,
)
from ipt2v.metrics.toy_quality import TOY_INCEPTION, toy_inception

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

# of the sorted lines "key 32,3,3,3" of torchvision 0.28.0's inception_v3, joined by newlines
NUM_KEYS, KEYS_SHA256 = 580, "5c65816aa3922f73a4e197600313b9892665b8aa9d7fafc33bcb4a4973e9d378"
NUM_VALUES, NUM_PARAMETERS = 27_197_584, 27_161_264  # with statistics and counters, and without; both with the second head
# the paper's figures and tables, in the order of convolutions()
STEM = (32, 32, 64, 80, 192)
A = (64, 48, 64, 64, 96, 96)  # and the pool's
B = (384, 64, 96, 96)
D = (192, 320, 192, 192, 192, 192)
E = (320, 384, 384, 384, 448, 384, 384, 384, 192)
LAST_OF_E = ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")
TOY_WIDTH = 26  # of a feature of the toy


def c(width: int) -> tuple[int, ...]:
    return (192, width, width, 192, width, width, width, width, 192, 192)


PUBLISHED_WIDTHS = (*STEM, *A, 32, *A, 64, *A, 64, *B, *c(128), *c(160), *c(160), *c(192), *D, *E, *E, 128, 768)
PUBLISHED = InceptionSize(widths=dict(zip(convolutions(), PUBLISHED_WIDTHS, strict=True)), num_classes=1000)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return toy_inception(5)


@pytest.fixture(scope="module")
def network(tensors: Tensors) -> Inception:
    return build(without_counters(tensors))


def without_counters(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}


def faces(num_faces: int = 2, side: int = 24, seed: int = 0) -> torch.Tensor:
    shape = (num_faces, side, side, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---- the file


def test_the_published_size_has_the_published_keys_shapes_and_number_of_values() -> None:
    with torch.device("meta"):
        published = Inception(PUBLISHED)
    state = published.state_dict()
    lines = sorted(f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in state.items())
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    assert sum(tensor.numel() for tensor in state.values()) == NUM_VALUES
    assert sum(parameter.numel() for parameter in published.parameters()) == NUM_PARAMETERS


def test_the_published_size_is_read_off_the_shapes_and_gives_2048_numbers() -> None:
    with torch.device("meta"):
        state = Inception(PUBLISHED).state_dict()
        assert read_size(state) == PUBLISHED
        assert build(without_counters(state))(torch.empty(2, 3, 299, 299)).shape == (2, 2048)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "size", [TOY_INCEPTION, InceptionSize(widths={name: 2 + len(name) % 3 for name in convolutions()}, num_classes=3)]
)
def test_a_narrow_network_loads_through_the_same_code(save: Save, size: InceptionSize, prefix: str) -> None:
    made = Inception(size).eval()
    loaded = load_inception(save({prefix + key: tensor for key, tensor in made.state_dict().items()}))
    assert not loaded.training
    same_tensors(loaded, made)
    num_features = sum(size.widths[f"Mixed_7c.{name}"] for name in LAST_OF_E)
    assert loaded(torch.zeros(1, 3, 75, 75)).shape == (1, num_features)


def same_tensors(one: Inception, other: Inception) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in without_counters(one.state_dict()).items())


def test_the_counters_of_batch_norms_may_be_left_out(save: Save, tensors: Tensors, network: Inception) -> None:
    assert any(key.endswith("num_batches_tracked") for key in tensors)
    for state in (tensors, without_counters(tensors)):
        same_tensors(load_inception(save(state)), network)


@pytest.mark.parametrize(
    "key", ["Mixed_6a.branch3x3.bn.running_var", "AuxLogits.fc.weight", "fc.bias", "Conv2d_1a_3x3.bn.bias"]
)
def test_a_missing_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 missing: {key}"):
        load_inception(save({name: tensor for name, tensor in tensors.items() if name != key}))


@pytest.mark.parametrize("key", ["Mixed_7c.branch_pool.conv.weight", "AuxLogits.conv1.conv.weight", "fc.weight"])
def test_a_missing_key_that_tells_a_width_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"key {key} is missing"):
        load_inception(save({name: tensor for name, tensor in tensors.items() if name != key}))


@pytest.mark.parametrize("key", ["Conv2d_1a_3x3.conv.bias", "Mixed_6a.branch_pool.conv.weight", "Mixed_7d.branch1x1.bn.weight"])
def test_an_unknown_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 unknown: {key}"):
        load_inception(save(tensors | {key: torch.ones(2)}))


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("Mixed_6b.branch7x7_2.conv.weight", (6, 6, 7, 1), r"found \(6, 6, 7, 1\), expected \(\d+, \d+, 1, 7\)"),
        ("fc.weight", (7, 2048), rf"expected \(7, {TOY_WIDTH}\)"),
        ("Mixed_5c.branch1x1.conv.weight", (4, 4, 1, 1), "of another shape"),
    ],
)
def test_a_misshapen_key_is_named(tensors: Tensors, save: Save, key: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_inception(save(tensors | {key: torch.ones(shape)}))


# ---- what it computes


def test_the_resolutions_are_those_of_the_paper(network: Inception) -> None:
    sides: dict[str, int] = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: sides.update({name: output.shape[-1]}))
    network(torch.zeros(1, 3, 299, 299))
    expected = [149, 147, 147, 73, 71, 35, 35, 35, 17, 17, 17, 17, 17, 8, 8, 8]
    assert list(sides.values()) == expected
    assert "AuxLogits" not in sides and "fc" not in sides


class Plain:
    """Convolutions, norms and what is above 0, in float64, straight from the tensors of one block."""

    def __init__(self, tensors: Tensors, block: str) -> None:
        self.state = {key.removeprefix(f"{block}."): value.double() for key, value in tensors.items() if key.startswith(block)}

    def __call__(self, x: torch.Tensor, name: str, *, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> torch.Tensor:
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], stride=stride, padding=padding)
        weight, bias, mean, var = (
            self.state[f"{name}.bn.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 0.001).sqrt() * weight + bias).clamp(min=0)


def mean_pool(x: torch.Tensor) -> torch.Tensor:
    """Of 3x3 around each pixel; what lies outside counts as 0."""
    return F.conv2d(x, torch.full((x.shape[1], 1, 3, 3), 1 / 9, dtype=x.dtype), padding=1, groups=x.shape[1])


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Of 3x3, every second of them."""
    return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def block_a(plain: Plain, x: torch.Tensor) -> list[torch.Tensor]:
    five = plain(plain(x, "branch5x5_1"), "branch5x5_2", padding=(2, 2))
    double = plain(plain(x, "branch3x3dbl_1"), "branch3x3dbl_2", padding=(1, 1))
    double = plain(double, "branch3x3dbl_3", padding=(1, 1))
    return [plain(x, "branch1x1"), five, double, plain(mean_pool(x), "branch_pool")]


def block_b(plain: Plain, x: torch.Tensor) -> list[torch.Tensor]:
    double = plain(plain(x, "branch3x3dbl_1"), "branch3x3dbl_2", padding=(1, 1))
    return [plain(x, "branch3x3", stride=2), plain(double, "branch3x3dbl_3", stride=2), max_pool(x)]


def block_c(plain: Plain, x: torch.Tensor) -> list[torch.Tensor]:
    row, column = (0, 3), (3, 0)
    seven = plain(plain(plain(x, "branch7x7_1"), "branch7x7_2", padding=row), "branch7x7_3", padding=column)
    double = plain(x, "branch7x7dbl_1")
    for index, padding in ((2, column), (3, row), (4, column), (5, row)):
        double = plain(double, f"branch7x7dbl_{index}", padding=padding)
    return [plain(x, "branch1x1"), seven, double, plain(mean_pool(x), "branch_pool")]


def block_d(plain: Plain, x: torch.Tensor) -> list[torch.Tensor]:
    seven = plain(plain(x, "branch7x7x3_1"), "branch7x7x3_2", padding=(0, 3))
    seven = plain(plain(seven, "branch7x7x3_3", padding=(3, 0)), "branch7x7x3_4", stride=2)
    return [plain(plain(x, "branch3x3_1"), "branch3x3_2", stride=2), seven, max_pool(x)]


def block_e(plain: Plain, x: torch.Tensor) -> list[torch.Tensor]:
    three, double = plain(x, "branch3x3_1"), plain(plain(x, "branch3x3dbl_1"), "branch3x3dbl_2", padding=(1, 1))
    forks = [
        plain(one, f"{name}{side}", padding=padding)
        for one, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
        for side, padding in (("a", (0, 1)), ("b", (1, 0)))
    ]
    return [plain(x, "branch1x1"), *forks, plain(mean_pool(x), "branch_pool")]


@pytest.mark.parametrize(
    ("name", "expected", "sides"),
    [
        ("Mixed_5b", block_a, (9, 9)),
        ("Mixed_6a", block_b, (9, 4)),
        ("Mixed_6c", block_c, (9, 9)),
        ("Mixed_7a", block_d, (9, 4)),
        ("Mixed_7c", block_e, (8, 8)),
    ],
)
def test_a_block_is_that_of_its_description(
    network: Inception,
    tensors: Tensors,
    name: str,
    expected: Callable[[Plain, torch.Tensor], list[torch.Tensor]],
    sides: tuple[int, int],
) -> None:
    first = next(value for key, value in tensors.items() if key.startswith(name))  # takes in what the block does
    x = torch.randn(2, first.shape[1], sides[0], sides[0], generator=torch.Generator().manual_seed(3)).double()
    with torch.inference_mode():
        found = network[name](x.float())
    wanted = torch.cat(expected(Plain(tensors, name), x), dim=1)
    assert found.shape == wanted.shape and found.shape[2:] == (sides[1], sides[1])
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.1


def test_the_feature_is_the_mean_over_the_last_block(network: Inception, tensors: Tensors) -> None:
    """The stem by hand; the blocks one after the other, in their own code."""
    plain = Plain(tensors, "Conv2d")
    x = pixels(faces()).double()
    x = plain(plain(plain(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=(1, 1))
    x = max_pool(plain(plain(max_pool(x), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")).float()
    for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        x = network[f"Mixed_{name}"](x)
    found = inception_features(network, faces())
    assert found.shape == (2, TOY_WIDTH) and found.dtype == torch.float32
    assert torch.allclose(found, x.mean((2, 3)), rtol=1e-4, atol=1e-5)


# ---- what it sees


def test_a_grey_face_is_shown_as_consisid_shows_it() -> None:
    """0..1, then torchvision's transform_input, without ImageNet's normalisation before it."""
    found = pixels(torch.full((1, 50, 40, 3), 51, dtype=torch.uint8))
    assert found.shape == (1, 3, 299, 299)
    red, green, blue = (0.2 * 0.458 - 0.03, 0.2 * 0.448 - 0.088, 0.2 * 0.45 - 0.188)
    assert torch.allclose(found[0, :, 7, 9], torch.tensor([red, green, blue]), atol=1e-6)


def test_a_face_is_stretched_to_a_square_by_pil_with_antialias() -> None:
    """Stripes of single columns, of 1196 of them: grey, where without antialias they would stay stripes."""
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(598).view(1, 1, -1, 1).expand(1, 20, -1, 3)
    found = pixels(stripes)[0, 0, :, 1:-1]  # at the border one stripe more counts
    assert (found - (0.5 * 0.458 - 0.03)).abs().max() < 0.01
    wide = faces(1, 30)[:, :20]
    expected = np.array(Image.fromarray(wide[0].numpy()).resize((299, 299), Image.Resampling.BILINEAR))
    assert torch.allclose(pixels(wide)[0, 1], torch.from_numpy(expected)[..., 1] / 255 * 0.448 - 0.088, atol=1e-6)


def test_a_batch_gives_what_its_faces_give_one_by_one(network: Inception) -> None:
    batch = faces(2)
    together, alone = inception_features(network, batch), torch.cat([inception_features(network, one[None]) for one in batch])
    assert together.shape == (2, TOY_WIDTH)
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_toy_tells_one_face_from_another_and_the_distance_takes_its_features(network: Inception) -> None:
    dark, bright = (torch.full((1, 24, 24, 3), level, dtype=torch.uint8) for level in (30, 220))
    rows = inception_features(network, torch.cat([dark, bright, dark])).numpy()
    distance = consisid_distance(rows[0], [rows[1]])
    assert isinstance(distance, float) and distance > 0.1
    assert consisid_distance(rows[0], [None, rows[2]]) == pytest.approx(0, abs=1e-9)


def test_the_toy_is_the_same_every_time() -> None:
    one, other = toy_inception(5), toy_inception(5)
    assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 9, 9, 3), torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.zeros(0, 9, 9, 3, dtype=torch.uint8)],
)
def test_what_is_no_face_is_refused(network: Inception, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[B,H,W,3\]"):
        inception_features(network, wrong)
