"""What people pass to `Trainer` that is nearly right: it works, or the error says what came and what does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ane_trainer import Reporter, Trainer, load_dataset
from ane_trainer.ane.errors import AneTrainerError, DataError, UsageError

X, Y = torch.rand(32, 5), torch.arange(32) % 3


class Items(Dataset):  # type: ignore[type-arg]
    """32 examples, made by `item` of x and y."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> Any:
        return self.item(X[row], int(Y[row]))


def fit(data: Any, epochs: int = 1) -> int:
    trainer = Trainer(nn.Linear(5, 3), device="cpu", report=Reporter())
    return trainer.fit(data, epochs=epochs).steps


def once() -> Any:
    return ((X[k : k + 8], Y[k : k + 8]) for k in range(0, 32, 8))


WORKS = {
    "a generator": (once, 4), "a dataset": (lambda: Items(lambda x, y: (x, y)), 1),
    "a loader with workers": (lambda: DataLoader(Items(lambda x, y: (x, y)), batch_size=8, num_workers=1), 4),
    "arrays": (lambda: (X.double().numpy(), Y.numpy()), 1),
    "one-hot targets": (lambda: [(X, torch.eye(3)[Y])], 1), "targets in a column": (lambda: [(X, Y[:, None])], 1),
    "bytes as targets": (lambda: [(X, Y.byte())], 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORKS)
def test_data_in_any_of_these_forms_trains(kind: str) -> None:
    make, steps = WORKS[kind]
    assert fit(make()) == steps


class Named(nn.Module):
    """Takes what Hugging Face's datasets call it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layer(input)


def test_a_dataset_of_dictionaries_is_put_together() -> None:
    data = Items(lambda x, y: {"input": x, "labels": y})
    trainer = Trainer(Named(), device="cpu", report=Reporter())
    assert trainer.fit(data, epochs=2, val=data).steps == 2
    loader = DataLoader(data, batch_size=8)
    assert Trainer(Named(), device="cpu", report=Reporter()).fit(loader).steps == 4


REFUSED: dict[str, tuple[Any, str]] = {
    "a name": ("digits", "load_dataset"), "arrays by name": ({"x": X, "y": Y}, "a dictionary of 'x', 'y'"),
    "nothing": (None, "got None"), "texts as targets": (Items(lambda x, y: (x, "ab"[y % 2])), "y needs numbers; got "),
    "no targets": (Items(lambda x, y: (x, None)), "y needs numbers; got None"),
    "triples": (DataLoader(Items(lambda x, y: (x, y, y)), batch_size=8),
                "list of 3 (tensor [8, 5], tensor [8], tensor [8])"),
    "paths": (DataLoader(Items(lambda x, y: ("a.png", y)), batch_size=8), "list of 2 (tuple of str, tensor [8])"),
    "single examples": ([(X[k], int(Y[k])) for k in range(32)], "DataLoader(data, batch_size=32)"),
    "an empty generator": (iter(()), "got none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_data_of_another_form_is_refused_by_what_came(kind: str) -> None:
    data, said = REFUSED[kind]
    with pytest.raises(DataError) as caught:
        fit(data)
    assert said in str(caught.value)


def test_a_generator_is_refused_for_two_passes_and_its_error_is_its_own() -> None:
    with pytest.raises(DataError, match="an iterator that ends once"):
        fit(once(), 2)

    def broken() -> Any:
        yield X[:8], Y[:8]
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fit(broken())


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs an nn.Module; got None"):
        Trainer(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"got 'adam'. Pass e.g. torch.optim.Adam"):
        Trainer(nn.Linear(5, 3), "cross_entropy", "adam")  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "text"), [
    ({"batch_size": "64"}, r"DATA102 digits: needs batch_size as a whole number; got '64'"),
    ({"limit": "3"}, r"DATA102 digits: needs limit\[0\] as a whole number"),
    ({"batchsize": 64}, r"ANE104 load_dataset: .*'batchsize'.*Did you mean 'batch_size'"),
])  # fmt: skip
def test_arguments_of_other_types_and_names_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(AneTrainerError, match=text):
        load_dataset("digits", **options)


@pytest.mark.parametrize(("options", "text"), [
    ({"seed": "a"}, "ANE104 seed"),
    ({"threads": -1}, "ANE104 threads"),
    ({"chip": 4}, "ANE100 chip"),
    ({"fidelity": 3}, "ANE104 fidelity"),
    ({"metrics": {"f1": 3}}, "ANE104 metrics: f1"),
])  # fmt: skip
def test_options_of_other_types_are_named(options: dict[str, Any], text: str) -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(AneTrainerError, match=text):
        Trainer(net, "mse", torch.optim.SGD(net.parameters(), lr=0.1), **options)


def test_what_makes_no_array_is_not_predicted() -> None:
    net = nn.Linear(3, 2)
    trainer = Trainer(net, "mse", torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(AneTrainerError, match=r"DATA105 predict: .*`evaluate` takes batches"):
        trainer.predict([(torch.zeros(4, 3), torch.zeros(4))])


def test_a_checkpoint_of_another_model_is_refused_by_its_names(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    trainer = Trainer(net, "mse", torch.optim.SGD(net.parameters(), lr=0.1))
    trainer.save(tmp_path / "saved")
    with pytest.raises(AneTrainerError, match=r"CKPT106 .*0\.weight, 0\.bias are not in Linear"):
        Trainer.resume(tmp_path / "saved", model=nn.Linear(3, 2))
