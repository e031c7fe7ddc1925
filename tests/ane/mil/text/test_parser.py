"""MIL text: program -> text -> program is identity; other writers' dialects; refusals name line and column."""

# ruff: noqa: E501  (MIL texts are quoted as other programs write them)
from __future__ import annotations

import string
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import DTYPE_BYTES, Literal, Program, TensorType, Value, literal
from ane_trainer.ane.mil.text.parser import parse_program
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.ane.mil.weights import BlobWriter, from_array, integer_range

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
names = st.text(string.ascii_letters + "_", min_size=1, max_size=6)


@st.composite
def fp16_literals(draw: st.DrawFn, shape: tuple[int, ...]) -> Literal:
    """Any bit pattern, NaN payloads and infinities included."""
    size = 2 * int(np.prod(shape, dtype=int))
    data = draw(st.binary(min_size=size, max_size=size))
    return Literal(TensorType("fp16", shape), data, draw(st.none() | st.just("fc1.weight") | names))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Functions of a dozen ops over all argument kinds: values, constants of every sort, tuples, several results."""
    functions = []
    for number in range(draw(st.integers(1, 2))):
        b = Builder(prefix=draw(st.sampled_from(["t", "v_", "out"])))
        live = [b.input(f"x{i}", TensorType("fp16", draw(shapes))) for i in range(draw(st.integers(1, 3)))]
        for _ in range(draw(st.integers(1, 12))):
            live.append(_random_op(draw, b, draw(st.sampled_from(live))))
        if draw(st.booleans()):
            live.append(b.op("const", val=draw(fp16_literals(draw(shapes))), name="table"))
        outputs = tuple(draw(st.lists(st.sampled_from(live), min_size=1, max_size=3)))
        outputs += tuple(v for v in live if v.name == "table" and v not in outputs)
        functions.append(b.finish(outputs, name="main" if number == 0 else f"f{number}"))
    return Program(tuple(functions), draw(st.sampled_from(["1.0", "1.3", "1.5"])), (("a", 'q"\\\n'),))


def _random_op(draw: st.DrawFn, b: Builder, x: Value) -> Value:
    kind = draw(
        st.sampled_from(["relu", "add", "mul", "reduce", "reshape", "concat", "matmul", "gelu", "pad"])
    )
    if kind == "relu":
        return b.op("relu", x=x)
    if kind == "add":
        return b.op("add", x=x, y=draw(fp16_literals(())))
    if kind == "mul":
        return b.op("mul", x=x, y=draw(fp16_literals(x.type.shape)))
    if kind == "reduce":
        return b.op("reduce_sum", x=x, axes=[draw(st.integers(0, x.type.rank - 1))], keep_dims=True)
    if kind == "reshape":
        return b.op("reshape", x=x, shape=[1] * draw(st.integers(0, 3)) + [x.type.size])
    if kind == "concat":
        return b.op(
            "concat", values=(x, draw(fp16_literals(x.type.shape)), x), axis=0, interleave=draw(st.booleans())
        )
    if kind == "matmul":
        row = b.op("reshape", x=x, shape=[1, x.type.size])
        return b.op("matmul", x=row, y=draw(fp16_literals((3, x.type.size))), transpose_y=True)
    if kind == "gelu":
        return b.op("gelu", x=x, mode=draw(st.sampled_from(["EXACT", "TANH_APPROXIMATION"])))
    return b.op(
        "pad", x=x, pad=[1, 0], mode="constant", constant_val=draw(st.sampled_from([0.0, -0.0, 65504.0]))
    )


@given(programs())
@settings(max_examples=150, deadline=None)
def test_program_to_text_to_program_is_identity(program: Program) -> None:
    text, blob = print_program(program)
    again = parse_program(text, blob)
    assert again == program
    assert again.attributes == program.attributes
    assert print_program(again) == (text, blob)


@given(st.data(), st.sampled_from(sorted(DTYPE_BYTES)), shapes | st.just(()))
def test_every_dtype_survives_as_a_constant(data: st.DataObject, dtype: str, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape, dtype=int))
    if dtype == "bool":
        lit = from_array(
            np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)
        )
    elif dtype.startswith("fp"):
        floats = st.lists(st.floats(width=int(dtype[2:])), min_size=size, max_size=size)
        lit = from_array(np.array(data.draw(floats)).reshape(shape), dtype=dtype)
    else:
        low, high = integer_range(dtype)
        drawn = data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
        lit = from_array(
            np.array(drawn, dtype=object).astype(np.uint64 if low == 0 else np.int64).reshape(shape),
            dtype=dtype,
        )
    b = Builder()
    program = Program((b.finish((b.op("const", val=lit),)),))
    text, blob = print_program(program)
    again = parse_program(text, blob)
    (op,) = again.main.ops
    ((_, found),) = op.args
    assert isinstance(found, Literal)
    assert found.type == lit.type
    if dtype == "fp64":  # a NaN's payload has no text form, and fp64 no blob
        np.testing.assert_array_equal(found.to_python(), lit.to_python())
    else:
        assert found == lit


_TEXTS = st.text('ab"\\ \t\n/é\x7f,{}')


@given(st.lists(st.tuples(_TEXTS, _TEXTS), min_size=1, max_size=3).map(tuple))
def test_strings_survive(pairs: tuple[tuple[str, str], ...]) -> None:
    b = Builder()
    relu = b.op("relu", x=b.input("x", TensorType("fp16", (1,))))
    program = Program((b.finish((relu,)),), attributes=pairs)
    assert parse_program(*print_program(program)).attributes == program.attributes


def wrap(body: str, outputs: str = "y", inputs: str = "tensor<fp16, [1, 4]> x") -> str:
    return f"program(1.3)\n{{\n  func main<ios18>({inputs}) {{\n    {body}\n  }} -> ({outputs});\n}}\n"


def test_weights_first_dialect_of_the_direct_path() -> None:
    """maderix/ANE's and Orion's style: ios16, tight spacing, own blob layout with only two header bytes set."""
    weight = np.arange(8, dtype=np.float16)
    blob = bytearray(128) + weight.tobytes()
    blob[0], blob[4] = 1, 2
    blob[64:68], blob[68] = bytes.fromhex("efbeadde"), 1
    blob[72:76], blob[80:84] = (16).to_bytes(4, "little"), (128).to_bytes(4, "little")
    text = """program(1.0)
