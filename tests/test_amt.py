"""AMT-S loads the published layout and nothing else, and computes what the description says, stated here a second time.

Legend: B pairs, C channels, H W pixels, h w = an eighth of them, P = h*w places, 2 = x then y.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ipt2v.metrics.amt import AMT, AMTSize, UpdateSize, load_amt, make_amt, resize, warp
from ipt2v.metrics.toy_motion import TOY_AMT, toy_amt

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

AMT_S = AMTSize(
    feature_widths=(32, 64, 96),
    features=84,
    pyramid=(20, 32, 44, 56),
    decoders=(60, 96, 132, 112),
    side=20,
    update=UpdateSize(correlation=64, flow=(40, 20), motion=68, hidden=76),
    radius=3,
    num_hypotheses=3,
    comb=18,
)
# of the sorted lines "key 32x3x7x7 float32" of amt-s.pth, joined by newlines
NUM_KEYS, KEYS_SHA256 = 213, "e89d80231644b2bd1a4c54d66d67145214894b0c675570e3889fbdcea92ec36b"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> AMT:
    path = tmp_path_factory.mktemp("amt") / "amt-s.pth"
    torch.save(toy_amt(0), path)
    return load_amt(path, device=CPU)


def frames_BCHW(count: int = 3, height: int = 128, width: int = 144, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- loading


def test_amt_s_has_the_published_keys_shapes_and_number_of_parameters() -> None:
    with torch.device("meta"):
        network = AMT(AMT_S)
    lines = sorted(f"{key} {'x'.join(map(str, tensor.shape))} float32" for key, tensor in network.state_dict().items())
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_990_543
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_the_published_size_is_read_off_the_tensors() -> None:
    with torch.device("meta"):
        made = AMT(AMT_S)
    network = make_amt(made.state_dict())
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_990_543
    assert (network.radius, network.num_hypotheses) == (3, 3)


def test_the_toy_has_the_published_keys_and_is_the_same_for_a_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = (toy_amt(seed)["state_dict"] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        published = AMT(AMT_S).state_dict()
    assert {key: tensor.ndim for key, tensor in one.items()} == {key: tensor.ndim for key, tensor in published.items()}
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["comb_block.0.weight"], other["comb_block.0.weight"])


@pytest.mark.parametrize(("radius", "num_hypotheses"), [(1, 1), (3, 3), (4, 5)])
def test_a_network_of_any_width_loads_and_gives_the_same_frame(save: Save, radius: int, num_hypotheses: int) -> None:
    size = AMTSize(
        feature_widths=(4, 8, 12),
        features=5,
        pyramid=(3, 4, 5, 6),
        decoders=(7, 8, 9, 10),
        side=2,
        update=UpdateSize(correlation=6, flow=(5, 4), motion=3, hidden=8),
        radius=radius,
        num_hypotheses=num_hypotheses,
        comb=4,
    )
    made = AMT(size).eval()
    loaded = load_amt(save({"state_dict": made.state_dict(), "epoch": 300}), device=CPU)
    assert not loaded.training
    first, second, _ = frames_BCHW().split(1)
    with torch.inference_mode():
        assert torch.equal(loaded(first, second), made(first, second))


@pytest.mark.parametrize(
    "key",
    ["feat_encoder.conv1.weight", "encoder.pyramid4.1.1.weight", "update2.flow_head.2.bias", "decoder1.convblock.2.weight"],
)
def test_a_missing_key_is_named(save: Save, key: str) -> None:
    path = save({"state_dict": {name: tensor for name, tensor in toy_amt(0)["state_dict"].items() if name != key}})
    with pytest.raises(ValueError, match=key) as error:
        load_amt(path, device=CPU)
    assert str(path) in str(error.value)


def test_an_unknown_key_is_named(save: Save) -> None:
    with pytest.raises(ValueError, match=r"amt\.pth: is not the AMT .* 1 unknown: encoder\.extra"):
        load_amt(save(toy_amt(0)["state_dict"] | {"encoder.extra": torch.ones(2)}), device=CPU)


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("decoder3.convblock.1.conv4.1.weight", (3,), r"found \(3,\), expected \(4,\)"),
        ("update3.convc1.weight", (12, 198, 1, 1), r"found \(12, 198, 1, 1\), expected \(12, 200, 1, 1\)"),
        ("update4.convc1.weight", (12, 198, 1, 1), "99 values of correlation"),
        ("update4.convc1.weight", (12, 199, 1, 1), "expected an even number"),
        ("decoder1.convblock.2.weight", (10, 23, 4, 4), "expected an even number and a multiple of 8"),
        ("comb_block.2.bias", (), r"found \(\), expected \(3,\)"),
    ],
)
def test_a_misshapen_key_is_refused(save: Save, key: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_amt(save({"state_dict": toy_amt(0)["state_dict"] | {key: torch.ones(shape)}}), device=CPU)


def test_raft_is_not_taken_for_amt(save: Save) -> None:
    with pytest.raises(ValueError, match=r"amt\.pth: key \S+ is missing"):
        load_amt(save({"fnet.conv1.weight": torch.ones(64, 3, 7, 7)}), device=CPU)


# ---- the warp


def test_the_warp_reads_at_the_pixel_plus_its_flow_and_the_edge_goes_on() -> None:
    image, flow = noise(2, 3, 9, 11), 4 * noise(2, 2, 9, 11, seed=1)
    found = warp(image, flow)
    outside = 0
    for one, y, x in itertools.product(range(2), range(9), range(11)):
        u, v = flow[one, :, y, x].tolist()
        outside += not (0 <= x + u <= 10 and 0 <= y + v <= 8)
        column, row = min(max(x + u, 0.0), 10.0), min(max(y + v, 0.0), 8.0)
        left, top = min(int(column), 9), min(int(row), 7)
        a, b = column - left, row - top
        cell = image[one, :, top : top + 2, left : left + 2]
        expected = (1 - b) * ((1 - a) * cell[:, 0, 0] + a * cell[:, 0, 1]) + b * ((1 - a) * cell[:, 1, 0] + a * cell[:, 1, 1])
        assert torch.allclose(found[one, :, y, x], expected, atol=1e-4)
    assert 20 < outside < 180


def test_the_warp_is_grid_sample_at_those_coordinates() -> None:
    image, flow = noise(1, 3, 16, 20), 3 * noise(1, 2, 16, 20, seed=1)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    grid = torch.stack([2 * (x + flow[:, 0]) / 19 - 1, 2 * (y + flow[:, 1]) / 15 - 1], -1)
    expected = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    assert torch.allclose(warp(image, flow), expected, atol=1e-4)


def test_a_whole_flow_moves_whole_pixels() -> None:
    image = noise(1, 3, 8, 10)
    flow = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 8, 10)
    assert torch.allclose(warp(image, flow)[..., 1:, :-2], image[..., :-1, 2:], atol=1e-5)


# ---- the description, section by section, on a bag of tensors: no module, no grid_sample but in the warp


class Stated:
    """AMT-S from its tensors, as the description numbers it."""

    def __init__(self, tensors: Tensors, radius: int) -> None:
        self.tensors, self.radius = tensors, radius

    def conv(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def prelu(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.where(x >= 0, x, x * self.tensors[f"{name}.weight"].view(1, -1, 1, 1))

    def features(self, x: torch.Tensor) -> torch.Tensor:  # 1.2
        x = instance_norm(self.conv(x, "feat_encoder.conv1", 2)).relu()
        for layer, block in itertools.product((1, 2, 3), (0, 1)):
            name, stride = f"feat_encoder.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = instance_norm(self.conv(x, f"{name}.conv1")).relu()
            y = instance_norm(self.conv(y, f"{name}.conv2", stride)).relu()
            y = instance_norm(self.conv(y, f"{name}.conv3")).relu()
            x = (y + (instance_norm(self.conv(x, f"{name}.downsample.0", 2)) if stride == 2 else x)).relu()
        return self.conv(x, "feat_encoder.conv2")

    def context(self, x: torch.Tensor) -> list[torch.Tensor]:  # 1.4
        maps = []
        for stage, (half, stride) in itertools.product((1, 2, 3, 4), ((0, 2), (1, 1))):
            name = f"encoder.pyramid{stage}.{half}"
            x = self.prelu(self.conv(x, f"{name}.0", stride), f"{name}.1")
            maps += [x] * half
        return maps

    def decode(self, level: int, *parts: torch.Tensor) -> torch.Tensor:  # 1.5
        name = f"decoder{level}.convblock"
        x = self.prelu(self.conv(torch.cat(parts, 1), f"{name}.0.0"), f"{name}.0.1")
        y, side = x, self.tensors[f"{name}.1.conv2.0.bias"].shape[0]
        for a, b in (("conv1", "conv2"), ("conv3", "conv4")):
            y = self.prelu(self.conv(y, f"{name}.1.{a}.0"), f"{name}.1.{a}.1").clone()
            y[:, -side:] = self.prelu(self.conv(y[:, -side:].clone(), f"{name}.1.{b}.0"), f"{name}.1.{b}.1")
        x = self.prelu(x + self.conv(y, f"{name}.1.conv5"), f"{name}.1.prelu")
        return F.conv_transpose2d(x, self.tensors[f"{name}.2.weight"], self.tensors[f"{name}.2.bias"], stride=2, padding=1)

    def look_up(self, volume_PPhw: list[torch.Tensor], centre_2hw: torch.Tensor) -> torch.Tensor:  # 1.3
        values = []
        for level, images_Phw in enumerate(volume_PPhw):
            for i, j in itertools.product(range(-self.radius, self.radius + 1), repeat=2):
                values.append(read(images_Phw, centre_2hw[0] / 2**level + i, centre_2hw[1] / 2**level + j))
        return torch.stack(values)[None]

    def update(
        self, level: int, net: torch.Tensor, flow: torch.Tensor, corr: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s, name = {4: 1, 3: 2, 2: 4}[level], f"update{level}"  # 1.7
        net = F.interpolate(net, scale_factor=1 / s, mode="bilinear") if s > 1 else net
        cor = leaky(self.conv(corr, f"{name}.convc1"))
        flo = leaky(self.conv(leaky(self.conv(flow, f"{name}.convf1")), f"{name}.convf2"))
        x = leaky(self.conv(torch.cat([cor, flo], 1), f"{name}.conv"))
        g = self.conv(leaky(self.conv(torch.cat([x, flow, net], 1), f"{name}.gru.0")), f"{name}.gru.2")
        dnet, dflow = (self.conv(leaky(self.conv(g, f"{name}.{h}.0")), f"{name}.{h}.2") for h in ("feat_head", "flow_head"))
        if s > 1:
            dnet, dflow = (F.interpolate(d, scale_factor=float(s), mode="bilinear") for d in (dnet, dflow))
        return dnet, s * dflow

    def __call__(self, first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
        m = torch.stack([first, second]).mean()  # 1.1
        first, second = first - m, second - m
        a, b = self.features(first)[0], self.features(second)[0]
        h, w = a.shape[1:]
        c = torch.einsum("cyx,cvu->yxvu", a, b) / len(a) ** 0.5
        there, back = halvings(c.reshape(h * w, h, w)), halvings(c.permute(2, 3, 0, 1).reshape(h * w, h, w))
        p = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")[::-1]).to(first)
        f0, f1 = self.context(first), self.context(second)
        flow0 = flow1 = feature = torch.empty(0)
        for level in (4, 3, 2):  # 1.9
            if level == 4:
                out = self.decode(4, f0[3], f1[3], torch.full((1, 1, h // 2, w // 2), t).to(first))
                flow0, flow1 = out[:, 0:2], out[:, 2:4]
            else:
                parts = feature, warp(f0[level - 1], flow0), warp(f1[level - 1], flow1), flow0, flow1
                out = self.decode(level, *parts)
                flow0, flow1 = (out[:, k : k + 2] + 2 * twice(flow) for k, flow in ((0, flow0), (2, flow1)))
            d = flow0.shape[-1] // w  # 1.8
            small0, small1 = (F.interpolate(f, scale_factor=1 / d, mode="bilinear") / d if d > 1 else f for f in (flow0, flow1))
            corr = [self.look_up(there, p + small1[0] / t), self.look_up(back, p + small0[0] / (1 - t))]
            dnet, dflow = self.update(level, out[:, 4:], torch.cat([small0, small1], 1), torch.cat(corr, 1))
            flow0, flow1, feature = flow0 + dflow[:, 0:2], flow1 + dflow[:, 2:4], out[:, 4:] + dnet
        out = self.decode(1, feature, warp(f0[0], flow0), warp(f1[0], flow1), flow0, flow1)
        return self.merge((first, second), out, 2 * twice(flow0), 2 * twice(flow1), m)

    def merge(
        self, frames: tuple, out: torch.Tensor, flow0: torch.Tensor, flow1: torch.Tensor, m: torch.Tensor
    ) -> torch.Tensor:
        blends = []  # 1.10
        for k in range(3):
            mask = 1 / (1 + torch.exp(-out[:, 12 + k : 13 + k]))
            one, two = (
                warp(f, out[:, o : o + 2] + g) for f, o, g in ((frames[0], 2 * k, flow0), (frames[1], 6 + 2 * k, flow1))
            )
            blends.append(mask * one + (1 - mask) * two + m + out[:, 15 + 3 * k : 18 + 3 * k])
        last = self.prelu(self.conv(torch.cat(blends, 1), "comb_block.0"), "comb_block.1")
        return ((blends[0] + blends[1] + blends[2]) / 3 + self.conv(last, "comb_block.2")).clamp(0, 1)


def instance_norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


def leaky(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, x, 0.1 * x)


def twice(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


def halvings(images_Phw: torch.Tensor) -> list[torch.Tensor]:
    levels = [images_Phw]
    for _ in range(3):
        h, w = (side // 2 for side in levels[-1].shape[1:])
        levels.append(levels[-1][:, : 2 * h, : 2 * w].reshape(-1, h, 2, w, 2).mean((2, 4)))
    return levels


def read(images_Phw: torch.Tensor, x_hw: torch.Tensor, y_hw: torch.Tensor) -> torch.Tensor:
    """From each place's own image, what lies at its (x, y); zero beyond the edge."""
    num, height, width = images_Phw.shape
    x, y = x_hw.flatten(), y_hw.flatten()
    total = torch.zeros_like(x)
    for dx, dy in itertools.product((0, 1), repeat=2):
        column, row = x.floor().long() + dx, y.floor().long() + dy
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        value = images_Phw[torch.arange(num), row.clamp(0, height - 1), column.clamp(0, width - 1)]
        total += inside * value * (1 - (x - column).abs()) * (1 - (y - row).abs())
    return total.view(x_hw.shape)


