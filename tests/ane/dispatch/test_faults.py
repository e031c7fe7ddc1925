"""What a user's model or torch raises while a step is made comes out by code, module and line, with a way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3


class Net(nn.Module):
    def __init__(self, act: Callable[[Net, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 8), nn.Linear(8, 3), act

    def forward(self, x: Tensor) -> object:
        return self.act(self, x)


def step(model: nn.Module, loss: Callable[..., object] = F.cross_entropy) -> float:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return float(at.compile_step(model, loss, optimizer, example=(X, Y), device="sim")(X, Y))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        raise RuntimeError("nothing comes back")


BAD: dict[str, Callable[[Net, Tensor], object]] = {
    r"b \(.*test_faults.py:\d+\): RuntimeError: mat1 and mat2 shapes": lambda m, x: m.b(m.a(x)[:, :5]),
    r"Net \(.*test_faults.py:\d+\): RuntimeError: .* same dtype": lambda m, x: m.b(m.a(x) @ torch.ones(8, 8).double()),
    r"Net \(.*test_faults.py:\d+\): RuntimeError: shape": lambda m, x: m.b(m.a(x).view(5, 8)),
    r"AttributeError: .* 'nothing'": lambda m, x: m.nothing(x),
    r"KeyError: 'k'": lambda m, x: {}["k"],
    r"test_faults.py:\d+\): RuntimeError: nothing comes back": lambda m, x: NoBackward.apply(m.b(m.a(x))),
    r"RuntimeError: a leaf Variable": lambda m, x: m.a.weight.mul_(2),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_an_error_of_pytorch_has_its_place_and_says_that_pytorch_raises_it(words: str) -> None:
    with pytest.raises(
        at.AneTrainerError, match=rf"ANE303[\s\S]*{words}[\s\S]*Plain PyTorch says the same"
    ) as caught:
        step(Net(BAD[words]))
    assert isinstance(caught.value.__cause__, Exception)


def test_what_only_a_program_cannot_do_is_said_to_run_in_pytorch() -> None:
    with pytest.raises(at.AneTrainerError, match=r"ANE303[\s\S]*Plain PyTorch runs it"):
        step(Net(lambda m, x: m.b(torch.sparse.mm(torch.eye(4).to_sparse(), m.a(x)))))


NOTHING: dict[str, tuple[Callable[[Net, Tensor], object], Callable[..., object]]] = {
    "depends on no parameter": (lambda m, x: m.b(m.a(x)).detach(), F.cross_entropy),
    r"got shape \[4\]": (lambda m, x: m.b(m.a(x)), lambda o, y: F.cross_entropy(o, y, reduction="none")),
    "got NoneType": (lambda m, x: m.b(m.a(x)), lambda o, y: None),
    "got float": (lambda m, x: m.b(m.a(x)), lambda o, y: 3.0),
}  # fmt: skip


@pytest.mark.parametrize("words", NOTHING)
def test_a_loss_that_trains_nothing_is_refused(words: str) -> None:
    act, loss = NOTHING[words]
    with pytest.raises(at.AneTrainerError, match=rf"ANE303[\s\S]*{words}"):
        step(Net(act), loss)


def test_a_loss_of_one_element_is_taken() -> None:
    assert step(Net(lambda m, x: m.b(m.a(x))), lambda o, y: F.cross_entropy(o, y).reshape(1)) > 0.0


def test_the_same_through_the_other_doors() -> None:
    wrong = Net(lambda m, x: m.b(m.a(x).double()))
    with pytest.raises(at.AneTrainerError, match=r"ANE303[\s\S]*test_faults.py:\d+[\s\S]*same dtype"):
        at.compile_forward(wrong, X)
    torch._dynamo.reset()
    with pytest.raises(at.AneTrainerError, match=r"ANE303[\s\S]*test_faults.py:\d+[\s\S]*same dtype"):
        torch.compile(wrong, backend="ane")(X)
    torch._dynamo.reset()


def test_an_index_that_torch_compile_hands_over_is_taken() -> None:
    layer, places = nn.Linear(6, 8), torch.tensor([0, 2, 2])
    torch._dynamo.reset()
    got = torch.compile(lambda x, i: layer(x)[i], backend="ane")(X, places)
    got.sum().backward()
    torch.testing.assert_close(got, layer(X)[places], atol=4e-3, rtol=4e-3)
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 3.0), atol=4e-3, rtol=4e-3)
    torch._dynamo.reset()
