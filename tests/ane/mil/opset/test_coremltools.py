"""Our type rules against coremltools' inference: same results, and no call that it refuses is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.opset import infer, known_ops, op_def
from ane_trainer.ane.mil.opset.builder import argument
from ane_trainer.ane.mil.program import Arg, TensorType

pytest.importorskip("coremltools")
from tests.ane.mil.opset.cases import CASES, REDUCE, C, Case, T, case
from tests.ane.mil.opset.witness import coreml_params, coreml_types

pytestmark = pytest.mark.filterwarnings("ignore")

#: Calls that coremltools' type inference lets pass although they mean nothing; ours refuses them.
STRICTER = [
    case("reduce_sum", x=T(2, 3), axes=[-3]),
    case("softmax", x=T(2, 3), axis=2),
    case("squeeze", x=T(2, 1), axes=[0]),
    case("conv", x=T(1, 4, 6, 6), weight=C(3, 2, 3, 3), groups=2),
    case("batch_norm", x=T(1, 4, 6, 6), mean=C(3), variance=C(3)),
    case("depth_to_space", x=T(1, 6, 2, 2), block_size=2),
    case("space_to_depth", x=T(1, 6, 3, 2), block_size=2),
    case("topk", x=T(3, 4), k=0),
    case("slice_by_size", x=T(4), begin=[3], size=[2]),
]

#: Calls that ANEForge hands the engine's own compiler and coremltools refuses.
LAXER = [
    case("prelu", x=T(2, 4, 3), alpha=C(4)),
    case("prelu", x=T(2, 4, 3, 2, 2), alpha=C(4)),
    case("constexpr_blockwise_shift_scale", data=C(4, 6, 3, 3, dtype="int8"), scale=C(4, 2)),
]

#: MIL text has these; coremltools builds programs without them.
TEXT_ONLY = {"const", "write_state"}


def arguments(call: Case) -> dict[str, Arg]:
    """The call as MIL arguments, numbers typed as the builder types them."""
    given = dict(call.args)
    return {p.name: argument(call.kind, p, given) for p in op_def(call.kind).params if p.name in given}


def ours(call: Case) -> tuple[TensorType, ...] | str:
    try:
        return infer(call.kind, arguments(call))
    except ProgramError as fault:
        return str(fault)


def check(call: Case) -> None:
    theirs, mine = coreml_types(call.kind, arguments(call)), ours(call)
    if isinstance(theirs, str):
        assert isinstance(mine, str), f"coremltools refuses ({theirs}); we give {mine}"
    elif not isinstance(mine, str) or all(extent > 0 for type_ in theirs for extent in type_.shape):
        assert mine == theirs  # an empty result, which the engine has no form for, is refused by ours only


@pytest.mark.parametrize("call", CASES, ids=str)
def test_same_types_and_refusals(call: Case) -> None:
    check(call)


@pytest.mark.parametrize("call", STRICTER, ids=str)
def test_ours_is_stricter_where_a_call_means_nothing(call: Case) -> None:
    assert not isinstance(coreml_types(call.kind, arguments(call)), str)
    assert isinstance(ours(call), str)


@pytest.mark.parametrize("call", LAXER, ids=str)
def test_ours_reads_what_aneforge_writes(call: Case) -> None:
    assert isinstance(coreml_types(call.kind, arguments(call)), str)
    mine = ours(call)
    assert not isinstance(mine, str), mine
    (first, *_) = arguments(call).values()
    assert mine[0].shape == first.type.shape  # type: ignore[union-attr]


def test_every_op_has_a_case_that_both_accept() -> None:
    accepted = {call.kind for call in CASES if not isinstance(ours(call), str)}
    assert set(known_ops()) - TEXT_ONLY - accepted == set()


@pytest.mark.parametrize("kind", sorted(set(known_ops()) - TEXT_ONLY))
def test_parameters_are_coremltools(kind: str) -> None:
    """Same names, required where coremltools requires them (roi and score_threshold are iOS 15's)."""
    theirs = coreml_params(kind)
    assert theirs is not None
    mine = {p.name: not p.required for p in op_def(kind).params}
    older = {"roi", "score_threshold", "shape" if kind.startswith("constexpr") else "roi"}
    assert {k: v for k, v in mine.items() if k not in older} == {**theirs, **_runtime_choices(kind, mine)}


def _runtime_choices(kind: str, mine: dict[str, bool]) -> dict[str, bool]:
    """`crop_resize` of iOS 15 has roi in place of boxes, so boxes may be left out."""
    return {"boxes": True} if kind == "crop_resize" else {}


extents = st.integers(1, 5)
shapes = st.lists(extents, min_size=0, max_size=4).map(tuple)
small = st.integers(-5, 6)


def images(rank: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(st.integers(1, 2), st.integers(1, 4), *[st.integers(1, 9)] * rank)


@given(shapes, shapes, st.sampled_from(["add", "less", "pow"]))
@settings(max_examples=60, deadline=None)
def test_broadcasting(x: tuple[int, ...], y: tuple[int, ...], kind: str) -> None:
    check(case(kind, x=T(*x), y=T(*y)))


@given(
    st.lists(extents, min_size=1, max_size=4),
    st.lists(small, min_size=1, max_size=3, unique=True),
    st.booleans(),
    st.sampled_from(REDUCE),
)
@settings(max_examples=60, deadline=None)
def test_reductions(shape: list[int], axes: list[int], keep: bool, kind: str) -> None:
    if any(not -len(shape) <= a < len(shape) for a in axes) or len({a % len(shape) for a in axes}) < len(
        axes
    ):
        assert isinstance(ours(case(kind, x=T(*shape), axes=axes, keep_dims=keep)), str)
    else:
        check(case(kind, x=T(*shape), axes=axes, keep_dims=keep))


@given(st.data(), st.integers(1, 3), st.sampled_from(["conv", "max_pool", "avg_pool", "conv_transpose"]))
@settings(max_examples=150, deadline=None)
def test_windows(data: st.DataObject, spatial: int, kind: str) -> None:
    x = data.draw(images(spatial))
    numbers = st.lists(st.integers(1, 3), min_size=spatial, max_size=spatial)
    kernel, strides = data.draw(numbers), data.draw(numbers)
    choices = (
        ["valid", "custom", "same"] if kind == "conv_transpose" else ["valid", "custom", "same", "same_lower"]
    )
    options: dict[str, object] = {"strides": strides, "pad_type": data.draw(st.sampled_from(choices))}
    options["pad"] = data.draw(st.lists(st.integers(0, 2), min_size=2 * spatial, max_size=2 * spatial))
    if kind.startswith("conv"):
        options["dilations"] = data.draw(numbers)
        weight = (3, x[1], *kernel) if kind == "conv" else (x[1], 3, *kernel)
        call = case(kind, x=T(*x), weight=C(*weight), **options)
    else:
        options["ceil_mode"] = data.draw(st.booleans())
        call = case(kind, x=T(*x), kernel_sizes=kernel, **options)
    check(call)


@given(st.data(), st.lists(st.integers(2, 5), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_slices(data: st.DataObject, shape: list[int]) -> None:
    """Axes of extent 1 are left out: coremltools gives 1 for them even where the slice is empty."""
    rank = len(shape)
    flags = st.lists(st.booleans(), min_size=rank, max_size=rank)
    begin = [data.draw(st.integers(-n, n - 1)) for n in shape]
    end = [data.draw(st.integers(-n, n + 1)) for n in shape]  # beyond -n coremltools and NumPy differ
    stride = data.draw(st.lists(st.sampled_from([1, 2, -1, -2]), min_size=rank, max_size=rank))
    call = case("slice_by_index", x=T(*shape), begin=begin, end=end, stride=stride,
                begin_mask=data.draw(flags), end_mask=data.draw(flags))  # fmt: skip
    check(call)


@given(st.lists(extents, min_size=1, max_size=4), st.data())
@settings(max_examples=80, deadline=None)
def test_reshapes(shape: list[int], data: st.DataObject) -> None:
    target = data.draw(st.permutations(shape)) if data.draw(st.booleans()) else data.draw(
        st.lists(st.integers(0, 6), min_size=1, max_size=4))  # fmt: skip
    if data.draw(st.booleans()):
        target = [*target[:-1], -1]
    check(case("reshape", x=T(*shape), shape=list(target)))


@given(
    st.lists(extents, min_size=2, max_size=4),
    st.lists(extents, min_size=2, max_size=4),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_matmul(x: list[int], y: list[int], transpose_x: bool, transpose_y: bool) -> None:
    y[-1 if transpose_y else -2] = x[-2 if transpose_x else -1]
    check(case("matmul", x=T(*x), y=T(*y), transpose_x=transpose_x, transpose_y=transpose_y))
