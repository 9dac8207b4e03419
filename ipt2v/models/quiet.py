"""Libraries that load models, kept from filling logs: progress bars are lines of carriage returns in a file."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # diffusers 0.42 warns on each cast of a VAE, once a picture, of the empty list of its layers that should not be cast
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return "that should be kept in float32: []" not in record.getMessage()
