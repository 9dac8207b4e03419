"""Likeness of faces: known answers, and what has no answer says why."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.metrics.identity import (
    NO_FACE,
    NO_REFERENCE,
    consisid_distance,
    consisid_frames,
    consisid_similarity,
    cosine,
    identity,
)
from ipt2v.metrics.undefined import Undefined


def at(degrees: float) -> np.ndarray:
    """An embedding at an angle to the reference, which is at 0."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=np.float32) * 7


REFERENCE = at(0)


def test_the_mean_is_over_the_frames_with_a_face() -> None:
    found = identity(REFERENCE, [at(0), None, at(60), None])
    assert found.arc_sim == pytest.approx(0.75) and found.face_rate == 0.5


def test_a_cosine_below_zero_counts_as_it_is_but_not_in_consisids_form() -> None:
    frames = [at(180), at(0)]
    assert identity(REFERENCE, frames).arc_sim == pytest.approx(0.0, abs=1e-7)
    assert consisid_similarity(REFERENCE, 2, lambda index: frames[index]) == pytest.approx(1 / 16)


def test_without_a_face_there_is_no_value_and_consisids_is_zero() -> None:
    found = identity(REFERENCE, [None] * 5)
    assert found.arc_sim == Undefined(reason=NO_FACE) and found.face_rate == 0
    assert consisid_similarity(REFERENCE, 5, lambda _: None) == 0.0
    assert consisid_distance(REFERENCE, [None]) == Undefined(reason=NO_FACE)


def test_a_reference_without_a_face_is_said_to_be_the_reason() -> None:
    found = identity(None, [at(0), None])
    assert found.arc_sim == Undefined(reason=NO_REFERENCE) == found.drift and found.face_rate == 0.5
    assert consisid_similarity(None, 5, lambda _: at(0)) == Undefined(reason=NO_REFERENCE)


def test_drift_is_the_last_third_minus_the_first() -> None:
    frames = [at(0), at(0), at(30), at(45), at(60), at(60), at(60)]  # thirds of 2
    assert identity(REFERENCE, frames).drift == pytest.approx(0.5 - 1.0)
    assert isinstance(identity(REFERENCE, [at(0), at(0), None]).drift, Undefined)
    assert isinstance(identity(REFERENCE, [at(0), at(0)]).drift, Undefined)  # a third of two frames is none


def test_consisid_looks_at_sixteen_frames_from_the_first_to_the_last() -> None:
    assert consisid_frames(81) == [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80]
    assert consisid_frames(1) == [0] * 16 and len(consisid_frames(4)) == 16


def test_the_distance_of_features_is_squared_and_averaged() -> None:
    zero, three = np.zeros(4, dtype=np.float32), np.full(4, 3, dtype=np.float32)
    assert consisid_distance(zero, [three, None, zero]) == pytest.approx((36 + 0) / 2)


@given(st.lists(st.floats(-180, 180), min_size=1, max_size=30))
def test_values_stay_in_their_ranges(angles: list[float]) -> None:
    found = identity(REFERENCE, [at(angle) for angle in angles])
    assert isinstance(found.arc_sim, float) and -1 - 1e-6 <= found.arc_sim <= 1 + 1e-6 and found.face_rate == 1


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        identity(REFERENCE, [])
    with pytest.raises(ValueError, match="embedding of zeros"):
        cosine(REFERENCE, np.zeros(2, dtype=np.float32))