@pytest.mark.parametrize(("time", "size"), [(0.5, (128, 144)), (0.3, (144, 128))])
def test_the_frame_is_the_one_of_the_description(time: float, size: tuple[int, int]) -> None:
    tensors = {key: tensor.double() for key, tensor in toy_amt(3)["state_dict"].items()}
    first, second = (smooth(frame).double() for frame in frames_BCHW(2, *size, seed=3).split(1))
    with torch.inference_mode():
        found = make_amt(tensors)(first, second, time=time)
        expected = Stated(tensors, TOY_AMT.radius)(first, second, time)
    assert ((found > 0) & (found < 1)).float().mean() > 0.9
    # in float64, so that even the faintest of the toy's parts cannot be wrong unseen
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def smooth(frame_BCHW: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(frame_BCHW, (4, 4, 4, 4), mode="reflect"), 9, stride=1)


# ---- the network


def test_the_new_frame_has_the_size_of_the_others_and_is_in_range(network: AMT) -> None:
    with torch.inference_mode():
        middle = network(*frames_BCHW(2, 144, 176).split(1))
    assert middle.shape == (1, 3, 144, 176)
    assert 0 <= middle.min() < middle.max() <= 1


def test_a_batch_of_pairs_gives_the_frame_of_each_pair_alone(network: AMT) -> None:
    frames = frames_BCHW(4)
    with torch.inference_mode():
        together = network(frames[:-1], frames[1:])
        alone = torch.cat([network(frames[i : i + 1], frames[i + 1 : i + 2]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_frame_is_the_same_bit_for_bit_each_time(network: AMT) -> None:
    first, second, third = frames_BCHW().split(1)
    with torch.inference_mode():
        middle = network(first, second)
        network(second, third)
        assert torch.equal(network(first, second), middle)
        assert torch.equal(network(first, second, time=0.5), middle)
        assert not torch.equal(network(first, second, time=0.25), middle)


@pytest.mark.parametrize("size", [(128, 136), (112, 128), (128, 64)])
def test_frames_that_divide_by_zero_or_leave_a_rest_are_refused(network: AMT, size: tuple[int, int]) -> None:
    height, width = size
    with pytest.raises(ValueError, match=f"frames of {width}x{height}: expected multiples of 16, at least 128"):
        network(*frames_BCHW(2, height, width).split(1))


def test_resizing_by_one_changes_nothing() -> None:
    x = noise(1, 2, 5, 6)
    assert torch.equal(resize(x, 1), x)
    assert torch.equal(resize(x, 1 / 1), x)
