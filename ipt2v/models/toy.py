"""Tiny random checkpoints in the published layouts, so that the loaders of real weights run anywhere, in seconds.

Must not know who loads them: no stage, no setting and no loader of this package is imported here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOY_MARK = "TOY.txt"  # a folder with this file may be replaced, one without it may be somebody's real weights
_TOY_NOTE = "Random toy weights in the layout of {name}: they load and run like the real ones, and make noise.\n"

_SPACE = "\u0120"  # what byte-level BPE writes for the byte 32

# The words that the toy tokenizers know whole, and that the toy language model speaks.
_SENTENCES = """
a young woman with long dark hair walks slowly along the quiet beach at sunset, holding a small red umbrella.
an old man in a brown coat sits on a wooden bench in the park and reads a thick book under the tall trees.
two friends ride their bicycles through a narrow street of the old town while light rain falls on the stones.
the chef stands in a bright kitchen, cuts fresh vegetables and smiles at the camera, then lifts a hot pan.
a girl in a yellow dress dances in a field of flowers, turns around and waves both hands to her mother.
the musician plays a black guitar on a dark stage, with warm lamps behind him and smoke near the floor.
a boy runs across green grass after a white dog, jumps over a low fence and laughs with open mouth.
the doctor looks through a large window of the hospital at the snow on the roofs and drinks a cup of tea.
a person wearing glasses and a blue shirt types on a laptop in a modern office full of plants and paper.
she climbs a steep mountain path in strong wind, stops near the edge and looks down at the river below.
he drives a silver car along the coast road at night, the city lights move past his calm and tired face.
close view of a face in soft morning light, the head turns left, the eyes close and then open again.
the camera moves forward from a wide shot to a portrait, the background stays blurred, the subject is in focus.
an artist paints a huge picture on the wall of a studio, steps back, nods and raises the brush once more.
"""

# ChatML; with enable_thinking=False the answer starts after an empty think block, as Qwen3 was trained.
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


Writers = Mapping[str, Callable[[Path], None]]  # name of a folder -> writes its files, at random


def write_toy_weights(root: Path, *, seed: int = 0) -> tuple[Path, ...]:
    """The folders that runs read, of tiny checkpoints in the published layouts and under the published names."""
    return write_toy_folders(root, WRITERS, seed=seed)


def write_toy_folders(root: Path, writers: Writers, *, seed: int) -> tuple[Path, ...]:
    """Folders of tiny, seeded, random checkpoints below `root`.

    The same seed gives a folder the same bytes, whatever is written beside it; the caller's random state is left alone. An
    older toy folder is replaced. Raises FileExistsError, before anything is written, if a folder exists that is not marked as
    a toy.
    """
    root = Path(root)
    folders = tuple(root / name for name in writers)
    for folder in folders:
        _refuse_unmarked(folder)
    root.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        _replace(folder, writers[folder.name], seed=seed)
    return folders


def _refuse_unmarked(folder: Path) -> None:
    if not os.path.lexists(folder) or ((folder / TOY_MARK).is_file() and not folder.is_symlink()):
        return
    raise FileExistsError(
        f"{folder}: exists and is not a toy (a folder with a {TOY_MARK}), perhaps it holds real weights; "
        "nothing was written: choose another root, or move it away yourself"
    )


def _replace(folder: Path, write: Callable[[Path], None], *, seed: int) -> None:
    """Write beside `folder`, then rename: a reader finds all of the old weights or all of the new."""
    import torch

    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    digest = hashlib.sha256(f"{seed}\0{folder.name}".encode()).digest()
    new.mkdir()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # not torch.manual_seed: that would also reseed the GPUs, which fork_rng(devices=[]) does not restore
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            write(new)
        (new / TOY_MARK).write_text(_TOY_NOTE.format(name=folder.name), encoding="utf-8")
        for path in new.rglob("*.safetensors"):
            path.chmod((new / TOY_MARK).stat().st_mode)  # safetensors 0.8 writes files that only their owner can read
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- Qwen3


_QWEN3_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
}


def _write_qwen3(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words, ids = _write_qwen3_tokenizer(folder)
    end_of_turn, end_of_text = ids["<|im_end|>"], ids["<|endoftext|>"]
    vocab_size = -(-len(ids) // 64) * 64  # the published one is padded too
    config = _QWEN3_CONFIG | {"bos_token_id": end_of_text, "eos_token_id": end_of_turn, "vocab_size": vocab_size}
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    _make_it_speak(model, words, end=end_of_turn)
    _save(folder, model, config)
    ends = {"bos_token_id": end_of_text, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    _write_json(folder / "generation_config.json", ends | sampling | {"transformers_version": "4.51.0"})


def _write_qwen3_tokenizer(folder: Path) -> tuple[list[int], dict[str, int]]:
    """Ids of the whole words (with their leading space), and the id of every token."""
    from transformers import Qwen2Tokenizer

    vocab, merges = _byte_level_bpe(prefix=_SPACE)
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    ids = {token: index for index, token in enumerate([*vocab, *added])}
    _write_json(folder / "vocab.json", {token: ids[token] for token in vocab})
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            # the think marks are part of the answer's text, so decoding keeps them
            "added_tokens_decoder": {
                str(ids[token]): {"content": token} | plain | {"special": token.startswith("<|")} for token in added
            },
            "bos_token": None,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return [ids[_SPACE + word] for word in _words() if word.isalpha()], ids


def _make_it_speak(model: Any, words: Sequence[int], *, end: int) -> None:
    """Whole words are likely, the end comes after some tens of them, and all else is as good as impossible.

    The output layer has no bias. So channel 0 of the residual stream is kept constant, and its column is the bias.
    """
    import torch

    _give_strength(model, gain=1.5)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
        layer.self_attn.q_norm.weight.fill_(4.0)  # sharp attention: each step looks at other words, so it says others
    embedding = model.model.embed_tokens.weight.normal_()
    embedding[:, 0] = 4.0
    # minus the embedding: a word is unlikely to follow itself
    model.lm_head.weight.normal_(std=0.25).sub_(0.15 * embedding)
    bias = torch.full((model.config.vocab_size,), -20.0)
    bias[list(words)] = 0.0
    bias[end] = 2.0
    model.lm_head.weight[:, 0] = bias


# ---------------------------------------------------------------------------------------------------- SDXL


def _write_realvisxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    vocab_size = _write_clip_tokenizer(folder / "tokenizer", pad="<|endoftext|>")
    _write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    _write_clip_text(folder / "text_encoder", CLIPTextModel, vocab_size, act="quick_gelu")
    _write_clip_text(folder / "text_encoder_2", CLIPTextModelWithProjection, vocab_size, act="gelu")
    EulerDiscreteScheduler(
        beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    unet = _toy_unet()
    _give_strength(unet)
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )
    _give_contrast(vae, latent_shape=(1, 4, 16, 16))
    vae.save_pretrained(folder / "vae")
    parts = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
    parts |= {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    parts |= {"scheduler": "EulerDiscreteScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    _write_model_index(folder, "StableDiffusionXLPipeline", parts, {"force_zeros_for_empty_prompt": True})


def _toy_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=64,  # 32 of each text encoder
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # 32 of the pooled text + 6 numbers x 8
        norm_num_groups=8,
    )


def _write_clip_tokenizer(folder: Path, *, pad: str) -> int:
    """Number of tokens."""
    folder.mkdir()
    vocab, merges = _byte_level_bpe(suffix="</w>")
    # the end must have the largest id: CLIP pools at the argmax of the ids
    tokens = [*vocab, "<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad, "unk_token": "<|endoftext|>"}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    _write_json(folder / "tokenizer_config.json", special | settings | {"tokenizer_class": "CLIPTokenizer"})
    return len(tokens)


def _write_clip_text(folder: Path, model_class: Any, vocab_size: int, *, act: str) -> None:
    from transformers import CLIPTextConfig

    config = {
        "architectures": [model_class.__name__],
        "attention_dropout": 0.0,
        "bos_token_id": 0,  # 0, 1 and 2 are the published values, and not the tokenizer's: 2 stands for "at the argmax"
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": 32,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "projection_dim": 32,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "vocab_size": vocab_size,
    }
    _save(folder, model_class(CLIPTextConfig(**config)), config)


# ---------------------------------------------------------------------------------------------------- VACE


def _write_vace(folder: Path, *, num_heads: int, num_layers: int) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACETransformer3DModel

    vocab_size = _write_t5_tokenizer(folder / "tokenizer")
    _write_umt5(folder / "text_encoder", vocab_size)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    transformer = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_heads,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
        vace_layers=[0, 2],
        vace_in_channels=96,  # 16 kept + 16 to be made + 8 x 8 pixels of the mask
    )
    _give_strength(transformer)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    _give_contrast(vae, latent_shape=(1, 16, 2, 16, 16))
    vae.save_pretrained(folder / "vae")
    parts = {"text_encoder": "UMT5EncoderModel", "tokenizer": "T5TokenizerFast", "vae": "AutoencoderKLWan"}
    parts |= {"scheduler": "UniPCMultistepScheduler", "transformer": "WanVACETransformer3DModel"}
    _write_model_index(folder, "WanVACEPipeline", parts, {})


def _write_t5_tokenizer(folder: Path) -> int:
    """Number of tokens. What is neither a known word nor ASCII becomes <unk>."""
    from transformers import T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    vocab = [(token, 0.0) for token in special] + [("\u2581", -3.0)]  # U+2581 stands for a space
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    vocab += [(f"\u2581{word}", -2.0) for word in _words()]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    folder.mkdir()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)
    settings = {"clean_up_tokenization_spaces": False, "extra_ids": 0, "model_max_length": int(1e30), "sp_model_kwargs": {}}
    _write_json(folder / "tokenizer_config.json", names | settings | {"tokenizer_class": "T5Tokenizer"})
    return len(vocab)


_UMT5_CONFIG = {
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.49.0",
    "use_cache": True,
}


def _write_umt5(folder: Path, vocab_size: int) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = _UMT5_CONFIG | {"vocab_size": vocab_size}
    _save(folder, UMT5EncoderModel(UMT5Config(**config)), config)


# ---------------------------------------------------------------------------------------------------- shared


def _words() -> list[str]:
    """The known words and punctuation marks, each once, in a fixed order."""
    return sorted(set(_SENTENCES.replace(",", " , ").replace(".", " . ").split()))


def _byte_level_bpe(prefix: str = "", suffix: str = "") -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-pair encoding that has all 256 bytes and our words, each between `prefix` and `suffix`.

    Not tokenizers' BpeTrainer: with a suffix its merges differ from call to call (0.23).
    """
    from tokenizers import pre_tokenizers

    single_bytes = sorted(pre_tokenizers.ByteLevel.alphabet())
    ranks: dict[tuple[str, str], int] = {}
    for word in filter(str.isalpha, _words()):
        pieces = [*(prefix + word)[:-1], word[-1] + suffix]
        while len(pieces) > 1:
            scores = [ranks.get(pair, math.inf) for pair in itertools.pairwise(pieces)]
            index = scores.index(min(scores))
            pair = (pieces[index], pieces[index + 1])
            ranks.setdefault(pair, len(ranks))  # a later pair never breaks up an earlier word: lower ranks merge first
            pieces[index : index + 2] = ["".join(pair)]
    single = [*single_bytes, *(byte + suffix for byte in single_bytes)]
    return list(dict.fromkeys([*single, *map("".join, ranks)])), list(ranks)


