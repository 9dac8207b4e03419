"""What an element makes next: its own shard, then what others left; nothing twice, nothing that cannot be finished."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from helpers import first_frame, frozen_run, provenance, video_latents, write_tree

from ipt2v import hdf5, run_dir
from ipt2v.claims import DELIVERY_SECONDS, MAX_CRASHES, Claims
from ipt2v.leases import Leases
from ipt2v.models.vace.position import Position
from ipt2v.position_file import save_position
from ipt2v.records import Failure
from ipt2v.run_dir import RunDir, free_leases_of_the_dead, seal_shard
from ipt2v.watch import END_TIME
from ipt2v.work import open_work


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Three shards of two people with two prompts each; all first frames are there."""
    write_tree(tmp_path / "testset", tuple(f"id{number:03d}" for number in range(6)), num_prompts=2)
    run = frozen_run(tmp_path, num_shards=3)
    digest = run.environment().run_digest
    for shard in range(3):
        for key in run.shard_keys(shard):
            hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), provenance(digest))
    return run


def claims(run: RunDir, shard: int) -> Claims:
    mine = Leases(folder=run.leases_path, owner=f"video element {shard}")
    return Claims(work=open_work(run, "video", shard), leases=mine)


def make(run: RunDir, key: str, *, with_mp4: bool = True) -> None:
    digest = run.environment().run_digest
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), provenance(digest))
    if with_mp4:
        run.mp4_path(key).parent.mkdir(parents=True, exist_ok=True)
        run.mp4_path(key).write_bytes(b"mp4")


def taken(found: Claims) -> list[str]:
    return [claim.key for claim in found.videos()]


def test_its_own_shard_comes_first_then_the_others_from_their_ends(run: RunDir) -> None:
    own, following, last = (run.shard_keys(shard) for shard in (1, 2, 0))
    assert taken(claims(run, 1)) == [*own, *reversed(following), *reversed(last)]


def test_two_elements_share_everything_and_take_nothing_twice(run: RunDir) -> None:
    one, other = claims(run, 0).videos(), claims(run, 2).videos()
    both = [claim.key for pair in zip(one, other, strict=False) for claim in pair]
    assert sorted(both) == sorted(key for shard in range(3) for key in run.shard_keys(shard))


def test_what_is_made_or_failed_or_has_no_first_frame_is_left_alone(run: RunDir) -> None:
    own, others = run.shard_keys(0), run.shard_keys(1)
    make(run, own[0])
    run.save_failure(Failure(key=own[1], stage="video", reason="x"))
    run.part_path("first_frame", others[0]).unlink()
    run.save_failure(Failure(key=others[1], stage="video", reason="x"))
    make(run, run.shard_keys(2)[0])
    seal_shard(run, "video", 2, run.shard_keys(2))
    expected = [*own[2:], *reversed(others[2:]), *reversed(run.shard_keys(2)[1:])]
    assert taken(claims(run, 0)) == expected


def test_an_item_that_another_finishes_between_look_and_lease_is_not_made_again(run: RunDir) -> None:
    found = claims(run, 0)
    videos = found.videos()
    first, (second, third) = next(videos).key, run.shard_keys(0)[1:3]
    make(run, second)
    assert next(videos).key == third
    assert found.leases.held == {first, third}


def test_a_lease_is_given_back_when_the_mp4_is_there(run: RunDir) -> None:
    found = claims(run, 0)
    videos = found.videos()
    first = next(videos).key
    make(run, first, with_mp4=False)
    second = next(videos).key
    assert found.leases.held == {first, second}
    make(run, first)
    third = next(videos).key
    assert found.leases.held == {second, third}


def test_latents_without_an_mp4_are_decoded_by_who_has_their_lease(run: RunDir) -> None:
    keys = run.shard_keys(0)
    for key in keys[:2]:
        make(run, key, with_mp4=False)
    make(run, keys[2])
    assert Leases(folder=run.leases_path, owner="video element 9").take(keys[0])  # it is about to write its MP4
    assert claims(run, 0).undecoded() == (keys[1],)


