"""Direct dispatch: ANEForge's real runtime layer on a library built from C, with the simulator behind it."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_trainer import TrainingStep, compile_forward, compile_step
from ane_trainer.ane.compiler.build import compile_program
from ane_trainer.ane.dispatch import resolve_target
from ane_trainer.ane.dispatch.devices import aneforge_runtime, get_device
from ane_trainer.ane.dispatch.devices.e5rt import E5RT, E5RTSession
from ane_trainer.ane.dispatch.devices.ordering import ordered
from ane_trainer.ane.errors import (
    EnvironmentFault,
    NumericsWarning,
    ProgramError,
    SimulationError,
    UsageError,
)
from ane_trainer.ane.mil.program import Function, Op, Program, TensorType, Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.stages import Alias, Compiled, Legalized, Lowered, Port
from ane_trainer.cli import run_command
from ane_trainer.commands.conformance.engines import make_training
from ane_trainer.training.reporting.report import Reporter
from ane_trainer.training.trainer import Trainer
from tests.standin.library import Engine, needs_compiler

DEVICES = ("e5rt", "e5rt-pingpong")


def compiled(
    ops: tuple[Op, ...], inputs: tuple[Port, ...], outputs: tuple[Port, ...], *aliases: Alias
) -> Compiled:
    values = {v.name: v for op in ops for v in (*op.operands(), *op.results)}
    ins, outs = (tuple(values[p.name] for p in ports) for ports in (inputs, outputs))
    lowered = Lowered(Program((Function("main", ins, ops, outs),)), inputs, outputs, aliases)
    return compile_program(Legalized(lowered, "m4", "e5rt"), cache=False)


def counter(size: int = 3) -> Compiled:
    """total' = total + x + fixed."""
    kind = TensorType("fp16", (size,))
    total, x, fixed, moved, result = (Value(n, kind) for n in ("total", "x", "fixed", "moved", "total_next"))
    ops = (Op("add", (("x", x), ("y", fixed)), (moved,)), Op("add", (("x", total), ("y", moved)), (result,)))
    roles = (("total", "state"), ("x", "batch"), ("fixed", "state"))
    ports = tuple(Port(n, (size,), r, n) for n, r in roles)
    outputs = (Port("total_next", (size,), "state", "total"), Port("moved", (size,), "result", "moved"))
    return compiled(ops, ports, outputs, Alias("total_next", "total"))


def swap() -> Compiled:
    """a' = b + 0, b' = a + 0: wrong if an output is written before the other input was read."""
    kind = TensorType("fp16", (2,))
    a, b, x, a2, b2 = (Value(n, kind) for n in ("a", "b", "x", "a2", "b2"))
    ops = (Op("add", (("x", b), ("y", x)), (a2,)), Op("add", (("x", a), ("y", x)), (b2,)))
    ports = (Port("a", (2,), "state"), Port("b", (2,), "state"), Port("x", (2,), "batch"))
    outputs = (Port("a2", (2,), "state"), Port("b2", (2,), "state"))
    return compiled(ops, ports, outputs, Alias("a2", "a"), Alias("b2", "b"))


def load(program: Compiled, device: str = "e5rt") -> E5RTSession:
    session = get_device(device).device.load(program, fidelity="exact", threads=None)
    assert isinstance(session, E5RTSession)
    return session


def half(*values: float) -> np.ndarray:
    return np.array(values, np.float16)


# -- the session ---------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_state_stays_and_results_come_back(engine: Engine, device: str) -> None:
    session = load(counter(), device)
    path, inputs, outputs = engine.compiled[-1]
    assert inputs == [("total", 6), ("x", 6), ("fixed", 6)]
    assert outputs == [("total_next", 6), ("moved", 6)]
    assert Path(path).name == "model.mil"
    session.write("fixed", half(10, 20, 30))
    session.write("total", np.array([0.5, 0, 0], np.float32))
    first = session.run({"x": half(1, 2, 3)})
    second = session.run({"x": np.array([1, 1, 1], np.float32)})
    assert set(first) == {"moved"}
    assert first["moved"].tolist() == [11, 22, 33]  # not overwritten by the second run
    assert second["moved"].tolist() == [11, 21, 31]
    assert session.read("total").tolist() == session.values("total").tolist() == [22.5, 43, 64]
    session.write("total", half(0, 0, 0))  # as a checkpoint does, between two runs
    session.run({"x": half(0, 0, 0)})
    assert session.read("total").tolist() == [10, 20, 30]
    session.close()


