"""The cut-out network is HRNetV2 as published, whatever layout its file has, and the mask is what the network says.

Legend: B batch, C channels, H W pixels, h w cells of the network's output, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file
from skimage.filters import gaussian
from skimage.measure import label

from ipt2v.models.hrnet.checkpoint import load_network
from ipt2v.models.hrnet.cutout import feathered, largest_part, load_cutter, make_cutter, on_white, person_score
from ipt2v.models.hrnet.network import HighResolutionModule, HRNet, HRNetSize
from ipt2v.models.hrnet.toy import TOY_SIZE, toy_state_dict

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
Save = Callable[[Tensors, str], Path]

W48 = HRNetSize(
    stem_width=64,
    bottleneck_width=64,
    num_bottlenecks=4,
    widths=(48, 96, 192, 384),
    num_modules=(1, 4, 3),
    num_blocks=((4, 4), (4, 4, 4), (4, 4, 4, 4)),
    num_classes=20,
)
# of the sorted lines "key 64,3,3,3" of the published HRNetV2-W48 for LIP, joined by newlines
W48_NUM_KEYS, W48_KEYS_SHA256 = 1839, "29f9f3d6db36e8a8addbc99d437243492ef8c959af0b0a87c02f44fb58fbe486"


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(tensors: object, name: str = "hrnet_torch11.pth") -> Path:
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="module")
def plain() -> Tensors:
    """Toy weights as the official network itself has them: no prefixes, gammas as they act."""
    tensors = {key.removeprefix("model."): tensor for key, tensor in toy_state_dict(7).items()}
    tensors |= {key: tensors[key].abs() + 1e-5 for key in gammas(tensors)}
    return tensors | {"last_layer.0.bias": torch.zeros(120)}  # mmseg has none there


@pytest.fixture(scope="module")
def network(plain: Tensors, tmp_path_factory: pytest.TempPathFactory) -> HRNet:
    path = tmp_path_factory.mktemp("hrnet") / "hrnet_torch11.pth"
    torch.save(plain, path)
    return load_network(path)


def gammas(tensors: Tensors) -> list[str]:
    return [key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 1]


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth blobs of colour."""
    coarse = np.random.default_rng(seed).random((1, 3, 5, 7), dtype=np.float32)
    smooth = F.interpolate(torch.from_numpy(coarse), size=(height, width), mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def noise_BCHW(size: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- the network


def test_w48_has_the_published_keys_shapes_and_number_of_parameters() -> None:
    with torch.device("meta"):
        w48 = HRNet(W48, align_corners=False)
    lines = sorted(f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in w48.state_dict().items())
    assert len(lines) == W48_NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == W48_KEYS_SHA256
    assert sum(parameter.numel() for parameter in w48.parameters()) == 65_860_100


def test_the_size_is_read_off_the_file(save: Save) -> None:
    size = HRNetSize(
        stem_width=6,
        bottleneck_width=5,
        num_bottlenecks=3,
        widths=(3, 4, 7, 9),
        num_modules=(2, 1, 3),
        num_blocks=((1, 2), (2, 1, 1), (1, 1, 2, 3)),
        num_classes=21,
    )
    made = HRNet(size, align_corners=False).eval()
    loaded = load_network(save(made.state_dict()))
    assert loaded.num_classes == 21
    assert torch.equal(loaded(noise_BCHW()), made(noise_BCHW()))


def test_a_photo_of_473_pixels_gives_119_cells(network: HRNet) -> None:
    with torch.inference_mode():
        assert network(noise_BCHW(473)).shape == (1, 20, 119, 119)


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_module_sums_what_a_naive_loop_sums(align_corners: bool) -> None:
    torch.manual_seed(3)
    widths, sides = (4, 6, 8, 10), (17, 9, 5, 3)
    module = HighResolutionModule(widths, (1, 1, 1, 1), align_corners=align_corners).eval()
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if key.endswith("running_var") else torch.randn_like(tensor) * 0.3)
    maps = [torch.randn(2, width, side, side) for width, side in zip(widths, sides, strict=True)]
    with torch.no_grad():
        found = module(maps)
        expected = naive_module(module.state_dict(), maps, align_corners=align_corners)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def naive_module(state: Tensors, maps: list[torch.Tensor], *, align_corners: bool) -> list[torch.Tensor]:
    """Section 3.2 of the paper, straight from the tensors: no module of torch, no interpolate, no conv2d."""
    blocks = []
    for b, x in enumerate(maps):
        key = f"branches.{b}.0."
        y = naive_norm(state, f"{key}bn1", naive_convolution(x, state[f"{key}conv1.weight"], 1)).clamp(min=0)
        blocks.append((naive_norm(state, f"{key}bn2", naive_convolution(y, state[f"{key}conv2.weight"], 1)) + x).clamp(min=0))
    sums = []
    for i, to in enumerate(blocks):
        total = to.clone()
        for j, source in enumerate(blocks):
            key, y = f"fuse_layers.{i}.{j}.", source
            if j > i:
                y = naive_norm(state, f"{key}1", naive_convolution(y, state[f"{key}0.weight"], 1))
                total += naive_bilinear(y, to.shape[-1], align_corners=align_corners)
            elif j < i:
                for k in range(i - j):
                    y = naive_norm(state, f"{key}{k}.1", naive_convolution(y, state[f"{key}{k}.0.weight"], 2))
                    y = y.clamp(min=0) if k < i - j - 1 else y
                total += y
        sums.append(total.clamp(min=0))
    return sums


def naive_convolution(x_BCHW: torch.Tensor, weight_OCkk: torch.Tensor, stride: int) -> torch.Tensor:
    kernel = weight_OCkk.shape[-1]
    side = (x_BCHW.shape[-1] + 2 * (kernel // 2) - kernel) // stride + 1
    patches = F.unfold(x_BCHW, kernel, padding=kernel // 2, stride=stride)
    return torch.einsum("ok,bkl->bol", weight_OCkk.flatten(1), patches).unflatten(2, (side, side))


def naive_norm(state: Tensors, key: str, x_BCHW: torch.Tensor) -> torch.Tensor:
    mean, var, gamma, beta = (state[f"{key}.{n}"].view(-1, 1, 1) for n in ("running_mean", "running_var", "weight", "bias"))
    return (x_BCHW - mean) / (var + 1e-5).sqrt() * gamma + beta


def naive_bilinear(x_BChh: torch.Tensor, side: int, *, align_corners: bool) -> torch.Tensor:
    size = x_BChh.shape[-1]
    matrix = torch.zeros(side, size)
    for i in range(side):
        at = i * (size - 1) / (side - 1) if align_corners else (i + 0.5) * size / side - 0.5
        at = min(max(at, 0), size - 1)
        low, high = int(at), min(int(at) + 1, size - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, high] += at - low
    return matrix @ x_BChh @ matrix.T


# ---- files


def as_torch11(plain: Tensors) -> Tensors:
    counts = {f"{key.removesuffix('.weight')}.num_batches_tracked": torch.tensor(5) for key in gammas(plain)}
    return {f"module.model.{key}": tensor for key, tensor in (plain | counts).items()} | {"loss.weight": torch.ones(20)}


def as_torch04(plain: Tensors) -> Tensors:
    """Toy 7 itself: its gammas are negative where chance wanted it, and |gamma| + 1e-5 is plain's."""
    file = {key.removeprefix("model."): tensor for key, tensor in toy_state_dict(7).items()}
    return {f"model.{key}": file[key] if key in gammas(plain) else tensor for key, tensor in plain.items()}


def as_ocr(plain: Tensors) -> Tensors:
    renamed = {key.replace("last_layer", "aux_head"): tensor for key, tensor in plain.items()}
    names = ("conv3x3_ocr.0.weight", "ocr_distri_head.conv_bn_dropout.0.weight", "ocr_gather_head.x", "cls_head.weight")
    return {f"model.{key}": tensor for key, tensor in (renamed | {name: torch.ones(3, 3, 1, 1) for name in names}).items()}


def as_mmseg(plain: Tensors) -> dict[str, object]:
    head = {"last_layer.0.": "convs.0.conv.", "last_layer.1.": "convs.0.bn.", "last_layer.3.": "conv_seg."}
    renamed = {f"backbone.{key}": tensor for key, tensor in plain.items() if not key.startswith("last_layer.")}
    for old, new in head.items():
        renamed |= {key.replace(old, f"decode_head.{new}"): plain[key] for key in plain if key.startswith(old)}
    del renamed["decode_head.convs.0.conv.bias"]
    return {"meta": {"CLASSES": ("background", "person"), "epoch": 1}, "state_dict": renamed}


LAYOUTS = {
    "hrnet_lip_5583_torch04.pth": as_torch04,
    "hrnet_cs_8090_torch11.pth": as_torch11,
    "hrnet_ocr_torch11.pth": as_ocr,
    "fcn_hr48_512x512_40k_voc12aug.pth": as_mmseg,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_weights_in_any_layout_are_the_same_network(network: HRNet, plain: Tensors, save: Save, name: str) -> None:
    loaded = load_network(save(LAYOUTS[name](plain), name))
    assert torch.equal(loaded(noise_BCHW()), network(noise_BCHW()))


def test_a_file_of_an_old_torch_is_read(network: HRNet, plain: Tensors, tmp_path: Path) -> None:
    torch.save(as_torch04(plain), tmp_path / "old_torch04.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_network(tmp_path / "old_torch04.pth")(noise_BCHW()), network(noise_BCHW()))


def test_safetensors_are_read_too(network: HRNet, plain: Tensors, tmp_path: Path) -> None:
    save_file(as_torch04(plain), tmp_path / "hrnet_lip_torch04.safetensors")
    assert torch.equal(load_network(tmp_path / "hrnet_lip_torch04.safetensors")(noise_BCHW()), network(noise_BCHW()))


def test_the_toy_has_gammas_of_either_sign_that_matter(network: HRNet, plain: Tensors, save: Save) -> None:
    file = as_torch04(plain)
    negative = [key for key in gammas(file) if (file[key] < 0).any() and (file[key] > 0).any()]
    assert len(negative) > len(gammas(file)) / 2
    assert not torch.allclose(load_network(save(file, "unnamed.pth"))(noise_BCHW()), network(noise_BCHW()), atol=0.1)


def test_the_name_of_the_file_can_be_overruled(network: HRNet, plain: Tensors, save: Save) -> None:
    renamed = load_network(save(as_torch04(plain), "renamed.pth"), gamma="inplace_abn")
    misnamed = load_network(save(plain, "misnamed_torch04.pth"), gamma="as_is")
    assert torch.equal(renamed(noise_BCHW()), network(noise_BCHW()))
    assert torch.equal(misnamed(noise_BCHW()), network(noise_BCHW()))


def test_align_corners_changes_the_upsampling_inside(network: HRNet, plain: Tensors, save: Save) -> None:
    aligned = load_network(save(plain), align_corners=True)
    assert not torch.allclose(aligned(noise_BCHW()), network(noise_BCHW()), atol=1e-2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("key", ["stage3.0.fuse_layers.2.0.0.1.running_mean", "conv1.weight", "layer1.0.downsample.0.weight"])
def test_a_missing_key_is_named(plain: Tensors, save: Save, name: str, key: str) -> None:
    path = save(LAYOUTS[name]({k: v for k, v in plain.items() if k != key}), name)
    with pytest.raises(ValueError, match=key) as error:
        load_network(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("part", ["stage2.", "stage3.0.branches.1.", "stage4.0.branches.3.", "layer1.", "last_layer."])
def test_a_missing_part_is_no_smaller_network(plain: Tensors, save: Save, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        load_network(save({key: tensor for key, tensor in plain.items() if not key.startswith(part)}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_unknown_key_is_named(plain: Tensors, save: Save, name: str) -> None:
    path = save(LAYOUTS[name](plain | {"stage4.0.extra.weight": torch.ones(2, 2)}), name)
    with pytest.raises(ValueError, match=r"1 unknown: stage4\.0\.extra\.weight"):
        load_network(path)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("stage2.0.branches.1.0.conv2.weight", (16, 16, 1, 1), r"found \(16, 16, 1, 1\), expected \(16, 16, 3, 3\)"),
        ("last_layer.3.bias", (19,), r"found \(19,\), expected \(20,\)"),
        ("bn1.running_var", (), r"found \(\), expected \(64,\)"),
    ],
)
def test_a_misshapen_key_is_named(plain: Tensors, save: Save, name: str, key: str, shape: tuple[int, ...], text: str) -> None:
    path = save(LAYOUTS[name](plain | {key: torch.ones(shape)}), name)
    with pytest.raises(ValueError, match=f"{key} .{text}"):
        load_network(path)


@pytest.mark.parametrize("content", [torch.ones(3), {"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}])
def test_a_file_of_something_else_is_refused(save: Save, content: object) -> None:
    with pytest.raises(ValueError, match=r"hrnet_torch11\.pth: holds \w+, expected a state dict of tensors"):
        load_network(save(content))


def test_a_pickle_that_would_run_code_is_refused(save: Save) -> None:
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_network(save({"conv1.weight": Path("/")}))


@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors"])
def test_a_torn_file_is_refused(plain: Tensors, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(plain, path) if path.suffix == ".safetensors" else torch.save(plain, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{name}: cannot be read as tensors"):
        load_network(path)


def test_an_unknown_number_of_classes_is_refused(plain: Tensors, save: Save) -> None:
    two = plain | {"last_layer.3.weight": torch.ones(2, 120, 1, 1), "last_layer.3.bias": torch.ones(2)}
    with pytest.raises(ValueError, match="HRNet of 2 classes: unknown which are a person; known: 19, 20, 21, 59, 60, 150, 171"):
        load_cutter(save(two), device=CPU)


# ---- the cut-out


def biased(plain: Tensors, bias_K: torch.Tensor) -> Tensors:
    """A network whose scores are its last bias, whatever it sees."""
    return plain | {"last_layer.3.weight": torch.zeros(len(bias_K), 120, 1, 1), "last_layer.3.bias": bias_K}


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("num_classes_and_person", [(20, 1), (20, 13), (20, 19), (21, 15), (19, 12), (150, 12), (59, 36)])
def test_where_all_is_person_the_photo_stays(plain, save: Save, num_classes_and_person: tuple[int, int], soft: bool) -> None:
    num_classes, person = num_classes_and_person
    path = save(biased(plain, 200 * F.one_hot(torch.tensor(person), num_classes).float()))
    image_HWC = picture(277, 466)
    cut_out = make_cutter(load_network(path), device=CPU, soft=soft, input_size=64)(image_HWC)
    assert cut_out.found
    assert (cut_out.alpha_HW == 1).all()
    assert np.array_equal(cut_out.image_HWC, image_HWC)


@pytest.mark.parametrize("num_classes_and_other", [(20, 0), (21, 0), (21, 14), (19, 13), (171, 170)])
def test_where_nobody_is_found_the_photo_stays_and_says_so(plain, save: Save, num_classes_and_other: tuple[int, int]) -> None:
    num_classes, other = num_classes_and_other
    path = save(biased(plain, 200 * F.one_hot(torch.tensor(other), num_classes).float()))
    image_HWC = picture(277, 466)
    cut_out = load_cutter(path, device=CPU, input_size=64, largest_component=True, feather_pixels=2)(image_HWC)
    assert not cut_out.found
    assert (cut_out.alpha_HW == 1).all()
    assert np.array_equal(cut_out.image_HWC, image_HWC)


def test_the_mask_is_the_probability_of_all_person_classes_together(plain: Tensors, save: Save) -> None:
    bias_K = torch.randn(20, generator=torch.Generator().manual_seed(1))
    cut_out = load_cutter(save(biased(plain, bias_K)), device=CPU, input_size=64)(picture(50, 40))
    expected = 1 - bias_K.softmax(0)[0].item()
    assert np.abs(cut_out.alpha_HW - expected).max() < 1e-6
    expected_HWC = 255 * (1 - expected) + expected * picture(50, 40).astype(float)
    assert np.abs(cut_out.image_HWC - expected_HWC).max() <= 0.5 + 1e-4


def test_the_score_is_the_softmax_and_the_argmax(network: HRNet) -> None:
    with torch.inference_mode():
        logits_Khw = network(noise_BCHW())[0]
    soft_hw, hard_hw = (person_score(logits_Khw, range(1, 20), soft=soft) for soft in (True, False))
    assert torch.allclose(soft_hw.sigmoid(), 1 - logits_Khw.softmax(0)[0], atol=1e-6)
    assert torch.equal(hard_hw > 0, logits_Khw.argmax(0) != 0)
    assert 0 < (hard_hw > 0).float().mean() < 1


@pytest.mark.parametrize("size", [(277, 466), (466, 277), (473, 473), (16, 16), (1, 300), (1001, 37)])
@pytest.mark.parametrize("soft", [True, False])
def test_the_cut_out_has_the_size_of_the_photo_and_alpha_is_in_range(network: HRNet, size: tuple[int, int], soft: bool) -> None:
    image_HWC = picture(*size)
    cut = make_cutter(network, device=CPU, soft=soft, feather_pixels=1.5, largest_component=True, input_size=128)
    cut_out = cut(image_HWC)
    assert (cut_out.image_HWC.shape, cut_out.image_HWC.dtype) == (image_HWC.shape, np.uint8)
    assert (cut_out.alpha_HW.shape, cut_out.alpha_HW.dtype) == (image_HWC.shape[:2], np.float32)
    assert cut_out.alpha_HW.min() >= 0
    assert cut_out.alpha_HW.max() <= 1


def test_the_mask_lies_where_the_network_saw_the_person(network: HRNet) -> None:
    """Along both axes, and not flipped: compared with the network's own cells, drawn out to the photo."""
    image_HWC = picture(300, 200)
    alpha_HW = make_cutter(network, device=CPU, input_size=128)(image_HWC).alpha_HW
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1) / 255
    squashed = F.interpolate(((pixels_CHW - mean) / std)[None], size=(128, 128), mode="bilinear", antialias=True)
    with torch.inference_mode():
        person_hw = 1 - network(squashed).softmax(1)[0, 0]
    drawn_HW = F.interpolate(person_hw[None, None], size=(200, 300), mode="nearest")[0, 0].numpy()
    assert 0.1 < alpha_HW.mean() < 0.9
    assert np.corrcoef(alpha_HW.ravel(), drawn_HW.ravel())[0, 1] > 0.95


def test_a_hard_mask_is_the_soft_one_at_one_half_when_two_classes_count(plain: Tensors, save: Save) -> None:
    tensors = dict(plain)
    tensors["last_layer.3.bias"] = torch.full((20,), -1e4).index_fill(0, torch.tensor([0, 13]), 0.0)
    network = load_network(save(tensors))
    soft, hard = (make_cutter(network, device=CPU, soft=soft, input_size=128)(picture(90, 120)) for soft in (True, False))
    assert set(np.unique(hard.alpha_HW)) == {0.0, 1.0}
    assert np.array_equal(hard.alpha_HW == 1, soft.alpha_HW > 0.5)


def test_a_cut_out_is_feathered(network: HRNet) -> None:
    plain_HW, feathered_HW = (
        make_cutter(network, device=CPU, feather_pixels=pixels, input_size=128)(picture(90, 60)).alpha_HW for pixels in (0, 3)
    )
    assert np.array_equal(feathered_HW, feathered(torch.from_numpy(plain_HW), 3).numpy())
    assert np.abs(feathered_HW - plain_HW).max() > 0.05


def test_a_photo_is_cut_out_the_same_bit_for_bit(network: HRNet) -> None:
    cut = make_cutter(network, device=CPU, feather_pixels=1.0, largest_component=True, input_size=128)
    first, other, again = cut(picture(277, 466)), cut(picture(60, 50, seed=1)), cut(picture(277, 466))
    assert np.array_equal(first.image_HWC, again.image_HWC)
    assert np.array_equal(first.alpha_HW, again.alpha_HW)
    assert first.found
    assert other.found


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.float32)])
def test_what_is_not_rgb_is_refused(network: HRNet, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H,W,3\]"):
        make_cutter(network, device=CPU)(image)


@pytest.mark.parametrize("options", [{"feather_pixels": -1.0}, {"input_size": 31}])
def test_impossible_options_are_refused(network: HRNet, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} {next(iter(options.values()))}"):
        make_cutter(network, device=CPU, **options)


def test_the_toy_is_the_published_layout_and_the_same_for_a_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = toy_state_dict(0), toy_state_dict(0), toy_state_dict(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["model.conv1.weight"], other["model.conv1.weight"])
    assert not any(key.endswith("num_batches_tracked") for key in one)
    assert one["model.last_layer.3.weight"].shape == (TOY_SIZE.num_classes, sum(TOY_SIZE.widths), 1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_toy_finds_a_part_of_a_busy_picture(save: Save, seed: int) -> None:
    cut = load_cutter(save(toy_state_dict(seed), "toy_torch04.pth"), device=CPU, input_size=128)
    assert 0.02 < cut(picture(120, 90)).alpha_HW.mean() < 0.98


# ---- the mask's own operations


def test_on_white_is_exact_at_both_ends() -> None:
    image_HWC = picture(64, 48)
    alpha_HW = np.zeros((48, 64), np.float32)
    alpha_HW[:, 20:] = 1
    cut_out = on_white(image_HWC, alpha_HW)
    assert (cut_out.image_HWC[:, :20] == 255).all()
    assert np.array_equal(cut_out.image_HWC[:, 20:], image_HWC[:, 20:])


@pytest.mark.parametrize(("num_pixels", "found"), [(99, False), (100, True)])
def test_one_percent_of_the_picture_is_a_person(num_pixels: int, found: bool) -> None:
    alpha_HW = (np.arange(10_000) < num_pixels).astype(np.float32).reshape(100, 100)
    image_HWC = picture(100, 100)
    cut_out = on_white(image_HWC, alpha_HW)
    assert cut_out.found == found
    assert np.array_equal(cut_out.image_HWC, image_HWC) == (not found)


def test_a_faint_mask_finds_nobody() -> None:
    assert not on_white(picture(40, 30), np.full((30, 40), 0.3, np.float32)).found


@pytest.mark.parametrize("sigma", [0.5, 2.0, 15.0])
def test_a_feathered_mask_is_blurred_by_a_gaussian(sigma: float) -> None:
    mask_HW = np.zeros((70, 90), np.float32)
    mask_HW[20:50, 30:90] = 1
    found_HW = feathered(torch.from_numpy(mask_HW), sigma).numpy()
    assert np.abs(found_HW - gaussian(mask_HW, sigma, mode="nearest", truncate=4)).max() < 5e-3
    assert found_HW.max() <= 1
    assert found_HW.min() >= 0


def test_feathering_keeps_what_is_all_one_and_zero_pixels_change_nothing() -> None:
    assert torch.allclose(feathered(torch.ones(20, 30), 40.0), torch.ones(20, 30))
    mask_HW = torch.rand(20, 30)
    assert torch.equal(feathered(mask_HW, 0), mask_HW)


@given(arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_the_largest_part_is_the_one_of_scikit_image(mask_HW: np.ndarray) -> None:
    parts_HW = label(mask_HW, connectivity=2)
    found_HW = largest_part(mask_HW)
    if not mask_HW.any():
        assert not found_HW.any()
        return
    sizes = np.bincount(parts_HW.ravel())[1:]
    assert np.array_equal(found_HW, parts_HW == parts_HW[found_HW][0])
    assert found_HW.sum() == sizes.max()


@pytest.mark.parametrize("density", [0.3, 0.45, 0.6, 0.95])
def test_four_megapixels_of_noise_are_no_worst_case(density: float) -> None:
    """A search that walked from part to part would not end within the test's time."""
    mask_HW = np.random.default_rng(0).random((2000, 2000)) < density
    found_HW = largest_part(mask_HW)
    parts_HW = label(mask_HW, connectivity=2)
    assert found_HW.sum() == np.bincount(parts_HW.ravel())[1:].max()


def test_a_snake_is_one_part() -> None:
    mask_HW = np.zeros((119, 119), bool)
    mask_HW[::2] = True
    for row in range(1, 119, 2):
        mask_HW[row, 118 if row % 4 == 1 else 0] = True
    assert np.array_equal(largest_part(mask_HW), mask_HW)


def test_the_largest_component_alone_is_kept_with_its_fringe(plain: Tensors) -> None:
    """A network that only looks at the photo's colour: three white squares on black, of which the small ones must go."""
    image_HWC = np.zeros((473, 473, 3), np.uint8)
    image_HWC[40:300, 40:242] = 255
    image_HWC[330:430, 330:430] = 255
    image_HWC[100:120, 246:266] = 255  # one cell beside the large one: within its fringe
    alone, all_parts = (
        make_cutter(BrightIsPerson(), device=CPU, largest_component=keep)(image_HWC).alpha_HW for keep in (True, False)
    )
    assert all_parts[330:430, 330:430].mean() > 0.9
    assert alone[310:, 310:].max() < 1e-6
    assert all_parts[104:116, 249:262].min() > 0.9
    assert alone[:, 249:].max() < 1e-4
    assert np.abs(alone[:305, :240] - all_parts[:305, :240]).max() < 1e-3


class BrightIsPerson(HRNet):
    """Face where the picture is white, background where it is black."""

    def __init__(self) -> None:
        super().__init__(TOY_SIZE, align_corners=False)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        bright_Bhw = F.interpolate(image_BCHW, size=(119, 119), mode="bilinear", antialias=True).mean(1)
        logits_BKhw = torch.full((1, 20, 119, 119), -1e4)
        logits_BKhw[:, 0] = 0
        logits_BKhw[:, 13] = 8 * bright_Bhw
        return logits_BKhw
