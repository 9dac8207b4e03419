"""Claims about reading test sets: what each format gives, and one error for each thing that can be wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ipt2v.records import Photo
from ipt2v.testsets import archive_template, detect_format, read_testset, sniff_image

CHALLENGE = Path(__file__).parents[2] / "shared" / "data" / "testset2025"
needs_challenge = pytest.mark.skipif(not CHALLENGE.is_dir(), reason=f"the challenge's test set is not at {CHALLENGE}")


def photo(kind: str = "PNG", shade: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 24), (shade, 10, 200)).save(file, kind)
    return file.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def write_jsonl(folder: Path, *rows: object) -> Path:
    return write(folder / "set.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_evaljson(folder: Path, *rows: object) -> Path:
    return write(folder / "eval.json", json.dumps(list(rows), indent=1))


def keys(path: Path, format: str = "auto") -> list[str]:
    return [item.key for item in read_testset(path, format)]


def error_of(path: Path, format: str = "auto") -> str:
    with pytest.raises(ValueError) as caught:
        read_testset(path, format)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for identity in ("id10", "id2", "anna"):
        write(root / identity / "image.png", photo())
        for number in (10, 2, 1):
            write(root / identity / f"prompt{number}.txt", f" {identity} says {number}\n")
    return root


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with two photos, for the formats that are one file."""
    write(tmp_path / "images" / "a.png", photo())
    write(tmp_path / "images" / "b.webp", photo("WEBP"))
    return tmp_path


# --- what each format gives ---------------------------------------------------------------------------------------------


def test_a_tree_gives_every_prompt_of_every_folder_in_natural_order(tree: Path) -> None:
    assert keys(tree) == [f"{identity}/prompt{n}" for identity in ("anna", "id2", "id10") for n in (1, 2, 10)]
    item = read_testset(tree)[3]
    assert (item.identity, item.prompt_id, item.prompt) == ("id2", "prompt1", "id2 says 1")
    assert item.reference == str(tree / "id2" / "image.png")
    assert item.reference_sha256 == hashlib.sha256(photo()).hexdigest()


@pytest.mark.parametrize("name", ["image.png", "image.webp", "image.jpg", "image.jpeg", "image.PNG"])
def test_a_tree_takes_each_image_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x" / name, photo())
    write(tmp_path / "x" / "prompt1.txt", "walks")
    assert read_testset(tmp_path)[0].reference == str(tmp_path / "x" / name)


def test_stray_files_in_a_tree_are_left_alone(tree: Path) -> None:
    before = keys(tree)
    for stray in (".DS_Store", "README.md", "Thumbs.db", "image.png", "prompt1.txt", ".git/config", ".cache/image.png"):
        write(tree / stray, "stray")
    for stray in (".DS_Store", "._image.png", "._prompt3.txt", "notes.txt", "prompt1.txt~", "prompt.txt", "small/image.png"):
        write(tree / "id2" / stray, "stray")
    assert keys(tree) == before


def test_a_tree_gives_further_photos_to_every_prompt_of_their_identity_by_their_numbers(tree: Path) -> None:
    names = ["Image2.png", "image3.WEBP", "image010.jpg", "image011.jpeg"]  # natural order would put I before i
    for shade, name in enumerate(reversed(names)):
        write(tree / "id2" / name, photo(shade=shade))
    items = read_testset(tree)
    assert {item.reference for item in items if item.identity == "id2"} == {str(tree / "id2" / "image.png")}
    expected = [(str(tree / "id2" / name), hashlib.sha256(photo(shade=3 - n)).hexdigest()) for n, name in enumerate(names)]
    for item in items:
        assert [(one.path, one.sha256) for one in item.more_photos] == (expected if item.identity == "id2" else [])


