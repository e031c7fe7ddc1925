"""New nodes of a graph have the shape and type that their operation gives."""

from __future__ import annotations

import torch
from torch.fx import Graph

from ane_trainer.ane.capture.range.editing import Editor, aten


def emitter(dtype: torch.dtype = torch.float32) -> tuple[Editor, torch.fx.Node]:
    """An editor of a graph with one input of 2 x 3."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, dtype=dtype, device="meta")
    graph.output(x)
    editor = Editor(graph)
    editor.here = graph.output_node()
    return editor, x


def test_like_operations_are_worked_out_once() -> None:
    editor, x = emitter()
    calls: list[float] = []

    def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        calls.append(factor)
        return tensor * factor

    first, second = editor.emit(scaled, x, 2.0), editor.emit(scaled, x, 2.0)
    assert calls == [2.0]
    assert first is not second
    assert second.meta["val"].shape == (2, 3)
    editor.emit(scaled, editor.view(x, (3, 2)), 2.0)
    assert calls == [2.0, 2.0]


def test_equal_numbers_of_different_types_give_different_types() -> None:
    editor, x = emitter(torch.int64)
    kinds = [editor.emit(aten.mul.Tensor, x, number).meta["val"].dtype for number in (1, 1.0, True)]
    assert kinds == [torch.int64, torch.float32, torch.int64]


def test_lists_of_nodes_and_of_numbers() -> None:
    editor, x = emitter()
    joined = [editor.emit(aten.cat.default, [x, x], axis).meta["val"].shape for axis in (0, 1)]
    assert joined == [(4, 3), (2, 6)]
