"""The sampler of HyperLoRA's text-to-image workflow, for painting and for redrawing faces."""

from __future__ import annotations

from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline


def dpmpp_2m_karras(pipeline: StableDiffusionXLPipeline) -> DPMSolverMultistepScheduler:
    """A new scheduler over the noise levels of a pipeline: k-diffusion's dpmpp_2m with karras sigmas."""
    return DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        use_karras_sigmas=True,
        final_sigmas_type="zero",
    )
