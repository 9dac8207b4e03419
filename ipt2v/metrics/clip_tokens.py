"""CLIP's byte-pair encoding: a text -> token ids, from the published list of merges. Knows no network.

The rules are those of OpenAI's CLIP (MIT), Radford et al. 2021; ViCLIP's differ in the number of tokens only.
"""

from __future__ import annotations

import gzip
import html
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_MAX_MERGES = 48_894  # the file has more; 256 bytes twice, these, and two markers make 49,408 ids
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vocabulary:
    ids: Mapping[str, int]  # token -> its id; the markers are the last two, the end of a text the largest
    ranks: Mapping[tuple[str, str], int]  # of two neighbours, those of the lowest rank are joined first

    @property
    def start(self) -> int:
        return self.ids[_START]

    @property
    def end(self) -> int:
        return self.ids[_END]


def load_vocabulary(path: Path) -> Vocabulary:
    """Of bpe_simple_vocab_16e6.txt.gz, or a shorter file like it: a heading, then two tokens a line, first merge first.

    Raises ValueError if it is not such a file.
    """
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")[1 : _MAX_MERGES + 1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of merges: {error}; download it again") from error
    pairs = [tuple(line.split()) for line in lines if line]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path}: expected a heading and then two tokens on every line; name another file")
    bytes_ = list(_characters_of_bytes().values())
    tokens = [*bytes_, *(one + _WORD_END for one in bytes_), *("".join(pair) for pair in pairs), _START, _END]
    ranks = {(pair[0], pair[1]): rank for rank, pair in enumerate(pairs)}
    return Vocabulary(ids={token: index for index, token in enumerate(tokens)}, ranks=ranks)


def token_ids(text: str, vocabulary: Vocabulary, *, context: int) -> list[int]:
    """`context` ids: start, text, end, then zeros. A longer text is cut, and its end marked at the last place: VBench's rule.

    ViCLIP has 32 of them, 30 for the text; CLIP 77.
    """
    ids = [vocabulary.start, *content_ids(text, vocabulary), vocabulary.end]
    if len(ids) > context:
        ids = [*ids[: context - 1], vocabulary.end]
    return ids + [0] * (context - len(ids))


def content_ids(text: str, vocabulary: Vocabulary) -> list[int]:
    """All ids of a text, without start and end."""
    characters = _characters_of_bytes()
    ids: list[int] = []
    for word in words(cleaned(text)):
        if word in (_START, _END):
            ids.append(vocabulary.ids[word])
            continue
        written = "".join(characters[byte] for byte in word.encode("utf-8"))
        ids.extend(vocabulary.ids[token] for token in merged(written, vocabulary.ranks))
    return ids


def cleaned(text: str) -> str:
    """Mended characters, no HTML escapes (of escapes), single spaces, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def words(text: str) -> Iterator[str]:
    """What is encoded piece by piece: markers, English contractions, runs of letters, single digits, runs of the rest."""
    kinds = "".join(" " if one.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(one)[0], ".") for one in text)
    start = 0
    while start < len(text):
        whole = next((one for one in (_START, _END, *_CONTRACTIONS) if text.startswith(one, start)), None)
        end = start + (len(whole) if whole else 1)
        if whole is None and kinds[start] in "L.":
            while end < len(text) and kinds[end] == kinds[start]:
                end += 1
        if kinds[start] != " ":
            yield text[start:end]
        start = end


def merged(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The tokens of a word: its characters, joined pair by pair in the order of the ranks, wherever the pair stands."""
    parts = [*word[:-1], word[-1] + _WORD_END]
    while known := [pair for pair in pairwise(parts) if pair in ranks]:
        best = min(known, key=lambda pair: ranks[pair])
        joined: list[str] = []
        for part in parts:
            # joined[-1] may be a pair already: its length tells, as no token equals its own beginning
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def _characters_of_bytes() -> dict[int, str]:
    """byte -> the character that stands for it: itself if it is printed, else one from 256 on; in the order of the ids."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + index) for index, byte in enumerate(others)}
