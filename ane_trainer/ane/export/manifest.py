"""The manifest of an exported training step: what each port is, in JSON, for drivers that know nothing else.

inputs, outputs   name, role, shape, dtype, and for state the tensor that it mirrors (`target`) and `scale`:
                  the port holds the tensor's value times `scale`
aliases           output -> input: in the form io, the output is the input of the next call
weights           a parameter's value is the sum of `factor * port` over its terms (two fp16 numbers)
optimizer         its settings, and how many updates there were
next_scalars      the values of the scalar inputs for the next update, by target
settings, parameters, scalars, policy   how to compute those of any update, and when units move (`driving.py`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.capture.randomness import PREFIX
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.stages import Lowered, Port

VERSION = 1

Manifest = dict[str, Any]


def manifest(lowered: Lowered, form: str, about: Mapping[str, object]) -> dict[str, object]:
    """The manifest of `lowered` in a form of `export.step`; `about` adds what the caller knows."""
    types = {
        value.name: value.type for value in (*lowered.program.main.inputs, *lowered.program.main.outputs)
    }
    trained = {p.target for p in lowered.inputs if p.role == "state"}

    def described(port: Port) -> dict[str, object]:
        known = types[port.name]
        row = {"name": port.name, "role": role_of(port, trained), "shape": list(known.shape)}
        row |= {"dtype": known.dtype}
        return row | ({"target": port.target, "scale": port.scale} if port.target else {})

    folded = _folded(lowered)
    return {
        "ane_trainer": "training step",
        "manifest": VERSION,
        "form": form,
        "inputs": [described(port) for port in lowered.inputs],
        "outputs": [described(port) for port in lowered.outputs],
        "aliases": {alias.output: alias.input for alias in lowered.aliases},
        "weights": {name: terms for name, terms in folded.items() if "/" not in name},
        "moments": {name: terms for name, terms in folded.items() if "/" in name},
        **about,
    }


def role_of(port: Port, states: set[str]) -> str:
    """One word: weight, residual, moment, buffer, scaling, batch, mask, scalar, or a result's own name."""
    if port.role == "batch":
        return "mask" if port.target.startswith(PREFIX) else "batch"
    if port.role == "result":
        return "gradient" if "/" in port.target else port.name
    if port.role != "state":
        return port.role
    owner, _, kind = port.target.partition("/")
    if port.target.startswith(SCALING):
        return "scaling"
    if not kind:
        return "weight" if f"{owner}/{RESIDUAL}" in states else "buffer"
    return "residual" if kind == RESIDUAL else "moment"


def _folded(lowered: Lowered) -> dict[str, list[dict[str, object]]]:
    """Tensor kept as two fp16 numbers (trained parameters, second moments) -> the ports whose weighted sum it is."""
    ports = {p.target: p for p in lowered.inputs if p.role == "state"}
    return {
        target: [
            {"port": port.name, "factor": 1.0 / port.scale},
            {"port": second.name, "factor": 1.0 / second.scale},
        ]
        for target, port in ports.items()
        if (second := ports.get(f"{target}/{RESIDUAL}")) is not None
    }


def manifest_path(path: str | Path) -> Path:
    """`step.mlpackage` -> `step.json`, beside it."""
    return Path(path).with_suffix(".json")


def write_manifest(path: str | Path, content: Mapping[str, object]) -> None:
    """Write the manifest beside the file of a step."""
    target = manifest_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest beside an exported step."""
    content: dict[str, object] = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    return content