[buildInfo = dict<tensor<string, []>, tensor<string, []>>({{"coremlc-component-MIL", "3510.2.1"}, {"coremltools-version", "9.0"}})]
{
    func main<ios16>(tensor<fp16, [1,4,1,8]> x) {
        tensor<string, []> pt = const()[name=tensor<string, []>("pt"), val=tensor<string, []>("valid")];
        tensor<int32, [2]> st = const()[name=tensor<string, []>("st"), val=tensor<int32, [2]>([1,1])];
        tensor<int32, [4]> pd = const()[name=tensor<string, []>("pd"), val=tensor<int32, [4]>([0,0,0,0])];
        tensor<int32, []> gr = const()[name=tensor<string, []>("gr"), val=tensor<int32, []>(1)];
        tensor<fp16, [2,4,1,1]> W = const()[name=tensor<string, []>("W"), val=tensor<fp16, [2,4,1,1]>(BLOBFILE(path=tensor<string, []>("@model_path/weights/weight.bin"), offset=tensor<uint64, []>(64)))];
        tensor<fp16, [1,2,1,8]> y = conv(dilations=st, groups=gr, pad=pd, pad_type=pt, strides=st, weight=W, x=x)[name=tensor<string, []>("cv")];
    } -> (y);
}"""
    for content in (
        bytes(blob),
        {"weight.bin": bytes(blob)},
        {"@model_path/weights/weight.bin": bytes(blob)},
    ):
        program = parse_program(text, content)
        assert (program.version, program.main.opset) == ("1.0", "ios16")
        assert program.attributes[1] == ("coremltools-version", "9.0")
        (conv,) = program.main.ops
        weights = conv.arg("weight")
        assert isinstance(weights, Literal)
        assert weights.data == weight.tobytes()
        assert conv.arg("groups") == literal(1, "int32")
        assert parse_program(*print_program(program)) == program


def test_statements_without_attributes_and_decimal_numbers() -> None:
    """maderix/ANE's training kernels leave the brackets out; Orion writes numbers as C's %g does."""
    body = """fp16 e = const()[name=string("e"), val=fp16(1e-05)];
        tensor<int32, [1]> ax = const()[name=string("ax"), val=tensor<int32, [1]>([1])];
        bool kd = const()[name=string("kd"), val=bool(true)];
        tensor<fp16, [1,4]> sq = mul(x=x,y=x);
        tensor<fp16, [1,1]> ss = reduce_sum(x=sq,axes=ax,keep_dims=kd);
        tensor<fp16, [1,1]> se = add(x=ss,y=e);
        tensor<fp16, [1,1]> r = pow(x=se,y=fp16(-0.5));
        tensor<fp16, [1,4]> silu = mul(x=x,y=r);
        tensor<fp16, [1,8]> y = concat(axis=int32(1),interleave=bool(false),values=(silu,x));"""
    program = parse_program(wrap(body))
    kinds = ["mul", "reduce_sum", "add", "pow", "mul", "concat"]
    assert [op.kind for op in program.main.ops] == kinds
    assert program.main.ops[2].arg("y") == literal(1e-5, "fp16")
    assert parse_program(*print_program(program)) == program


def test_states_several_functions_and_function_attributes() -> None:
    text = """program(1.3) // a comment
    {
      func write<ios18>(state<tensor<fp16, [2, 4]>> cache, tensor<fp16, [2, 4]> x)
        [FlexibleShapeInformation = tuple<tuple<string, dict<string, tensor<int32, [?]>>>>((("DefaultShapes", {{"x", [2, 4]}})))] {
        tensor<fp16, [2, 4]> old = read_state(input = cache)[name = string("old")];
        tensor<fp16, [2, 4]> sum = add(x = old, y = x)[name = string("sum")];
        write_state(data = sum, input = cache)[name = string("w")];
      } -> (sum); /* the second
      one */
      func main<ios18>(tensor<fp16, [3]> x) { tensor<fp16, [3]> y = relu(x = x)[name = string("y")]; } -> (y, x);
    }"""
    program = parse_program(text)
    assert [f.name for f in program.functions] == ["write", "main"]
    assert program.main.name == "main"
    assert program.functions[0].inputs[0].type == TensorType("fp16", (2, 4), state=True)
    assert [op.kind for op in program.functions[0].ops] == ["read_state", "add", "write_state"]
    assert program.functions[0].ops[2].results == ()
    assert parse_program(*print_program(program)) == program


@pytest.mark.parametrize(
    ("written", "value"),
    [("0x1.8p+1", 3.0), ("3", 3.0), ("3.0", 3.0), ("-2.5e-1", -0.25), ("0X1P-24", 2.0**-24), ("1e9", np.inf),
     ("-inf", -np.inf), ("0x1p+99999", np.inf), (".5", 0.5), ("0x1.1999999999998p+3", 8.796875)],
)  # fmt: skip
def test_number_spellings(written: str, value: float) -> None:
    program = parse_program(
        wrap(f'tensor<fp16, [1, 4]> y = add(x = x, y = fp16({written}))[name = string("y")];')
    )
    assert program.main.ops[0].arg("y") == literal(value, "fp16")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("tensor<fp16, [1, 4]> y = frobnicate(x = x)[];", "line 4, column 30: frobnicate: needs a known MIL op"),
        ("tensor<fp16, [1, 4]> y = reelu(x = x)[];", "Did you mean relu"),
        ("tensor<fp16, [1, 4]> y = relu(x = z)[];", "line 4, column 39: needs a value that is defined above; got z"),
        ("tensor<fp16, [1, 5]> y = relu(x = x)[];", r"needs the result type fp16\[1,4\]; got fp16\[1,5\]"),
        ("tensor<fp32, [1, 4]> y = relu(x = x)[];", "needs the result type"),
        ("tensor<fp16, [1, 4]> x = relu(x = x)[];", "needs each name once; got x again"),
        ("tensor<fp16, [1, 4]> y = relu(x = x, x = x)[];", "needs each parameter once"),
        ("tensor<fp16, [1, 4]> y = relu(x = x, q = x)[];", "got q"),
        ("tensor<fp16, [1, 4]> y = relu()[];", "it is missing"),
        ("tensor<fp16, [1, 4]> y = softmax(axis = x, x = x)[];", "axis needs a constant"),
        ("tensor<fp16, [1, ?]> y = relu(x = x)[];", "static shapes"),
        ("tensor<fp16, [1, 4]> y = relu(x = x)[] relu", "needs `;`"),
        ("tensor<fp16, [1, 4]> y = add(x = x, y = 1.0)[];", "needs a value or a typed constant"),
        ("tensor<fp16, [1, 4]> y = add(x = x, y = int8(128))[];", "needs an integer from -128 to 127"),
        ("tensor<fp16, [1, 4]> y = add(x = x, y = fp16(true))[];", "needs a number"),
        ("tensor<fp16, [1, 4]> y = add(x = x, y = tensor<fp16, [2]>([1, 2, 3]))[];", "needs 2 values"),
        ("tensor<fp16, [1, 4]> y = add(x = x, y = tensor<fp16, [2, 2]>([[1, 2, 3], [4]]))[];", "needs 2 items"),
        ("tensor<fp16, [4]> y = add(x = x, y = tensor<fp16, [4]>(BLOBFILE(path = string(\"w\"), offset = uint64(64))))[];",
         "needs the content of w"),
        ("tensor<fp16, [1, 4]> y = relu(x = \"x)[];", "an unfinished string"),
        ("tensor<fp16, [1, 4]> y = relu(x = $)[];", "'\\$'"),
    ],
)  # fmt: skip
def test_refusals_name_the_place(body: str, words: str) -> None:
    with pytest.raises(ProgramError, match=words) as caught:
        parse_program(wrap(body))
    assert "line 4, column " in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "program", "program(1.3)", "program(1.3) {", "program(1.3) {}", "program(1.3) { func", "\0", "]"],
)
def test_refuses_unfinished_texts(text: str) -> None:
    with pytest.raises(ProgramError):
        parse_program(text)


def test_a_weight_of_another_size_is_refused() -> None:
    blob = BlobWriter()
    blob.add(from_array(np.ones(4, np.float16)))
    body = 'tensor<fp16, [1, {0}]> y = const()[val = tensor<fp16, [1, {0}]>(BLOBFILE(path = string("w"), offset = uint64(64)))];'
    assert parse_program(wrap(body.format(4)), blob.finish()).main.ops[0].kind == "const"
    with pytest.raises(ProgramError, match=r"line 4, column .*needs 10 bytes"):
        parse_program(wrap(body.format(5)), blob.finish())


@pytest.mark.parametrize(
    "bulk",
    [
        "[" * 200_000, "(" * 200_000, "state<" * 100_000, "/*" * 100_000, '"\\' * 100_000, "9" * 200_000, "a" * 200_000,
        "-" * 200_000, "0x" * 100_000, "tensor<" * 100_000, "x = (" * 60_000, "program(1.3) [" + "{" * 200_000,
    ],
)  # fmt: skip
def test_deep_and_long_texts_are_refused_quickly(bulk: str) -> None:
    for text in (
        bulk,
        f"program(1.3) {{ func main<ios18>() {{ {bulk}",
        wrap(f"tensor<fp16, [1, 4]> y = relu(x = {bulk}"),
    ):
        start = time.process_time()
        with pytest.raises(ProgramError):
            parse_program(text)
        assert time.process_time() - start < 5


def test_numbers_do_not_ask_for_memory() -> None:
    huge = "tensor<fp16, [2147483647]>"
    for body in (
        f"{huge} y = split(axis = int32(0), num_splits = int32(2147483647), x = x)[];",
        f"{huge} y = tile(reps = tensor<int32, [1]>([2147483647]), x = x)[];",
        f"{huge} y = fill(shape = tensor<int32, [2]>([2147483647, 2147483647]), value = fp16(0))[];",
        f'{huge} y = const()[val = {huge}(BLOBFILE(path = string("w"), offset = uint64(0)))];',
        f"{huge} y = const()[val = {huge}([0])];",
    ):
        with pytest.raises(ProgramError):
            parse_program(wrap(body, inputs=f"{huge} x"), bytes(1000))


def test_time_is_linear_in_length() -> None:
    def seconds(count: int) -> float:
        lines = "\n".join(
            f'tensor<fp16, [1, 4]> a{i} = relu(x = x)[name = string("a{i}")];' for i in range(count)
        )
        text = wrap(lines, outputs="a0")
        start = time.process_time()
        parse_program(text)
        return time.process_time() - start

    seconds(100)
    assert seconds(8000) < 8 * 4 * max(seconds(1000), 0.01)
