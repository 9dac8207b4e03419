"""Libraries that load models, kept from drawing progress bars: in a log file each is a line of carriage returns."""

from __future__ import annotations


def quiet_libraries() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
