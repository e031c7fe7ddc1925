"""`ane-trainer run`: programs from disk with inputs from files or drawn, outputs, profile, errors, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from ane_trainer.ane import load_program, simulate
from ane_trainer.cli import run_command
from ane_trainer.commands.run import write_arrays

MODEL = """program(1.3)
{
    func main<ios18>(tensor<fp16, [2, 3]> x, tensor<int32, [2]> rows) {
        tensor<fp16, [2, 3]> y = square(x = x)[name = string("y")];
        tensor<fp16, [2, 3]> z = exp(x = y)[name = string("z")];
    } -> (z, y);
    func other<ios18>(tensor<fp16, [2, 3]> x) {
        tensor<fp16, [2, 3]> y = relu(x = x)[name = string("y")];
    } -> (y);
}
"""
COUNTER = """program(1.3)
{
    func main<ios18>(tensor<fp16, [2]> x, state<tensor<fp16, [2]>> total) {
        tensor<fp16, [2]> old = read_state(input = total)[name = string("old")];
        tensor<fp16, [2]> sum = add(x = old, y = x)[name = string("sum")];
        write_state(data = sum, input = total)[name = string("w")];
        tensor<fp16, [2]> y = add(x = sum, y = sum)[name = string("y")];
    } -> (y);
}
"""
PROD = """program(1.3)
{
    func main<ios18>(tensor<fp16, [2, 3]> x, tensor<bool, [2]> flags) {
        tensor<fp16, [2]> y = reduce_prod(axes = tensor<int32, [1]>([1]), x = x)[name = string("y")];
    } -> (y);
}
"""


PACKED = """program(1.3)
{
    func main<ios18>(tensor<fp16, [2]> x, tensor<uint4, [2]> packed) {
        tensor<fp16, [2]> y = relu(x = x)[name = string("y")];
    } -> (y);
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "model": MODEL,
        "counter": COUNTER,
        "prod": PROD,
        "packed": PACKED,
        "bad": "program(1.3) {",
    }.items():
        (tmp_path / f"{name}.mil").write_text(text)
    np.save(tmp_path / "x.npy", np.float32([[1, 2, 3], [0.001, -0.5, 0]]))
    np.save(tmp_path / "rows.npy", np.array([0, 1]))
    np.save(tmp_path / "steps.npy", np.float16([[1, 2], [3, 4], [5, 6]]))
    np.save(tmp_path / "two.npy", np.float16([10, 20]))
    np.save(tmp_path / "fractions.npy", np.array([0.5, 1.5]))
    np.save(tmp_path / "large.npy", np.array([0, 2**40]))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", np.zeros(3))
    (tmp_path / "text.npy").write_text("hello")
    return tmp_path


