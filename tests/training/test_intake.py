"""Tests of ane_trainer/training/intake.py: types and shapes of batches, and the last, smaller batch against PyTorch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer import Reporter, Trainer
from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets.opening import batches_of
from ane_trainer.training.intake import (
    Intake,
    WeightedLoss,
    fill_up,
    fit_target,
    has_smaller_batch,
    mixes_examples,
    per_example,
)
from ane_trainer.training.loop import as_tensors, check_rows

torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_classes_of_other_integer_types_train_as_int64(dtype: torch.dtype, device: str) -> None:
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    losses = []
    for target in (y, y.to(dtype)):
        torch.manual_seed(0)
        trainer = Trainer(torch.nn.Linear(4, 2), device=device, threads=1, report=Reporter(), verify="off")
        losses.append(trainer.fit([(x, target)], val=[(x, target)]).train_loss)
    assert losses[0] == losses[1]


def code_of(call, *arguments):
    with pytest.raises(DataError) as caught:
        call(*arguments)
    return caught.value.code


# Types and shapes --------------------------------------------------------------------------------------------


def test_arrays_lists_and_float64_become_tensors():
    x, y = as_tensors(np.zeros((2, 3))), as_tensors([1, 0])
    assert (x.dtype, x.shape, y.dtype) == (torch.float32, (2, 3), torch.int64)
    assert as_tensors(np.zeros(2, np.uint8)).dtype == torch.uint8
    assert as_tensors({"a": torch.zeros(2, dtype=torch.float64)})["a"].dtype == torch.float32
    assert code_of(as_tensors, np.zeros(2, complex)) == "DATA105"
    assert code_of(as_tensors, np.array(["a"])) == "DATA105"


def test_lengths():
    check_rows(torch.zeros(3, 2), torch.zeros(3))
    assert code_of(check_rows, torch.zeros(3, 2), torch.zeros(2)) == "DATA105"
    assert code_of(check_rows, torch.zeros(0, 2), torch.zeros(0)) == "DATA104"


@pytest.mark.parametrize(
    ("loss", "output", "y", "wanted"),
    [(F.cross_entropy, (3, 4), torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0, 1, 3])),
     (F.cross_entropy, (3, 4), torch.tensor([[0], [1], [3]]), torch.tensor([0, 1, 3])),
     (F.cross_entropy, (3, 4), torch.tensor([0, 1, 3], dtype=torch.uint8), torch.tensor([0, 1, 3])),
     (F.cross_entropy, (3, 4), torch.full((3, 4), 0.25), torch.full((3, 4), 0.25)),
     (nn.CrossEntropyLoss(ignore_index=-7), (3, 4), torch.tensor([0, -7, 3]), torch.tensor([0, -7, 3])),
     (F.mse_loss, (3, 1), torch.tensor([1, 2, 3]), torch.tensor([[1.0], [2.0], [3.0]])),
     (F.mse_loss, (3,), torch.ones(3, 1), torch.ones(3)),
     (F.mse_loss, (2, 3), torch.tensor([2, 0]), torch.tensor([[0.0, 0, 1], [1, 0, 0]])),
     (F.binary_cross_entropy_with_logits, (2, 2), torch.tensor([[True, False], [False, True]]),
      torch.tensor([[1.0, 0], [0, 1]]))],
)  # fmt: skip
def test_targets_fit_the_loss(loss, output, y, wanted):
    got = fit_target(loss, output, y)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("loss", "output", "y", "code"),
    [(F.cross_entropy, (3, 4), torch.tensor([0.5, 1, 2]), "DATA107"),
     (F.cross_entropy, (3, 4), torch.tensor([0, 1, 4]), "DATA107"),
     (F.cross_entropy, (3, 4), torch.tensor([0, -1, 2]), "DATA107"),
     (F.cross_entropy, (3, 1, 4), torch.tensor([0, 1, 2]), "DATA105"),
     (F.mse_loss, (3, 4), torch.zeros(3, 3), "DATA105"), (F.mse_loss, (3, 4), torch.zeros(3), "DATA105"),
     (F.mse_loss, (2, 3), torch.tensor([3, 0]), "DATA107")],
)  # fmt: skip
def test_targets_that_do_not_fit_are_refused(loss, output, y, code):
    assert code_of(fit_target, loss, output, y) == code


def test_pixels_that_the_model_does_not_take_are_refused_and_tokens_pass():
    linear, data = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), []
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"got uint8 .*255") as caught:
        Intake(linear, "cross_entropy").begin(data, pixels, torch.tensor([0, 1, 1]))
    assert caught.value.code == "DATA105"
    tokens = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 2))
    x, _ = Intake(tokens, "cross_entropy").begin(
        data, torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 1, 1])
    )
    assert x.dtype == torch.int64


# The last, smaller batch -------------------------------------------------------------------------------------

LOSSES = [
    (F.cross_entropy, lambda n: torch.randint(5, (n,))),
    (F.cross_entropy, lambda n: torch.randn(n, 5).softmax(1)),
    (nn.CrossEntropyLoss(label_smoothing=0.1), lambda n: torch.randint(5, (n,))),
    (F.mse_loss, lambda n: torch.randn(n, 5)),
    (F.huber_loss, lambda n: torch.randn(n, 5)),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), lambda n: torch.rand(n, 5)),
]


@pytest.mark.parametrize(("loss", "targets"), LOSSES)
@pytest.mark.parametrize("count", [1, 5, 8, 11, 16])
def test_a_filled_batch_has_the_loss_and_the_gradients_of_the_real_one(loss, targets, count):
    model = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 5)).double()
    x, y = torch.randn(count, 3).double(), targets(count)
    y = y.double() if y.is_floating_point() else y
    wanted = loss(model(x), y)
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    x_full, y_full, weights = fill_up(x, y, 16, -100)
    assert len(x_full) == len(weights) == 16
    assert float(weights.mean()) == pytest.approx(1)
    got = WeightedLoss(loss)(model(x_full), (y_full, weights.double()))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_ignored_class_numbers_and_sequences_keep_their_mean():
    output, y = torch.randn(3, 5, 4), torch.randint(5, (3, 4))
    y[0, :2] = y[2, 3] = -100
    _, y_full, weights = fill_up(torch.zeros(3), y, 7, -100)
    got = WeightedLoss(F.cross_entropy)(output[torch.arange(7) % 3], (y_full, weights))
    assert float(got) == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-6)


def test_a_whole_batch_weighs_one():
    *_, weights = fill_up(torch.zeros(6, 2), torch.randint(5, (6,)), 6, -100)
    assert torch.equal(weights, torch.ones(6))


def test_losses_without_a_value_for_each_example():
    for loss in (nn.CrossEntropyLoss(weight=torch.ones(5)), nn.MSELoss(reduction="sum"), lambda o, t: o.mean(),
                 nn.CosineEmbeddingLoss()):  # fmt: skip
        assert per_example(loss) is None


def test_models_whose_examples_influence_each_other_are_found_and_left_as_they_were():
    norm = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    norm[2].eval()
    state = copy.deepcopy(norm.state_dict())
    x = torch.randn(6, 1, 5, 5)
    generator = torch.get_rng_state()
    assert mixes_examples(norm, norm, x)
    assert all(torch.equal(state[name], value) for name, value in norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in norm] == [True, True, False, True]
    apart = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Dropout(0.5), nn.Flatten())
    assert not mixes_examples(apart, apart, x)

    class Attends(nn.Module):
        def forward(self, x):
            return x - x.mean(dim=0)

    assert mixes_examples(Attends(), Attends(), torch.randn(4, 3))


def test_data_that_ends_with_a_smaller_batch_is_known():
    x, y = torch.zeros(10, 2), torch.zeros(10)
    examples = torch.utils.data.TensorDataset(x, y)
    for size, drop_last, wanted in (
        (4, False, True),
        (4, True, False),
        (5, False, False),
        (16, False, False),
    ):
        loader = torch.utils.data.DataLoader(examples, batch_size=size, drop_last=drop_last)
        assert has_smaller_batch(loader) is wanted
    assert has_smaller_batch([(x, y), (x[:3], y[:3])])
    assert not has_smaller_batch([(x, y), (x, y)])
    assert has_smaller_batch([(x, y), (x[:3], y[:3]), (x, y)])
    assert has_smaller_batch(iter([(x, y)])) is None
    assert has_smaller_batch(batches_of((x, y), "train", 0, batch_size=3))


def test_what_is_left_out_is_said():
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    data = [(x, y), (x[:1], y[:1])]
    plain = Intake(nn.Linear(3, 2), "cross_entropy")
    plain.begin(data, x, y)
    assert plain.weighted
    assert plain.notes == []
    for model, loss, text in (
        (nn.Linear(3, 2), lambda o, t: F.cross_entropy(o, t), "not known to be a mean"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "cross_entropy", "batch norm"),
    ):
        intake = Intake(model, loss)
        intake.begin(data, torch.randn(4, 3), y)
        assert not intake.weighted
        assert text in intake.notes[0]
        assert intake(x[:1], y[:1], "here") is None
        assert len(intake.take_notes()) == 1
        assert intake.take_notes() == []
