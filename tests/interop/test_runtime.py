"""The dispatch interface: ports, views, resident state, several outputs, limits and error returns."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aneforge as af
import numpy as np
import pytest
from aneforge import _circuit, _compile, _runtime, _targets

from ane_trainer.ane.errors import UsageError
from ane_trainer.interop.aneforge import install, installed, uninstall
from tests.interop.harness import QUIET, compile_text, run, values

pytestmark = pytest.mark.filterwarnings(QUIET)

X = values(2, 8)


@pytest.fixture
def counter() -> Iterator[Any]:
    """A program of two outputs: total' = total + x, and double = 2 total'."""
    total, x = af.input((2, 8)), af.input((2, 8))
    after = total + x
    model = _compile.compile_multi([after, after * 2.0])
    yield model
    model.release()


def names(model: Any) -> tuple[list[str], list[str]]:
    return [n for _, n in model.input_ports], [n for _, n in model.output_ports]


def test_several_outputs(counter: Any) -> None:
    _, (after, double) = names(counter)
    out = counter(X, X)
    np.testing.assert_array_equal(out[after], 2 * X)
    np.testing.assert_array_equal(out[double], 4 * X)


def test_resident_state_accumulates_and_can_be_seeded_again(counter: Any) -> None:
    (total, x), (after, double) = names(counter)
    program = counter.prog
    program.share_buffer(0, after, 0, total)
    program.set_input(total, np.full((2, 8), 3, np.float16))
    np.testing.assert_array_equal(program.read_output(after), 3)  # one buffer, already before a run
    program.set_input(x, np.ones((2, 8), np.float16))
    for _ in range(4):
        program.execute()
    np.testing.assert_array_equal(program.read_output(after), 7)
    np.testing.assert_array_equal(program.read_output(double), 14)
    program.set_input(total, np.zeros((2, 8), np.float16))
    program.execute()
    np.testing.assert_array_equal(program.read_output(after), 1)


def test_views_are_memory_and_follow_shared_buffers(counter: Any) -> None:
    (total, x), (after, double) = names(counter)
    program = counter.prog
    program.share_buffer(0, after, 0, total)
    state, step, result = program.input_view(total), program.input_view(x), program.output_view(double)
    assert state.ctypes.data == program.output_view(after).ctypes.data
    step[...] = 1
    state[...] = 10
    program.execute()
    assert (state == 11).all()
    assert (result == 22).all()
    state[0] = 0
    program.execute()
    np.testing.assert_array_equal(state[:, 0], [1, 12])


def test_one_output_shared_with_two_inputs() -> None:
    a, b = af.input((1, 4)), af.input((1, 4))
    model = _compile.compile_multi([a + b])
    (first, second), (total,) = names(model)
    for port in (first, second):
        model.prog.share_buffer(0, total, 0, port)
    model.prog.set_input(second, np.ones((1, 4), np.float16))
    for _ in range(3):
        model.prog.execute()
    np.testing.assert_array_equal(model.prog.read_output(total), 8)


def test_states_that_swap() -> None:
    a, b = af.input((1, 4)), af.input((1, 4))
    model = _compile.compile_multi([b * 1.0, a * 1.0])
    (first, second), (to_first, to_second) = names(model)
    model.prog.share_buffer(0, to_first, 0, first)
    model.prog.share_buffer(0, to_second, 0, second)
    model.prog.set_input(first, np.ones((1, 4), np.float16))
    model.prog.set_input(second, np.zeros((1, 4), np.float16))
    model.prog.execute()
    assert (model.prog.read_output(to_first)[0, 0], model.prog.read_output(to_second)[0, 0]) == (0, 1)


def test_a_result_that_shows_the_old_state_keeps_it() -> None:
    state, x = af.input((2, 4)), af.input((2, 4))
    model = _compile.compile_multi([state.reshape(4, 2), state + x])
    (first, second), (old, new) = names(model)
    model.prog.share_buffer(0, new, 0, first)
    model.prog.set_input(second, np.ones((2, 4), np.float16))
    for step in range(3):
        model.prog.execute()
        assert (model.prog.read_output(old) == step).all()
        assert (model.prog.read_output(new) == step + 1).all()
    model.release()


def test_a_shared_buffer_of_another_shape_is_the_same_bytes() -> None:
    a, b = af.input((2, 4)), af.input((8, 1))
    model = _compile.compile_multi([a + 1.0, b * 2.0])
    _, second = names(model)[0]
    model.prog.share_buffer(0, names(model)[1][0], 0, second)
    model.prog.set_input(names(model)[0][0], np.arange(8, dtype=np.float16).reshape(2, 4))
    model.prog.execute()
    model.prog.execute()
    got = model.prog.read_output(names(model)[1][1])
    np.testing.assert_array_equal(got[:, 0], 2 * np.arange(1, 9))


def test_sharing_is_refused_after_a_run_and_for_unknown_ports(counter: Any) -> None:
    (total, _), (after, _) = names(counter)
    for arguments in ((0, "nothing", 0, total), (0, after, 0, "nothing"), (1, after, 0, total)):
        with pytest.raises(RuntimeError, match="rc=-1"):
            counter.prog.share_buffer(*arguments)
    counter.prog.share_buffer(0, after, 0, total)
    counter.prog.execute()
    with pytest.raises(RuntimeError, match="rc=-1"):
        counter.prog.share_buffer(0, after, 0, total)


def test_results_stay_until_the_next_run(counter: Any) -> None:
    (total, x), (after, _) = names(counter)
    counter.prog.set_input(total, np.ones((2, 8), np.float16))
    counter.prog.set_input(x, np.ones((2, 8), np.float16))
    counter.prog.execute()
    counter.prog.set_input(x, np.zeros((2, 8), np.float16))
    np.testing.assert_array_equal(counter.prog.read_output(after), 2)


def test_raw_rc_codes(counter: Any) -> None:
    library, handle = _runtime._lib, counter.prog._handle
    words = (ctypes.c_uint16 * 17)()
    assert library.ane_e5rt_program_set_input_fp16(handle, b"nothing", words, 1) == -1
    port = names(counter)[0][0].encode()
    assert library.ane_e5rt_program_set_input_fp16(handle, port, words, 17) == -1
    assert library.ane_e5rt_program_set_input_fp16(handle, port, words, 16) == 0
    assert library.ane_e5rt_program_get_output_fp16(handle, b"nothing", words, 16) == -1
    assert library.ane_e5rt_program_execute(None) == -1
    address, nbytes = ctypes.c_void_p(), ctypes.c_size_t()
    assert (
        library.ane_e5rt_program_input_buffer(handle, b"no", ctypes.byref(address), ctypes.byref(nbytes))
        == -1
    )
    assert (
        library.ane_e5rt_program_input_buffer(handle, port, ctypes.byref(address), ctypes.byref(nbytes)) == 0
    )
    assert (nbytes.value, address.value % 64) == (32, 0)


def stream(folder: Path, operations: int) -> tuple[Any, int]:
    """A program of `operations` doublings in one stream, each fed by the one before, and its handle."""
    text = TEXT.replace("%s(x = x)", "add(x = x, y = x)")
    program = compile_text(folder, text, y=(1, 4))
    library, handle = _runtime._lib, program._handle
    for index in range(1, operations):
        path = str(folder / "model.mil").encode()
        assert library.ane_e5rt_program_add_op(handle, path, b"x", 8, b"y", 8) == index
        assert library.ane_e5rt_program_share_buffer(handle, index - 1, b"y", index, b"x") == 0
    return program, handle


def test_streams_of_operations(tmp_path: Path) -> None:
    program, handle = stream(tmp_path, 5)
    library, words = _runtime._lib, np.zeros(4, np.uint16)
    assert library.ane_e5rt_program_get_op_count(handle) == 5
    assert library.ane_e5rt_program_chain_ops(handle, 0, 4, b"edge") == 0
    assert library.ane_e5rt_program_chain_ops(handle, 0, 5, b"edge") == -1
    program.set_input("x", np.ones((1, 4), np.float16))
    assert library.ane_e5rt_program_execute_multi(handle) == 0
    assert library.ane_e5rt_program_chain_ops(handle, 0, 4, b"edge") == -1  # it has run
    pointer = words.ctypes.data_as(ctypes.POINTER(ctypes.c_uint16))
    assert library.ane_e5rt_program_get_output_fp16_op(handle, 4, b"y", pointer, 4) == 0
    np.testing.assert_array_equal(words.view(np.float16), 32)
    assert library.ane_e5rt_program_add_op(handle, b"/missing.mil", b"x", 8, b"y", 8) == -1


def test_asynchronous_runs_are_counted_and_waited_for_once(tmp_path: Path) -> None:
    program, handle = stream(tmp_path, 2)
    library, before, after = _runtime._lib, ctypes.c_uint64(7), ctypes.c_uint64(7)
    assert library.ane_e5rt_program_wait_for_completion(handle) == -2
    assert library.ane_e5rt_program_get_final_event_signaled(handle, before, after) == -1
    program.execute()  # a synchronous run does not count
    assert library.ane_e5rt_program_wait_for_completion(handle) == -2
    for earlier in range(2):
        assert library.ane_e5rt_program_execute_async(handle) == 0
        assert library.ane_e5rt_program_wait_for_completion(handle) == 0
        assert library.ane_e5rt_program_wait_for_completion(handle) == -2
        arguments = (ctypes.byref(before), ctypes.byref(after))
        assert library.ane_e5rt_program_get_final_event_signaled(handle, *arguments) == 0
        assert (before.value, after.value) == (earlier, earlier + 1)
    assert library.ane_e5rt_program_get_event_last_signaled(handle, 0, ctypes.byref(after)) == 0
    assert after.value == 2
    assert library.ane_e5rt_program_get_chain_event_last_signaled(handle, 2, ctypes.byref(after)) == -1
    block = library.ane_e5rt_make_completion_block(ctypes.CFUNCTYPE(None)(lambda: None), None)
    assert block
    assert library.ane_e5rt_make_completion_block(None, None) is None
    library.ane_e5rt_free_completion_block(block)


def test_threads_share_a_program() -> None:
    w = values(32, 32, seed=3)
    net = af.compile((af.input((8, 32)) @ w).softmax(-1))
    x = values(8, 32)
    want = net(x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(net, [x] * 40):
            np.testing.assert_array_equal(got, want)
    net.release()


def test_uint8_images() -> None:
    image = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3) * 9
    x = af.image_input((1, 3, 3, 3), scale=[1 / 255, 0.5, 1.0], bias=[0.0, 1.0, -1.0])
    net = af.compile(x.relu())
    wide = image.astype(np.float32) * np.array([1 / 255, 0.5, 1]).reshape(1, 3, 1, 1)
    want = np.maximum(wide + np.array([0, 1, -1]).reshape(1, 3, 1, 1), 0)
    np.testing.assert_allclose(net(image), want, rtol=2e-3, atol=1e-3)
    with pytest.raises(TypeError, match="uint8"):
        net(image.astype(np.float32))


def test_the_129th_program_fails_and_a_release_frees_a_place(capfd: pytest.CaptureFixture[str]) -> None:
    free = 128 - len(_runtime._lib.loaded)
    models = [af.compile(af.input((1, 2)) * 2.0, _check_precision=False) for _ in range(free)]
    with pytest.raises(RuntimeError, match="compile failed"):
        af.compile(af.input((1, 2)) * 2.0, _check_precision=False)
    assert "128" in capfd.readouterr().err
    models.pop().release()
    models.append(af.compile(af.input((1, 2)) * 2.0, _check_precision=False))
    assert models[-1](np.ones((1, 2)))[0, 0] == 2
    for model in models:
        model.release()


TEXT = """program(1.3)
{ func main<ios18>(tensor<fp16, [1, 4]> x) {
    tensor<fp16, [1, 4]> y = %s(x = x)[name = string("y")];
} -> (y); }
"""


def test_programs_written_by_hand_run(tmp_path: Path) -> None:
    program = compile_text(tmp_path, TEXT % "relu", y=(1, 4))
    out = program.eval({"x": np.array([[-1, 0, 1, 2]], np.float16)})
    np.testing.assert_array_equal(out["y"], [[0, 0, 1, 2]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT % "acos", "refuses"),
        (TEXT % "no_such_op", "no_such_op"),
        ("program(1.3) { func main<ios18>(tensor<fp16, [1, 4]> y) { } -> (y); }", "operation"),
        (TEXT.replace("-> (y)", "-> (z)") % "relu", "z"),
        ("nonsense", "MIL110"),
    ],
)
def test_a_failed_compile_gives_no_handle_and_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    with pytest.raises(RuntimeError, match="compile failed"):
        compile_text(tmp_path, text, y=(1, 4))
    assert reason in capfd.readouterr().err


def test_ports_that_the_program_does_not_have_fail_the_compile(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="compile failed"):
        compile_text(tmp_path, TEXT % "relu", z=(1, 4))
    assert "output port z" in capfd.readouterr().err


def test_weights_outside_the_folder_are_not_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 256)
    folder = tmp_path / "model"
    folder.mkdir()
    blob = 'BLOBFILE(path = string("@model_path/../secret.bin"), offset = uint64(64))'
    const = f'tensor<fp16, [1, 4]> w = const()[name = string("w"), val = tensor<fp16, [1, 4]>({blob})];'
    with pytest.raises(RuntimeError, match="compile failed"):
        compile_text(folder, TEXT.replace("    tensor", f"    {const}\n    tensor", 1) % "relu", y=(1, 4))
    assert "was not given" in capfd.readouterr().err


def test_compile_checks_for_other_chips(tmp_path: Path) -> None:
    (tmp_path / "model.mil").write_text(TEXT % "sin")
    check = _runtime.compile_check
    rc = {
        arch: check(tmp_path / "model.mil", tmp_path, f"TargetArchitecture={arch}")
        for arch in ("h13", "h14g", "h15", "h16s", "h17s", "unheard")
    }
    assert [rc[a] != 0 for a in ("h13", "h14g")] == [True, True]
    assert [rc[a] for a in ("h15", "h16s", "h17s", "unheard")] == [0, 0, 0, 0]
    assert check(tmp_path / "model.mil", tmp_path) == 0
    assert _compile.cross_compile_check(af.input((1, 4)).relu(), "h13")


def test_transposes_of_long_axes_run_and_other_ops_do_not(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """ANEForge measured a limit of 2^24 - 1 for transposes; all other extents end at 65536."""
    x = values(3, 65537)
    np.testing.assert_array_equal(run(lambda t: t.transpose([1, 0]), x), x.T)
    text = TEXT.replace("[1, 4]", "[1, 65537]") % "relu"
    (tmp_path / "model.mil").write_text(text)
    assert _runtime.compile_check(tmp_path / "model.mil", tmp_path) == -1
    assert "65536" in capfd.readouterr().err


def test_sine_is_decomposed_where_the_chip_has_none() -> None:
    x = values(2, 20, low=-3, high=3)
    native = run(lambda t: t.sin(), x)
    install("m1", threads=1)
    assert _targets.detect_family() == _targets.Family.A13
    decomposed = run(lambda t: t.sin(), x)
    np.testing.assert_allclose(decomposed, np.sin(x), atol=2e-2)
    assert (native != decomposed).any()


def test_the_width_slice_clamp_follows_the_chip() -> None:
    x = np.array([[1, 4094, 4096, -5000]], np.float32)

    def cut(t):
        return t.slice_by_size([0, 1], [1, 3])

    np.testing.assert_array_equal(run(cut, x), [[4094, 4096, -5000]])
    install("m1", threads=1)
    np.testing.assert_array_equal(run(cut, x), [[4094, np.inf, -np.inf]])


@pytest.mark.parametrize(
    ("chip", "family"), [("m1", 2), ("m1-max", 2), ("m2", 3), ("m3", 4), ("m4", 5), ("m5-pro", 5), ("m6", 5)]
)
def test_aneforge_sees_the_chip(chip: str, family: int) -> None:
    install(chip)
    assert _targets.detect_family() == family


def test_uninstall_gives_back_the_original() -> None:
    before = installed()
    assert before is not None
    uninstall()
    assert installed() is None
    with pytest.raises((RuntimeError, OSError), match=r"darwin|macOS|dylib"):
        run(lambda x: x.relu(), X)
    uninstall()
    install("m5")
    np.testing.assert_array_equal(run(lambda x: x.relu(), X), np.maximum(X, 0))


def test_a_refused_program_leaves_no_pause_behind() -> None:
    """ANEForge paces what follows a failed compile; Apple's service never saw this one."""
    uninstall()
    before = _circuit._last_failure_ts
    install("m5")
    _circuit.note_compile_result(False)
    uninstall()
    assert _circuit._last_failure_ts == before


