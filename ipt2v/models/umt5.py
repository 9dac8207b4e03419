"""UMT5: a text -> the embedding that the video model reads. Array 1 runs it, so array 2 never loads its 11 GB.

Legend: L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan_vace import prompt_clean
from numpy.typing import NDArray
from transformers import AutoTokenizer, UMT5EncoderModel

from ipt2v.config import TextEncoderConfig, VideoConfig
from ipt2v.models.zero3 import is_shared, load_zero3
from ipt2v.records import TextEmbedding

_WHOLE = TextEncoderConfig()


def load_text_encoder(
    folder: Path, settings: VideoConfig, *, device: torch.device, sharing: TextEncoderConfig = _WHOLE, num_ranks: int = 1
) -> Callable[[str], TextEmbedding]:
    """encode(text) -> its embedding as WanVACEPipeline.encode_prompt makes it, without the padding.

    If ranks share the model (`is_shared`), all load it, in `ready_for_zero3`, and then encode equally many texts each.
    Raises ValueError if DeepSpeed, which they need for this, is not installed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    dtype = getattr(torch, settings.dtype)

    def load() -> Any:
        return UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()

    if is_shared(sharing, num_ranks):
        model = load_zero3(load, dtype, device, cpu_offload=sharing.cpu_offload)
    else:
        model = load().to(device)

    @torch.inference_mode()
    def encode(text: str) -> TextEmbedding:
        inputs = tokenizer(
            [prompt_clean(text)],
            padding="max_length",
            max_length=settings.max_text_tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        hidden_LD = model(inputs.input_ids, inputs.attention_mask).last_hidden_state[0]
        return TextEmbedding(text=text, embedding_LD=_to_numpy(hidden_LD[: int(inputs.attention_mask.sum())]))

    return encode


def padded(embedding: TextEmbedding, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, num_tokens, D]: the embedding with zeros behind it, as the transformer expects it."""
    values = embedding.embedding_LD
    tensor_LD = torch.from_numpy(values).view(torch.bfloat16) if values.dtype == np.uint16 else torch.from_numpy(values)
    padding = torch.zeros(num_tokens - tensor_LD.shape[0], tensor_LD.shape[1], dtype=tensor_LD.dtype)
    return torch.cat([tensor_LD, padding])[None].to(device, dtype)


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    tensor = tensor.cpu().contiguous()
    # numpy knows no bfloat16: its bits travel as uint16
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.float().numpy()
