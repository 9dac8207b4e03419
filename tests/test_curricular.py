"""The IR-101 of CurricularFace has the published keys, shapes and size, and computes what its description says.

Not compared with TFace's code, nor run on the published weights. Legend: B faces, C=3 RGB, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ipt2v.metrics.curricular import CurricularFace, FaceSize, build, embed_faces, load_curricular
from ipt2v.metrics.toy_quality import TOY_FACE, toy_curricular

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

IR_101 = FaceSize(stem_width=64, widths=(64,) * 3 + (128,) * 13 + (256,) * 30 + (512,) * 3, out_width=512)
# of the sorted lines "key 64,3,3,3" of glint360k_curricular_face_r101_backbone.bin, joined by newlines;
# shared/facts/checkpoints/curricularface_ir101.tsv
NUM_KEYS, KEYS_SHA256 = 917, "dd0327d19afa8c821651aad07d7540add8b5ea316f0663cbddb9e809992dc4cb"
NUM_VALUES, NUM_PARAMETERS = 65_220_569, 65_150_912  # with statistics and counters, and without


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return toy_curricular(5)


@pytest.fixture(scope="module")
def network(tensors: Tensors) -> CurricularFace:
    return build({key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")})


def faces(num_faces: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (num_faces, 112, 112, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_published_size_has_the_published_keys_shapes_and_number_of_values() -> None:
    with torch.device("meta"):
        published = CurricularFace(IR_101)
    state = published.state_dict()
    lines = sorted(f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in state.items())
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    assert sum(tensor.numel() for tensor in state.values()) == NUM_VALUES
    assert sum(parameter.numel() for parameter in published.parameters()) == NUM_PARAMETERS


def test_the_published_size_is_read_off_the_shapes_and_halves_at_units_0_3_16_46() -> None:
    with torch.device("meta"):
        state = CurricularFace(IR_101).state_dict()
    loaded = build({key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")})
    assert [index for index, unit in enumerate(loaded.body) if unit.stride == 2] == [0, 3, 16, 46]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("size", [TOY_FACE, FaceSize(stem_width=3, widths=(2, 2, 5, 4, 6, 6), out_width=7)])
def test_a_narrow_network_loads_through_the_same_code(save: Save, size: FaceSize, prefix: str) -> None:
    made = CurricularFace(size).eval()
    loaded = load_curricular(save({prefix + key: tensor for key, tensor in made.state_dict().items()}))
    assert not loaded.training
    assert torch.equal(embed_faces(loaded, faces()), embed_faces(made, faces()))


def test_the_counters_of_batch_norms_may_be_left_out(save: Save, tensors: Tensors, network: CurricularFace) -> None:
    bare = load_curricular(save({key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}))
    assert torch.equal(embed_faces(bare, faces()), embed_faces(network, faces()))


@pytest.mark.parametrize(
    "key",
    ["input_layer.2.weight", "body.0.res_layer.3.weight", "body.1.shortcut_layer.1.running_var", "output_layer.4.running_mean"],
)
def test_a_missing_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 missing: {key}"):
        load_curricular(save({name: tensor for name, tensor in tensors.items() if name != key}))


@pytest.mark.parametrize("key", ["body.0.shortcut_layer.0.weight", "output_layer.4.weight", "body.2.extra"])
def test_an_unknown_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 unknown: {key}"):
        load_curricular(save(tensors | {key: torch.ones(2)}))


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("output_layer.3.weight", (16, 10), r"found \(16, 10\), expected \(16, 490\)"),
        ("body.2.res_layer.4.weight", (6, 6, 1, 1), r"expected \(6, 6, 3, 3\)"),
        ("body.1.res_layer.1.weight", (4, 4, 3, 3), "of another shape"),
        ("body.4.res_layer.1.weight", (8, 8, 3, 3), "units of 3 widths in a row, expected 4"),
    ],
)
def test_a_misshapen_key_is_named(tensors: Tensors, save: Save, key: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_curricular(save(tensors | {key: torch.ones(shape)}))


def test_a_missing_unit_is_no_smaller_network(tensors: Tensors, save: Save) -> None:
    with pytest.raises(ValueError, match=r"body\.2\."):
        load_curricular(save({key: tensor for key, tensor in tensors.items() if not key.startswith("body.2.")}))


def test_the_embedding_is_that_of_the_description(network: CurricularFace, tensors: Tensors) -> None:
    x = (faces().permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    expected = naive_embedding({key: value.double() for key, value in tensors.items()}, x)
    with torch.inference_mode():
        found = network(x.float())
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1
    assert torch.allclose(embed_faces(network, faces()), F.normalize(found, dim=1))


def naive_embedding(state: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Section 4 of the description in float64, straight from the tensors."""

    def norm(x: torch.Tensor, key: str) -> torch.Tensor:
        columns = (1, -1, *[1] * (x.ndim - 2))
        mean, var = (state[f"{key}.running_{name}"].view(columns) for name in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * state[f"{key}.weight"].view(columns) + state[f"{key}.bias"].view(columns) if f"{key}.weight" in state else x

    def slope(x: torch.Tensor, key: str) -> torch.Tensor:
        return torch.where(x > 0, x, x * state[f"{key}.weight"].view(1, -1, 1, 1))

    x = slope(norm(F.conv2d(x, state["input_layer.0.weight"], padding=1), "input_layer.1"), "input_layer.2")
    sides = []
    for index, stride in enumerate((2, 2, 1, 2, 2)):
        key = f"body.{index}.res_layer."
        y = F.conv2d(norm(x, f"{key}0"), state[f"{key}1.weight"], padding=1)
        y = slope(norm(y, f"{key}2"), f"{key}3")
        y = norm(F.conv2d(y, state[f"{key}4.weight"], padding=1, stride=stride), f"{key}5")
        kept = x[:, :, ::stride, ::stride]
        if index in (1, 3, 4):  # where the width changes
            kept = norm(F.conv2d(kept, state[f"body.{index}.shortcut_layer.0.weight"]), f"body.{index}.shortcut_layer.1")
        x = y + kept
        sides.append(x.shape[-1])
    assert sides == [56, 28, 28, 14, 7]
    flat = norm(x, "output_layer.0").flatten(1)
    return norm(flat @ state["output_layer.3.weight"].T + state["output_layer.3.bias"], "output_layer.4")


def test_a_batch_embeds_what_its_faces_embed_one_by_one(network: CurricularFace) -> None:
    batch = faces(3)
    together, alone = embed_faces(network, batch), torch.cat([embed_faces(network, one[None]) for one in batch])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 112, 112, 3), torch.zeros(1, 3, 112, 112, dtype=torch.uint8)])
def test_what_is_not_an_aligned_face_is_refused(network: CurricularFace, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[B,112,112,3\]"):
        embed_faces(network, wrong)
