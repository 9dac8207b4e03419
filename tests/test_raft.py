"""RAFT loads the published layout and nothing else, and each step is what its definition says, computed the slow way.

Legend: B pairs, C channels, H W pixels, h w cells.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ipt2v.metrics import correlation
from ipt2v.metrics.raft import RAFT, EncoderSize, RAFTSize, load_raft, make_raft, upsample
from ipt2v.metrics.toy_motion import TOY_RAFT, toy_raft
from ipt2v.models.strict_load import read_tensors

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

THINGS = RAFTSize(
    features=EncoderSize(widths=(64, 96, 128), out=256),
    context=EncoderSize(widths=(64, 96, 128), out=256),
    radius=4,
    correlation=(256, 192),
    flow=(128, 64),
    motion=126,
    hidden=128,
    flow_head=256,
    mask_head=256,
)
# of the sorted lines "key 64x3x7x7 float32" of raft-things.pth, joined by newlines
NUM_KEYS, KEYS_SHA256 = 179, "feb01b6bbbd30c6c39dfb9535f6e24e4204ff25c195e20fbf33c9cceb92754bb"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> RAFT:
    path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save(toy_raft(0), path)
    return load_raft(path, device=CPU)


def frames_BCHW(count: int = 3, height: int = 128, width: int = 136, seed: int = 0) -> torch.Tensor:
    return 255 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def key_lines(tensors: Tensors) -> list[str]:
    return sorted(
        f"{key} {'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
        for key, tensor in tensors.items()
    )


# ---- loading


def test_things_has_the_published_keys_shapes_and_number_of_parameters() -> None:
    with torch.device("meta"):
        network = RAFT(THINGS)
    lines = key_lines({f"module.{key}": tensor for key, tensor in network.state_dict().items()})
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_257_536


def test_the_published_size_is_read_off_the_tensors() -> None:
    with torch.device("meta"):
        tensors = RAFT(THINGS).state_dict()
    network = make_raft({key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")})
    assert network.size == THINGS
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_257_536


def test_the_toy_has_the_published_keys_and_is_the_same_for_a_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = toy_raft(0), toy_raft(0), toy_raft(1)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        published = RAFT(THINGS).state_dict()
    assert {key: (t.ndim, t.dtype) for key, t in one.items()} == {
        f"module.{k}": (t.ndim, t.dtype) for k, t in published.items()
    }
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["module.fnet.conv1.weight"], other["module.fnet.conv1.weight"])


@pytest.mark.parametrize("radius", [1, 3, 4])
def test_a_network_of_any_width_loads_and_gives_the_same_flow(save: Save, radius: int) -> None:
    size = RAFTSize(
        features=EncoderSize(widths=(4, 5, 6), out=7),
        context=EncoderSize(widths=(3, 5, 4), out=9),
        radius=radius,
        correlation=(8, 7),
        flow=(6, 5),
        motion=4,
        hidden=3,
        flow_head=5,
        mask_head=6,
    )
    made = RAFT(size).eval()
    loaded = load_raft(save({f"module.{key}": tensor for key, tensor in made.state_dict().items()}), device=CPU)
    assert loaded.size == size
    assert not loaded.training
    first, second, _ = frames_BCHW().split(1)
    with torch.inference_mode():
        assert torch.equal(loaded(first, second, num_iterations=2), made(first, second, num_iterations=2))


def test_the_prefix_and_the_bookkeeping_may_be_left_out(network: RAFT, save: Save) -> None:
    tensors = {k.removeprefix("module."): v for k, v in toy_raft(0).items() if not k.endswith("num_batches_tracked")}
    loaded = load_raft(save(tensors), device=CPU)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in tensors.items())


def test_half_precision_is_computed_in_float32(save: Save) -> None:
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in toy_raft(0).items()}
    assert all(parameter.dtype == torch.float32 for parameter in load_raft(save(halves), device=CPU).parameters())


def test_of_a_norm_stored_twice_the_one_in_the_shortcut_counts(save: Save) -> None:
    tensors = toy_raft(0)
    tensors["module.cnet.layer2.0.norm3.weight"] = torch.full((12,), 7.0)
    block = load_raft(save(tensors), device=CPU).cnet.get_submodule("layer2.0")
    assert torch.equal(block.get_parameter("downsample.1.weight"), tensors["module.cnet.layer2.0.downsample.1.weight"])
    assert block.get_submodule("norm3") is block.get_submodule("downsample.1")


def torchvision_name(key: str) -> str:
    """The table of ours and theirs, read the other way."""
    encoder, _, rest = key.partition(".")
    if encoder in ("fnet", "cnet"):
        parts = rest.split(".")
        if parts[0].startswith("layer") and not parts[2].startswith("downsample"):
            place = {"conv": "0", "norm": "1"}[parts[2][:-1]]
            parts[2:3] = [f"convnormrelu{parts[2][-1]}", place]
        elif parts[0] in ("conv1", "norm1"):
            parts[:1] = ["convnormrelu", "0" if parts[0] == "conv1" else "1"]
        elif parts[0] == "conv2":
            parts[:1] = ["conv"]
        return ".".join([{"fnet": "feature_encoder", "cnet": "context_encoder"}[encoder], *parts])
    block, part, name, *end = key.split(".")
    if part == "encoder":
        theirs = {"convc": "convcorr", "convf": "convflow"}.get(name[:-1], "") + name[-1] if name != "conv" else "conv"
        return ".".join([block, "motion_encoder", theirs, "0", *end])
    if part == "gru":
        return ".".join([block, "recurrent_block", f"convgru{name[-1]}", name[:-1], *end])
    if part == "mask":
        return ".".join(["mask_predictor", *(["convrelu", "0"] if name == "0" else ["conv"]), *end])
    return key


def test_torchvisions_names_load_as_the_same_network(network: RAFT, save: Save) -> None:
    tensors = {key.removeprefix("module."): tensor for key, tensor in toy_raft(0).items()}
    theirs = {torchvision_name(key): tensor for key, tensor in tensors.items() if ".norm3." not in key}
    assert {"feature_encoder.convnormrelu.0.weight", "context_encoder.layer2.0.convnormrelu2.1.running_var"} <= theirs.keys()
    loaded = load_raft(save(theirs), device=CPU).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in network.state_dict().items() if tensor.ndim)


@pytest.mark.parametrize(
    "key", ["fnet.conv1.bias", "cnet.layer2.0.norm3.running_mean", "update_block.gru.convz1.weight", "update_block.mask.2.bias"]
)
def test_a_missing_key_is_named(save: Save, key: str) -> None:
    path = save({name: tensor for name, tensor in toy_raft(0).items() if name != f"module.{key}"})
    with pytest.raises(ValueError, match=key) as error:
        load_raft(path, device=CPU)
    assert str(path) in str(error.value)


def test_an_unknown_key_is_named(save: Save) -> None:
    with pytest.raises(ValueError, match=r"raft\.pth: is not the RAFT .* 1 unknown: fnet\.extra\.weight"):
        load_raft(save(toy_raft(0) | {"module.fnet.extra.weight": torch.ones(2)}), device=CPU)


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("fnet.layer1.0.conv2.weight", (8, 8, 1, 1), r"found \(8, 8, 1, 1\), expected \(8, 8, 3, 3\)"),
        ("cnet.norm1.running_var", (), r"found \(\), expected \(8,\)"),
        ("update_block.mask.2.bias", (64,), r"found \(64,\), expected \(576,\)"),
        ("update_block.encoder.convc1.weight", (16, 99, 1, 1), r"99 values of correlation: expected 4\*\(2r\+1\)\^2"),
        ("update_block.gru.convz1.weight", (20, 1, 1, 5), "expected more than the 20 of the hidden state"),
        ("fnet.conv2.weight", (), r"fnet\.conv2\.weight is of shape \(\)"),
    ],
)
def test_a_misshapen_key_is_refused(save: Save, key: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_raft(save(toy_raft(0) | {f"module.{key}": torch.ones(shape)}), device=CPU)


@pytest.mark.parametrize("content", [torch.ones(3), {"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}])
def test_a_file_of_something_else_is_refused(save: Save, content: object) -> None:
    with pytest.raises(ValueError, match=r"raft\.pth: holds \w+, expected a state dict of tensors"):
        load_raft(save(content), device=CPU)


def test_a_pickle_that_would_run_code_is_refused(save: Save) -> None:
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_tensors(save({"module.fnet.conv1.weight": Path("/")}))


@pytest.mark.parametrize("num_bytes", [0, 10, 20_000])
def test_a_torn_file_is_refused(save: Save, num_bytes: int) -> None:
    path = save(toy_raft(0))
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"raft\.pth: cannot be read as tensors"):
        load_raft(path, device=CPU)


# ---- the steps


def bilinear(image_HW: torch.Tensor, x: float, y: float) -> float:
    """What lies at (x, y), 0 beyond the edge."""
    height, width = image_HW.shape
    left, top = int(x // 1), int(y // 1)
    value = 0.0
    for column, row in itertools.product((left, left + 1), (top, top + 1)):
        if 0 <= column < width and 0 <= row < height:
            value += float(image_HW[row, column]) * (1 - abs(x - column)) * (1 - abs(y - row))
    return value


@pytest.mark.parametrize("radius", [1, 2])
def test_the_lookup_is_the_correlation_around_the_place_level_by_level(radius: int) -> None:
    batch, channels, h, w = 2, 3, 17, 18  # of odd sizes the last row is left out, halving them
    first, second = noise(batch, channels, h, w), noise(batch, channels, h, w, seed=1)
    centre_B2hw = correlation.grid_2hw(first) + 3 * noise(batch, 2, h, w, seed=2)
    levels = correlation.pyramid(correlation.correlation_BPhw(first, second))
    found = correlation.look_up(levels, centre_B2hw, radius)
    side = 2 * radius + 1
    assert found.shape == (batch, 4 * side**2, h, w)
    for one, row, column in [(0, 0, 0), (0, 16, 17), (1, 5, 9), (1, 12, 3)]:
        image_hw = torch.einsum("c,chw->hw", first[one, :, row, column], second[one]) / channels**0.5
        x, y = centre_B2hw[one, :, row, column].tolist()
        for level in range(4):
            values = [
                bilinear(image_hw, x / 2**level + dx, y / 2**level + dy)
                for dx, dy in itertools.product(range(-radius, radius + 1), repeat=2)  # x is slow
            ]
            window = found[one, level * side**2 : (level + 1) * side**2, row, column]
            assert torch.allclose(window, torch.tensor(values), atol=1e-4), level
            height, width = image_hw.shape
            image_hw = image_hw[: height // 2 * 2, : width // 2 * 2].unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3))


def test_a_place_finds_its_own_feature_at_the_middle_of_the_window() -> None:
    features = noise(1, 32, 16, 16)
    levels = correlation.pyramid(correlation.correlation_BPhw(features, features))
    middle_hw = correlation.look_up(levels, correlation.grid_2hw(features)[None], 4)[0, 40]
    assert torch.allclose(middle_hw, features[0].square().sum(0) / 32**0.5, atol=1e-5)


def test_the_large_flow_is_a_weighted_mean_of_nine_cells_eight_times_as_long() -> None:
    flow, logits = noise(2, 2, 3, 4), noise(2, 576, 3, 4, seed=1)
    found = upsample(flow, logits)
    assert found.shape == (2, 2, 24, 32)
    for one, y, x in [(0, 0, 0), (0, 23, 31), (1, 10, 17), (1, 8, 7), (1, 15, 16)]:
        row, column, inside = y // 8, x // 8, 8 * (y % 8) + x % 8
        weights = logits[one, inside::64, row, column].softmax(0)
        expected = torch.zeros(2)
        for weight, (dy, dx) in zip(weights, itertools.product((-1, 0, 1), repeat=2), strict=True):
            if 0 <= row + dy < 3 and 0 <= column + dx < 4:
                expected += 8 * weight * flow[one, :, row + dy, column + dx]
        assert torch.allclose(found[one, :, y, x], expected, atol=1e-5)


def test_an_even_flow_stays_even_inside() -> None:
    flow = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 5, 6)
    inside = upsample(flow, noise(1, 576, 5, 6))[..., 8:-8, 8:-8]
    assert torch.allclose(inside, torch.tensor([12.0, -16.0]).view(1, 2, 1, 1).expand_as(inside), atol=1e-4)


# ---- the network


def test_the_flow_has_the_size_of_the_frames_and_is_finite(network: RAFT) -> None:
    with torch.inference_mode():
        flow = network(*frames_BCHW(2, 136, 160).split(1))
    assert flow.shape == (1, 2, 136, 160)
    assert flow.isfinite().all()
    assert flow.abs().max() > 0.1


def test_a_batch_of_pairs_gives_the_flow_of_each_pair_alone(network: RAFT) -> None:
    frames = frames_BCHW(4)
    with torch.inference_mode():
        together = network(frames[:-1], frames[1:])
        alone = torch.cat([network(frames[i : i + 1], frames[i + 1 : i + 2]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-3)


def test_the_flow_is_the_same_bit_for_bit_each_time(network: RAFT) -> None:
    first, second, third = frames_BCHW().split(1)
    with torch.inference_mode():
        flow = network(first, second)
        network(second, third)
        assert torch.equal(network(first, second), flow)
        assert not torch.equal(network(second, first), flow)


def test_twenty_iterations_are_the_default(network: RAFT) -> None:
    first, second, _ = frames_BCHW().split(1)
    with torch.inference_mode():
        assert torch.equal(network(first, second), network(first, second, num_iterations=20))
        assert not torch.equal(network(first, second), network(first, second, num_iterations=19))


@pytest.mark.parametrize("size", [(128, 132), (120, 128), (128, 64)])
def test_frames_that_divide_by_zero_or_leave_a_rest_are_refused(network: RAFT, size: tuple[int, int]) -> None:
    height, width = size
    with pytest.raises(ValueError, match=f"frames of {width}x{height}: expected multiples of 8, at least 128"):
        network(*frames_BCHW(2, height, width).split(1))


def test_the_toy_is_of_the_size_it_says(network: RAFT) -> None:
    assert network.size == TOY_RAFT
