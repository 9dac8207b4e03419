"""CLIP and LAION's head: the published keys, shapes and sizes, three layouts of one network, and the answers of transformers.

Not run on the published CLIP. Legend: B images, C=3 RGB, H W pixels, L length of a text, D width.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from ipt2v.metrics.aesthetic import load_head
from ipt2v.metrics.clip import CLIP, ImageSize, TextSize, TransformerSize, load_clip
from ipt2v.metrics.toy_quality import TOY_IMAGE, toy_clip, toy_head
from ipt2v.models.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

VIT_L_14 = (
    TextSize(
        transformer=TransformerSize(width=768, mlp_width=3072, num_blocks=12, num_heads=12),
        context=77,
        vocabulary=49_408,
        out_width=768,
    ),
    ImageSize(
        transformer=TransformerSize(width=1024, mlp_width=4096, num_blocks=24, num_heads=16), patch=14, grid=16, out_width=768
    ),
)
# of the sorted lines "key 64,3,7,7" of ViT-L-14.pt without its three numbers, joined by newlines;
# shared/facts/checkpoints/clip_vit_l14.tsv
NUM_KEYS, KEYS_SHA256 = 446, "05ef2487d55e888e760f2390de990004e3730b92e25b28bbdf7436ef088dd8fb"
HEAD = ROOT.parent / "shared" / "data" / "weights" / "sa_0_4_vit_l_14_linear.pth"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return toy_clip(2)


@pytest.fixture(scope="module")
def transformers_clip() -> CLIPModel:
    """Of other widths for text and image, two heads each."""
    tower = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    text = tower | {"intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 9, "eos_token_id": 29}
    vision = tower | {"intermediate_size": 40, "image_size": 15, "patch_size": 5, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=7)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check_same(loaded: CLIP, theirs: CLIPModel) -> None:
    images_BCHW = torch.randn(3, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    ids_BL = torch.tensor([[28, 5, 6, 29, 0, 0, 0, 0, 0], [28, 1, 2, 3, 4, 5, 6, 7, 29]])
    with torch.inference_mode():
        found, vision = loaded.encode_image(images_BCHW), theirs.vision_model(pixel_values=images_BCHW)
        assert torch.allclose(found, theirs.visual_projection(vision.pooler_output), rtol=1e-4, atol=1e-4)
        found, text = loaded.encode_text(ids_BL), theirs.text_model(input_ids=ids_BL)
        assert torch.allclose(found, theirs.text_projection(text.pooler_output), rtol=1e-4, atol=1e-4)


# ---- CLIP


def test_vit_l_14_has_the_published_keys_shapes_and_number_of_parameters() -> None:
    with torch.device("meta"):
        published = CLIP(*VIT_L_14)
    lines = sorted(f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in published.state_dict().items())
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    assert sum(parameter.numel() for parameter in published.parameters()) == 427_616_513


def test_hugging_faces_file_is_the_same_network(transformers_clip: CLIPModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {key: tensor.contiguous() for key, tensor in transformers_clip.state_dict().items()}
    save_file(state | {"vision_model.embeddings.position_ids": torch.arange(10)}, path)  # older files have these
    loaded = load_clip(path)
    assert loaded.visual.image_size == 15
    assert not loaded.training
    check_same(loaded, transformers_clip)


def test_openais_layout_is_the_same_network(transformers_clip: CLIPModel, tmp_path: Path, save: Save) -> None:
    save_file({key: tensor.contiguous() for key, tensor in transformers_clip.state_dict().items()}, tmp_path / "a.safetensors")
    state = load_clip(tmp_path / "a.safetensors").state_dict()
    numbers = {"input_resolution": torch.tensor(15), "context_length": torch.tensor(9), "vocab_size": torch.tensor(30)}
    check_same(load_clip(save(state | numbers)), transformers_clip)


def test_half_precision_is_computed_in_float32(tensors: Tensors, save: Save) -> None:
    loaded = load_clip(save(tensors))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    image_BCHW = torch.randn(1, 3, TOY_IMAGE.grid * TOY_IMAGE.patch, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert loaded.encode_image(image_BCHW).isfinite().all()


@pytest.mark.parametrize("key", ["logit_scale", "visual.proj", "visual.transformer.resblocks.1.ln_2.bias", "text_projection"])
def test_a_missing_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        load_clip(save({name: tensor for name, tensor in tensors.items() if name != key}))


def test_an_unknown_key_is_named(tensors: Tensors, save: Save) -> None:
    with pytest.raises(ValueError, match=r"1 unknown: visual\.extra"):
        load_clip(save(tensors | {"visual.extra": torch.ones(2)}))


def test_a_misshapen_key_is_named(tensors: Tensors, save: Save) -> None:
    with pytest.raises(ValueError, match=r"visual\.conv1\.weight \(found \(64, 3, 27, 28\), expected \(64, 3, 28, 28\)\)"):
        load_clip(save(tensors | {"visual.conv1.weight": torch.ones(64, 3, 27, 28)}))


def test_a_missing_half_of_hugging_faces_attention_is_named(transformers_clip: CLIPModel, tmp_path: Path) -> None:
    state = {key: tensor.contiguous() for key, tensor in transformers_clip.state_dict().items()}
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: visual\.transformer\.resblocks\.1\.attn\.in_proj_bias"):
        load_clip(tmp_path / "model.safetensors")


# ---- TorchScript archives, which OpenAI publishes


class Part(torch.nn.Module):
    """A tree of modules that holds tensors under given keys and computes nothing."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name in dict.fromkeys(key.split(".")[0] for key in tensors):
            if name in tensors:
                self.register_parameter(name, torch.nn.Parameter(tensors[name], requires_grad=False))
            else:
                below = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
                self.add_module(name, Part(below))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.fixture(scope="module")