@needs_compiler
def test_only_aliasing_shares_memory(engine: Engine) -> None:
    for device, shared in (("e5rt", True), ("e5rt-pingpong", False)):
        session = load(counter(), device)
        program = session._loaded.program
        assert np.shares_memory(program.input_view("total"), program.output_view("total_next")) == shared
        assert not np.shares_memory(program.input_view("fixed"), program.output_view("total_next"))
        session.close()


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_states_swap_whatever_the_engine_writes_first(engine: Engine, device: str) -> None:
    engine.eager = True
    session = load(swap(), device)
    session.write("a", half(1, 2))
    session.write("b", half(3, 4))
    for _ in range(3):
        session.run({"x": half(0, 0)})
    assert session.read("a").tolist() == [3, 4]
    assert session.read("b").tolist() == [1, 2]
    session.close()


@needs_compiler
def test_sharing_what_is_read_later_would_be_wrong(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hazard is real: the same program with every state shared loses one of the two."""
    engine.eager = True
    monkeypatch.setattr(
        "ane_trainer.ane.dispatch.devices.e5rt.ordered", lambda function, aliases: frozenset(aliases)
    )
    session = load(swap())
    session.write("a", half(1, 2))
    session.write("b", half(3, 4))
    session.run({"x": half(0, 0)})
    assert session.read("a").tolist() == session.read("b").tolist()
    session.close()


def tiny_training(device: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of Adam on two-term weights."""
    torch.manual_seed(0)  # the state holds torch's generator
    model, optimizer, batches = make_training("mlp adam")
    step = compile_step(model, "cross_entropy", optimizer, batches[0], device=device, sync="lazy", threads=1)
    losses = [float(step(x, y)) for x, y in batches]
    state = step.state_dict()
    step.close()
    return losses, state


@needs_compiler
def test_training_does_not_depend_on_the_engines_schedule(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.eager = True
    losses, state = tiny_training("sim")
    for device in DEVICES:
        own_losses, own_state = tiny_training(device)
        assert own_losses == losses
        assert same(state, own_state), device
    monkeypatch.setattr(
        "ane_trainer.ane.dispatch.devices.e5rt.ordered", lambda function, aliases: frozenset(aliases)
    )
    with pytest.warns(NumericsWarning, match="departs from fp32"):  # and the comparison with fp32 tells
        assert not same(state, tiny_training("e5rt")[1])


def test_states_that_may_share_memory_are_told_from_those_that_may_not() -> None:
    program = counter()
    assert ordered(program.program.main, program.aliases) == set(program.aliases)
    program = swap()
    assert ordered(program.program.main, program.aliases) == set()
    model, optimizer, batches = make_training("mlp adam")
    step = compile_step(model, "cross_entropy", optimizer, batches[0], sync="lazy", threads=1)
    names = {p.name: p.target for p in step.compiled.inputs}
    shared = {names[a.input] for a in ordered(step.program.main, step.compiled.aliases)}
    assert {"0.weight/exp_avg", "0.weight/residual", "2.weight/exp_avg", "2.weight/residual"} <= shared
    assert "0.weight" not in shared  # its residual is computed from the old and the new value
    step.close()


def test_views_and_products_do_not_share() -> None:
    kind = TensorType("fp16", (4, 4))
    state, x, seen, result = (Value(n, kind) for n in ("old", "x", "seen", "result"))
    ports = (Port("old", (4, 4), "state"), Port("x", (4, 4), "batch"))
    product = Op("matmul", (("x", state), ("y", x)), (result,))
    turned = Op("transpose", (("x", state), ("perm", from_array(np.array([1, 0], np.int32)))), (seen,))
    for ops in ((product,), (turned, Op("add", (("x", seen), ("y", x)), (result,)))):
        made = compiled(ops, ports, (Port("result", (4, 4), "state"),), Alias("result", "old"))
        assert ordered(made.program.main, made.aliases) == set()


@needs_compiler
def test_bit_patterns_pass_the_border(engine: Engine) -> None:
    session = load(counter())
    patterns = np.array([0x7C00, 0x8001, 0xFE01], np.uint16).view(np.float16)
    session.write("total", patterns)
    assert session.read("total").tobytes() == patterns.tobytes()
    session.write("total", np.array([1e6, -1e6, 1e-9], np.float32))
    assert session.read("total").tolist() == [np.inf, -np.inf, 0]
    session.close()


@needs_compiler
def test_wrong_names_and_sizes_are_refused(engine: Engine) -> None:
    session = load(counter())
    with pytest.raises(
        SimulationError, match="needs a known name; the program has fixed, total, x"
    ) as caught:
        session.write("nothing", half(0))
    assert caught.value.code == "SIM102"
    with pytest.raises(SimulationError, match=r"needs the shape \[3\]; got \[2\]") as caught:
        session.run({"x": half(1, 2)})
    assert caught.value.code == "SIM103"
    with pytest.raises(SimulationError, match="needs the inputs x; they are missing") as caught:
        session.run({})
    assert caught.value.code == "SIM101"
    with pytest.raises(SimulationError, match="known name"):
        session.read("moved")
    session.close()


@needs_compiler
def test_a_closed_session_says_so(engine: Engine) -> None:
    session = load(counter())
    session.close()
    session.close()
    for use in (lambda: session.run({"x": half(0, 0, 0)}), lambda: session.read("total"),
                lambda: session.write("x", half(0, 0, 0))):  # fmt: skip
        with pytest.raises(SimulationError, match="was closed"):
            use()


# -- loading -------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_failing_compile_gives_the_librarys_reason_and_is_not_repeated(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = counter()
    broken = dataclasses.replace(
        program, text=program.text.replace("add(", "multiply("), fingerprint="broken"
    )
    with pytest.raises(EnvironmentFault, match=r"standin engine: .*multiply") as caught:
        load(broken)
    assert caught.value.code == "ANE206"
    attempts = len(engine.compiled)
    with pytest.raises(EnvironmentFault, match="not tried again"):
        load(broken)
    assert len(engine.compiled) == attempts
    pauses: list[float] = []
    monkeypatch.setattr("aneforge._circuit._sleep", pauses.append)
    with pytest.warns(UserWarning, match="pacing this compile"):  # ANEForge's pause before another program
        load(program).close()
    assert 10 < pauses[0] <= 15


@needs_compiler
def test_ports_that_are_not_the_programs_are_refused_before_compiling(engine: Engine) -> None:
    program = counter()
    lowered = program.legalized.lowered
    for inputs in (lowered.inputs[:2], (*lowered.inputs[:2], Port("fixed", (4,), "state"))):
        wrong = dataclasses.replace(lowered, inputs=inputs)
        legal = dataclasses.replace(program.legalized, lowered=wrong)
        with pytest.raises(ProgramError, match="fixed differ"):
            load(dataclasses.replace(program, legalized=legal))
    x = Value("x", TensorType("fp16", (2,)))
    nothing = Lowered(Program((Function("main", (x,), (), (x,)),)), *((Port("x", (2,), "batch"),),) * 2, ())
    with pytest.raises(ProgramError, match="needs an operation before each; x has none"):
        load(compile_program(Legalized(nothing, "m4", "e5rt"), cache=False))
    assert not engine.compiled


@needs_compiler
def test_128_programs_fit_and_one_more_does_not(engine: Engine) -> None:
    program = counter(1)
    sessions = [load(program) for _ in range(128)]
    with pytest.raises(EnvironmentFault, match="at most 128 loaded in a process") as caught:
        load(program)
    assert caught.value.code == "ANE207"
    sessions.pop().close()
    sessions.append(load(program))
    for session in sessions:
        session.close()


@needs_compiler
def test_programs_of_others_count_in_the_library(engine: Engine, tmp_path: Path) -> None:
    """ANEForge's own programs take places that this package does not see: the message names the limit."""
    from aneforge._runtime import E5RT as Layer

    program = counter(1)
    (tmp_path / "model.mil").write_text(program.text)
    (tmp_path / "weights.bin").write_bytes(program.weights)
    ports = {p.name: p.shape for p in program.inputs}, {p.name: p.shape for p in program.outputs}
    others = [
        Layer.compile(tmp_path / "model.mil", cache_dir=tmp_path, inputs=ports[0], outputs=ports[1])
        for _ in range(128)
    ]
    with pytest.raises(EnvironmentFault, match=r"128 programs are loaded.*more than 128 programs"):
        load(program)
    for other in others:
        other.release()


@needs_compiler
def test_an_unsuccessful_run_is_an_error(engine: Engine) -> None:
    session = load(counter())
    engine.failing = True
    with pytest.raises(EnvironmentFault, match="rc=-5") as caught:
        session.run({"x": half(0, 0, 0)})
    assert caught.value.code == "ANE209"
    session.close()


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_neither_uses_nor_frees_programs(engine: Engine) -> None:
    session = load(counter())
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (lambda: session.read("total"), lambda: load(counter())):
            try:
                use()
            except EnvironmentFault as fault:
                refused += fault.code == "ANE208"
        session.close()
        os._exit(refused if engine.loaded == 1 else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert session.run({"x": half(1, 1, 1)})["moved"].tolist() == [1, 1, 1]
    session.close()


def test_state_is_one_of_two_ways() -> None:
    assert [E5RT(state).name for state in ("alias", "pingpong")] == list(DEVICES)
    with pytest.raises(UsageError, match="alias or pingpong"):
        E5RT("copy")


# -- where it runs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "darwin", reason="is about other machines")
@pytest.mark.parametrize("device", DEVICES)
def test_off_a_mac_it_says_what_to_do(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANEFORGE_DYLIB", raising=False)
    with pytest.raises(
        EnvironmentFault, match=r'Apple silicon Mac with macOS 14.*Use device="sim"'
    ) as caught:
        get_device(device)
    assert caught.value.exit_code == 2
    assert run_command(["train", "digits", "--device", device]) == 2
    assert "Apple silicon" in capsys.readouterr().err


def test_the_packages_absence_and_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aneforge_runtime, "on_apple_silicon", lambda: True)
    monkeypatch.setattr("platform.mac_ver", lambda: ("13.6", ("", "", ""), "arm64"))
    assert "macOS 14 or later, this is 13.6" in str(E5RT().unavailable())
    monkeypatch.setattr("platform.mac_ver", lambda: ("26.5", ("", "", ""), "arm64"))
    for version, words in ((None, 'pip install "ane_trainer[e5rt]"'), ("0.5.1", "0.4.x is needed, 0.5.1")):
        monkeypatch.setattr(aneforge_runtime, "_version", lambda version=version: version)
        assert words in str(E5RT().unavailable())


@needs_compiler
def test_a_named_library_is_not_taken_for_an_engine(engine: Engine) -> None:
    if sys.platform == "darwin":
        pytest.skip("is about other machines")
    assert get_device("auto").device.name == "sim"
    where, how = get_device("e5rt").device.placement("m4", "exact")
    assert where.startswith("unknown")
    assert "no Neural Engine" in how


# -- training ------------------------------------------------------------------------------------------------


def mlp_step(device: str) -> TrainingStep:
    """The MNIST MLP of the main job: 784-256-10, batch 128."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 256), torch.nn.GELU(), torch.nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    example = torch.zeros(128, 1, 28, 28), torch.zeros(128, dtype=torch.int64)
    return compile_step(model, "cross_entropy", optimizer, example, device=device, sync="lazy", threads=1)


def trained(device: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and the engine's whole state after `steps` batches of noisy class patterns."""
    draw = torch.Generator().manual_seed(1)
    patterns = torch.rand(10, 1, 28, 28, generator=draw)
    step = mlp_step(device)
    losses = []
    for _ in range(steps):
        y = torch.randint(0, 10, (128,), generator=draw)
        x = patterns[y] + 0.5 * torch.randn(128, 1, 28, 28, generator=draw)
        losses.append(float(step(x, y)))
    state = step.state_dict()
    step.close()
    return losses, state


def same(wanted: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> bool:
    return wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


@needs_compiler
@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_training_ends_at_the_simulators_weights_bit_for_bit(engine: Engine, steps: int) -> None:
    losses, state = trained("sim", steps)
    assert losses[-1] < 0.7 * losses[0]
    for device in DEVICES:
        own_losses, own_state = trained(device, steps)
        assert own_losses == losses, device
        assert same(state, own_state), device
    assert len(engine.compiled) == 2


@needs_compiler
def test_a_step_goes_on_from_another_devices_state(engine: Engine) -> None:
    x, y = torch.rand(128, 1, 28, 28), torch.arange(128) % 10
    with mlp_step("sim") as first, mlp_step("e5rt") as second:
        first(x, y)
        second.load_state_dict(first.state_dict())
        assert float(first(x, y)) == float(second(x, y))
        assert same(first.state_dict(), second.state_dict())
        assert second.placement()["device"] == "e5rt"


@needs_compiler
def test_inference_equals_the_simulators(engine: Engine) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    x = torch.rand(2, 1, 8, 8)
    programs = [compile_forward(model, x, device=device) for device in ("sim", "e5rt")]
    assert torch.equal(programs[0](x), programs[1](x))
    for program in programs:
        program.close()


@needs_compiler
def test_the_trainer_trains_evaluates_and_lets_go(engine: Engine) -> None:
    draw = torch.Generator().manual_seed(3)
    batches = [(torch.randn(8, 6, generator=draw), torch.arange(8) % 3) for _ in range(4)]
    results = []
    for device in ("sim", *DEVICES):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        trainer = Trainer(model, device=device, report=Reporter(), threads=1)
        results.append(trainer.fit(batches, epochs=2, val=batches))
        assert results[-1].device == device
        assert results[-1].compiles == 1
        del trainer
        gc.collect()
    assert len({(r.train_loss, r.test_loss, r.test_accuracy) for r in results}) == 1
    if sys.platform != "darwin":
        assert results[1].placement["where"].startswith("unknown")


# -- on a Mac ------------------------------------------------------------------------------------------------


@pytest.mark.mac
@pytest.mark.parametrize("device", DEVICES)
def test_on_the_engine_a_program_runs_and_keeps_state(device: str) -> None:
    session = load(counter(64), device)
    session.write("fixed", np.full(64, 2, np.float16))
    for _ in range(3):
        moved = session.run({"x": np.ones(64, np.float16)})["moved"]
    assert moved.tolist() == [3] * 64
    assert session.read("total").tolist() == [9] * 64
    session.close()


@pytest.mark.mac
@pytest.mark.parametrize("device", DEVICES)
def test_on_the_engine_the_mnist_mlp_learns(device: str) -> None:
    losses, _ = trained(device, 100)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.mac
def test_on_the_engine_both_ways_to_keep_state_agree() -> None:
    assert same(trained("e5rt", 50)[1], trained("e5rt-pingpong", 50)[1])


def test_the_program_is_for_this_macs_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(E5RT, "unavailable", lambda self: None)
    monkeypatch.setattr("ane_trainer.ane.dispatch.options.known_chip", lambda: "m1")
    chosen = resolve_target("e5rt", "m4", "exact")
    assert chosen.chip == "m1"
    assert "this Mac's chip instead of M4" in chosen.headline
    assert resolve_target("sim", "m4", "exact").chip == "m4"
