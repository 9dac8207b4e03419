"""Claims about the list of a run's items: it comes back exactly, its digest means the content, shards keep identities whole."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt2v.manifest import (
    dumps_manifest,
    in_natural_order,
    manifest_digest,
    natural_key,
    of_some_identities,
    read_manifest,
    shard_by_identity,
    write_manifest,
)
from ipt2v.records import Item, Photo


def item_of(identity: str = "id1", prompt_id: str = "p1", prompt: str = "walks", reference: str = "/a.png") -> Item:
    digest = hashlib.sha256(reference.encode()).hexdigest()
    return Item(identity=identity, prompt_id=prompt_id, prompt=prompt, reference=reference, reference_sha256=digest)


def photo_of(name: str, content: str = "") -> Photo:
    return Photo(path=f"/{name}.png", sha256=hashlib.sha256((content or name).encode()).hexdigest())


def items_of(counts: list[int]) -> list[Item]:
    """counts[k] prompts for identity k."""
    return [item_of(f"id{k}", f"prompt{n}") for k, count in enumerate(counts) for n in range(1, count + 1)]


few = settings(max_examples=50)  # of Hypothesis's 100: the suite is to stay fast
items_with_photos = st.builds(
    lambda item, photos: replace(item, more_photos=tuple(photos)),
    st.builds(item_of, st.text(), st.text(), st.text(), st.text()),
    st.lists(st.builds(Photo, path=st.text(), sha256=st.text()), max_size=2),
)
item_lists = st.lists(
    items_with_photos,
    unique_by=lambda item: (item.identity, item.prompt_id),
    max_size=5,
)
count_lists = st.lists(st.integers(1, 12), min_size=1, max_size=30)


# --- natural order ------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, 10**12)), st.sampled_from(["id", "", "prompt", "7x"]))
def test_names_with_a_number_sort_by_the_number(numbers: list[int], prefix: str) -> None:
    assert sorted((f"{prefix}{n}" for n in numbers), key=natural_key) == [f"{prefix}{n}" for n in sorted(numbers)]


@few
@given(st.lists(st.text(alphabet="ab019.-²٣", max_size=6)), st.randoms())
def test_natural_order_does_not_depend_on_the_order_before(names: list[str], shuffler: random.Random) -> None:
    shuffled = shuffler.sample(names, len(names))
    assert sorted(names, key=natural_key) == sorted(shuffled, key=natural_key)


def test_items_sort_by_identity_and_then_by_prompt() -> None:
    keys = ["id1/prompt1", "id1/prompt2", "id1/prompt10", "id2/prompt1", "id10/prompt1"]
    items = [item_of(*key.split("/")) for key in sorted(keys)]
    assert [item.key for item in in_natural_order(items)] == keys


# --- the file -----------------------------------------------------------------------------------------------------------


@few
@given(item_lists)
def test_a_manifest_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> None:
    path = tmp_path_factory.getbasetemp() / "manifest.jsonl"
    write_manifest(items, path)
    assert read_manifest(path) == tuple(items)
    assert path.read_bytes() == dumps_manifest(items).encode("utf-8")


def test_a_manifest_is_one_readable_sorted_object_a_line() -> None:
    text = dumps_manifest([item_of(prompt="dreht\nsich um: \u00e9\u2028"), item_of("id2")])
    lines = text.removesuffix("\n").split("\n")
    assert len(lines) == 2
    assert list(json.loads(lines[0])) == ["identity", "prompt", "prompt_id", "reference", "reference_sha256"]
    assert '"dreht\\nsich um: \u00e9\u2028"' in lines[0]


def test_a_line_of_a_single_photo_says_nothing_of_further_ones_and_others_list_them() -> None:
    item = item_of()
    single = {name: getattr(item, name) for name in ("identity", "prompt", "prompt_id", "reference", "reference_sha256")}
    assert dumps_manifest([item]) == json.dumps(single) + "\n"
    more = json.loads(dumps_manifest([replace(item, more_photos=(photo_of("c"), photo_of("b")))]))
    photos = [{"path": "/c.png", "sha256": photo_of("c").sha256}, {"path": "/b.png", "sha256": photo_of("b").sha256}]
    assert more == single | {"more_photos": photos}


def test_the_photos_of_an_item_are_the_main_one_and_then_the_further_ones() -> None:
    item = item_of(reference="/a.png")
    assert item.photos == (Photo(path="/a.png", sha256=item.reference_sha256),)
    assert replace(item, more_photos=(photo_of("c"), photo_of("b"))).photos == (*item.photos, photo_of("c"), photo_of("b"))


@pytest.mark.parametrize(
    ("more_photos", "found"),
    [
        ("null", "more_photos is None (NoneType), expected a list of at least one object with the texts path, sha256"),
        ("[]", "more_photos is [] (list), expected"),
        ('"/b.png"', "more_photos is '/b.png' (str), expected"),
        ('{"path": "b", "sha256": "c"}', "more_photos is {'path': 'b', 'sha256': 'c'} (dict), expected"),
        ('["/b.png"]', "more_photos[0] is '/b.png' (str), expected"),
        ('[{"path": "b", "sha256": "c"}, {"path": "b"}]', "more_photos[1] is {'path': 'b'} (dict), expected"),
        ('[{"path": "b", "sha256": 7}]', "more_photos[0] is {'path': 'b', 'sha256': 7} (dict), expected"),
        (
            '[{"path": "b", "sha256": "c", "x": "y"}]',
            "more_photos[0] is {'path': 'b', 'sha256': 'c', 'x': 'y'} (dict), expected",
        ),
    ],
)
def test_further_photos_of_another_shape_are_refused(tmp_path: Path, more_photos: str, found: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(dumps_manifest([item_of()]).replace("{", f'{{"more_photos": {more_photos}, ', 1), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}, line 1: {found}")
    assert str(caught.value).endswith("write the manifest anew")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"identity": "a",', "malformed JSON: Expecting property name"),
        ("", "malformed JSON: Expecting value"),
        ("9" * 5000, "malformed JSON"),
        ("[1]", "found a list, expected an object"),
        ("{}", "fields none, expected identity, prompt, prompt_id, reference, reference_sha256"),
        (json.dumps({"identity": "a", "seed": "1"}), "fields identity, seed, expected identity, prompt,"),
        (
            json.dumps({"more_photos": []}),
            "fields more_photos, expected identity, prompt, prompt_id, reference, reference_sha256 and",
        ),
        (dumps_manifest([item_of()]).replace('"walks"', "7").strip(), "prompt is 7 (int), expected text"),
        (dumps_manifest([item_of("id0")]).strip(), "'id0/p1' is also on line 1"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(dumps_manifest([item_of("id0")]) + line + "\n" + dumps_manifest([item_of("id9")]), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}, line 2: {found}")


def test_a_manifest_cut_off_inside_a_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(dumps_manifest(items_of([3]))[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 3: malformed JSON"):
        read_manifest(path)


def test_a_manifest_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"\n\xff")
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2: not UTF-8 at byte 1"):
        read_manifest(path)


def test_100_000_items_are_read_within_a_second_and_a_half(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    prompt = "The astronaut, dressed in a white suit, pushes his car. " * 5
    line = dumps_manifest([item_of("id_", prompt=prompt)])
    path.write_text("".join(line.replace("id_", f"id{index}") for index in range(100_000)), encoding="utf-8")
    for _ in range(4):  # a busy machine may slow one try down, hardly all
        start = time.process_time()
        assert len(read_manifest(path)) == 100_000
        seconds = time.process_time() - start
        if seconds < 1.5:
            break
    assert seconds < 1.5


# --- the digest ---------------------------------------------------------------------------------------------------------


@few
@given(item_lists, st.randoms())
def test_the_digest_does_not_depend_on_order_nor_on_paths(items: list[Item], shuffler: random.Random) -> None:
    moved = [
        replace(
            item,
            reference="/elsewhere" + item.reference,
            more_photos=tuple(replace(photo, path="/elsewhere" + photo.path) for photo in item.more_photos),
        )
        for item in items
    ]
    assert manifest_digest(shuffler.sample(moved, len(moved))) == manifest_digest(items)


@pytest.mark.parametrize("field", ["identity", "prompt_id", "prompt", "reference_sha256"])
def test_the_digest_changes_with_every_other_field(field: str) -> None:
    items = items_of([2, 3])
    assert manifest_digest([*items[:-1], replace(items[-1], **{field: "other"})]) != manifest_digest(items)


def test_the_digest_of_items_with_single_photos_stays_what_run_folders_on_disk_have() -> None:
    rows = (("id1", "prompt1", "a"), ("id1", "prompt2", "a"), ("id2", "prompt1", "b"))
    items = [
        Item(identity=identity, prompt_id=prompt_id, prompt="walks", reference=f"/{identity}.png", reference_sha256=digit * 64)
        for identity, prompt_id, digit in rows
    ]
    # computed before items could have further photos
    assert manifest_digest(items) == "eeca592e6a4b5024061df4e8e951977f7fe9aa59c813c4f28246547b0a221226"


def test_the_digest_changes_with_the_content_and_the_order_of_further_photos_and_not_with_their_place() -> None:
    def digest(*more_photos: Photo) -> str:
        return manifest_digest([item_of("id0"), replace(item_of(), more_photos=more_photos)])

    photos = photo_of("b"), photo_of("c")
    different = [(), photos[:1], photos, photos[::-1], (photos[0], photo_of("c", "other"))]
    assert len({digest(*more_photos) for more_photos in different}) == len(different)
    assert digest(photos[0], photo_of("elsewhere", "c")) == digest(*photos)


def test_the_digest_tells_the_main_photo_from_a_further_one() -> None:
    item = replace(item_of(reference="/b.png"), more_photos=(photo_of("c"),))
    main, further = item.photos
    swapped = replace(item, reference=further.path, reference_sha256=further.sha256, more_photos=(main,))
    assert manifest_digest([swapped]) != manifest_digest([item])


def test_the_digest_does_not_run_fields_together() -> None:
    assert manifest_digest([item_of("ab", "c")]) != manifest_digest([item_of("a", "bc")])
    assert len(manifest_digest([])) == 64


# --- shards -------------------------------------------------------------------------------------------------------------


@few
@given(count_lists, st.data())
def test_every_item_lands_in_exactly_one_shard_and_no_shard_is_empty(counts: list[int], data: st.DataObject) -> None:
    items = items_of(counts)
    shards = shard_by_identity(items, data.draw(st.integers(1, len(counts))))
    assert Counter(item.key for shard in shards for item in shard) == Counter(item.key for item in items)
    assert all(shards)


@few
@given(count_lists, st.data())
def test_an_identity_never_straddles_two_shards(counts: list[int], data: st.DataObject) -> None:
    shards = shard_by_identity(items_of(counts), data.draw(st.integers(1, len(counts))))
    identities = [identity for shard in shards for identity in {item.identity for item in shard}]
    assert len(identities) == len(set(identities)) == len(counts)


@few
@given(count_lists, st.data(), st.randoms())
def test_shards_do_not_depend_on_the_order_of_the_items(
    counts: list[int], data: st.DataObject, shuffler: random.Random
) -> None:
    items, num_shards = items_of(counts), data.draw(st.integers(1, len(counts)))
    shards = shard_by_identity(items, num_shards)
    assert shard_by_identity(shuffler.sample(items, len(items)), num_shards) == shards
    assert all(shard == in_natural_order(shard) for shard in shards)


@few
@given(count_lists, st.data())
def test_two_shards_differ_by_one_identity_at_most(counts: list[int], data: st.DataObject) -> None:
    sizes = [len(shard) for shard in shard_by_identity(items_of(counts), data.draw(st.integers(1, len(counts))))]
    assert max(sizes) - min(sizes) <= max(counts)


@few
@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_identities_of_equal_size_differ_by_one_identity_at_most(
    num_identities: int, num_prompts: int, data: st.DataObject
) -> None:
    num_shards = data.draw(st.integers(1, num_identities))
    sizes = [len(shard) for shard in shard_by_identity(items_of([num_prompts] * num_identities), num_shards)]
    assert max(sizes) - min(sizes) in (0, num_prompts)


def test_largest_identities_go_first_and_ties_go_by_natural_order() -> None:
    counts = (("id2", 2), ("id10", 2), ("id30", 3))
    shards = shard_by_identity([item_of(identity, f"p{n}") for identity, count in counts for n in range(count)], 2)
    assert [[item.identity for item in shard] for shard in shards] == [["id30"] * 3, ["id2"] * 2 + ["id10"] * 2]
    shards = shard_by_identity([item_of(identity) for identity in ("id10", "id2", "id1")], 2)
    assert [[item.identity for item in shard] for shard in shards] == [["id1", "id10"], ["id2"]]


@pytest.mark.parametrize("num_shards", [-1, 0, 4])
def test_a_number_of_shards_that_cannot_be_is_refused_with_both_numbers(num_shards: int) -> None:
    with pytest.raises(ValueError, match=f"num_shards: {num_shards} for 3 identities; expected 1..3"):
        shard_by_identity(items_of([1, 2, 1]), num_shards)


def test_no_items_cannot_be_sharded() -> None:
    with pytest.raises(ValueError, match="num_shards: 1 for 0 identities"):
        shard_by_identity([], 1)


def test_some_identities_are_spread_over_the_list_each_whole_and_in_order() -> None:
    items = items_of([2] * 10)
    assert [item.key for item in of_some_identities(items, 3)] == [f"id{k}/prompt{n}" for k in (0, 3, 6) for n in (1, 2)]
    assert of_some_identities(items, None) == of_some_identities(items, 10) == tuple(items)
    with pytest.raises(ValueError, match=r"testset\.identities: found 11, expected at most the 10 of the test set"):
        of_some_identities(items, 11)
