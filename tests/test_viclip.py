"""ViCLIP and CLIP's tokens: the published keys, shapes and sizes; the towers against slow ones and transformers' CLIP.

Not compared with VBench's code, nor run on the published weights. The tokenizer with the published merges was once compared
by hand with OpenAI's own (openai-clip 1.0.1): equal ids for the 50 prompts of the 2025 test set and 20,005 odd texts.
Legend: B batch, T=8 frames, C=3 RGB, H W pixels, N tokens, L length of a text, D width.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ipt2v.metrics.clip import ImageSize, TextSize, TextTower, TransformerSize
from ipt2v.metrics.clip_tokens import Vocabulary, cleaned, content_ids, load_vocabulary, merged, token_ids, words
from ipt2v.metrics.toy_quality import TOY_IMAGE, TOY_VICLIP_TEXT, toy_merges, toy_viclip
from ipt2v.metrics.viclip import ViCLIP, VideoTower, build, load_viclip

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
Save = Callable[[object], Path]

VISION_L = TransformerSize(width=1024, mlp_width=4096, num_blocks=24, num_heads=16)
TEXT_L = TransformerSize(width=768, mlp_width=3072, num_blocks=12, num_heads=12)
IMAGE = ImageSize(transformer=VISION_L, patch=14, grid=16, out_width=768)
TEXT = TextSize(transformer=TEXT_L, context=32, vocabulary=49_408, out_width=768)
# of the sorted lines "key 64,3,7,7" of the model in ViClip-InternVid-10M-FLT.pth, joined by newlines;
# shared/facts/checkpoints/viclip.tsv
NUM_KEYS, KEYS_SHA256 = 447, "01fbdc09c19c92bad394f116c735198b0effda3e7104a994424589c90306aba6"

TINY = TransformerSize(width=128, mlp_width=24, num_blocks=2, num_heads=2)
TINY_IMAGE = ImageSize(transformer=TINY, patch=5, grid=3, out_width=7)
TINY_TEXT = TextSize(transformer=TINY, context=9, vocabulary=30, out_width=7)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return toy_viclip(2)["model"]


@pytest.fixture(scope="module")
def network(tensors: Tensors) -> ViCLIP:
    return build(tensors)


@pytest.fixture(scope="module")
def tiny() -> ViCLIP:
    """A network all of whose tensors matter, of small odd sizes and two heads."""
    made = ViCLIP(TINY_TEXT, TINY_IMAGE, 4)
    randomise(made)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("bpe") / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(toy_merges())
    return load_vocabulary(path)


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5 + 0.3 * noise)


# ---- the layout


def test_the_published_size_has_the_published_keys_shapes_and_number_of_parameters() -> None:
    with torch.device("meta"):
        published = ViCLIP(TEXT, IMAGE, 8)
    lines = sorted(f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in published.state_dict().items())
    assert len(lines) == NUM_KEYS
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256
    towers = (published.vision_encoder, published.text_encoder)
    assert [sum(parameter.numel() for parameter in tower.parameters()) for tower in towers] == [303_974_400, 123_615_744]


def test_the_published_size_is_read_off_the_shapes() -> None:
    with torch.device("meta"):
        loaded = build(ViCLIP(TEXT, IMAGE, 8).state_dict())
    assert (loaded.vision_encoder.image_size, loaded.vision_encoder.num_frames) == (224, 8)
    assert loaded.text_encoder.context == 32
    towers = (loaded.vision_encoder, loaded.text_encoder)
    assert [len(tower.transformer.resblocks) for tower in towers] == [24, 12]
    assert [tower.transformer.resblocks[0].attn.num_heads for tower in towers] == [16, 12]


@pytest.mark.parametrize("wrap", [lambda tensors: {"model": tensors}, lambda tensors: tensors], ids=["model", "bare"])
def test_a_narrow_network_loads_through_the_same_code(save: Save, tiny: ViCLIP, wrap: Callable[[Tensors], object]) -> None:
    loaded = load_viclip(save(wrap(tiny.state_dict())))
    frames_BTCHW, ids_BL = torch.randn(2, 4, 3, 15, 15), torch.randint(0, 30, (2, 9))
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded.encode_video(frames_BTCHW), tiny.encode_video(frames_BTCHW))
        assert torch.equal(loaded.encode_text(ids_BL), tiny.encode_text(ids_BL))


@pytest.mark.parametrize(
    "key",
    [
        "temp",
        "vision_encoder.class_embedding",
        "vision_encoder.temporal_positional_embedding",
        "vision_encoder.transformer.resblocks.1.attn.in_proj_bias",
        "text_encoder.ln_final.bias",
        "text_encoder.transformer.resblocks.0.mlp.c_fc.weight",
    ],
)
def test_a_missing_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    path = save({"model": {name: tensor for name, tensor in tensors.items() if name != key}})
    with pytest.raises(ValueError, match=key) as error:
        load_viclip(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["logit_scale", "vision_encoder.transformer.resblocks.0.attn.bias_k"])
def test_an_unknown_key_is_named(tensors: Tensors, save: Save, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 unknown: {key}"):
        load_viclip(save({"model": tensors | {key: torch.ones(2)}}))


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("vision_encoder.positional_embedding", (67, 64), "has 67 rows, expected one and those of a square"),
        ("vision_encoder.conv1.weight", (64, 3, 28, 28), r"conv1\.weight is of shape \(64, 3, 28, 28\)"),
        ("vision_encoder.conv1.weight", (64, 3, 2, 28, 28), r"expected \(64, 3, 1, 28, 28\)"),
        ("text_encoder.positional_embedding", (32, 65), r"found \(32, 65\), expected \(32, 64\)"),
        ("text_encoder.transformer.resblocks.0.mlp.c_fc.weight", (96, 60), "width 60, expected a multiple of 64"),
        ("temp", (1,), r"temp \(found \(1,\), expected \(\)\)"),
    ],
)
def test_a_misshapen_key_is_named(tensors: Tensors, save: Save, key: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_viclip(save({"model": tensors | {key: torch.ones(shape)}}))


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"model": {"epoch": 3}}])
def test_a_file_of_something_else_is_refused(save: Save, content: object) -> None:
    with pytest.raises(ValueError, match=r"viclip\.pth: holds \w+, expected a state dict of tensors"):
        load_viclip(save(content))


def test_a_pickle_that_would_run_code_is_refused(save: Save) -> None:
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_viclip(save({"model": {"temp": Path("/")}}))


# ---- the video tower


def test_the_video_tower_is_that_of_the_description(tiny: ViCLIP) -> None:
    frames_BTCHW = torch.randn(2, 4, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([naive_video(tiny.vision_encoder, frames_TCHW) for frames_TCHW in frames_BTCHW])
    found = tiny.encode_video(frames_BTCHW)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-2


def naive_video(tower: VideoTower, frames_TCHW: torch.Tensor) -> torch.Tensor:
    """Section 3.1 of the description, token by token; position-major with time fastest, as published."""
    state = tower.state_dict()
    spatial, temporal = state["positional_embedding"], state["temporal_positional_embedding"][0]
    tokens = [state["class_embedding"] + spatial[0]]
    for n in range(9):
        row, column = divmod(n, 3)
        for frame, frame_CHW in enumerate(frames_TCHW):
            patch = frame_CHW[:, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
            pixels = (state["conv1.weight"][:, :, 0] * patch).sum((1, 2, 3))
            tokens.append(pixels + spatial[1 + n] + temporal[frame])
    x_ND = naive_norm(state, "ln_pre", torch.stack(tokens))
    for index in range(2):
        x_ND = naive_block(state, f"transformer.resblocks.{index}.", x_ND)
    return naive_norm(state, "ln_post", x_ND[0]) @ state["proj"]


def naive_norm(state: Tensors, key: str, x: torch.Tensor) -> torch.Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{key}.weight"] + state[f"{key}.bias"]


def naive_block(state: Tensors, key: str, x_ND: torch.Tensor) -> torch.Tensor:
    y = naive_norm(state, f"{key}ln_1", x_ND) @ state[f"{key}attn.in_proj_weight"].T + state[f"{key}attn.in_proj_bias"]
    q, k, v = y.split(128, dim=1)
    heads = []
    for head in (slice(0, 64), slice(64, 128)):
        heads.append((q[:, head] @ k[:, head].T / 8).softmax(1) @ v[:, head])
    x_ND = x_ND + torch.cat(heads, 1) @ state[f"{key}attn.out_proj.weight"].T + state[f"{key}attn.out_proj.bias"]
    y = naive_norm(state, f"{key}ln_2", x_ND) @ state[f"{key}mlp.c_fc.weight"].T + state[f"{key}mlp.c_fc.bias"]
    y = y / (1 + torch.exp(-1.702 * y))
    return x_ND + y @ state[f"{key}mlp.c_proj.weight"].T + state[f"{key}mlp.c_proj.bias"]


def test_a_batch_of_videos_gives_what_they_give_one_by_one(network: ViCLIP) -> None:
    frames_BTCHW = torch.randn(2, 8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = network.encode_video(frames_BTCHW)
        alone = torch.cat([network.encode_video(frames[None]) for frames in frames_BTCHW])
    assert together.shape == (2, TOY_IMAGE.out_width)
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_order_of_the_frames_counts(tiny: ViCLIP) -> None:
    frames_BTCHW = torch.randn(1, 4, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(tiny.encode_video(frames_BTCHW), tiny.encode_video(frames_BTCHW.flip(1)), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 3, 15, 15), (1, 4, 3, 15, 20), (1, 3, 4, 15, 15)])
def test_frames_of_another_shape_are_refused(tiny: ViCLIP, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B,4,3,15,15\]"):
        tiny.encode_video(torch.zeros(shape))


# ---- the text tower


def test_the_text_tower_is_that_of_transformers(tiny: ViCLIP) -> None:
    ids_BL = torch.tensor([[28, 5, 6, 29, 0, 0, 0, 0, 0], [28, 29, 3, 29, 1, 2, 3, 4, 5], [28, 1, 2, 3, 4, 5, 6, 7, 29]])
    theirs = transformers_text(tiny.text_encoder)
    with torch.inference_mode():
        expected, found = theirs(input_ids=ids_BL).text_embeds, tiny.encode_text(ids_BL)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def transformers_text(tower: TextTower) -> CLIPTextModelWithProjection:
    state = tower.state_dict()
    config = CLIPTextConfig(
        vocab_size=TINY_TEXT.vocabulary,
        hidden_size=TINY.width,
        intermediate_size=TINY.mlp_width,
        projection_dim=TINY_TEXT.out_width,
        num_hidden_layers=TINY.num_blocks,
        num_attention_heads=TINY.num_heads,
        max_position_embeddings=TINY_TEXT.context,
        hidden_act="quick_gelu",
        eos_token_id=TINY_TEXT.vocabulary - 1,
    )
    model = CLIPTextModelWithProjection(config).eval()
    renamed = {"text_projection.weight": state["text_projection"].T}
    renamed["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    renamed["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    for kind in ("weight", "bias"):
        renamed[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for index in range(TINY.num_blocks):
            ours, their = f"transformer.resblocks.{index}.", f"text_model.encoder.layers.{index}."
            for name, part in zip("qkv", state[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                renamed[f"{their}self_attn.{name}_proj.{kind}"] = part
            renamed[f"{their}self_attn.out_proj.{kind}"] = state[f"{ours}attn.out_proj.{kind}"]
            pairs = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"))
            renamed |= {f"{their}{new}.{kind}": state[f"{ours}{old}.{kind}"] for old, new in pairs}
    model.load_state_dict(renamed)
    return model


def test_what_comes_after_the_end_of_a_text_does_not_count(tiny: ViCLIP) -> None:
    one, other = torch.tensor([[28, 5, 29, 0, 0, 0, 0, 0, 0]]), torch.tensor([[28, 5, 29, 7, 8, 9, 1, 2, 29]])
    assert torch.allclose(tiny.encode_text(one), tiny.encode_text(other), atol=1e-5)


# ---- the tokens


def test_the_toy_vocabulary_is_that_of_the_toy_network(vocabulary: Vocabulary) -> None:
    assert len(vocabulary.ids) == TOY_VICLIP_TEXT.vocabulary
    assert (vocabulary.start, vocabulary.end) == (len(vocabulary.ids) - 2, len(vocabulary.ids) - 1)


@pytest.mark.parametrize(("num_merges", "end"), [(100, 512 + 101), (48_894, 49_407), (50_000, 49_407)])
def test_48894_merges_are_used_and_no_more(tmp_path: Path, num_merges: int, end: int) -> None:
    path = tmp_path / "bpe.gz"
    path.write_bytes(gzip.compress("\n".join(["#version", *(f"{n} x" for n in range(num_merges)), ""]).encode()))
    assert load_vocabulary(path).end == end


def test_the_first_ids_are_the_printed_bytes(vocabulary: Vocabulary) -> None:
    # known from the published vocabulary: "!" is 0, "a" is 64, "!</w>" is 256, "a</w>" is 320
    assert [vocabulary.ids[token] for token in ("!", "a", "!</w>", "a</w>")] == [0, 64, 256, 320]
    assert content_ids("a !", vocabulary) == [320, 256]


@pytest.mark.parametrize("num_words", [0, 1, 29, 30, 31, 200])
def test_a_text_is_cut_at_32_tokens_and_its_end_stays(vocabulary: Vocabulary, num_words: int) -> None:
    ids = token_ids("the " * num_words, vocabulary, context=32)
    the = vocabulary.ids["the</w>"]
    kept = min(num_words, 30)
    assert ids == [vocabulary.start, *[the] * kept, vocabulary.end, *[0] * (30 - kept)]
    assert ids[-1] == (vocabulary.end if num_words >= 30 else 0)


def test_words_behind_the_cut_do_not_count(vocabulary: Vocabulary, network: ViCLIP) -> None:
    beginning = "the walks of " * 10
    one, other, earlier = (
        torch.tensor([token_ids(text, vocabulary, context=32)])
        for text in (beginning + "and a pet", beginning + "in water", "of " + beginning)
    )
    with torch.inference_mode():
        assert torch.equal(network.encode_text(one), network.encode_text(other))
        assert not torch.allclose(network.encode_text(one), network.encode_text(earlier), atol=1e-3)


def test_a_text_is_cleaned() -> None:
    assert cleaned("1 < 2 &amp;amp; 3") == "1 < 2 & 3"  # where ftfy sees a tag it leaves escapes alone
    assert cleaned("  Salt &amp;amp; PEPPER\n\n schÃ¶n\t“so” ") == 'salt & pepper schön "so"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it's 1920, she'll don't", ["it", "'s", "1", "9", "2", "0", ",", "she", "'ll", "don", "'t"]),
        ("a-b!? <|endoftext|>x", ["a", "-", "b", "!?", "<|endoftext|>", "x"]),
        ("!'s café x² 東京 e\u0301", ["!'", "s", "café", "x", "²", "東京", "e", "\u0301"]),
        ("", []),
    ],
)
def test_a_text_falls_into_words(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected


def test_the_lowest_rank_is_joined_first_and_everywhere() -> None:
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2, ("abc", "abc</w>"): 3, ("a", "bc</w>"): 4, ("b", "c</w>"): 5}
    assert merged("abcabc", ranks) == ["abc", "ab", "c</w>"]  # a b joins before b c</w> can
    assert merged("abcabx", ranks) == ["abc", "ab", "x</w>"]
    assert merged("aaaa", {("a", "a"): 0}) == ["aa", "a", "a</w>"]
    assert merged("x", {}) == ["x</w>"]


@given(st.text(alphabet="abc", min_size=1, max_size=12), st.permutations(["ab", "bc", "ca", "aa", "abc", "caa", "bcaa"]))
def test_joined_tokens_spell_the_word(word: str, order: list[str]) -> None:
    ranks = {(token[:cut], token[cut:]): rank for rank, token in enumerate(order) for cut in range(1, len(token))}
    assert "".join(merged(word, ranks)) == word + "</w>"


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b""), gzip.compress(b"#\na b\na b c\n"), gzip.compress(b"#\na b")[:-9]]
)
def test_a_file_that_holds_no_merges_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bpe.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bpe\.gz: "):
        load_vocabulary(path)
