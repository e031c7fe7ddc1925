"""Packed sequences in padded form: all steps of all rows, and the lengths.

PyTorch packs a batch into as many rows as there are true steps, which a program of fixed shapes cannot. Here
`pack_padded_sequence` gives time-major rows [T B, ...] with padding; the tensor of batch sizes (B, T times) carries
the lengths. Recurrent layers keep a row's state from its length on and write zeros there, so that outputs, last
states and gradients are PyTorch's. What else reads the rows by themselves is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import wrap_torch_function

from ane_trainer.ane.capture.trace.torch_private import SideTable
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.opset import family, known_ops

#: Functions of rows that may be applied to a packed sequence's data, by name; their results are rows again.
ROW_BY_ROW = frozenset(
    (
        "linear dropout add sub mul div __mul__ __rmul__ __add__ __radd__ __sub__ __truediv__ __rtruediv__ __rsub__ "
        "__neg__ neg log1p clamp reciprocal to float type layer_norm embedding contiguous clone"
    ).split()
) | {kind for kind in known_ops() if family(kind) == "unary"}


@dataclass(frozen=True)
class Lengths:
    """What a tensor of batch sizes stands for: the rows' lengths [B], and how many steps each row has."""

    lengths: torch.Tensor
    steps: int


class PackedSequences:
    """The packed sequences of one capture: their batch sizes and rows, as long as these tensors live.

    `values_known`: functions run on the example's values, so that lengths can be looked at (calibration).
    """

    def __init__(self, values_known: bool) -> None:
        self._lengths: SideTable[Lengths] = SideTable()
        self._rows: SideTable[bool] = SideTable()
        self._values_known = values_known

    def lengths(self, batch_sizes: object) -> Lengths | None:
        """What `lengths_of` gives."""
        return self._lengths.get(batch_sizes)

    def is_rows(self, value: object) -> bool:
        """Whether the tensor is the data of a packed sequence."""
        return bool(self._rows) and self._rows.get(value) is not None

    def mark_rows(self, value: object) -> Any:
        """The tensor, from now on the data of a packed sequence."""
        if isinstance(value, torch.Tensor):
            self._rows[value] = True
        return value

    def pack(
        self, x: torch.Tensor, lengths: torch.Tensor, batch_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_pack_padded_sequence`: rows [T B, ...] and the batch sizes, as many as the longest row has steps."""
        steps = x.transpose(0, 1) if batch_first else x
        longest = int(lengths.max()) if self._values_known else steps.shape[0]
        batch_sizes = torch.full((longest,), steps.shape[1], dtype=torch.int64)
        self._lengths[batch_sizes] = Lengths(lengths, steps.shape[0])
        return self.mark_rows(steps.flatten(0, 1)), batch_sizes

    def pad(
        self, rows: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, value: float, total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_pad_packed_sequence`: [T, B, ...] or [B, T, ...] with `value` behind each length, and the lengths.

        Without a total length PyTorch cuts it to the longest length; that must be T here, at least in the example.
        """
        known = self._lengths.get(batch_sizes)
        assert known is not None
        count = known.steps
        if total < count:
            reason = f"needs the longest length to be that of the padded batch, {count}; got {total}."
            fix = f"Pass total_length={count}."
            finding = Finding("pad_packed_sequence", "pad_packed_sequence", reason, fix)
            raise UnsupportedModel("The step needs fixed shapes:", [finding])
        steps = rows.reshape(count, rows.shape[0] // count, *rows.shape[1:])
        inside = _inside(known.lengths, count).reshape(*steps.shape[:2], *(1 for _ in steps.shape[2:]))
        steps = torch.where(inside, steps, value)
        if total > count:
            steps = F.pad(steps, (*(0 for _ in range(2 * (steps.dim() - 1))), 0, total - count), value=value)
        return (steps.transpose(0, 1) if batch_first else steps), known.lengths


@wrap_torch_function(lambda batch_sizes: (batch_sizes,))
def lengths_of(batch_sizes: torch.Tensor) -> Lengths | None:
    """The lengths that a tensor of batch sizes stands for, by the `RewriteMode` in force; None if it is another."""
    return None


@wrap_torch_function(lambda rows: (rows,))
def as_rows(rows: torch.Tensor) -> torch.Tensor:
    """The tensor, marked by the `RewriteMode` in force as the data of a packed sequence."""
    return rows


def is_packed_call(args: Sequence[object]) -> bool:
    """Whether a recurrent function is called on a sequence that `PackedSequences` packed."""
    return len(args) > 1 and isinstance(args[1], torch.Tensor) and lengths_of(args[1]) is not None


def check_use(name: str) -> None:
    """Raises: UnsupportedModel for a function that mixes the rows of a packed sequence or counts them."""
    if name in ROW_BY_ROW or name.startswith("__get") or name in ("size", "dim", "__len__", "requires_grad_"):
        return
    finding = Finding(
        name, name, "uses the rows of a packed sequence, whose number depends on the lengths.",
        "Call pad_packed_sequence first, and leave the padding out with a mask.",
    )  # fmt: skip
    raise UnsupportedModel("The step needs fixed shapes:", [finding])


def recurrent(
    func: Callable[..., object],
    rows: torch.Tensor,
    batch_sizes: torch.Tensor,
    start: Any,
    weights: Sequence[torch.Tensor],
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[torch.Tensor, ...]:
    """`lstm`, `gru`, `rnn_tanh` or `rnn_relu` on packed rows: (rows of outputs, last states)."""
    states = list(start) if isinstance(start, (tuple, list)) else [start]
    known = lengths_of(batch_sizes)
    assert known is not None
    x = rows.reshape(known.steps, -1, rows.shape[-1])
    inside = _inside(known.lengths, known.steps).unsqueeze(-1)
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    ends: list[list[torch.Tensor]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : (number + 1) * each]
            first = [state[number] for state in states]
            result, last = _direction(func.__name__, x, inside, first, own, bias, direction == 1)
            outputs.append(result)
            ends.append(last)
        x = torch.cat(outputs, -1) if directions > 1 else outputs[0]
        if dropout and training and layer < layers - 1:
            x = F.dropout(x, dropout)
    return (as_rows(x.flatten(0, 1)), *(torch.stack(parts) for parts in zip(*ends, strict=True)))


def _direction(
    kind: str, x: torch.Tensor, inside: torch.Tensor, state: list[torch.Tensor], weights: Sequence[torch.Tensor],
    bias: bool, backwards: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """One direction of one layer over [T, B, K]; `inside` [T, B, 1]: (outputs, last state)."""
    w_x, w_h, *rest = weights
    b_x, b_h = (rest.pop(0), rest.pop(0)) if bias else (None, None)
    project = rest[0] if rest else None
    inputs = F.linear(x, w_x, b_x).unbind(0)
    outputs: list[Any] = [None] * len(inputs)
    for t in reversed(range(len(inputs))) if backwards else range(len(inputs)):
        new = _CELLS[kind](inputs[t], F.linear(state[0], w_h, b_h), state)
        if project is not None:
            new[0] = F.linear(new[0], project)
        outputs[t] = torch.where(inside[t], new[0], 0.0)
        state = [torch.where(inside[t], n, old) for n, old in zip(new, state, strict=True)]
    return torch.stack(outputs), state


def _lstm(x: torch.Tensor, h: torch.Tensor, state: list[torch.Tensor]) -> list[torch.Tensor]:
    enter, keep, value, out = (x + h).chunk(4, -1)
    cell = torch.sigmoid(keep) * state[1] + torch.sigmoid(enter) * torch.tanh(value)
    return [torch.sigmoid(out) * torch.tanh(cell), cell]


def _gru(x: torch.Tensor, h: torch.Tensor, state: list[torch.Tensor]) -> list[torch.Tensor]:
    (x_reset, x_keep, x_new), (h_reset, h_keep, h_new) = x.chunk(3, -1), h.chunk(3, -1)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    return [new + torch.sigmoid(x_keep + h_keep) * (state[0] - new)]


_CELLS: dict[str, Callable[..., list[torch.Tensor]]] = {
    "lstm": _lstm, "gru": _gru,
    "rnn_tanh": lambda x, h, state: [torch.tanh(x + h)], "rnn_relu": lambda x, h, state: [torch.relu(x + h)],
}  # fmt: skip


def _inside(lengths: torch.Tensor, count: int) -> torch.Tensor:
    """[T, B]: which steps come before each row's length."""
    return torch.arange(count).unsqueeze(1) < lengths.unsqueeze(0)
