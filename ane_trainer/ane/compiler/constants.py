"""Weights held by a program itself: input ports become constants, which an op decodes.

before: main(w, x): y = matmul(x, w)
after:  main(x): w = constexpr_affine_dequantize(quantized_data=<int8>, scale=<fp16>); y = matmul(x, w)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ane_trainer.ane.mil.program import Op
from ane_trainer.ane.stages import Lowered


def hold_weights(lowered: Lowered, decoding: Mapping[str, Op]) -> Lowered:
    """The step with the state ports whose targets are in `decoding` made by these ops; those it does not read go."""
    ports = {p.name: p for p in lowered.inputs if p.role == "state" and p.target in decoding}
    main = lowered.program.main
    if not ports:
        return lowered
    read = {value for op in main.ops for value in op.operands()}
    made = [
        dataclasses.replace(decoding[ports[value.name].target], results=(value,))
        for value in main.inputs
        if value.name in ports and value in read
    ]
    function = dataclasses.replace(
        main, inputs=tuple(v for v in main.inputs if v.name not in ports), ops=(*made, *main.ops)
    )
    others = tuple(f for f in lowered.program.functions if f is not main)
    program = dataclasses.replace(lowered.program, functions=(function, *others))
    inputs = tuple(p for p in lowered.inputs if p.name not in ports)
    return dataclasses.replace(lowered, program=program, inputs=inputs)
