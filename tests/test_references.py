"""Claims about decoding reference photos: every kind becomes upright RGB on white, every damage has its own error."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ipt2v.records import Item, ItemError
from ipt2v.references import load_photos, load_reference
from ipt2v.testsets import read_testset

CHALLENGE = Path(__file__).parents[2] / "shared" / "data" / "testset2025"
needs_challenge = pytest.mark.skipif(not CHALLENGE.is_dir(), reason=f"the challenge's test set is not at {CHALLENGE}")

RED, WHITE = (200, 0, 0), (255, 255, 255)


def item_of(path: Path, data: bytes) -> Item:
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Item(identity="id1", prompt_id="p1", prompt="walks", reference=str(path), reference_sha256=digest)


def with_photos(item: Item, *others: Item) -> Item:
    """The item with the photos of the others as its further ones."""
    return replace(item, more_photos=tuple(photo for other in others for photo in other.photos))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def loaded(path: Path, image: Image.Image, kind: str = "PNG", **options: object) -> NDArray[np.uint8]:
    image_HWC = load_reference(item_of(path / "image.png", encoded(image, kind, **options)))
    assert image_HWC.dtype == np.uint8
    assert image_HWC.ndim == 3 and image_HWC.shape[2] == 3
    return image_HWC


def quarters(mode: str = "RGB") -> Image.Image:
    """40 wide, 20 high: black, but red in the top left quarter."""
    image = Image.new("RGB", (40, 20))
    image.paste(RED, (0, 0, 20, 10))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_named_png_may_hold_any_kind(tmp_path: Path, kind: str) -> None:
    image_HWC = loaded(tmp_path, Image.new("RGB", (40, 20), RED), kind)
    assert image_HWC.shape == (20, 40, 3)
    assert abs(image_HWC.astype(int) - RED).max() <= 4


def test_an_exif_rotated_jpeg_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    image_HWC = loaded(tmp_path, quarters(), "JPEG", exif=exif, quality=95)
    assert image_HWC.shape == (40, 20, 3)
    assert image_HWC[5, 15, 0] > 180  # red was top left, now top right
    assert image_HWC[5, 5, 0] < 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_agrees_with_pillow(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quarters(), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(load_reference(item_of(tmp_path / "a.png", data)), np.asarray(expected))


def test_a_damaged_exif_block_spoils_no_pixel(tmp_path: Path) -> None:
    data = encoded(quarters(), "PNG", exif=b"Exif\0\0XX\0*\0\0\0\x08broken")
    assert np.array_equal(load_reference(item_of(tmp_path / "a.png", data)), np.asarray(quarters()))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_becomes_white(tmp_path: Path, kind: str) -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 20, 20))
    image.paste((*RED, 128), (0, 0, 20, 10))
    options = {"lossless": True} if kind == "WEBP" else {}
    image_HWC = loaded(tmp_path, image, kind, **options)
    assert tuple(image_HWC[15, 5]) == RED
    assert tuple(image_HWC[5, 30]) == WHITE
    assert tuple(image_HWC[5, 5]) == (227, 127, 127)


def test_gray_with_alpha_becomes_rgb_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (20, 20), (90, 255))
    image.paste((90, 0), (0, 0, 10, 20))
    image_HWC = loaded(tmp_path, image)
    assert tuple(image_HWC[0, 15]) == (90, 90, 90)
    assert tuple(image_HWC[0, 0]) == WHITE


def test_a_palette_becomes_rgb(tmp_path: Path) -> None:
    image = quarters().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(loaded(tmp_path, image), np.asarray(quarters()))


def test_a_palette_with_transparency_becomes_rgb_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([1, 2, 3, *RED])
    image.paste(1, (0, 0, 10, 20))
    image_HWC = loaded(tmp_path, image, transparency=0)
    assert tuple(image_HWC[0, 0]) == RED
    assert tuple(image_HWC[0, 15]) == WHITE


@pytest.mark.parametrize(("mode", "colour", "transparency"), [("RGB", RED, RED), ("L", 90, 90)])
def test_a_png_colour_marked_as_transparent_becomes_white(
    tmp_path: Path, mode: str, colour: tuple[int, ...] | int, transparency: tuple[int, ...] | int
) -> None:
    image_HWC = loaded(tmp_path, Image.new(mode, (20, 20), colour), transparency=transparency)
    assert (image_HWC == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_every_mode_keeps_black_and_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste(WHITE, (20, 0, 40, 20))
    image_HWC = loaded(tmp_path, image.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert image_HWC[:, :16].max() <= 4
    assert image_HWC[:, 24:].min() >= 251


def test_16_bit_gray_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    gray16_HW = np.repeat(np.linspace(0, 65535, 256).astype(np.uint16)[None], 16, axis=0)
    image_HWC = loaded(tmp_path, Image.fromarray(gray16_HW))
    assert np.array_equal(image_HWC[0, :, 0], np.arange(256))
    image_HWC = loaded(tmp_path, Image.fromarray(gray16_HW), transparency=0)
    assert list(image_HWC[0, :3, 0]) == [255, 1, 2]


def test_16_bit_rgb_png_becomes_8_bit(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">3H", 51400, 0, 65535) * 16
    chunks = ((b"IHDR", struct.pack(">2I5B", 16, 16, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row * 16)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    image_HWC = load_reference(item_of(tmp_path / "a.png", data))
    assert (image_HWC == (200, 0, 255)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    image_HWC = loaded(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (image_HWC == RED).all()


def test_the_first_picture_of_a_phone_s_multi_picture_jpeg_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, WHITE)]
    image_HWC = loaded(tmp_path, frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert abs(image_HWC.astype(int) - RED).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9])
def test_a_truncated_photo_is_this_items_error(tmp_path: Path, kind: str, fraction: float) -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise_HWC), kind)
    item = item_of(tmp_path / "image.png", data[: int(len(data) * fraction)])
    with pytest.raises(ItemError, match=r"id1/p1: reference .*image\.png cannot be decoded: .*; replace the photo"):
        load_reference(item)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow about EXIF blocks
def test_damaged_photos_are_decoded_or_this_items_error(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        data = np.frombuffer(encoded(quarters(), kind, exif=exif), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            damaged[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
            try:
                assert load_reference(item_of(tmp_path / "image.png", damaged.tobytes())).shape[2] == 3
            except ItemError as error:
                assert "id1/p1: reference " in str(error)


@pytest.mark.parametrize("size", [(15, 40), (40, 15), (1, 1)])
def test_a_tiny_photo_is_this_items_error(tmp_path: Path, size: tuple[int, int]) -> None:
    item = item_of(tmp_path / "a.png", encoded(Image.new("RGB", size), "PNG"))
    with pytest.raises(ItemError, match=f"is {size[0]}x{size[1]} px, expected at least 16 px a side"):
        load_reference(item)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "found"), [(10_001, "is 10001x10001 px, .* at most 100 megapixels"), (60_000, "3600000000 pixels")]
)
def test_an_absurdly_large_photo_is_refused_before_it_is_decoded(tmp_path: Path, side: int, found: str) -> None:
    data = bytearray(encoded(Image.new("RGB", (20, 20)), "PNG"))
    data[16:24] = struct.pack(">2I", side, side)  # the header claims it; there are no such pixels
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ItemError, match=found):
        load_reference(item_of(tmp_path / "a.png", bytes(data)))


def test_other_image_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="cannot be decoded"):
        load_reference(item_of(tmp_path / "image.png", encoded(quarters(), "BMP")))


def test_a_changed_photo_names_both_digests(tmp_path: Path) -> None:
    item = item_of(tmp_path / "a.png", encoded(quarters(), "PNG"))
    changed = item_of(tmp_path / "a.png", encoded(quarters("L"), "PNG"))
    with pytest.raises(ValueError) as caught:
        load_reference(item)
    digests = f"sha256 {changed.reference_sha256[:12]}, expected {item.reference_sha256[:12]}"
    assert str(caught.value) == f"id1/p1: reference {item.reference} has changed: {digests}; restore it or make a new run"


def test_a_photo_that_vanished_is_named(tmp_path: Path) -> None:
    item = item_of(tmp_path / "a.png", encoded(quarters(), "PNG"))
    Path(item.reference).unlink()
    with pytest.raises(ValueError, match=r"a\.png cannot be read \(No such file or directory\); restore it or make a new run"):
        load_reference(item)


def test_all_photos_are_loaded_the_main_one_first_and_the_others_in_their_order(tmp_path: Path) -> None:
    shades = {"main": (40, 20), "c": (20, 30), "b": (16, 16)}
    items = [
        item_of(tmp_path / f"{name}.png", encoded(Image.new("RGB", size, RED if name == "c" else WHITE), "PNG"))
        for name, size in shades.items()
    ]
    main, *others = load_photos(with_photos(*items))
    assert [image.shape for image in (main, *others)] == [(20, 40, 3), (30, 20, 3), (16, 16, 3)]
    assert (others[0] == RED).all() and (others[1] == 255).all()
    assert np.array_equal(main, load_reference(items[0]))


def test_an_item_with_a_single_photo_has_one(tmp_path: Path) -> None:
    item = item_of(tmp_path / "a.png", encoded(quarters(), "PNG"))
    assert len(load_photos(item)) == 1
    assert np.array_equal(load_photos(item)[0], load_reference(item))


def test_a_further_photo_stands_upright_on_white_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    further = encoded(Image.new("RGBA", (40, 20), (0, 0, 0, 0)), "PNG", exif=exif)
    item = with_photos(item_of(tmp_path / "a.png", encoded(quarters(), "PNG")), item_of(tmp_path / "b.png", further))
    assert load_photos(item)[1].shape == (40, 20, 3)
    assert (load_photos(item)[1] == 255).all()


def test_a_changed_or_vanished_further_photo_is_named(tmp_path: Path) -> None:
    item = with_photos(*(item_of(tmp_path / name, encoded(quarters(), "PNG")) for name in ("a.png", "b.png")))
    (tmp_path / "b.png").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"^id1/p1: reference .*b\.png has changed: sha256 .*; restore it or make a new run$"):
        load_photos(item)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"^id1/p1: reference .*b\.png cannot be read \(No such file or directory\)"):
        load_photos(item)
    assert load_reference(item).shape == (20, 40, 3)


@pytest.mark.parametrize(
    ("further", "found"),
    [
        (encoded(Image.new("RGB", (40, 20)), "PNG")[:60], "cannot be decoded: .*; replace the photo"),
        (encoded(Image.new("RGB", (15, 40)), "PNG"), "is 15x40 px, expected at least 16 px a side"),
    ],
)
def test_a_further_photo_that_cannot_be_used_is_this_items_error_and_is_named(
    tmp_path: Path, further: bytes, found: str
) -> None:
    item = with_photos(item_of(tmp_path / "a.png", encoded(quarters(), "PNG")), item_of(tmp_path / "b.png", further))
    with pytest.raises(ItemError, match=rf"^id1/p1: reference .*b\.png {found}"):
        load_photos(item)


@needs_challenge
def test_every_reference_of_the_challenge_set_is_rgb() -> None:
    one_each = {item.reference: item for item in read_testset(CHALLENGE)}.values()
    shapes = [load_reference(item).shape for item in one_each]
    assert len(shapes) == 10
    assert all(min(height, width) >= 300 and channels == 3 for height, width, channels in shapes)
