"""Which modules of a model are its blocks."""

from __future__ import annotations

from torch import nn

from ane_trainer.ane.capture.repeats import repeating


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


def test_layers_of_a_list() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(4, 4), "layers": nn.ModuleList(Block() for _ in range(3))})
    assert repeating(model) == [["layers.0", "layers.1", "layers.2"]]


def test_stages_of_a_resnet_are_runs_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
    assert repeating(model) == [["1.0", "1.1"], ["2.0", "2.1"]]


def test_modules_of_one_class_as_attributes() -> None:
    model = nn.Module()
    model.one, model.two, model.head = Block(), Block(), nn.Linear(4, 2)
    assert repeating(model) == [["one", "two"]]


def test_single_layers_where_there_is_nothing_larger() -> None:
    assert repeating(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == [["0", "2"]]


def test_nothing_repeats() -> None:
    assert repeating(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []
    assert repeating(nn.Linear(4, 4)) == []


def test_what_holds_the_layers_is_not_a_block() -> None:
    model = nn.ModuleDict({name: nn.Sequential(Block(), Block()) for name in ("encoder", "decoder")})
    assert repeating(model) == [["encoder.0", "encoder.1"], ["decoder.0", "decoder.1"]]
