"""Batches of texts come in few lengths, padded by what the model leaves out; others stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from ane_trainer.interop.lengths import LONG, Padding, common_multiple, longest_of, pad_loaders


def collate(examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest of the batch, as tokenizers do."""
    length = max(len(e["input_ids"]) for e in examples)  # type: ignore[arg-type]
    rows = {
        name: torch.tensor([[*e[name], *[0] * (length - len(e[name]))] for e in examples])  # type: ignore[arg-type, misc]
        for name in ("input_ids", "attention_mask")
    }
    return {**rows, "labels": torch.tensor([e["labels"] for e in examples])}


def example(length: int) -> dict[str, object]:
    return {"input_ids": [3] * length, "attention_mask": [1] * length, "labels": 1}


def test_rows_are_padded_with_the_models_token_and_outside_of_the_mask() -> None:
    batch = Padding(collate, 16, token=9)([example(5), example(3)])
    assert batch["input_ids"].shape == (2, 16)  # type: ignore[index]
    assert batch["input_ids"][0, 5:].tolist() == [9] * 11  # type: ignore[index]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]  # type: ignore[index]
    assert batch["labels"].tolist() == [1, 1]  # type: ignore[index]


def test_labels_of_tokens_are_padded_by_what_losses_ignore() -> None:
    def rows(examples: list[object]) -> dict[str, torch.Tensor]:
        return {
            name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")
        }

    assert Padding(rows, 8, token=0)([])["labels"][0].tolist() == [1] * 5 + [-100] * 3  # type: ignore[index]


@pytest.mark.parametrize(
    "change", [{"labels": None}, {"word_ids": torch.ones(2, 5)}, {"labels": torch.ones(2, 5)}]
)
def test_what_padding_could_change_is_left_alone(change: dict[str, torch.Tensor | None]) -> None:
    """Without labels a script makes them of the tokens, padding included; rows of numbers have no filling."""

    def rows(examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        return {name: row for name, row in {**collate(examples), **change}.items() if row is not None}

    assert Padding(rows, 16, token=0)([example(5), example(3)])["input_ids"].shape == (2, 5)  # type: ignore[index]


def test_four_lengths_at_most() -> None:
    data = [example(length) for length in (7, 100, 33)]
    assert longest_of(data) == 100
    assert longest_of(iter(data)) == LONG
    assert common_multiple([data, data[:1]]) == 32
    assert common_multiple([data[:1]]) == 16


def test_loaders_of_texts_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    texts = DataLoader([example(9), example(40)], batch_size=1, collate_fn=collate)  # type: ignore[arg-type]
    images = DataLoader([torch.ones(3)], batch_size=1)  # type: ignore[arg-type]
    pad_loaders([texts, images], token=0)  # type: ignore[list-item]
    pad_loaders([texts], token=0)  # type: ignore[list-item]
    assert [batch["input_ids"].shape[1] for batch in texts] == [16, 48]
    assert not isinstance(images.collate_fn, Padding)
    assert "multiples of 16" in caplog.text
