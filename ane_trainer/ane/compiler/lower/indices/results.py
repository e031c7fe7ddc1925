"""Integer results that leave as two numbers, where the caller accepts that (`Port.index_encoding` is "split")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ane_trainer.ane.compiler.lower.operands import Encoded
from ane_trainer.ane.stages import Port


def in_two_numbers(
    ports: Sequence[Port], operands: Sequence[object]
) -> tuple[tuple[Port, ...], list[object]]:
    """The results with the quotients of those in two numbers at the end; other ports hold the integers as they are."""
    found, parts, quotients, high = [], [], [], []
    for port, operand in zip(ports, operands, strict=True):
        if port.index_encoding == "split" and isinstance(operand, Encoded) and operand.encoding == "split":
            quotient = replace(
                port, name=f"{port.name}_high", target=f"{port.target}#high", index_encoding="none"
            )
            quotients.append(quotient)
            high.append(operand.parts[1])
            port, operand = replace(port, quotients=quotient.name), operand.parts[0]
        else:
            port = replace(port, index_encoding="none")
        found.append(port)
        parts.append(operand)
    return (*found, *quotients), [*parts, *high]
