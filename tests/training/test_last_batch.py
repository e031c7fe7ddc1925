"""Tests of Trainer with a last, smaller batch, and with data as NumPy and PyTorch users have it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer import Trainer
from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.training.datasets.opening import by_rows
from ane_trainer.training.reporting.report import Reporter


class Notes(Reporter):
    """Keeps what is said about the data, and how often a step was compiled."""

    def __init__(self):
        self.texts, self.losses, self.compilations = [], [], 0

    def note(self, topic, text):
        if topic == "data":
            self.texts.append(text)

    def step(self, loss, loss_scale, skipped_steps):
        self.losses.append(loss)

    def compiled(self, program, seconds):
        self.compilations += 1


def examples(count=22, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, :classes].argmax(dim=1))


def model(seed=1, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def loader(x, y, size=8):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)


def by_pytorch(net, data, loss, epochs):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
    return net


def trained(net, data, loss="cross_entropy", epochs=3, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    report = Notes()
    trainer = Trainer(net, loss, optimizer, report=report, **options)
    trainer.fit(data, epochs)
    return trainer, report


@pytest.mark.parametrize(("device", "tolerance"), [("cpu", 1e-6), ("sim", 3e-3)])
@pytest.mark.parametrize("size", [8, 20])
def test_the_last_batch_trains_as_in_pytorch_in_one_program(device, tolerance, size):
    x, y = examples()
    expected = by_pytorch(model(), loader(x, y, size), F.cross_entropy, 3)
    net = model()
    trainer, report = trained(net, loader(x, y, size), device=device)
    assert trainer.result().steps == 3 * -(-22 // size)
    assert report.compilations == 1
    assert report.texts == []
    for got, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=tolerance)
    shorter = by_pytorch(model(), list(loader(x, y, size))[:-1], F.cross_entropy, 3)
    assert not torch.allclose(net[0].weight, shorter[0].weight, atol=3 * tolerance)


def test_whole_batches_give_the_same_bits_with_and_without_weights():
    x, y = examples(24)
    batches = list(loader(x, y))
    _, plain = trained(model(), batches, epochs=1)
    _, weighted = trained(model(), [*batches, (x[:3], y[:3])], epochs=1)
    assert weighted.losses[:3] == plain.losses
    assert len(weighted.losses) == 4


@pytest.mark.parametrize(("net", "loss", "text"), [
    (model(norm=True), "cross_entropy", "batch norm"),
    (model(), lambda output, y: F.cross_entropy(output, y), "not known to be a mean"),
])  # fmt: skip
def test_what_cannot_be_weighed_is_left_out_and_said_once(net, loss, text):
    x, y = examples()
    trainer, report = trained(net, loader(x, y), loss, device="cpu")
    assert trainer.result().steps == 6
    assert len(report.texts) == 1
    assert text in report.texts[0]


class Passes:
    """An iterable that only a pass over it tells of: each pass yields the next of these lists, the last one again."""

    def __init__(self, *passes: list) -> None:
        self.passes, self.done = passes, 0

    def __iter__(self):  # a generator: only a pass that is begun counts
        self.done += 1
        yield from self.passes[min(self.done, len(self.passes)) - 1]


def test_smaller_batches_of_an_iterable_train_as_in_pytorch():
    """None but a pass tells that there are any: they were left out without a word."""
    x, y = examples(19)
    batches = [(x[:8], y[:8]), (x[8:11], y[8:11]), (x[11:19], y[11:19])]
    expected = by_pytorch(model(), batches, F.cross_entropy, 2)
    net = model()
    trainer, report = trained(net, Passes(batches), device="cpu", epochs=2)
    assert (trainer.result().steps, report.compilations, report.texts) == (6, 1, [])
    for got, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


def test_a_smaller_batch_that_cannot_be_weighed_is_said_when_it_comes():
    x, y = examples(16)
    whole, part = (x[:8], y[:8]), (x[8:11], y[8:11])
    trainer, report = trained(model(norm=True), Passes([whole, part, part, whole]), device="cpu", epochs=2)
    assert trainer.result().steps == 4
    (text,) = report.texts
    assert "batch 2" in text
    assert "batch norm" in text


def test_an_epoch_that_trains_on_nothing_is_an_error():
    x, y = examples(16)
    with pytest.raises(DataError, match=r"DATA105 train: epoch 2, batch 2: .*batch norm.*one size"):
        trained(model(norm=True), Passes([(x[:8], y[:8])], [(x[:4], y[:4])] * 2), device="cpu", epochs=2)


@pytest.mark.parametrize(("device", "tolerance"), [("cpu", 1e-6), ("sim", 3e-3)])
@pytest.mark.parametrize("size", [4, 11])
def test_another_fit_of_other_batches_goes_on_with_the_state(device, tolerance, size):
    """Of smaller ones it trained on none, and reported a loss of 0; larger ones were refused."""
    x, y = examples(22)
    expected, net = model(), model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (expected, net)]
    report = Notes()
    trainer = Trainer(net, "cross_entropy", optimizers[1], report=report, device=device)
    for batches in ([(x[:8], y[:8]), (x[8:16], y[8:16])], [(x[:size], y[:size]), (x[size:], y[size:])]):
        batches = [(a[: len(batches[0][0])], b[: len(batches[0][0])]) for a, b in batches]
        for a, b in batches:
            optimizers[0].zero_grad()
            F.cross_entropy(expected(a), b).backward()
            optimizers[0].step()
        trainer.fit(batches)
    assert (trainer.result().steps, report.compilations) == (4, 2)
    for got, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=tolerance)


def test_numbers_as_numpy_users_have_them():
    x, y = examples(16)
    wanted = model()
    trained(wanted, [(x, y)], device="cpu")
    for data in ([(x.double().numpy(), y.numpy())], [(x.numpy(), y.double().numpy())], [(x.numpy(), y.tolist())],
                 [(x, y[:, None])], [(x.double(), y.to(torch.uint8))]):  # fmt: skip
        net = model()
        trained(net, data, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), wanted.parameters(), strict=True))


def test_arrays_and_datasets_are_batched():
    x, y = examples(150)
    net = model()
    trainer, _ = trained(net, (x.numpy(), y.numpy()), device="cpu", epochs=2)
    assert trainer.result().steps == 4
    other = model()
    trained(other, torch.utils.data.TensorDataset(x, y), device="cpu", epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert trainer.evaluate((x, y)).examples == 150


def test_a_column_of_targets_does_not_broadcast_against_the_outputs():
    """PyTorch's mse of [B, 1] against [B] compares each with each; the mean over pairs is no regression."""
    x, _ = examples(16)
    y = x[:, 0] * 2
    torch.manual_seed(0)
    net = nn.Linear(6, 1)
    expected = nn.Linear(6, 1)
    expected.load_state_dict(net.state_dict())
    by_pytorch(expected, [(x, y[:, None])], F.mse_loss, 5)
    trainer, _ = trained(net, [(x, y)], "mse", 5, device="cpu")
    assert torch.allclose(net.weight, expected.weight, atol=1e-6)
    assert trainer.evaluate([(x, y)]).loss == pytest.approx(F.mse_loss(net(x), y[:, None]).item())


