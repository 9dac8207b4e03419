"""VACE: a first frame and a temporal prompt -> latents -> frames, over one group of ranks."""
