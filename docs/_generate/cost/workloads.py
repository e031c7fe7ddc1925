"""Published benchmark programs from a text of a word and integers, as ANEForge 0.4.0 and others emit them.

Weights have a type and no payload. `tests/docs/test_cost_model.py` holds the op sequences against the
installed ANEForge's emitter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Program, TensorType, Value, literal

Shape = tuple[int, ...]


class Graph:
    """A program in the making; `weights` is fp16, int8, int4 (one LUT a tensor) or sparse."""

    def __init__(self, weights: str = "fp16") -> None:
        self.ops: list[Op] = []
        self.inputs: list[Value] = []
        self.weights = weights

    def input(self, *shape: int) -> Value:
        self.inputs.append(Value(f"x{len(self.inputs)}", TensorType("fp16", shape)))
        return self.inputs[-1]

    def op(self, kind: str, shape: Shape, **args: Arg) -> Value:
        result = Value(f"t{len(self.ops)}", TensorType("fp16", shape))
        self.ops.append(Op(kind, tuple(args.items()), (result,)))
        return result

    def weight(self, *shape: int) -> Arg:
        """A constant of a contraction, encoded as the program's weights are."""
        if self.weights == "int8":
            data = Literal(TensorType("int8", shape), b"")
            return self.op("constexpr_affine_dequantize", shape, quantized_data=data)
        if self.weights == "int4":
            index = Literal(TensorType("uint4", shape), b"")
            return self.op("constexpr_lut_to_dense", shape, indices=index, lut=constant(16))
        if self.weights == "sparse":  # two thirds zero, as published
            size = TensorType("fp16", shape).size
            mask = Literal(TensorType("uint1", shape), b"")
            return self.op("constexpr_sparse_to_dense", shape, nonzero_data=constant(size // 3), mask=mask)
        return constant(*shape)

    def program(self, *outputs: Value) -> Program:
        return Program((Function("main", tuple(self.inputs), tuple(self.ops), outputs),))

    # --- layers as ANEForge writes them ---

    def linear(self, x: Value, n: int, bias: bool = False) -> Value:
        shape = (*x.type.shape[:-1], n)
        weight = self.weight(n, x.type.shape[-1])
        y = self.op("matmul", shape, x=x, y=weight, transpose_y=literal(True, "bool"))
        return self.op("add", shape, x=y, y=constant(1, n)) if bias else y

    def conv(self, x: Value, channels: int, kernel: int, stride: int = 1, bias: bool = False) -> Value:
        batch, fan_in, height, width = x.type.shape
        shape = (batch, channels, -(-height // stride), -(-width // stride))
        strides = literal((stride, stride), "int32")
        weight = self.weight(channels, fan_in, kernel, kernel)
        y = self.op("conv", shape, x=x, weight=weight, strides=strides, groups=literal(1, "int32"))
        return self.op("add", shape, x=y, y=constant(1, channels, 1, 1)) if bias else y

    def unary(self, kind: str, x: Value) -> Value:
        return self.op(kind, x.type.shape, x=x)

    def binary(self, kind: str, x: Value, y: Value | Literal) -> Value:
        shape = x.type.shape if x.type.size >= y.type.size else y.type.shape
        return self.op(kind, shape, x=x, y=y)

    def reduce(self, kind: str, x: Value, *axes: int) -> Value:
        shape = tuple(1 if axis in axes else extent for axis, extent in enumerate(x.type.shape))
        return self.op(kind, shape, x=x, axes=literal(axes, "int32"), keep_dims=literal(True, "bool"))

    def layer_norm(self, x: Value) -> Value:
        last = x.type.rank - 1
        centred = self.binary("sub", x, self.reduce("reduce_mean", x, last))
        spread = self.reduce("reduce_mean", self.binary("mul", centred, centred), last)
        root = self.unary("rsqrt", self.binary("add", spread, constant(1)))
        scaled = self.binary("mul", self.binary("mul", centred, root), constant(1, x.type.shape[-1]))
        return self.binary("add", scaled, constant(1, x.type.shape[-1]))

    def l2_norm(self, x: Value) -> Value:
        norm = self.binary("maximum", self.reduce("reduce_l2_norm", x, x.type.rank - 1), constant(1))
        return self.binary("real_div", x, norm)

    def rms_norm(self, x: Value) -> Value:
        return self.binary("mul", self.l2_norm(x), constant(1, x.type.shape[-1]))

    def group_norm(self, x: Value, groups: int = 32) -> Value:
        batch, channels, height, width = x.type.shape
        shape = (batch, groups, channels // groups, height * width)
        grouped = self.op("reshape", shape, x=x)
        centred = self.binary("sub", grouped, self._group_mean(grouped))
        spread = self.binary("add", self._group_mean(self.binary("mul", centred, centred)), constant(1))
        scaled = self.binary("mul", centred, self.unary("rsqrt", spread))
        back = self.op("reshape", x.type.shape, x=scaled)
        gain = self.binary("mul", back, constant(1, channels, 1, 1))
        return self.binary("add", gain, constant(1, channels, 1, 1))

    def _group_mean(self, x: Value) -> Value:
        total = self.reduce("reduce_sum", self.reduce("reduce_sum", x, 3), 2)
        return self.binary("mul", total, constant(1))

    def heads(self, x: Value, rows: Shape, heads: int) -> Value:
        """[rows..., D] to [B, H, S, D/H] (no B for rank 2)."""
        depth = x.type.shape[-1] // heads
        split = self.op("reshape", (*rows, heads, depth), x=x)
        return self.op("transpose", (*rows[:-1], heads, rows[-1], depth), x=split)

    def attention(self, x: Value, rows: Shape, heads: int) -> Value:
        """Self-attention with its four projections; `rows` is (S,) or (B, S)."""
        width = x.type.shape[-1]
        q, k, v = (self.heads(self.linear(x, width, True), rows, heads) for _ in range(3))
        lead, depth = q.type.shape[:-1], q.type.shape[-1]
        k = self.op("transpose", (*lead[:-1], depth, lead[-1]), x=k)
        scores = self.op("matmul", (*lead, lead[-1]), x=q, y=k)
        weights = self.unary("softmax", self.binary("mul", scores, constant(1)))
        mixed = self.op("matmul", (*lead, depth), x=weights, y=v)
        turned = self.op("transpose", (*rows, heads, depth), x=mixed)
        return self.linear(self.op("reshape", x.type.shape, x=turned), width, True)

    def feed_forward(self, x: Value, hidden: int) -> Value:
        return self.linear(self.unary("gelu", self.linear(x, hidden, True)), x.type.shape[-1], True)


def constant(*shape: int) -> Literal:
    return Literal(TensorType("fp16", shape), b"")


# --- single ops ---


def gemm(g: Graph, m: int, k: int, n: int) -> Value:
    return g.linear(g.input(m, k), n)


def gemm_batched(g: Graph, b: int, m: int, k: int, n: int) -> Value:
    return g.linear(g.input(b, m, k), n)


def conv(g: Graph, b: int, c: int, h: int, k: int, stride: int) -> Value:
    return g.conv(g.input(b, c, h, h), c, k, stride)


def pointwise_conv(g: Graph, fan_in: int, channels: int, positions: int) -> Value:
    return g.conv(g.input(1, fan_in, 1, positions), channels, 1)


def unary(kind: str) -> Callable[..., Value]:
    return lambda g, *shape: g.unary(kind, g.input(*shape))


def reduce_sum(g: Graph, r: int, c: int) -> Value:
    return g.reduce("reduce_sum", g.input(r, c), 1)


def layer(name: str) -> Callable[..., Value]:
    return lambda g, *shape: getattr(g, name)(g.input(*shape))


def max_pool(g: Graph, *shape: int) -> Value:
    small = (*shape[:2], shape[2] // 2, shape[3] // 2)
    return g.op("max_pool", small, x=g.input(*shape), kernel_sizes=literal((2, 2), "int32"))


def pixel_shuffle(g: Graph, b: int, c: int, h: int, w: int) -> Value:
    return g.op("pixel_shuffle", (b, c // 4, h * 2, w * 2), x=g.input(b, c, h, w))


# --- several ops ---


def conv_stack(g: Graph, b: int, c: int, h: int, k: int, depth: int) -> Value:
    y = g.input(b, c, h, h)
    for _ in range(depth):
        y = g.unary("relu", g.conv(y, c, k))
    return y


def pointwise_stack(g: Graph, c: int, positions: int, depth: int) -> Value:
    y = g.input(1, c, 1, positions)
    for _ in range(depth):
        y = g.conv(y, c, 1)
    return y


def pointwise_stack_w8a8(g: Graph, c: int, positions: int, depth: int) -> Value:
    """Convolutions between quantize and dequantize, as the int8 path wants them."""
    y, shape = g.input(1, c, 1, positions), (1, c, 1, positions)
    g.weights = "int8"
    for _ in range(depth):
        y = g.op("dequantize", shape, input=g.op("quantize", shape, input=y))
        y = g.conv(y, c, 1)
    return y


def stencil(g: Graph, h: int, steps: int) -> Value:
    y = g.input(1, 1, h, h)
    for _ in range(steps):
        y = g.conv(y, 1, 3)
    return y


def jacobi(g: Graph, n: int, iterations: int) -> Value:
    x, right, inverse = g.input(1, n), g.input(1, n), g.input(1, n)
    for _ in range(iterations):
        x = g.binary("mul", g.binary("sub", right, g.linear(x, n)), inverse)
    return x


def neck(g: Graph, c: int, h: int) -> Value:
    y = g.group_norm(g.conv(g.input(1, c, h, h), c, 1))
    return g.unary("gelu", g.unary("gelu", y))


def vision(g: Graph, b: int) -> Value:
    y = g.input(b, 16, 32, 32)
    for _ in range(6):
        y = g.unary("relu", g.conv(y, 64, 3))
    return g.linear(g.op("reshape", (b, 64), x=g.reduce("reduce_mean", y, 2, 3)), 100)


# --- transformer blocks and models ---


def attention(g: Graph, s: int, d: int, heads: int) -> Value:
    return g.attention(g.input(s, d), (s,), heads)


def attention_batched(g: Graph, b: int, s: int, d: int, heads: int) -> Value:
    return g.attention(g.input(b, s, d), (b, s), heads)


def encoder(g: Graph, b: int, s: int, d: int, heads: int) -> Value:
    """Pre-norm block; the norms work on [B*S, D], the rest on [B, S, D]."""
    x = g.input(b, s, d)

    def norm(y: Value) -> Value:
        flat = g.op("reshape", (b * s, d), x=y)
        return g.op("reshape", (b, s, d), x=g.layer_norm(flat))

    x = g.binary("add", x, g.attention(norm(x), (b, s), heads))
    return g.binary("add", x, g.feed_forward(norm(x), 4 * d))


def encoder_flat(g: Graph, b: int, s: int, d: int, heads: int) -> Value:
    """Pre-norm block wholly on [B*S, D] but for the attention scores."""
    x = g.op("reshape", (b * s, d), x=g.input(b, s, d))
    x = g.binary("add", x, g.attention(g.layer_norm(x), (b, s), heads))
    x = g.binary("add", x, g.feed_forward(g.layer_norm(x), 4 * d))
    return g.op("reshape", (b, s, d), x=x)


def minilm(g: Graph, s: int, layers: int, d: int, heads: int) -> Value:
    x = g.input(s, d)
    for _ in range(layers):
        x = g.layer_norm(g.binary("add", x, g.attention(x, (s,), heads)))
        x = g.layer_norm(g.binary("add", x, g.feed_forward(x, 4 * d)))
    return x


def vit(g: Graph, layers: int, d: int, heads: int) -> Value:
    image, token, place = g.input(1, 3, 224, 224), g.input(1, d), g.input(197, d)
    patches = g.conv(image, d, 16, 16, bias=True)
    flat = g.op("reshape", (1, d, 196), x=patches)
    rows = g.op("reshape", (196, d), x=g.op("transpose", (1, 196, d), x=flat))
    x = g.binary("add", g.op("concat", (197, d), values=(token, rows)), place)
    for _ in range(layers):
        x = g.binary("add", x, g.attention(g.layer_norm(x), (197,), heads))
        x = g.binary("add", x, g.feed_forward(g.layer_norm(x), 4 * d))
    turned = g.op("transpose", (d, 197), x=g.layer_norm(x))
    return g.linear(g.op("transpose", (1, d), x=g.linear(turned, 1)), 1000, True)


def resnet(g: Graph, depth: int) -> Value:
    """ResNet-18 or ResNet-50 at 224 x 224, batch 1, batch norm folded."""
    bottleneck = depth == 50
    x = g.unary("relu", g.conv(g.input(1, 3, 224, 224), 64, 7, 2, bias=True))
    x = g.op("max_pool", (1, 64, 56, 56), x=x, kernel_sizes=literal((3, 3), "int32"))
    for stage, blocks in enumerate((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)):
        for block in range(blocks):
            x = _residual(g, x, 64 * 2**stage, 2 if stage and not block else 1, bottleneck)
    width = x.type.shape[1]
    return g.linear(g.op("reshape", (1, width), x=g.reduce("reduce_mean", x, 2, 3)), 1000, True)


def _residual(g: Graph, x: Value, width: int, stride: int, bottleneck: bool) -> Value:
    out = width * 4 if bottleneck else width
    if bottleneck:
        y = g.unary("relu", g.conv(x, width, 1, bias=True))
        y = g.unary("relu", g.conv(y, width, 3, stride, bias=True))
        y = g.conv(y, out, 1, bias=True)
    else:
        y = g.conv(g.unary("relu", g.conv(x, width, 3, stride, bias=True)), out, 3, bias=True)
    same = stride == 1 and x.type.shape[1] == out
    return g.unary("relu", g.binary("add", y, x if same else g.conv(x, out, 1, stride, bias=True)))


def decode(g: Graph, b: int, d: int, layers: int, heads: int, hidden: int, cache_length: int) -> Program:
    """One token of a decoder with a KV cache as inputs and a vocabulary of 32,000 in two tiles."""
    depth, h = d // heads, g.input(b, d)
    for _ in range(layers):
        normed = g.rms_norm(h)
        q, k, v = (g.op("reshape", (b * heads, 1, depth), x=g.linear(normed, d)) for _ in range(3))
        keys, values = g.input(b * heads, depth, cache_length), g.input(b * heads, cache_length, depth)
        old = g.binary("mul", g.op("matmul", (b * heads, 1, cache_length), x=q, y=keys), constant(1))
        turned = g.op("transpose", (b * heads, depth, 1), x=k)
        own = g.binary("mul", g.op("matmul", (b * heads, 1, 1), x=q, y=turned), constant(1))
        scores = g.op("concat", (b * heads, 1, cache_length + 1), values=(old, own))
        full = g.op("concat", (b * heads, cache_length + 1, depth), values=(values, v))
        mixed = g.op("matmul", (b * heads, 1, depth), x=g.unary("softmax", scores), y=full)
        h = g.binary("add", h, g.linear(g.op("reshape", (b, d), x=mixed), d))
        normed = g.rms_norm(h)
        gate, up = g.unary("silu", g.linear(normed, hidden)), g.linear(normed, hidden)
        h = g.binary("add", h, g.linear(g.binary("mul", gate, up), d))
    h = g.rms_norm(h)
    return g.program(g.linear(h, 16384), g.linear(h, 32000 - 16384))


def mlp_step(g: Graph, rows: int, width: int, hidden: int, classes: int) -> Program:
    """Forward, cross-entropy, backward and Adam of a two-layer MLP, as ANEForge's resident training step."""
    shapes = ((width, hidden), (1, hidden), (hidden, classes), (1, classes))
    x, target, rate = g.input(rows, width), g.input(rows, classes), g.input(1, 1)
    params, *moments = ([g.input(*shape) for shape in shapes] for _ in range(3))

    def product(a: Value, b: Value) -> Value:
        return g.op("matmul", (a.type.shape[0], b.type.shape[1]), x=a, y=b)

    def turn(a: Value) -> Value:
        return g.op("transpose", a.type.shape[::-1], x=a)

    before = g.binary("add", product(x, params[0]), params[1])
    h = g.unary("gelu", before)
    scores = g.binary("add", product(h, params[2]), params[3])
    error = g.binary("mul", g.binary("sub", g.unary("softmax", scores), target), constant(1))
    half = g.binary(
        "mul", g.binary("add", g.unary("erf", g.binary("mul", before, constant(1))), constant(1)), constant(1)
    )
    bell = g.unary("exp", g.binary("mul", g.binary("mul", before, before), constant(1)))
    slope = g.binary("add", half, g.binary("mul", g.binary("mul", before, bell), constant(1)))
    inner = g.binary("mul", product(error, turn(params[2])), slope)
    gradients = (product(turn(x), inner), g.reduce("reduce_sum", inner, 0), product(turn(h), error),
                 g.reduce("reduce_sum", error, 0))  # fmt: skip
    updates = [
        _adam(g, *state, gradient, rate)
        for state, gradient in zip(zip(params, *moments, strict=True), gradients, strict=True)
    ]
    return g.program(*(value for update in updates for value in update))


def _adam(g: Graph, p: Value, m: Value, v: Value, gradient: Value, rate: Value) -> tuple[Value, Value, Value]:
    m = g.binary("add", g.binary("mul", m, constant(1)), g.binary("mul", gradient, constant(1)))
    square = g.binary("mul", g.binary("mul", gradient, gradient), constant(1))
    v = g.binary("add", g.binary("mul", v, constant(1)), square)
    step = g.binary("real_div", m, g.binary("add", g.unary("sqrt", v), constant(1)))
    return g.binary("sub", p, g.binary("mul", step, rate)), m, v


BUILDERS: dict[str, Callable[..., Value | Program]] = {
    "gemm": gemm, "gemm_batched": gemm_batched, "conv": conv, "pointwise_conv": pointwise_conv,
    "reduce_sum": reduce_sum, "max_pool": max_pool, "pixel_shuffle": pixel_shuffle,
    **{kind: unary(kind) for kind in ("relu", "gelu", "sigmoid", "softmax")},
    **{kind: layer(kind) for kind in ("layer_norm", "rms_norm", "l2_norm", "group_norm")},
    "conv_stack": conv_stack, "pointwise_stack": pointwise_stack, "pointwise_stack_w8a8": pointwise_stack_w8a8,
    "stencil": stencil, "jacobi": jacobi, "neck": neck, "vision": vision,
    "attention": attention, "attention_batched": attention_batched, "encoder": encoder,
    "encoder_flat": encoder_flat, "minilm": minilm, "vit": vit, "resnet": resnet, "decode": decode,
    "mlp_step": mlp_step,
}  # fmt: skip


@cache
def program(workload: str) -> Program:
    """The program of a workload text, e.g. `gemm 512 512 512` or `gemm 1 4096 4096 int8`."""
    word, *rest = workload.split()
    encoding = rest.pop() if rest and not rest[-1].isdigit() else "fp16"
    g = Graph(encoding)
    made = BUILDERS[word](g, *map(int, rest))
    return made if isinstance(made, Program) else g.program(made)