def run(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(("run", *arguments))
    return code, out.getvalue(), err.getvalue()


INPUTS = ("--input", "x=x.npy", "--input", "rows=rows.npy")


def test_outputs_are_those_of_the_simulator_and_written(folder: Path) -> None:
    code, text, _ = run("model.mil", *INPUTS, "--chip", "m1", "--out", "made/here", cwd=folder)
    assert code == 0
    assert "simulator of M1, exact, path e5rt" in text
    feeds = {"x": np.load(folder / "x.npy").astype(np.float16), "rows": np.int32([0, 1])}
    want = simulate(load_program(folder / "model.mil"), feeds, chip="m1")
    for name in ("y", "z"):
        written = np.load(folder / "made" / "here" / f"{name}.npy")
        assert written.dtype == np.float16
        assert np.array_equal(written, want[name])
        assert f"{name}.npy" in text


def test_random_inputs_follow_the_seed_and_files_go_first(folder: Path) -> None:
    def ports(*arguments: str) -> tuple[dict, dict]:
        code, text, _ = run("model.mil", "--random", "--json", *arguments, cwd=folder)
        assert code == 0
        found = json.loads(text)
        return tuple({p["name"]: p for p in found[kind]} for kind in ("inputs", "outputs"))

    first, outputs = ports("--seed", "3")
    assert (first, outputs) == ports("--seed", "3")
    assert first["x"] != ports("--seed", "4")[0]["x"]
    assert first["x"]["place"] == "random, seed 3"
    mixed, _ = ports("--input", "x=x.npy")
    assert mixed["x"]["place"] == "x.npy"
    assert mixed["x"]["high"] == 3.0


def test_profile_names_the_worst_and_compare_adds_the_outputs(folder: Path) -> None:
    code, text, _ = run("model.mil", *INPUTS, "--profile", cwd=folder)
    assert code == 0
    assert "underflows to zero" in text
    assert "1. z = exp fp16[2,3]" in text
    assert "against fp64" not in text
    code, text, _ = run("model.mil", *INPUTS, "--compare", cwd=folder)
    assert "against fp64" in text
    assert "worst" not in text
    code, text, _ = run("model.mil", *INPUTS, "--profile", "--compare", "--json", cwd=folder)
    found = json.loads(text)
    assert [op["name"] for op in found["profile"]["ops"]] == ["y", "z"]
    assert {e["name"] for e in found["errors"]} == {"y", "z"}
    assert 0 < found["profile"]["ops"][1]["own"]["relative"] < 0.01


def test_steps_keep_states(folder: Path) -> None:
    code, text, _ = run(
        "counter.mil", "--input", "x=steps.npy", "--steps", "3", "--out", "o", "--compare", cwd=folder
    )
    assert code == 0, text
    assert np.load(folder / "o" / "y.npy").tolist() == [[2, 4], [8, 12], [18, 24]]
    assert np.load(folder / "o" / "total.state.npy").tolist() == [9, 12]
    assert "3 steps" in text
    assert "states" in text
    assert "path coreml" in text
    run(
        "counter.mil",
        "--input",
        "x=two.npy",
        "--input",
        "total=two.npy",
        "--steps",
        "2",
        "--out",
        "p",
        cwd=folder,
    )
    assert np.load(folder / "p" / "total.state.npy").tolist() == [30, 60]


def test_another_function(folder: Path) -> None:
    code, text, _ = run("model.mil", "--function", "other", "--input", "x=x.npy", "--out", "o", cwd=folder)
    assert code == 0
    assert "function other" in text
    assert np.load(folder / "o" / "y.npy")[1].tolist() == [np.float16(0.001), 0, 0]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "words"),
    [
        (["model.mil"], 1, "SIM101", ["x: needs fp16[2,3]", "rows", "--random"]),
        (["model.mil", "--random", "--input", "q=x.npy"], 1, "SIM102", ["q", "x, rows"]),
        (["model.mil", "--random", "--input", "x=two.npy"], 1, "SIM103", ["(2, 3)", "(2,)"]),
        (["counter.mil", "--steps", "2", "--input", "x=steps.npy"], 1, "SIM103", ["(2, 2)", "(3, 2)"]),
        (["model.mil", "--random", "--input", "rows=fractions.npy"], 1, "SIM107", ["int32", "float64"]),
        (["model.mil", "--random", "--input", "rows=large.npy"], 1, "SIM107", ["int32"]),
        (["prod.mil", "--path", "none", "--random", "--input", "flags=two.npy"], 1, "SIM107", ["bool"]),
        (["packed.mil", "--random"], 1, "SIM105", ["packed", "uint4"]),
        (["model.mil", "--random", "--input", "x=none.npy"], 1, "SIM108", ["none.npy", "No such file"]),
        (["model.mil", "--random", "--input", "x=text.npy"], 1, "SIM108", ["text.npy"]),
        (["model.mil", "--random", "--input", "x=objects.npy"], 1, "SIM108", ["objects.npy"]),
        (["model.mil", "--random", "--input", "x=archive.npz"], 1, "SIM108", ["archive"]),
        (["model.mil", "--random", "--input", "x"], 1, "ANE104", ["name=file.npy"]),
        (["model.mil", "--input", "x=x.npy", "--input", "x=x.npy"], 1, "ANE104", ["x twice"]),
        (["model.mil", "--random", "--function", "third"], 1, "MIL112", ["main, other", "third"]),
        (["model.mil", "--random", "--path", "gpu"], 1, "ANE104", ["e5rt", "gpu"]),
        (["model.mil", "--random", "--chip", "m9"], 1, "ANE100", ["m9"]),
        (["model.mil", "--random", "--fidelity", "best"], 1, "ANE104", ["best"]),
        (["model.mil", "--random", "--steps", "0"], 1, "ANE104", ["--steps"]),
        (["model.mil", "--random", "--out", "x.npy/sub"], 2, "ANE204", ["x.npy"]),
        (["none.mil", "--random"], 1, "MIL111", ["none.mil", "nothing there"]),
        (["bad.mil", "--random"], 1, "MIL110", ["bad.mil", "line 1"]),
        (["prod.mil", "--random"], 3, "ANE300", ["reduce_prod", "e5rt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_have_code_words_and_exit_code(
    arguments: list[str], exit_code: int, code: str, words: list[str], folder: Path
) -> None:
    done, text, err = run(*arguments, "--json", cwd=folder)
    assert done == exit_code, err
    assert json.loads(text)["error"]["code"] == code
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_a_refused_program_runs_without_a_path(folder: Path) -> None:
    code, text, _ = run("prod.mil", "--random", "--path", "none", cwd=folder)
    assert code == 0
    assert "path" not in text.splitlines()[0]


def test_all_that_is_wrong_with_inputs_is_said_at_once(folder: Path) -> None:
    _, _, err = run("model.mil", "--input", "x=two.npy", "--input", "rows=fractions.npy", cwd=folder)
    assert "(2, 3)" in err
    assert "int32" in err


def test_output_names_stay_in_the_folder(tmp_path: Path) -> None:
    names = ("../up", ".._up", "a/b", ".hidden")
    written = write_arrays(tmp_path / "o", {n: np.float16([i]) for i, n in enumerate(names)}, {})
    assert {Path(f).parent for f in written.values()} == {tmp_path / "o"}
    assert [np.load(written[n])[0] for n in names] == [0, 1, 2, 3]
    assert write_arrays(None, {"y": np.zeros(1)}, {}) == {}
