"""Train with an exported step and nothing else: the file, its manifest, NumPy, and something that runs programs.

ane-trainer export RUN --format step-mlpackage      # step.mlpackage and step.json
python examples/drive_step.py step.mlpackage batches.npz weights.npz    # batches: x and y, an axis more in front
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

NAMES = {
    "__builtins__": {}, "sqrt": math.sqrt, "min": min, "max": max, "abs": abs,
    "power_above": lambda x: 2.0 ** min(0, max(-24, math.frexp(x)[1])) if x else 1.0,
    "product": lambda term, n: math.prod(term(float(i)) for i in range(1, int(n) + 1))}  # fmt: skip


class Driver:
    """`run(inputs) -> outputs` is one call of the step; `state` holds its values by input port."""

    def __init__(self, manifest, state, run):
        self.m, self.state, self.run, self.updates = manifest, state, run, manifest["applied_steps"]
        self.dtype = {"fp16": np.float16, "fp32": np.float32}[manifest["inputs"][0]["dtype"]]
        self.parameters, self.steps = {p["name"]: dict(p) for p in manifest["parameters"]}, manifest["steps"]
        self.port = {row["target"]: row["name"] for row in manifest["inputs"] if "target" in row}
        self.scaling = [self.port["step/" + n] for n in ("loss_scale", "loss_scale_inverse", "good_steps")]
        self.sums = [n for t, n in self.port.items() if t.endswith("/accumulated")]

    def scalars(self, last):
        found, common = {}, min(p["unit"] for p in self.parameters.values())
        known = NAMES | {"t": self.updates + 1.0, "shift": self.m["shift"], "common": common, "last": last}
        for target, row in self.m["scalars"].items():
            own = [self.parameters[name] for name in row.get("parameters", ())] or [dict(row, unit=1.0)]
            formulas = row.get("formula_by_group") or [row["formula"]] * len(self.m["settings"])
            terms = [(formulas[p["group"]], self.m["settings"][p["group"]], p["unit"]) for p in own]
            found[target] = np.array([eval(f, {**s, **known, "unit": u}) for f, s, u in terms], self.dtype)
        return found

    def step(self, batch):
        """One batch; again while its gradients do not fit: units move, and a loss scale that is too large halves."""
        self.steps, scale = self.steps + 1, None
        last = self.steps % self.m["policy"]["accumulate"] == 0
        before = {n: self.state[n] for t, n in self.port.items() if t == "step/accumulated_fits"}
        for _ in range(self.m["policy"]["attempts"]):
            scalars = self.scalars(last)
            results = self.run(self.state | before | {self.port[t]: v for t, v in scalars.items()} | batch)
            self.state = {name: results[output] for output, name in self.m["aliases"].items()}
            fits = self.move(results["health"].astype(float), scalars["gradient_limits"].astype(float))
            scale = scale or {name: self.state[name] for name in self.scaling}
            if fits or not np.isfinite(results["loss"][0]):
                break
        self.state |= {} if fits else scale | {n: 0 * self.state[n] for n in self.sums if last}  # one halving
        self.updates += last and bool(results["applied"][0])  # 0: nothing brought a gradient into range
        return float(results["loss"][0]) / self.m["loss_unit"]

    def move(self, health, limits):
        """Units follow their gradients by powers of two, and the state in them. Not for clipped norms."""
        policy = self.m["policy"]
        if not health[len(limits)] > 0:
            return False  # the loss scale, which is state, was halved
        for p, peak, limit in zip(self.parameters.values(), health, limits, strict=False):
            if peak > 0:
                p["level"] = max(peak, policy["fade"] * p["level"]) if math.isfinite(peak) else 65504.0
            up = self.steps in policy["up_first"] or self.steps % policy["up_every"] == 0
            fits = p["level"] <= policy["high"] and peak < limit
            if p["level"] == 0 or (fits and (p["level"] >= policy["low"] or not up)):
                continue
            wanted = policy["peak"] / max(p["level"], p["least_gradient"] * p["unit"])
            unit = float(np.clip(p["unit"] * 2.0 ** math.floor(math.log2(wanted)), *p["unit_bounds"]))
            states, factor = [(self.port[s["target"]], s["power"]) for s in p["in_units"]], unit / p["unit"]
            peaks = [(float(np.abs(self.state[name]).max()), n) for name, n in states]
            room = [math.log2(policy["moved_peak"] / peak) // n for peak, n in peaks if peak > 0]
            factor = min(factor, max(1.0, 2.0 ** min([24, *room])))
            p["unit"], p["level"] = p["unit"] * factor, p["level"] * factor
            self.state |= {n: (self.state[n] * np.float32(factor**k)).astype(self.dtype) for n, k in states}
        return (health[: len(limits)] < limits).all()

    def weights(self):
        v = {port: value.astype(float) for port, value in self.state.items()}
        return {n: sum(v[t["port"]] * t["factor"] for t in terms) for n, terms in self.m["weights"].items()}


def open_package(path, chip="m4"):
    """A driver of a package in the form io, on the simulator."""
    from ane_trainer.ane import load_program
    from ane_trainer.ane.simulator import make_context, prepare

    plans = {f.name: prepare(f, make_context(chip)) for f in load_program(path).functions}
    manifest = json.loads(path.with_suffix(".json").read_text())
    return Driver(manifest, plans["initial_state"].run({}), plans["main"].run)


if __name__ == "__main__":
    driver, batches = open_package(Path(sys.argv[1])), np.load(sys.argv[2])
    for i in range(len(batches["x"])):
        print(i + 1, driver.step({name: batches[name][i].astype(np.float16) for name in batches.files}))
    np.savez(sys.argv[3], **driver.weights())
