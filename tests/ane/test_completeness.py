"""Adding an op takes four places: type rule, meaning, kernel, lowering. What is missing is named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ane_trainer.ane
from ane_trainer.ane.compiler.coreai.ops import RULES as CORE_AI
from ane_trainer.ane.compiler.lower.rules.pointwise import PASS_THROUGH
from ane_trainer.ane.mil.opset import family, known_ops
from ane_trainer.ane.mil.semantics import MEANINGS, WITHOUT_MEANING
from ane_trainer.ane.simulator import KERNELS, WITHOUT_KERNEL

SOURCE = Path(ane_trainer.ane.__file__).parent
FAMILIES = {
    "unary", "binary", "select", "view", "movement", "reduction", "arg_reduction", "softmax", "normalization",
    "contraction", "pooling", "constexpr", "random", "",
}  # fmt: skip
#: Where an op is named to be added.
PLACES = ("mil/opset", "mil/semantics", "simulator", "compiler/lower/rules")
#: Ops that a file beside them may name: special cases of one op, not lists that a new op has to join.
MOST_NAMED_ELSEWHERE = 8


def missing(kinds: set[str], meanings: set[str], kernels: set[str]) -> list[str]:
    """What each op lacks, by name."""
    return [
        f"{kind}: needs a {what} ({place})"
        for kind in sorted(kinds | meanings | kernels)
        for what, place, there in (
            ("type rule", "mil/opset", kinds), ("meaning", "mil/semantics", meanings),
            ("kernel", "simulator/kernels", kernels),
        )
        if kind not in there
    ]  # fmt: skip


def emitted() -> set[str]:
    """The MIL ops that the lowering names in calls that emit one."""
    found = set(PASS_THROUGH.values())
    for file in (SOURCE / "compiler" / "lower").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("emit", "unary", "binary"):
                found |= {
                    a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
                }
    return found


def test_every_op_is_in_all_its_places() -> None:
    kinds = set(known_ops())
    assert missing(kinds, set(MEANINGS) | set(WITHOUT_MEANING), set(KERNELS) | set(WITHOUT_KERNEL)) == []
    assert {family(kind) for kind in kinds} <= FAMILIES


def test_what_a_new_op_lacks_is_named() -> None:
    assert missing({"abs", "cbrt"}, {"abs"}, {"abs", "cbrt"}) == ["cbrt: needs a meaning (mil/semantics)"]


def test_what_the_lowering_emits_exists_and_has_a_core_ai_form() -> None:
    kinds = emitted()
    assert len(kinds) > 40
    assert kinds <= set(known_ops())
    assert kinds <= set(CORE_AI)


def lists_of_ops() -> Iterator[tuple[str, int]]:
    """Files outside the four places, and how many elementwise ops and reductions their tables name."""
    plain = {kind for kind in known_ops() if family(kind) in ("unary", "reduction")}
    for file in SOURCE.rglob("*.py"):
        place = file.relative_to(SOURCE).as_posix()
        if not place.startswith((*PLACES, "verify")):
            texts = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
            yield (
                place,
                len({w for t in texts if isinstance(t, str) and len(t) < 400 for w in t.split()} & plain),
            )


def test_no_table_elsewhere_lists_ops() -> None:
    """Core AI and ONNX spell their own formulas; every other file asks the registry for a family."""
    found = {place: n for place, n in lists_of_ops() if n > MOST_NAMED_ELSEWHERE}
    assert set(found) <= {"compiler/coreai/ops.py", "export/onnx_step.py"}, found