def test_programs_outlive_a_change_of_chip() -> None:
    net = af.compile(af.input((2, 8)) * 2.0)
    install("m1")
    other = af.compile(af.input((2, 8)) * 4.0)
    np.testing.assert_array_equal(other(X), 4 * X)
    np.testing.assert_array_equal(net(X), 2 * X)
    count = len(_runtime._lib.loaded)
    other.release()
    net.release()
    assert len(_runtime._lib.loaded) == count - 2


def test_unknown_chips_are_refused_and_change_nothing() -> None:
    before = installed()
    with pytest.raises(UsageError, match="chip"):
        install("m99")
    assert installed() is before


def test_graphs_of_thousands_of_ops() -> None:
    """One chain of one variable, one of two, one of products."""
    x, z = af.input((2, 8)), af.input((2, 8))
    one, two, three = x, x, x
    w = np.eye(8, dtype=np.float32)
    for _ in range(250):
        one, two, three = (one * 0.5).relu().adds(0.25), two * x + z, (three @ w).relu()
    model = _compile.compile_multi([one, two, three])
    half = np.full((2, 8), 0.5)
    first, second, third = model(half, half).values()
    model.release()
    assert (first == 0.5).all()
    np.testing.assert_allclose(second, 1, rtol=1e-3)
    assert (third == 0.5).all()
