"""The toy checkpoints look like the published ones to every loader, are always the same, and never replace real weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ipt2v.metrics.toy_weights import write_all_toy_weights, write_toy_scores
from ipt2v.models.toy import write_toy_weights

pytestmark = pytest.mark.slow

CLIP_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
VACE_FILES = [
    "TOY.txt",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
HYPERLORA = "hyper_lora/hyper_lora/sdxl_hyper_id_lora_v1_"
RUN_FILES = {
    "antelopev2": ["2d106det.onnx", "TOY.txt", "genderage.onnx", "glintr100.onnx", "scrfd_10g_bnkps.onnx"],
    "HRNetV2-W48": ["TOY.txt", "hrnet_lip_5583_torch04.pth"],
    "HyperLoRA": [
        "TOY.txt",
        "hyper_lora/clip_processor/clip_vit_large_14_processor/preprocessor_config.json",
        "hyper_lora/clip_vit/clip_vit_large_14/config.json",
        "hyper_lora/clip_vit/clip_vit_large_14/model.safetensors",
        *(
            f"{HYPERLORA}{variant}/{name}"
            for variant in ("edit", "fidelity")
            for name in (
                "hyper_lora_modules.json",
                "hyper_lora_modules.safetensors",
                "id_projector.safetensors",
                "resampler.safetensors",
            )
        ),
    ],
    "Qwen3-8B": [
        "TOY.txt",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ],
    "RealVisXL_V4.0": [
        "TOY.txt",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        *(f"tokenizer/{name}" for name in CLIP_TOKENIZER),
        *(f"tokenizer_2/{name}" for name in CLIP_TOKENIZER),
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
    "Wan2.1-VACE-14B-diffusers": VACE_FILES,
    "Wan2.1-VACE-1.3B-diffusers": VACE_FILES,
}
MERGES = "bpe_simple_vocab_16e6.txt.gz"
SCORE_FILES = {
    "buffalo_l": ["2d106det.onnx", "TOY.txt", "det_10g.onnx", "genderage.onnx", "w600k_r50.onnx"],
    "CurricularFace": ["TOY.txt", "glint360k_curricular_face_r101_backbone.bin"],
    "Inception-v3": ["TOY.txt", "inception_v3_google-0cc3c7bd.pth"],
    "ViCLIP": ["TOY.txt", "ViClip-InternVid-10M-FLT.pth", MERGES],
    "CLIP-ViT-L-14": ["TOY.txt", "ViT-L-14.pt"],
    "CLIP-ViT-B-32": ["TOY.txt", "ViT-B-32.pt", MERGES],
    "LAION-aesthetic": ["TOY.txt", "sa_0_4_vit_l_14_linear.pth"],
    "MUSIQ-SPAQ": ["TOY.txt", "musiq_spaq_ckpt-358bb6af.pth"],
    "AMT-S": ["TOY.txt", "amt-s.pth"],
    "RAFT-things": ["TOY.txt", "raft-things.pth"],
}
FILES = RUN_FILES | SCORE_FILES
WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".pth", ".pt", ".bin")
DETECTORS = ("scrfd_10g_bnkps.onnx", "det_10g.onnx")  # they find their one face by design, not by chance
VACES = [name for name in FILES if name.startswith("Wan")]
ANY_TEXT = [
    "a woman walks.",
    "\u8272\u8c03\u8273\u4e3d, \u8fc7\u66dd",
    "na\u00efve caf\u00e9 \U0001f600",
    "\x00\x01 tab\t\n\n  end ",
    "",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def qwen(toy_weights: Path) -> SimpleNamespace:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = toy_weights / "Qwen3-8B"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder), model=model, report=report)


@pytest.fixture(scope="module")
def sdxl(toy_weights: Path):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_weights / "RealVisXL_V4.0", add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=VACES)
def vace(request: pytest.FixtureRequest, toy_weights: Path):
    from diffusers import WanVACEPipeline

    pipeline = WanVACEPipeline.from_pretrained(toy_weights / request.param)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- the files


def test_importing_the_module_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers'}"
    code = f"import sys, ipt2v.metrics.toy_weights; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FILES)
def test_each_folder_has_exactly_these_files(toy_weights: Path, name: str) -> None:
    assert sorted(contents(toy_weights / name)) == sorted(FILES[name])


def test_there_is_nothing_but_these_folders(toy_weights: Path) -> None:
    assert sorted(path.name for path in toy_weights.iterdir()) == sorted(FILES)


def test_all_of_it_is_below_18_megabytes(toy_weights: Path) -> None:
    assert sum(map(len, contents(toy_weights).values())) < 18e6


@pytest.mark.parametrize("name", FILES)
def test_each_folder_says_in_one_line_that_it_is_random(toy_weights: Path, name: str) -> None:
    text = (toy_weights / name / "TOY.txt").read_text()
    assert text.startswith("Random") and "noise" in text and text.count("\n") == 1


def test_everybody_who_may_read_one_file_may_read_all(toy_weights: Path) -> None:
    assert len({path.stat().st_mode for path in toy_weights.rglob("*") if path.is_file()}) == 1


def test_the_seed_decides_every_byte_and_the_callers_random_state_is_left_alone(toy_weights: Path, tmp_path: Path) -> None:
    import torch

    before = torch.random.get_rng_state()
    folders = write_all_toy_weights(tmp_path / "again", seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [folder.name for folder in folders] == list(FILES)
    assert contents(tmp_path / "again") == contents(toy_weights)

    # over the older ones, in place
    write_all_toy_weights(tmp_path / "again", seed=1)
    for name, files in FILES.items():
        weights = [file for file in files if file.endswith(WEIGHT_SUFFIXES) and file not in DETECTORS]
        old, new = contents(toy_weights / name), contents(tmp_path / "again" / name)
        assert sorted(new) == sorted(old)
        assert all(new[file] != old[file] for file in weights)
        assert all(new[file] == old[file] for file in files if file not in weights)


def test_the_folders_of_scores_are_the_same_without_those_of_runs(toy_weights: Path, tmp_path: Path) -> None:
    write_toy_scores(tmp_path, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SCORE_FILES)
    assert all(contents(tmp_path / name) == contents(toy_weights / name) for name in SCORE_FILES)


def test_nothing_is_written_if_one_folder_of_scores_is_somebodys_own(tmp_path: Path) -> None:
    (tmp_path / "RAFT-things").mkdir()
    with pytest.raises(FileExistsError, match="RAFT-things: exists and is not a toy"):
        write_all_toy_weights(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["RAFT-things"]


def test_a_folder_without_the_mark_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    real = tmp_path / "Wan2.1-VACE-1.3B-diffusers"  # the last one to be written
    real.mkdir()
    (real / "model_index.json").write_text("precious")
    with pytest.raises(FileExistsError, match=r"Wan2\.1-VACE-1\.3B-diffusers: exists and is not a toy.*choose another root"):
        write_toy_weights(tmp_path)
    assert contents(tmp_path) == {"Wan2.1-VACE-1.3B-diffusers/model_index.json": b"precious"}
    assert [path.name for path in tmp_path.iterdir()] == [real.name]


def test_a_link_is_refused_even_if_it_leads_to_a_toy(toy_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "Qwen3-8B").symlink_to(toy_weights / "Qwen3-8B")
    with pytest.raises(FileExistsError, match="Qwen3-8B"):
        write_toy_weights(tmp_path)


# ---- the language model


def test_qwen3_reloads_whole(qwen: SimpleNamespace) -> None:
    assert type(qwen.model).__name__ == "Qwen3ForCausalLM"
    assert not any(qwen.report.values())
    assert len(qwen.tokenizer) <= qwen.model.config.vocab_size
    assert qwen.tokenizer.eos_token == "<|im_end|>"
    assert qwen.model.generation_config.eos_token_id[0] == qwen.tokenizer.eos_token_id


@pytest.mark.parametrize("text", ANY_TEXT)
def test_qwen3_tokens_give_back_any_text(qwen: SimpleNamespace, text: str) -> None:
    assert qwen.tokenizer.decode(qwen.tokenizer(text).input_ids) == text


def test_the_chat_template_adds_an_empty_think_block_only_when_thinking_is_switched_off(qwen: SimpleNamespace) -> None:
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    told = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"

    def render(**settings: bool) -> str:
        return qwen.tokenizer.apply_chat_template(chat, tokenize=False, **settings)

    assert render() == told
    assert render(add_generation_prompt=True) == told + "<|im_start|>assistant\n"
    assert render(add_generation_prompt=True, enable_thinking=True) == told + "<|im_start|>assistant\n"
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render(add_generation_prompt=True, enable_thinking=False) == told + empty


@pytest.mark.parametrize("sample", [False, True])
def test_qwen3_answers_a_batch_with_words(qwen: SimpleNamespace, sample: bool) -> None:
    import torch

    prompts = [
        qwen.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for text in ("a woman walks in the park", "two boys")
    ]
    batch = qwen.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = qwen.model.generate(**batch, max_new_tokens=40, do_sample=sample)
    answers = qwen.tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert answers[0] != answers[1]
    for answer in answers:
        words = answer.split()
        assert all(word.isascii() and word.isalpha() for word in words)
        assert len(set(words)) >= 3


# ---- the image model


def test_sdxl_has_the_published_classes(sdxl) -> None:
    found = {name: type(part).__name__ for name, part in sdxl.components.items() if part is not None}
    assert found == {
        "scheduler": "EulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    assert sdxl.vae_scale_factor == 8
    assert sdxl.config.force_zeros_for_empty_prompt is True
    assert sdxl.tokenizer.model_max_length == sdxl.tokenizer_2.model_max_length == 77
    assert (sdxl.tokenizer.pad_token, sdxl.tokenizer_2.pad_token) == ("<|endoftext|>", "!")


@pytest.mark.parametrize("text", ANY_TEXT)
def test_clip_ends_every_text_with_its_largest_id(sdxl, text: str) -> None:
    ids = sdxl.tokenizer(text).input_ids
    assert ids[-1] == max(ids) == len(sdxl.tokenizer) - 1 == sdxl.tokenizer.eos_token_id


def test_clip_knows_our_words_whole(sdxl) -> None:
    assert sdxl.tokenizer.tokenize("A woman walks, slowly") == ["a</w>", "woman</w>", "walks</w>", ",</w>", "slowly</w>"]


def paint(sdxl, prompt: str) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(0)
    picture_HWC = sdxl(prompt, height=64, width=64, num_inference_steps=2, generator=generator, output_type="np").images[0]
    return picture_HWC * 255


def test_sdxl_paints_visible_noise_that_depends_on_the_prompt(sdxl) -> None:
    woman_HWC, man_HWC = paint(sdxl, "a woman on the beach"), paint(sdxl, "an old man reads a book")
    assert woman_HWC.shape == (64, 64, 3)
    assert np.isfinite(woman_HWC).all()
    assert woman_HWC.std() > 10
    assert np.abs(woman_HWC - man_HWC).mean() > 0.5


# ---- the video models


@pytest.mark.parametrize("name", VACES)
def test_each_part_of_vace_reloads_on_its_own(toy_weights: Path, name: str) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACETransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = toy_weights / name
    text_encoder, report = UMT5EncoderModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(report.values())
    transformer, report = WanVACETransformer3DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(report.values())
    vae, report = AutoencoderKLWan.from_pretrained(folder / "vae", output_loading_info=True)
    assert not any(report.values())
    scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    assert text_encoder.config.d_model == transformer.config.text_dim
    assert text_encoder.config.vocab_size == len(tokenizer)
    assert transformer.config.vace_layers == [0, 2]
    assert transformer.config.vace_in_channels == 2 * vae.config.z_dim + 8 * 8
    assert transformer.config.rope_max_seq_len >= 104  # 832 pixels
    assert vae.config.latents_mean[0] == -0.7571 and vae.config.latents_std[0] == 2.8184  # Wan-AI/Wan2.1-VACE-14B-diffusers
    assert (scheduler.config.prediction_type, scheduler.config.use_flow_sigmas) == ("flow_prediction", True)
    assert scheduler.config.flow_shift == 3.0


@pytest.mark.parametrize("text", ANY_TEXT)
def test_t5_takes_any_text_and_ends_it(vace, text: str) -> None:
    ids = vace.tokenizer(text).input_ids
    assert ids[-1] == vace.tokenizer.eos_token_id
    assert (vace.tokenizer.unk_token_id in ids) == any(ord(character) > 126 or ord(character) < 9 for character in text)


def animate(vace, prompt: str, red: int) -> np.ndarray:
    """9 frames that begin with a plain red picture."""
    import torch
    from PIL import Image

    video = [Image.new("RGB", (32, 32), (red, 0, 0)), *[Image.new("RGB", (32, 32), (128, 128, 128))] * 8]
    mask = [Image.new("L", (32, 32), 0), *[Image.new("L", (32, 32), 255)] * 8]  # 0 keeps, 255 generates
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    frames_THWC = vace(video=video, mask=mask, prompt=prompt, negative_prompt="\u8272", generator=generator, **size).frames[0]
    return np.asarray(frames_THWC) * 255


def test_vace_makes_visible_noise_that_depends_on_the_prompt_and_the_first_frame(vace) -> None:
    frames_THWC = animate(vace, "a woman walks", 250)
    assert frames_THWC.shape == (9, 32, 32, 3)
    assert np.isfinite(frames_THWC).all()
    assert frames_THWC.std() > 10 and frames_THWC.std(axis=(1, 2, 3)).min() > 5
    assert np.abs(frames_THWC - animate(vace, "the dog jumps over the fence", 250)).mean() > 0.1
    assert np.abs(frames_THWC - animate(vace, "a woman walks", 20)).mean() > 0.1
