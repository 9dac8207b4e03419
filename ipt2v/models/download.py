"""A file at a plain URL -> a file here; an archive -> its files. Knows no model and no record."""

from __future__ import annotations

import os
import shutil
import zipfile
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20


def unpack(archive: Path, folder: Path) -> list[Path]:
    """The .onnx files of an archive, all in `folder` whatever folders it has. Raises ValueError if a name leads out of it."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = [(PurePosixPath(info.filename.replace("\\", "/")), info) for info in content.infolist()]
            for path, info in members:
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(
                        f"{archive}: member {info.filename!r} leads out of the archive's folder; nothing was unpacked"
                    )
            chosen = {path.name: info for path, info in members if path.suffix == ".onnx"}
            for name, info in chosen.items():
                scratch = folder / f"{name}.part"
                with content.open(info) as source, scratch.open("wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(scratch, folder / name)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: no zip archive ({error}); delete it and fetch it again") from None
    return [folder / name for name in chosen]


def size_at(url: str) -> int | None:
    """Size in bytes of what is at a URL. Raises ValueError if it cannot be reached."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT_SECONDS) as response:
            return int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
    except HTTPError as error:
        raise ValueError(
            f"weights fetch: {url} answers {error.code} {error.reason}; fetch it by hand into the folder"
        ) from None
    except (OSError, HTTPException) as error:
        raise unreachable(host_of(url), error) from None


def resume(url: str, part: Path, size: int | None) -> None:
    """All of what is at a URL in `part`, after what it holds already. Raises OSError if the transfer ends early."""
    from tqdm import tqdm

    done = part.stat().st_size if part.is_file() else 0
    if done and done == size:
        return
    if size is not None and done > size:
        done = 0
    request = Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            if response.status != 206:  # the server sends all of it
                done = 0
            bar = tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=part.stem, disable=None)
            with part.open("ab" if done else "wb") as file, bar:
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, HTTPException) as error:
        raise OSError(f"weights fetch: {url} stopped ({one_line(error)}); run it again, it goes on from there") from None
    found = part.stat().st_size
    if size not in (None, found):
        raise OSError(f"weights fetch: {url} stopped after {found:,} of {size:,} bytes; run it again, it goes on from there")


def unreachable(host: str, error: Exception) -> ValueError:
    return ValueError(
        f"weights fetch: {host} cannot be reached ({one_line(error)}); run it on a login node with network, "
        "or copy the folder and run `ipt2v weights check`"
    )


def one_line(error: Exception) -> str:
    text = str(error.reason if isinstance(error, URLError) else error)
    return " ".join(text.split())[:200] or type(error).__name__


def host_of(url: str) -> str:
    return urlsplit(url).netloc or url
