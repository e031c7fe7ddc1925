"""Text as examples of a language model: windows of tokens, and the token after each as its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.batches import Examples
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.datasets.encodings import read_any_text
from ane_trainer.training.datasets.kinds import other_kind
from ane_trainer.training.datasets.splits import VAL_SPLIT, DataOptions, Parts

SUFFIXES = (".txt", ".md", ".text")
#: Characters in a vocabulary at most; a text with more is read as bytes.
MOST_CHARACTERS = 512


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens from the places `starts`: x int64 [B, T], y [B, T] is x one token later."""

    tokens_N: NDArray[np.int64]
    length: int
    starts: NDArray[np.int64]
    draws = False

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Windows and their targets."""
        places_BT = self.starts[rows_B, None] + np.arange(self.length)
        return self.tokens_N[places_BT], self.tokens_N[places_BT + 1]

    def content(self) -> bytes:
        """The text and the places of the windows."""
        return self.tokens_N.tobytes() + self.starts.tobytes()

    def targets(self) -> NDArray[np.int64]:
        """The targets of all windows [N, T]."""
        return self.take(np.arange(len(self)))[1]


def windows_of(tokens_N: NDArray[np.int64], length: int, seed: int | None) -> Windows:
    """Windows that follow each other; with a seed each is moved on by a random part of its length.

    Windows that all began at a multiple of their length would let a model learn a text's rhythm by position.
    """
    last = len(tokens_N) - length - 1
    starts = np.arange(max(len(tokens_N) - 1, 0) // length) * length
    if seed is not None:
        random = np.random.Generator(np.random.PCG64([seed, 6]))
        starts = np.minimum(starts + random.integers(0, length, len(starts)), max(last, 0))
    return Windows(tokens_N, length, starts)


def open_text(path: Path, options: DataOptions) -> Parts:
    """A text file as windows; validation and test are its end, since neighbours are alike."""
    content = read_text(path)
    vocabulary = find_vocabulary(content, options.tokens)
    tokens = encode_text(content, vocabulary, str(path))
    share = VAL_SPLIT if options.val_split is None else options.val_split
    ends = np.round(len(tokens) * np.array([1 - share - options.test_split, 1 - options.test_split])).astype(
        int
    )
    pieces = dict(zip(("train", "val", "test"), np.split(tokens, ends), strict=True))
    parts: dict[str, Examples] = {
        split: windows_of(piece, options.context, options.seed if split == "train" else None)
        for split, piece in pieces.items()
    }
    if not len(parts["train"]):
        raise DataError(
            f"{path}: needs more than {options.context} tokens to train on; got {len(pieces['train'])}. "
            "Give more text, or a smaller --context.",
            code="DATA104",
        )
    kept = {split: part for split, part in parts.items() if len(part)}
    description = DataDescription(
        path.name, "text", "next-token", (options.context,), vocabulary=vocabulary, source=str(path)
    )
    return Parts(kept, description, takes=frozenset({"context", "tokens"}))


def read_text(path: Path) -> str:
    """A text file; DataError DATA115 if it is none."""
    try:
        other = other_kind(path, b"<")
        if other is not None:
            raise DataError(f"{path}: needs text; got {other[0]}. {other[1]}", code="DATA115")
        return read_any_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: needs text; got {error}. Save it as UTF-8.", code="DATA115") from None


def find_vocabulary(text: str, tokens: str) -> tuple[str, ...]:
    """The characters of a text, sorted; () for bytes, which "auto" takes beyond 512 different characters."""
    if tokens not in ("auto", "chars", "bytes"):
        raise DataError(f"tokens: needs auto, chars or bytes; got {tokens!r}. Choose one.", code="DATA102")
    if tokens == "bytes":
        return ()
    characters = tuple(sorted(set(text)))
    if len(characters) == 1:
        raise DataError(
            f"text: needs two or more different characters; got only {characters[0]!r}. There is nothing to learn.",
            code="DATA104",
        )
    return () if tokens == "auto" and len(characters) > MOST_CHARACTERS else characters


def encode_text(text: str, vocabulary: Sequence[str], where: str) -> NDArray[np.int64]:
    """Token numbers [N]; DataError DATA116 for characters that the vocabulary has not."""
    if not vocabulary:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    number = {character: index for index, character in enumerate(vocabulary)}
    if unknown := sorted(set(text) - number.keys()):
        raise DataError(
            f"{where}: needs characters of the training text; got {', '.join(map(repr, unknown[:8]))}. "
            "Leave them out, or train on bytes (--tokens bytes).",
            code="DATA116",
        )
    return np.array([number[character] for character in text], np.int64)


def decode_text(tokens_N: Sequence[int] | Array, vocabulary: Sequence[str]) -> str:
    """The text of token numbers."""
    if not vocabulary:
        return bytes(int(token) for token in tokens_N).decode(errors="replace")
    return "".join(vocabulary[int(token)] for token in tokens_N)