def test_a_broken_record_is_put_aside_and_its_item_made_again(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    keys = run.shard_keys(0)
    make(run, keys[0])
    path = run.part_path("video", keys[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert taken(claims(run, 0))[: len(keys)] == list(keys)
    assert path.with_name(f".{path.name}.broken").read_bytes() == whole[: len(whole) // 2] and not path.exists()
    assert f"{path}: not a readable HDF5 file" in caplog.text


def test_another_shards_first_frame_that_does_not_open_is_left_to_it(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    others = run.shard_keys(1)
    run.part_path("first_frame", others[-1]).write_bytes(b"no HDF5")
    with caplog.at_level(logging.WARNING):
        assert others[-1] not in taken(claims(run, 0))
    assert "left to shard 1" in caplog.text
    assert run.part_path("first_frame", others[-1]).exists()


def test_what_has_crashed_an_element_is_tried_by_its_own_alone_and_at_last_counts_as_failed(run: RunDir) -> None:
    key = run.shard_keys(0)[1]
    for life in range(MAX_CRASHES - 1):
        run.note_crash(key, f"life{life}", "RuntimeError: odd")
        run.note_crash(key, f"life{life}", "another rank's consequence of it")
    assert key in taken(claims(run, 0))
    (run.leases_path / f"{key}.lease").unlink()
    assert key not in taken(claims(run, 1))
    run.note_crash(key, "last", "RuntimeError: odd again")
    assert key not in taken(claims(run, 0))
    (failure,) = run.failures()
    assert (failure.key, failure.stage) == (key, "video")
    assert failure.reason == f"{MAX_CRASHES} elements crashed in it: RuntimeError: odd again"


def damage(path: Path) -> None:
    """Cut the pixels' own bytes up; the file opens, and so does its provenance."""
    with h5py.File(path, "r+") as file:
        dataset = next(group["image"] for identity in file["items"].values() for group in identity.values())
        place, size = dataset.id.get_chunk_info(0).byte_offset, dataset.id.get_chunk_info(0).size
    data = bytearray(path.read_bytes())
    data[place : place + size] = bytes(size)
    path.write_bytes(data)


def test_a_damaged_first_frame_fails_its_item_and_ends_no_element(run: RunDir) -> None:
    own, others = run.shard_keys(0), run.shard_keys(1)
    damage(run.part_path("first_frame", own[1]))
    damage(run.part_path("first_frame", others[2]))
    assert set(taken(claims(run, 0))) == {*own, *others, *run.shard_keys(2)} - {own[1], others[2]}
    (failure,) = run.failures()
    assert (failure.key, failure.stage) == (own[1], "video")
    assert "damaged" in failure.reason and "verify RUN --repair" in failure.reason


def test_a_sealed_shard_that_does_not_open_is_left_to_its_own(run: RunDir) -> None:
    seal_shard(run, "first_frame", 1, run.shard_keys(1))
    run.sealed_path("first_frame", 1).write_bytes(b"cut short")
    assert set(taken(claims(run, 0))) == {*run.shard_keys(0), *run.shard_keys(2)}


def test_a_part_that_is_sealed_at_this_moment_is_still_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    work, keys = open_work(run, "video", 0), run.shard_keys(0)
    stale = run.record_paths("first_frame", 0, keys)
    seal_shard(run, "first_frame", 0, keys)
    looks = [stale, run.record_paths("first_frame", 0, keys)]
    monkeypatch.setattr(RunDir, "record_paths", lambda *_: looks.pop(0))
    assert work.load(hdf5.load_first_frame, "first_frame", keys[0]).key == keys[0]


def test_a_shard_that_is_sealed_between_two_looks_loses_no_record(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, look = run.shard_keys(0), run_dir.existing

    def late(*arguments: Any) -> set[str]:
        monkeypatch.setattr(run_dir, "existing", look)
        seal_shard(run, "first_frame", 0, keys)
        return look(*arguments)

    monkeypatch.setattr(run_dir, "existing", late)
    assert run.recorded("first_frame", 0, keys) == set(keys)


@pytest.mark.parametrize(("spare", "expected"), [(-1.0, True), (30.0, False)])
def test_no_item_is_begun_that_cannot_be_finished_but_the_first(
    run: RunDir, spare: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = claims(run, 0)
    monkeypatch.setenv(END_TIME, str(time.time() + 1))
    videos = found.videos()
    assert next(videos).key == run.shard_keys(0)[0]
    found.took += [100.0, 7.0, 100.0]
    monkeypatch.setenv(END_TIME, str(time.time() + DELIVERY_SECONDS + 100 + spare))
    assert (next(videos, None) is None, found.out_of_time) == (expected, expected)


def test_a_claim_comes_with_the_steps_that_somebody_has_saved(run: RunDir) -> None:
    key, digest = run.shard_keys(0)[0], run.environment().run_digest
    position = Position(num_done=7, num_steps=12, latents_BCthw=torch.ones(1), tensors={}, numbers={"_step_index": 7})
    save_position(run.position_path(key), position, key=key, run_digest=digest, seconds=3.5)
    claim, other = list(claims(run, 0).videos())[:2]
    assert claim.position is not None and (claim.position.num_done, claim.seconds) == (7, 3.5)
    assert other.position is None and other.seconds == 0


def test_a_shard_is_sealed_once_when_it_is_whole_by_whoever_comes_last(run: RunDir) -> None:
    thief, owner = claims(run, 2), claims(run, 0)
    thief.shards.append(0)
    keys = run.shard_keys(0)
    for key in keys[:-1]:
        make(run, key)
    thief.seal()
    assert not run.sealed_path("video", 0).exists()
    make(run, keys[-1])
    assert thief.leases.take("seal-000")  # about to
    owner.seal()
    assert not run.sealed_path("video", 0).exists()
    thief.leases.drop("seal-000")
    owner.seal()
    assert hdf5.sealed_keys(run.sealed_path("video", 0)) == keys
    before = os.stat(run.sealed_path("video", 0)).st_mtime_ns
    thief.seal()
    assert os.stat(run.sealed_path("video", 0)).st_mtime_ns == before


def test_what_the_dead_hold_is_free_at_once_when_it_is_known_who_lives(run: RunDir) -> None:
    dead, alive = claims(run, 0), claims(run, 1)
    one, other = next(dead.videos()).key, next(alive.videos()).key
    free_leases_of_the_dead(run, {1, 2})
    found = taken(claims(run, 2))
    assert one in found and other not in found
