"""Where the published HyperLoRA folder keeps what. Imports nothing, so that file lists cost no torch."""

from __future__ import annotations

CLIP_FOLDER = "hyper_lora/clip_vit/clip_vit_large_14"
PROCESSOR_FOLDER = "hyper_lora/clip_processor/clip_vit_large_14_processor"
VARIANT_FOLDER = "hyper_lora/hyper_lora/sdxl_hyper_id_lora_v1_{variant}"


def hyperlora_files(variant: str) -> list[str]:
    """Every file that load_hyperlora reads."""
    names = ("hyper_lora_modules.json", "hyper_lora_modules.safetensors", "id_projector.safetensors", "resampler.safetensors")
    folder = VARIANT_FOLDER.format(variant=variant)
    return [
        f"{PROCESSOR_FOLDER}/preprocessor_config.json",
        f"{CLIP_FOLDER}/config.json",
        f"{CLIP_FOLDER}/model.safetensors",
        *(f"{folder}/{name}" for name in names),
    ]
