"""What stands in place of a score that a video cannot have. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Undefined:
    """A score that this video cannot have."""

    reason: str