def archive(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = Part(tensors)
    module.register_buffer("input_resolution", torch.tensor(224))
    module.register_buffer("context_length", torch.tensor(77))
    module.register_buffer("vocab_size", torch.tensor(len(tensors["token_embedding.weight"])))
    path = tmp_path_factory.mktemp("archive") / "ViT-L-14.pt"
    torch.jit.trace(module, torch.zeros(1)).save(path)
    return path


def test_an_archive_gives_the_tensors_that_torch_would_read(archive: Path, save: Save, tensors: Tensors) -> None:
    expected = torch.jit.load(archive).state_dict()
    found = read_torchscript(archive)
    assert is_torchscript(archive)
    assert not is_torchscript(save(tensors))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)


def test_an_archive_is_the_same_network_as_its_flat_dict(archive: Path, save: Save, tensors: Tensors) -> None:
    from_archive, from_dict = load_clip(archive).state_dict(), load_clip(save(tensors)).state_dict()
    assert from_archive.keys() == from_dict.keys()
    assert all(torch.equal(from_archive[key], from_dict[key]) for key in from_dict)


@pytest.mark.parametrize(
    "content", [pickle.dumps(Path("/")), pickle.dumps(print, protocol=2), b"", b"garbage", pickle.dumps(torch.nn.Linear)]
)
def test_an_archive_that_would_run_code_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/constants.pkl", pickle.dumps(()))
        file.writestr("evil/data.pkl", content)
    assert is_torchscript(path)
    with pytest.raises(ValueError, match=r"evil\.pt: cannot be read as a TorchScript archive"):
        load_clip(path)


def test_a_torn_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.pt"
    path.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"torn\.pt: cannot be read"):
        load_clip(path)


def test_an_archive_whose_storage_is_missing_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "lost.pt"
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(path, "w") as lost:
        for name in whole.namelist():
            if not name.endswith("/data/3"):
                lost.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match=r"lost\.pt: cannot be read as a TorchScript archive.*data/3"):
        load_clip(path)


# ---- the head


@pytest.mark.skipif(not HEAD.is_file(), reason=f"{HEAD} is not there")
def test_laions_head_loads() -> None:
    head = load_head(HEAD)
    assert head.weight.shape == (1, 768)
    assert head.bias.item() == pytest.approx(3.5294, abs=1e-4)
    assert hashlib.sha256(HEAD.read_bytes()).hexdigest() == "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"
    features_BD = torch.nn.functional.one_hot(torch.tensor([0, 767]), 768).float()
    assert torch.allclose(head(features_BD)[:, 0], head.weight[0, [0, 767]] + head.bias)


def test_a_narrow_head_loads_and_is_linear(save: Save) -> None:
    tensors = toy_head(0)
    head = load_head(save(tensors))
    assert not head.weight.requires_grad
    assert torch.equal(head(torch.zeros(2, head.in_features)), tensors["bias"].expand(2, 1))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"weight": torch.ones(1, 5)}, "1 missing: bias"),
        ({"weight": torch.ones(2, 5), "bias": torch.ones(2)}, r"weight \(found \(2, 5\), expected \(1, 5\)\)"),
        ({"weight": torch.ones(5), "bias": torch.ones(1)}, r"weight is of shape \(5,\)"),
        # the "improved" predictor, an MLP on the same features
        ({"layers.0.weight": torch.ones(4, 5), "layers.0.bias": torch.ones(4)}, "weight is missing"),
    ],
)
def test_another_head_is_refused(save: Save, tensors: Tensors, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_head(save(tensors))
