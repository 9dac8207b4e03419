"""The text embedding that is kept is the one that WanVACEPipeline computes, to the last bit. Legend: L tokens, D width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline

from ipt2v.config import VideoConfig
from ipt2v.models.umt5 import load_text_encoder, padded
from ipt2v.records import TextEmbedding

pytestmark = pytest.mark.slow

MODEL = "Wan2.1-VACE-14B-diffusers"
CPU = torch.device("cpu")
NUM_TOKENS = 24
TEXTS = {
    "English": "A person walks slowly along the beach, then laughs.",
    "Chinese": "色调艳丽，过曝，静态，细节模糊不清，字幕",
    "both": "a woman 走路 in the park 🙂",
    "empty": "",
    "blank": " \n\t ",
    "blanks between": "  a   woman\nwalks  ",
    "HTML": "a man &amp;amp; a dog &lt;b&gt; &quot;run&quot;",
    "broken encoding": "the cafÃ© â€” at night",
    "too long": "a woman walks in the park and reads a book, " * 8,
    "one too long": "a " * NUM_TOKENS,
    "just fits": "a " * (NUM_TOKENS - 1),
}


def settings(dtype: str = "float32") -> VideoConfig:
    return VideoConfig(model=MODEL, dtype=dtype, max_text_tokens=NUM_TOKENS)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(toy_weights: Path, dtype: str) -> WanVACEPipeline:
    return WanVACEPipeline.from_pretrained(toy_weights / MODEL, dtype=getattr(torch, dtype))


@pytest.fixture(scope="module")
def embed(toy_weights: Path, dtype: str):
    return load_text_encoder(toy_weights / MODEL, settings(dtype), device=CPU)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_padded_embedding_equals_the_pipelines_bit_for_bit(pipeline: WanVACEPipeline, embed, dtype: str, text: str) -> None:
    found_BLD = padded(embed(text), NUM_TOKENS, dtype=getattr(torch, dtype), device=CPU)

    with torch.inference_mode():
        expected_BLD, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=NUM_TOKENS)
    assert found_BLD.dtype == expected_BLD.dtype
    assert torch.equal(found_BLD, expected_BLD), (found_BLD.float() - expected_BLD.float()).abs().max()


@pytest.mark.parametrize(
    ("name", "num_tokens"), [("empty", 1), ("blank", 1), ("just fits", NUM_TOKENS), ("too long", NUM_TOKENS)]
)
def test_an_embedding_is_kept_without_padding_and_with_the_text_as_written(embed, name: str, num_tokens: int) -> None:
    embedding = embed(TEXTS[name])
    assert embedding.text == TEXTS[name]
    assert embedding.embedding_LD.shape == (num_tokens, 32)


def test_an_embedding_does_not_depend_on_what_was_embedded_before(embed) -> None:
    first = embed(TEXTS["English"])
    embed(TEXTS["too long"])
    assert np.array_equal(embed(TEXTS["English"]).embedding_LD, first.embedding_LD)


def test_different_texts_have_different_embeddings(embed) -> None:
    one, other = embed("a woman walks").embedding_LD, embed("a woman sits").embedding_LD
    assert one.shape == other.shape and not np.array_equal(one, other)


def test_bfloat16_survives_as_uint16_bit_for_bit(toy_weights: Path) -> None:
    embedding = load_text_encoder(toy_weights / MODEL, settings("bfloat16"), device=CPU)(TEXTS["English"])
    values = embedding.embedding_LD
    assert values.dtype == np.uint16
    back = padded(embedding, len(values), dtype=torch.bfloat16, device=CPU)
    assert np.array_equal(back[0].view(torch.uint16).numpy(), values)


def test_every_bit_pattern_of_bfloat16_passes_unchanged() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)
    back = padded(TextEmbedding(text="", embedding_LD=bits), 2**10 + 3, dtype=torch.bfloat16, device=CPU)
    assert np.array_equal(back[0, : 2**10].view(torch.uint16).numpy(), bits)
    assert (back[0, 2**10 :].view(torch.uint16).numpy() == 0).all()


def test_padding_is_zeros_behind_the_embedding_and_leaves_it_alone() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    before = values.copy()
    found = padded(TextEmbedding(text="", embedding_LD=values), 5, dtype=torch.float32, device=CPU)
    assert found.shape == (1, 5, 4)
    assert np.array_equal(found[0, :3].numpy(), values)
    assert (found[0, 3:] == 0).all()
    found += 1
    assert np.array_equal(values, before)
