"""The choice of a device, and the simulator's session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ane_trainer.ane.dispatch import devices
from ane_trainer.ane.dispatch.devices import get_device
from ane_trainer.ane.errors import EnvironmentFault, SimulationError, UsageError
from ane_trainer.ane.mil.program import Function, Op, Program, TensorType, Value
from ane_trainer.ane.stages import Alias, Compiled, Legalized, Lowered, Port


def counter() -> Compiled:
    """total' = total + x + fixed: one state that changes, one that does not."""
    kind = TensorType("fp16", (2,))
    total, x, fixed, moved, result = (Value(n, kind) for n in ("total", "x", "fixed", "moved", "total_next"))
    ops = (Op("add", (("x", x), ("y", fixed)), (moved,)), Op("add", (("x", total), ("y", moved)), (result,)))
    function = Function("main", (total, x, fixed), ops, (result, moved))
    ports = [Port(n, (2,), r, n) for n, r in (("total", "state"), ("x", "batch"), ("fixed", "state"))]
    outputs = (Port("total_next", (2,), "state", "total"), Port("moved", (2,), "result", "moved"))
    lowered = Lowered(Program((function,)), tuple(ports), outputs, (Alias("total_next", "total"),))
    return Compiled(Legalized(lowered, "m4", "e5rt"), "", b"", "")


def test_a_session_holds_state_between_runs() -> None:
    session = get_device("sim").device.load(counter(), fidelity="exact", threads=1)
    session.write("fixed", np.array([10, 20], np.float16))
    for _ in range(3):
        results = session.run({"x": np.array([1, 2], np.float16)})
    assert set(results) == {"moved"}
    assert results["moved"].tolist() == [11, 22]
    assert session.read("total").tolist() == session.values("total").tolist() == [33, 66]
    session.close()
    session.close()
    with pytest.raises(SimulationError, match="closed"):
        session.run({})


def test_unknown_devices_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'sim'"):
        get_device("simulator")


def test_devices_that_are_not_here_say_what_to_type() -> None:
    for name in set(devices.DEVICE_NAMES) - {"auto", "sim", "cpu"}:
        if name in devices._REGISTERED:
            continue
        with pytest.raises(EnvironmentFault, match='device="sim"') as caught:
            get_device(name)
        assert caught.value.exit_code == 2


def test_cpu_is_refused_with_the_way_to_it() -> None:
    with pytest.raises(UsageError, match="Trainer"):
        get_device("cpu")


def test_auto_says_why() -> None:
    choice = get_device("auto")
    assert choice.reason.startswith("auto: ")
    assert choice.device.unavailable() is None


def test_unknown_fidelity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exact or fast"):
        get_device("sim").device.load(counter(), fidelity="exactly", threads=1)
