"""Few lengths for batches of texts: each shape is a program of its own, so batches are padded to a common multiple."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sized

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

__all__ = ["Padding", "common_multiple", "longest_of", "pad_loaders"]

_log = logging.getLogger(__name__)

#: Lengths that batches are padded to at most; programs of one model: those, a smaller last batch, and evaluation's.
LENGTHS, PROGRAMS = 4, 16
#: What lengths are a multiple of; the longest example of data that does not say before it is used.
ROW, LONG = 16, 1024
#: What fills a batch's rows of tokens, by name; `input_ids` get the model's padding token.
FILLING = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "labels": -100}


def common_multiple(datasets: Iterable[object]) -> int:
    """The multiple to pad to, so that at most LENGTHS lengths come of the datasets."""
    longest = max(map(longest_of, datasets), default=LONG)
    return max(ROW, math.ceil(longest / LENGTHS / ROW) * ROW)


def longest_of(dataset: object) -> int:
    """The most tokens in an example, LONG where only reading a stream would tell."""
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return LONG
    if "input_ids" in (getattr(dataset, "column_names", None) or ()):  # of Hugging Face's, read at once
        return max(map(len, dataset["input_ids"]), default=0)
    examples = (dataset[k] for k in range(len(dataset)))
    return max((len(e.get("input_ids", ())) for e in examples if isinstance(e, Mapping)), default=0)


class Padding:
    """A collator after which rows of tokens are as long as a multiple, where a mask says which tokens count.

    Batches without labels (which may be made of the tokens, padding included) or with rows whose filling is not known
    are left as they are.
    """

    def __init__(self, collate: Callable[[list[object]], object], multiple: int, token: int) -> None:
        self._collate = collate
        self._multiple = multiple
        self._filling = {**FILLING, "input_ids": token}

    def __call__(self, examples: list[object]) -> object:
        batch = self._collate(examples)
        if isinstance(batch, MutableMapping) and {"input_ids", "attention_mask", "labels"} <= batch.keys():
            shape = batch["input_ids"].shape
            rows = [
                name for name, row in batch.items() if torch.is_tensor(row) and row.shape[1:2] == shape[1:]
            ]
            short = -shape[1] % self._multiple
            known = all(name in self._filling and not batch[name].is_floating_point() for name in rows)
            if short and known:
                for name in rows:
                    batch[name] = F.pad(batch[name], (0, short), value=self._filling[name])
        return batch


def pad_loaders(loaders: list[DataLoader[object]], token: int) -> None:
    """Let loaders of tokenized texts pad to a common multiple, and say so."""
    texts = [loader for loader in loaders if holds_texts(loader.dataset) and loader.collate_fn is not None]
    multiple = common_multiple(loader.dataset for loader in texts)
    for loader in texts:
        if not isinstance(loader.collate_fn, Padding):
            loader.collate_fn = Padding(loader.collate_fn, multiple, token)
    if texts:
        _log.warning(f"ane_trainer: batches are padded to multiples of {multiple}: each length is a program")


def holds_texts(dataset: object) -> bool:
    """Whether examples are mappings with tokens and no attention to what is padded."""
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return False
    example = dataset[0]
    return isinstance(example, Mapping) and {"input_ids", "attention_mask"} <= example.keys()