def _give_strength(model: Any, *, gain: float = 1.0) -> None:
    """Draw all weights anew, so large that each input matters to the output; torch's own are made for training."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.weight.normal_(std=gain / math.sqrt(module.weight[0].numel()))


def _give_contrast(vae: Any, *, latent_shape: tuple[int, ...], target_std: float = 0.4) -> None:
    """Scale the decoder's last layer so that noise is decoded to visible noise rather than to flat gray."""
    import torch

    _give_strength(vae)
    std = vae.eval().decode(torch.randn(latent_shape)).sample.std().item()
    # a power of two: the last bits of `std`, which depend on the machine, must not reach the file
    vae.decoder.conv_out.weight.mul_(2.0 ** round(math.log2(target_std / std)))
    vae.decoder.conv_out.bias.zero_()


def _save(folder: Path, model: Any, config: dict[str, Any]) -> None:
    """One safetensors file and `config` as it is: save_pretrained would write the keys of its own version."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))  # a tied tensor under its first name only
    save_file(dict(tensors.values()), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_model_index(folder: Path, pipeline: str, parts: dict[str, str], settings: dict[str, bool]) -> None:
    import diffusers
    import transformers

    index: dict[str, object] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **settings}
    for name, class_name in sorted(parts.items()):
        library = transformers if hasattr(transformers, class_name) else diffusers
        index[name] = [library.__name__, class_name]
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_face_pack(folder: Path) -> None:
    import torch

    from ipt2v.models.toy_faces import toy_face_pack

    toy_face_pack(folder, seed=int(torch.randint(2**31, ())))


def _write_hyperlora(folder: Path) -> None:
    import torch

    from ipt2v.models.hyperlora.toy import write_toy_hyperlora

    write_toy_hyperlora(folder, _toy_unet(), seed=int(torch.randint(2**31, ())))


def _write_hrnet(folder: Path) -> None:
    import torch

    from ipt2v.models.hrnet.toy import toy_state_dict

    torch.save(toy_state_dict(int(torch.randint(2**31, ()))), folder / "hrnet_lip_5583_torch04.pth")


WRITERS: Writers = {
    "antelopev2": _write_face_pack,
    "HRNetV2-W48": _write_hrnet,
    "HyperLoRA": _write_hyperlora,
    "Qwen3-8B": _write_qwen3,
    "RealVisXL_V4.0": _write_realvisxl,
    "Wan2.1-VACE-14B-diffusers": functools.partial(_write_vace, num_heads=4, num_layers=4),
    "Wan2.1-VACE-1.3B-diffusers": functools.partial(_write_vace, num_heads=6, num_layers=3),
}