def test_jsonl_takes_a_list_of_images_with_the_main_photo_first(table: Path) -> None:
    row = {"identity": "a", "prompt": "walks"}
    images = [" images/b.webp ", "images/a.png"], ["images/a.png"], "images/a.png"
    listed, alone, plain = read_testset(write_jsonl(table, *(row | {"image": image} for image in images)))
    assert listed.reference == str(table / "images" / "b.webp")
    assert listed.reference_sha256 == hashlib.sha256(photo("WEBP")).hexdigest()
    sha256 = hashlib.sha256(photo()).hexdigest()
    assert listed.more_photos == (Photo(path=str(table / "images" / "a.png"), sha256=sha256),)
    assert alone.photos == plain.photos == listed.more_photos


def test_a_further_photo_in_jsonl_may_be_absolute(table: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write(tmp_path_factory.mktemp("elsewhere") / "c.png", photo(shade=1))
    path = write_jsonl(table, {"identity": "a", "prompt": "walks", "image": ["images/a.png", str(elsewhere)]})
    assert [one.path for one in read_testset(path)[0].more_photos] == [str(elsewhere)]


def test_csv_and_evaljson_give_no_further_photos(table: Path) -> None:
    assert not read_testset(write(table / "s.csv", "identity,prompt,image\na,walks,images/a.png\n"))[0].more_photos
    assert not read_testset(write_evaljson(table, {"img": "images/a.png", "prompt": "walks"}))[0].more_photos
    path = write_evaljson(table, {"img": ["images/a.png"], "prompt": "walks"})
    assert "line 2 (entry 1): img is ['images/a.png'] (list), expected text in quotes" in error_of(path)


def test_an_evaljson_numbers_its_entries_from_1(table: Path) -> None:
    rows = [{"img": f"images/{name}", "prompt": f"p {name}"} for name in ("b.webp", "a.png", "b.webp")]
    path = write_evaljson(table, *rows)
    assert keys(path) == ["a/2", "b/1", "b/3"]
    assert read_testset(table) == read_testset(path)
    assert read_testset(table)[0].reference == str(table / "images" / "a.png")


def test_jsonl_and_csv_say_the_same(table: Path) -> None:
    rows = [("b", "x", "sits, then stands", "images/b.webp"), ("a", "y", "walks", "images/a.png")]
    names = ("identity", "prompt_id", "prompt", "image")
    jsonl = write_jsonl(table, *(dict(zip(names, row, strict=True)) for row in rows))
    comma = write(
        table / "set.csv", "identity, prompt_id, prompt, image\r\n" + "".join(f'{a},{b},"{c}",{d}\r\n' for a, b, c, d in rows)
    )
    assert read_testset(jsonl) == read_testset(comma)
    assert keys(jsonl) == ["a/y", "b/x"]
    assert read_testset(comma)[1].prompt == "sits, then stands"


def test_rows_without_prompt_id_are_numbered_within_their_identity(table: Path) -> None:
    rows = [{"identity": identity, "prompt": "walks", "image": "images/a.png"} for identity in ("b", "a", "b", "b")]
    rows[2]["prompt_id"] = None  # type: ignore[assignment]  # pandas writes null for a hole
    assert keys(write_jsonl(table, *rows)) == ["a/prompt1", "b/prompt1", "b/prompt2", "b/prompt3"]
    text = "identity,prompt_id,prompt,image\n" + "b,,walks,images/a.png\n" * 2 + "a,last,walks,images/a.png\n"
    assert keys(write(table / "set.csv", text)) == ["a/last", "b/prompt1", "b/prompt2"]


def test_a_csv_cell_may_span_lines(table: Path) -> None:
    path = write(table / "set.csv", 'identity,prompt,image\na,"one\ntwo",images/a.png\na,,images/a.png\n')
    assert "line 4: prompt is empty" in error_of(path)
    path = write(table / "set.csv", 'identity,prompt,image\n\na,"one\ntwo",images/a.png\n')
    assert read_testset(path)[0].prompt == "one\ntwo"


def test_separators_of_unicode_do_not_split_a_jsonl_line(table: Path) -> None:
    path = write_jsonl(table, {"identity": "a", "prompt": "one\u2028two\u0085three", "image": "images/a.png"})
    assert read_testset(path)[0].prompt == "one\u2028two\u0085three"


def test_a_byte_order_mark_is_accepted_everywhere(tree: Path, table: Path) -> None:
    write(tree / "id2" / "prompt1.txt", "\ufeff walks")
    assert read_testset(tree)[3].prompt == "walks"
    row = {"identity": "a", "prompt": "walks", "image": "images/a.png"}
    assert keys(write(table / "a.jsonl", "\ufeff" + json.dumps(row))) == ["a/prompt1"]
    assert keys(write(table / "a.csv", "\ufeffidentity,prompt,image\na,walks,images/a.png")) == ["a/prompt1"]
    assert keys(write(table / "eval.json", "\ufeff" + json.dumps([{"img": "images/a.png", "prompt": "walks"}]))) == ["a/1"]


def test_absolute_images_are_allowed_in_jsonl_and_csv_only(table: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write(tmp_path_factory.mktemp("elsewhere") / "c.png", photo())
    row = {"identity": "a", "prompt": "walks", "image": str(elsewhere)}
    assert read_testset(write_jsonl(table, row))[0].reference == str(elsewhere)
    assert read_testset(write(table / "s.csv", f"identity,prompt,image\na,walks,{elsewhere}\n"))[0].reference == str(elsewhere)
    text = error_of(write_evaljson(table, {"img": str(elsewhere), "prompt": "walks"}))
    assert f"line 2 (entry 1): image '{elsewhere}' is absolute, expected a path relative to {table}" in text


def test_a_photo_is_hashed_once_however_many_prompts_it_has(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real_open = Path.open

    def noting_open(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return real_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", noting_open)
    rows = [{"identity": "a", "prompt": "walks", "image": f"images/{name}"} for name in ("a.png", "b.webp", "a.png", "a.png")]
    rows.append({"identity": "a", "prompt": "walks", "image": ["images/b.webp", "images/a.png"]})  # type: ignore[dict-item]
    assert len(read_testset(write_jsonl(table, *rows))) == 5
    assert [path.name for path in opened if path.parent.name == "images"] == ["a.png", "b.webp"]


def test_a_relative_path_gives_absolute_references(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "id2")
    assert read_testset(Path("..")) == read_testset(tree)
    monkeypatch.chdir(tree.parent)
    assert read_testset(Path("set")) == read_testset(tree)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_photo_is_known_by_its_content(kind: str) -> None:
    assert sniff_image(photo(kind)[:12]) == kind.lower()


@pytest.mark.parametrize("head", [b"", b"GIF89a", b"\x89PNG", b"RIFF\0\0\0\0WAVE", b"version https://git-lfs"])
def test_other_content_is_no_photo(head: bytes) -> None:
    assert sniff_image(head) is None


def test_a_file_named_png_may_hold_jpeg_or_webp(tree: Path) -> None:
    write(tree / "id2" / "image.png", photo("JPEG"))
    write(tree / "id10" / "image.png", photo("WEBP"))
    assert len(read_testset(tree)) == 9


def test_every_format_has_an_archive_template() -> None:
    templates = [archive_template(name) for name in ("tree", "evaljson", "jsonl", "csv")]
    assert templates == ["{identity}/{prompt_id}.mp4", "{prompt_id}.mp4"] + ["{identity}/{prompt_id}.mp4"] * 2


@needs_challenge
def test_the_challenge_set_has_10_identities_with_5_prompts_each() -> None:
    items = read_testset(CHALLENGE)
    assert detect_format(CHALLENGE) == "tree"
    assert [item.key for item in items] == [f"id{i:03}/prompt{k}" for i in range(1, 11) for k in range(1, 6)]
    assert len({item.reference_sha256 for item in items}) == 10


# --- which format it is -------------------------------------------------------------------------------------------------


def test_auto_picks_by_what_the_path_is(tree: Path, tmp_path: Path) -> None:
    assert detect_format(tree) == "tree"
    for name, format in (("a.jsonl", "jsonl"), ("a.CSV", "csv"), ("other.json", "evaljson")):
        assert detect_format(write(tmp_path / name, "")) == format
    assert detect_format(write(tmp_path / "e" / "eval.json", "[]").parent) == "evaljson"


def test_auto_says_what_it_found_when_it_cannot_tell(tree: Path, tmp_path: Path) -> None:
    text = error_of(tree.parent)
    assert f"{tree.parent}: format unclear: a folder that fits no format, it holds set/" in text
    assert "say which: tree, evaljson, jsonl, csv" in text
    assert "suffix '.txt', expected .jsonl, .csv, .json" in error_of(write(tmp_path / "a.txt", ""))
    write(tree / "eval.json", "[]")
    text = error_of(tree)
    assert "fits evaljson and tree" in text
    assert "it holds anna/, eval.json, id2/, id10/" in text
    assert "no such file or folder" in error_of(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in error_of(tmp_path / "empty")


def test_an_unknown_format_lists_the_known_ones(tree: Path) -> None:
    assert error_of(tree, "trees") == "format 'trees' unknown; known: tree, evaljson, jsonl, csv"
    with pytest.raises(ValueError, match="known: tree, evaljson, jsonl, csv"):
        archive_template("auto")


# --- what can be wrong in a tree ----------------------------------------------------------------------------------------


def test_a_folder_without_image_is_named_with_what_it_holds(tree: Path) -> None:
    (tree / "id2" / "image.png").rename(tree / "id2" / "photo.png")
    text = error_of(tree)
    assert f"{tree / 'id2'}: image missing: found photo.png, prompt1.txt, prompt2.txt, prompt10.txt" in text


def test_several_images_in_one_folder_are_all_named(tree: Path) -> None:
    write(tree / "id2" / "image.webp", photo("WEBP"))
    assert f"{tree / 'id2'}: 2 images found (image.png, image.webp), expected one" in error_of(tree)


def test_a_folder_with_further_photos_alone_lacks_its_main_one(tree: Path) -> None:
    (tree / "id2" / "image.png").rename(tree / "id2" / "image2.png")
    assert f"{tree / 'id2'}: image missing: found image2.png, prompt1.txt" in error_of(tree)


@pytest.mark.parametrize("name", ["image0.png", "image1.png", "image01.webp"])
def test_a_further_photo_that_counts_below_2_is_named(tree: Path, name: str) -> None:
    write(tree / "id2" / name, photo())
    expected = f"{tree / 'id2'}: {name} found beside image.*; further photos count from image2.* on; rename it"
    assert error_of(tree) == expected


@pytest.mark.parametrize("names", [("image2.png", "image2.webp"), ("image02.png", "image2.png")])
def test_two_further_photos_with_one_number_are_both_named(tree: Path, names: tuple[str, str]) -> None:
    for shade, name in enumerate(names):
        write(tree / "id2" / name, photo(shade=shade))
    assert f"{tree / 'id2'}: 2 images with the number 2 found ({names[0]}, {names[1]}), expected one" in error_of(tree)


def test_a_further_photo_in_a_tree_is_checked_as_the_main_one_is(tree: Path) -> None:
    path, place = tree / "id2" / "image2.png", tree / "id2" / "prompt1.txt"
    write(path, "version https://git-lfs.github.com/spec/v1")
    assert error_of(tree).startswith(f"{place}: image {path} starts with b'version http', expected the content of a PNG")
    path.unlink()
    path.symlink_to(tree / "absent.png")
    assert error_of(tree).startswith(f"{place}: image {path} missing: no such file; add it or correct the path")


def test_the_same_photo_twice_in_one_folder_is_refused(tree: Path) -> None:
    write(tree / "id2" / "image2.png", photo(shade=1))
    path = write(tree / "id2" / "image3.png", photo())
    text = f"image {path} has the same content as {tree / 'id2' / 'image.png'}, expected different photos of the person"
    assert error_of(tree) == f"{tree / 'id2' / 'prompt1.txt'}: {text}; remove one"


def test_a_folder_without_prompts_is_named_with_what_it_holds(tree: Path) -> None:
    write(tree / "zoe" / "image.png", photo())
    assert f"{tree / 'zoe'}: no prompts: found image.png, expected prompt1.txt" in error_of(tree)


def test_an_empty_prompt_is_named_by_its_file(tree: Path) -> None:
    path = write(tree / "id2" / "prompt2.txt", "\ufeff \n")
    assert error_of(tree).startswith(f"{path}: prompt is empty")


def test_a_prompt_that_is_not_utf8_is_named_with_offset_and_line(tree: Path) -> None:
    path = write(tree / "id2" / "prompt2.txt", b"one\ncaf\xe9 two")
    assert error_of(tree).startswith(f"{path}: not UTF-8: byte 0xe9 at offset 7 (line 2)")


def test_a_file_that_is_no_image_is_named_with_its_first_bytes(tree: Path) -> None:
    path = write(tree / "id2" / "image.png", "version https://git-lfs.github.com/spec/v1")
    assert f"image {path} starts with b'version http', expected the content of a PNG, JPEG or WEBP" in error_of(tree)


def test_an_empty_test_set_is_an_error_in_every_format(tmp_path: Path) -> None:
    for path, format in (
        (tmp_path, "tree"),
        (write(tmp_path / "eval.json", "[]"), "evaljson"),
        (write(tmp_path / "a.jsonl", "\n\n"), "jsonl"),
        (write(tmp_path / "a.csv", "identity,prompt,image\n"), "csv"),
    ):
        assert error_of(path, format) == f"{path}: empty test set: no items found, reading it as {format!r}"


def test_a_tree_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent'}: no such folder" in error_of(tmp_path / "absent", "tree")


# --- what can be wrong in files -----------------------------------------------------------------------------------------

BAD_NAMES = [
    ("", "is empty"),
    ("a/b", "holds a path separator"),
    ("a\\b", "holds a path separator"),
    ("a..b", "holds '..'"),
    (".a", "starts with a dot"),
    ("a\tb", "holds a control character"),
    ("a\u2028b", "holds a control character"),
    ("x" * 101, "is longer than 100 characters"),
    ("\u4e2d" * 90, "is longer than 200 bytes"),
    ("a\ud800", "is not UTF-8 text"),
]


@pytest.mark.parametrize("field", ["identity", "prompt_id"])
@pytest.mark.parametrize(("name", "fault"), BAD_NAMES)
def test_a_name_that_cannot_be_a_file_name_is_refused(table: Path, field: str, name: str, fault: str) -> None:
    good = {"identity": "a", "prompt_id": "p", "prompt": "walks", "image": "images/a.png"}
    path = write(table / "set.jsonl", json.dumps(good) + "\n" + json.dumps(good | {"prompt_id": "q"} | {field: name}))
    text = error_of(path)
    assert text.startswith(f"{path}, line 2: {field} ")
    assert f"({len(name)} characters) {fault}; expected 1..100 characters" in text


def test_a_folder_name_with_a_blank_at_its_end_is_refused(tree: Path) -> None:
    (tree / "id2").rename(tree / "id2 ")
    assert "identity 'id2 ' (4 characters) starts or ends with a blank" in error_of(tree)


def test_a_duplicate_key_names_both_places(table: Path) -> None:
    row = {"identity": "a", "prompt_id": "p", "prompt": "walks", "image": "images/a.png"}
    path = write_jsonl(table, row, row | {"identity": "b"}, row)
    assert f"{path}, line 3: duplicate key 'a/p', first seen at {path}, line 1" in error_of(path)


def test_a_missing_image_names_file_and_line(table: Path) -> None:
    row = {"identity": "a", "prompt": "walks", "image": "images/a.png"}
    path = write_jsonl(table, row, row | {"image": "images/c.png"})
    assert f"{path}, line 2: image {table / 'images' / 'c.png'} missing: no such file" in error_of(path)
    path = write_evaljson(table, {"img": "images/c.png", "prompt": "walks"})
    assert f"{path}, line 2 (entry 1): image {table / 'images' / 'c.png'} missing" in error_of(path)


def test_a_further_photo_in_jsonl_is_checked_as_the_main_one_is(table: Path) -> None:
    outside = write(table.parent / f"{table.name}-outside.png", photo())
    write(table / "text.png", "no photo at all")
    for image, found in (
        ("images/c.png", f"image {table / 'images' / 'c.png'} missing: no such file"),
        (f"../{outside.name}", f"image '../{outside.name}' leads out of the test set to {outside}"),
        ("text.png", f"image {table / 'text.png'} starts with b'no photo at ', expected the content of"),
        ("", "image '' is no path"),
        ("images/b.webp", f"image {table / 'images' / 'b.webp'} has the same content as {table / 'images' / 'b.webp'}"),
        ("images/../images/b.webp", f"image {table}/images/../images/b.webp has the same content as"),
    ):
        row = {"identity": "a", "prompt": "walks", "image": ["images/b.webp", "images/a.png", image]}
        path = write_jsonl(table, {"identity": "b", "prompt": "walks", "image": "images/a.png"}, row)
        assert error_of(path).startswith(f"{path}, line 2: {found}")


def test_two_identities_may_share_a_photo(table: Path) -> None:
    rows = [{"identity": one, "prompt": "walks", "image": ["images/a.png", "images/b.webp"]} for one in "ab"]
    first, second = read_testset(write_jsonl(table, *rows))
    assert first.photos == second.photos


@pytest.mark.parametrize("image", ["images", "x" * 300, "", "a\0b"])
def test_an_image_path_that_is_no_file_is_an_error_with_its_line(table: Path, image: str) -> None:
    path = write_jsonl(table, {"identity": "a", "prompt": "walks", "image": image})
    assert error_of(path).startswith(f"{path}, line 1: image ")


@pytest.mark.parametrize("through", ["dots", "file link", "folder link", "loop"])
def test_a_relative_image_may_not_leave_the_test_set(tmp_path: Path, through: str) -> None:
    outside = write(tmp_path / "outside" / "a.png", photo())
    folder = tmp_path / "set"
    folder.mkdir()
    image = {"dots": "../outside/a.png", "file link": "a.png", "folder link": "inner/a.png", "loop": "loop/a.png"}[through]
    (folder / "a.png").symlink_to(outside)
    (folder / "inner").symlink_to(outside.parent)
    (folder / "loop").symlink_to(folder / "loop")
    path = write_jsonl(folder, {"identity": "a", "prompt": "walks", "image": image})
    expected = "leads nowhere" if through == "loop" else f"leads out of the test set to {outside}"
    assert f"{path}, line 1: image '{image}' {expected}" in error_of(path)


def test_a_relative_image_may_use_dots_and_links_inside_the_test_set(table: Path) -> None:
    (table / "link.png").symlink_to(table / "images" / "a.png")
    rows = [{"identity": "a", "prompt": "walks", "image": image} for image in ("images/../images/a.png", "link.png")]
    assert len({item.reference_sha256 for item in read_testset(write_jsonl(table, *rows))}) == 1


def test_a_test_set_reached_through_a_link_keeps_the_link_in_its_paths(table: Path, tmp_path: Path) -> None:
    write_jsonl(table, {"identity": "a", "prompt": "walks", "image": "images/a.png"})
    (tmp_path / "link").symlink_to(table)
    assert read_testset(tmp_path / "link" / "set.jsonl")[0].reference == str(tmp_path / "link" / "images" / "a.png")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (
            {"identity": "a", "promt": "x", "image": "i"},
            "column 'promt' unknown; did you mean 'prompt'? known: identity, prompt_id",
        ),
        ({"zzz": "a"}, "column 'zzz' unknown; known: identity, prompt_id, prompt, image"),
        ({"identity": "a", "prompt": "x"}, "column 'image' missing; found: identity, prompt"),
        ({"identity": "a", "prompt_id": 1, "prompt": "x", "image": "i"}, "prompt_id is 1 (int), expected text"),
        ({"identity": None, "prompt": "x", "image": "i"}, "identity is None (NoneType), expected text"),
        (
            {"identity": "a", "prompt": "x", "image": []},
            "image is an empty list, expected text in quotes or a list of at least",
        ),
        (
            {"identity": "a", "prompt": "x", "image": ["images/a.png", 7]},
            "image is a list with 7 (int), expected text in quotes",
        ),
        ({"identity": "a", "prompt": "x", "image": [["i"]]}, "image is a list with ['i'] (list), expected text in quotes"),
        ({"identity": "a", "prompt": "x", "image": 7}, "image is 7 (int), expected text in quotes"),
        ({"identity": "a", "prompt": ["x"], "image": ["i"]}, "prompt is ['x'] (list), expected text in quotes"),
        (["a", "x", "i"], "found a list, expected an object with identity, prompt_id, prompt, image"),
        ({"identity": "a", "prompt": "one\0two", "image": "images/a.png"}, "prompt holds a NUL character at 3"),
        ({"identity": "a", "prompt": " \t", "image": "images/a.png"}, "prompt is empty"),
    ],
)
def test_a_bad_jsonl_row_names_its_line(table: Path, row: object, found: str) -> None:
    good = {"identity": "good", "prompt": "walks", "image": "images/a.png"}
    path = write_jsonl(table, good, row)
    assert error_of(path).startswith(f"{path}, line 2: {found}")


@pytest.mark.parametrize("line", ['{"identity": "a",', "[" * 100_000, "9" * 5000, '{"a": 1} {"b": 2}'])
def test_malformed_jsonl_names_its_line(table: Path, line: str) -> None:
    path = write(table / "set.jsonl", "\n" + line)
    assert error_of(path).startswith(f"{path}, line 2: ")


def test_half_a_character_in_a_prompt_is_refused(table: Path) -> None:
    path = write(table / "set.jsonl", '{"identity": "a", "prompt": "x \\ud83d", "image": "images/a.png"}')
    assert f"{path}, line 1: prompt holds half a character" in error_of(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("identity,promt,image\n", "line 1: column 'promt' unknown; did you mean 'prompt'?"),
        ("identity;prompt;image\n", "line 1: column 'identity;prompt;image' unknown"),
        ("identity,prompt\n", "line 1: column 'image' missing; found: identity, prompt"),
        ("identity,prompt,image,image\n", "line 1: column 'image' is there 2 times"),
        ("identity,prompt,image\na,walks, then sits,images/a.png\n", "line 2: malformed CSV: 4 cells, expected 3"),
        ("identity,prompt,image\na,walks\n", "line 2: malformed CSV: 2 cells, expected 3"),
        (
            'identity,prompt,image\na,"walks,images/a.png\nb,sits,images/a.png\n',
            "line 2: malformed CSV: unexpected end of data",
        ),
        ("identity,prompt,image\na,walks,images/a.png\n,walks,images/a.png\n", "line 3: identity '' (0 characters) is empty"),
    ],
)
def test_bad_csv_names_its_line(table: Path, text: str, found: str) -> None:
    path = write(table / "set.csv", text)
    assert error_of(path).startswith(f"{path}, {found}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[\n {"img": "images/a.png" "prompt": "x"}\n]', ", line 2: malformed JSON: Expecting ',' delimiter"),
        ("", ", line 1: malformed JSON: Expecting value"),
        ("[" * 100_000, ": malformed JSON"),
        ('{"img": "images/a.png", "prompt": "x"}', ": found a dict, expected a list of objects with img, prompt"),
        (
            '[\n\n{"img": "images/a.png",\n"prompt": "x"},\n"y"]',
            ", line 5 (entry 2): found a str, expected an object with img, prompt",
        ),
        ('[{"img_paths": [], "global_prompt": "x"}]', ", line 1 (entry 1): column 'img_paths' unknown; did you mean 'img'?"),
        ('[{"img": "images/a.png", "prompt": "x"},\n{"img": "images/a.png"}]', ", line 2 (entry 2): column 'prompt' missing"),
        ('[{"img": "images/a.png", "prompt": ""}]', ", line 1 (entry 1): prompt is empty"),
        ('[{"img": "../a.png", "prompt": "x"}]', ", line 1 (entry 1): image '../a.png' leads out of the test set"),
    ],
)
def test_bad_evaljson_names_line_and_entry(table: Path, text: str, found: str) -> None:
    path = write(table / "eval.json", text)
    assert error_of(path).startswith(f"{path}{found}")


@pytest.mark.parametrize("name", ["set.jsonl", "set.csv", "eval.json"])
def test_a_file_that_is_not_utf8_is_named_with_offset_and_line(table: Path, name: str) -> None:
    path = write(table / name, b"\n\n  \xff\xfe")
    assert error_of(path).startswith(f"{path}: not UTF-8: byte 0xff at offset 4 (line 3)")


@pytest.mark.parametrize("format", ["jsonl", "csv", "evaljson"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, format: str) -> None:
    assert f"{tmp_path / 'absent'}: cannot be read (No such file or directory)" in error_of(tmp_path / "absent", format)


def test_a_file_name_that_is_not_utf8_is_refused_with_a_printable_message(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/set/caf\xe9"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    write(Path(os.fsdecode(folder)) / "image.png", photo())
    write(Path(os.fsdecode(folder)) / "prompt1.txt", "walks")
    text = error_of(tmp_path / "set")
    assert "is not UTF-8 text" in text
    assert text.encode("utf-8")


def test_a_line_break_in_a_file_name_does_not_break_the_message(tmp_path: Path) -> None:
    write(tmp_path / "a\nb" / "image.png", photo())
    write(tmp_path / "a\nb" / "prompt1.txt", "walks")
    assert "identity 'a\\nb' (3 characters) holds a control character" in error_of(tmp_path)


ERRORS_OF_NOTHING: list[Callable[[Path], object]] = [read_testset, detect_format]


@pytest.mark.parametrize("call", ERRORS_OF_NOTHING)
def test_a_path_that_is_not_there_is_named(tmp_path: Path, call: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match="absent: no such file or folder; give the path of a test set"):
        call(tmp_path / "absent")


@pytest.mark.parametrize(
    "call", [*ERRORS_OF_NOTHING, lambda path: read_testset(path, "tree"), lambda path: read_testset(path, "csv")]
)
def test_a_name_that_is_too_long_is_wrong_input(tmp_path: Path, call: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match=r"x: cannot be read \(File name too long\); check the path and its permissions"):
        call(tmp_path / ("x" * 300))


@pytest.mark.parametrize("call", [*ERRORS_OF_NOTHING, lambda path: read_testset(path, "tree")])
def test_a_folder_that_may_not_be_listed_is_wrong_input(
    tree: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], object]
) -> None:
    closed, listed = tree / "anna", os.listdir

    def refuse(path: Any = ".") -> Any:  # chmod does not keep root out
        if path in (closed, str(closed)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ValueError, match=r"anna: cannot be read \(Permission denied\); check the path and its permissions"):
        call(tree)
