"""HyperLoRA: photos of one person -> LoRA weights that give an SDXL UNet that person's face."""