def test_class_numbers_with_a_loss_of_numbers_become_rows():
    x, y = examples(16)
    net, expected = model(), model()
    by_pytorch(expected, [(x, F.one_hot(y, 3).float())], F.mse_loss, 3)
    trainer, report = trained(net, [(x, y)], "mse", device="cpu")
    assert "single 1" in report.texts[0]
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), expected.parameters(), strict=True)
    )
    assert trainer.evaluate([(x, y)]).accuracy is not None


X, Y = examples(8)


@pytest.mark.parametrize(
    ("train", "val", "code"),
    [(5, None, "DATA105"), ([(X, Y[:3])], None, "DATA105"), ([(X[:0], Y[:0])], None, "DATA104"),
     ([(X, Y.float() + 0.5)], None, "DATA107"), ([(X, Y + 9)], None, "DATA107"), ([(X, Y)], [(X, Y + 9)], "DATA107"),
     ([(X, Y)], [(X[:, :3], Y)], "DATA105"), ([((X * 9).byte(), Y)], None, "DATA105"),
     ([(X.to(torch.complex64), Y)], None, "DATA105"), ([(X, Y)], 7, "DATA105"), ([(X, Y, Y)], None, "DATA105"),
     ([{"x": X}], None, "DATA105"), ([("a", "b")], None, "DATA105"), ((X, Y[:5]), None, "DATA105")],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_data_that_cannot_be_used_is_refused_with_a_code(train, val, code, device):
    net = model()
    trainer = Trainer(net, device=device, report=Notes())
    with pytest.raises(DataError) as caught:
        trainer.fit(train, 1, val)
    assert caught.value.code == code


def test_a_dictionary_without_labels_is_not_evaluated():
    trainer = Trainer(model(), device="cpu", report=Notes())
    with pytest.raises(DataError, match=r'batch 1: needs a pair .* loss="model"') as caught:
        trainer.evaluate([{"input": X}])
    assert caught.value.code == "DATA105"


def test_a_number_of_epochs_below_zero_is_refused():
    with pytest.raises(UsageError, match="epochs"):
        Trainer(model(), device="cpu", report=Notes()).fit([(X, Y)], -1)


LOADERS = {
    "in order": {}, "shuffled": {"shuffle": True}, "the whole ones": {"shuffle": True, "drop_last": True},
    "a generator of its own": {"shuffle": True, "generator": True},
    "weighted": {"sampler": torch.utils.data.WeightedRandomSampler([0.1, 0.9] * 11, 22)},
    "own collate": {"collate_fn": lambda rows: tuple(map(torch.stack, zip(*rows, strict=True)))},
}  # fmt: skip


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("kind", LOADERS)
def test_tensors_of_a_loader_are_taken_by_rows_in_its_own_order(kind, part):
    """The batches, and what is drawn of PyTorch's generator, over two passes."""
    data = torch.utils.data.TensorDataset(*examples())
    data = (
        torch.utils.data.Subset(data, [20, 3, 5, 7, 1, 0, 2, 11, 13]) if part and kind != "weighted" else data
    )
    passes = []
    for take in (lambda loader: loader, by_rows):
        torch.manual_seed(3)
        own = {"generator": torch.Generator().manual_seed(4)} if "generator" in LOADERS[kind] else {}
        whole = torch.utils.data.DataLoader(data, 4, **{**LOADERS[kind], **own})
        assert (take(whole) is whole) == (take is not by_rows or kind == "own collate")
        passes.append([*take(whole), *take(whole), [torch.rand(3)]])
    for plain, fast in zip(*passes, strict=True):
        assert len(plain) == len(fast)
        assert all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))
