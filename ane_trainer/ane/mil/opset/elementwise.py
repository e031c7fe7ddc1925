"""Type rules of the pointwise ops: one input keeps its type, two or three broadcast."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import broadcast
from ane_trainer.ane.mil.program import TensorType


@rule("abs exp2 sign square", tensor("x"), dtypes="x:FI", family="unary")
@rule(
    "acos asin atan atanh ceil cos cosh erf exp floor relu relu6 round sigmoid silu sin sinh softsign"
    " softplus sqrt tan tanh",
    tensor("x"),
    dtypes="x:F",
    family="unary",
)
@rule("identity", tensor("x"), family="view")
def unary(call: Call) -> tuple[TensorType, ...]:
    """One input, whose type the result has."""
    return (call.type("x"),)


@rule("rsqrt", tensor("x"), const("epsilon", "fp16", 1e-12), dtypes="x:F epsilon:F", family="unary")
@rule("inverse", tensor("x"), const("epsilon", "fp16", 1e-4), dtypes="x:F epsilon:F", family="unary")
@rule("log", tensor("x"), const("epsilon", "fp16", 1e-45), dtypes="x:F epsilon:F", family="unary")
def unary_epsilon(call: Call) -> tuple[TensorType, ...]:
    """As `unary`; epsilon is added before the function."""
    return (call.type("x"),)


@rule("gelu", tensor("x"), const("mode", "string", "EXACT"), dtypes="x:F", family="unary")
def gelu(call: Call) -> tuple[TensorType, ...]:
    """`mode` names one of three formulas."""
    modes = ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    if call.text("mode") not in modes:
        raise call.refuse(f"mode needs one of {', '.join(modes)}; got {call.text('mode')!r}")
    return (call.type("x"),)


@rule(
    "leaky_relu elu thresholded_relu",
    tensor("x"),
    const("alpha", "fp16"),
    dtypes="x:F alpha:F",
    family="unary",
)
@rule("threshold", tensor("x"), const("alpha", "fp16"), dtypes="x:FI.T alpha:FI.T", family="unary")
def unary_alpha(call: Call) -> tuple[TensorType, ...]:
    """One input and one number."""
    return (call.type("x"),)


@rule(
    "clip",
    tensor("x"),
    const("alpha", "fp16"),
    const("beta", "fp16"),
    dtypes="x:F.T alpha:F.T beta:F.T",
    family="unary",
)
@rule(
    "clamped_relu linear_activation scaled_tanh sigmoid_hard",
    tensor("x"),
    const("alpha", "fp16"),
    const("beta", "fp16"),
    dtypes="x:F alpha:F.U beta:F.U",
    family="unary",
)
def unary_alpha_beta(call: Call) -> tuple[TensorType, ...]:
    """One input and two numbers; `clip` needs alpha below beta."""
    if call.op.kind == "clip" and call.number("alpha") >= call.number("beta"):
        raise call.refuse(
            f"alpha needs a number below beta; got {call.number('alpha')}, {call.number('beta')}"
        )
    return (call.type("x"),)


@rule("prelu", tensor("x"), const("alpha", "fp16"), dtypes="x:F alpha:F")
def prelu(call: Call) -> tuple[TensorType, ...]:
    """alpha has one slope per channel (axis 1).

    coremltools asks for equal slopes at ranks 3 and 5. ANEForge 0.4.0 (`Tensor.prelu`) hands the engine's own
    compiler any slopes from rank 3 on, so that text with them is read.
    """
    x, alpha = call.type("x"), call.type("alpha")
    if not 3 <= x.rank <= 5 or alpha.shape != (x.shape[1],):
        raise call.refuse(f"alpha needs one number per channel of a rank 3 to 5 input; got {alpha} for {x}")
    return (x,)


@rule(
    "softplus_parametric",
    tensor("x"),
    const("alpha", "fp16"),
    const("beta", "fp16"),
    dtypes="x:F alpha:F.U beta:F.U",
)
def softplus_parametric(call: Call) -> tuple[TensorType, ...]:
    """alpha and beta have one number per channel (axis 1)."""
    x, alpha, beta = call.type("x"), call.type("alpha"), call.type("beta")
    if x.rank < 3 or not alpha.shape == beta.shape == (x.shape[1],):
        raise call.refuse(f"alpha and beta need one number per channel of {x}; got {alpha} and {beta}")
    return (x,)


@rule(
    "add sub mul real_div floor_div maximum minimum mod pow",
    tensor("x"),
    tensor("y"),
    dtypes="x:FI.T y:FI.T",
    family="binary",
)
def binary(call: Call) -> tuple[TensorType, ...]:
    """Two inputs of one dtype that broadcast."""
    x, y = call.type("x"), call.type("y")
    if x.dtype != y.dtype:
        raise call.refuse(f"needs x and y of one dtype; got {x.dtype} and {y.dtype}")
    return (TensorType(x.dtype, broadcast(call, x.shape, y.shape)),)


@rule(
    "equal not_equal greater greater_equal less less_equal",
    tensor("x"),
    tensor("y"),
    dtypes="x:FI.T y:FI.T",
    family="binary",
)
def comparison(call: Call) -> tuple[TensorType, ...]:
    """As `binary`, with a bool result."""
    return (TensorType("bool", binary(call)[0].shape),)


@rule(
    "logical_and logical_or logical_xor",
    tensor("x", "bool"),
    tensor("y", "bool"),
    dtypes="x:bool y:bool",
    family="binary",
)
def logical(call: Call) -> tuple[TensorType, ...]:
    """As `binary`, on bool."""
    return binary(call)


@rule("logical_not", tensor("x", "bool"), dtypes="x:bool", family="unary")
def logical_not(call: Call) -> tuple[TensorType, ...]:
    """A bool input keeps its type."""
    return (call.type("x"),)


@rule(
    "select",
    tensor("cond", "bool"),
    tensor("a"),
    tensor("b"),
    dtypes="cond:bool a:FIB.T b:FIB.T",
    family="select",
)
def select(call: Call) -> tuple[TensorType, ...]:
    """MIL's `select` does not broadcast a against b beyond scalars; cond, a and b have one shape."""
    cond, a, b = call.type("cond"), call.type("a"), call.type("b")
    if cond.dtype != "bool":
        raise call.refuse(f"cond needs bool; got {cond.dtype}")
    if a.dtype != b.dtype:
        raise call.refuse(f"needs a and b of one dtype; got {a.dtype} and {b.dtype}")
    return (TensorType(a.dtype, broadcast(call, cond.shape, a.shape, b.shape)),)


@rule("cast", tensor("x"), const("dtype", "string"), dtypes="x:ALL", family="movement")
def cast(call: Call) -> tuple[TensorType, ...]:
    """x's shape with another dtype."""
    dtype, known = call.text("dtype"), call.op.domains["x"].dtypes
    if dtype not in known:
        raise call.refuse(f"dtype needs one of {', '.join(known)}; got {dtype!r}")
    return (TensorType(dtype, call.type("x").shape),)
