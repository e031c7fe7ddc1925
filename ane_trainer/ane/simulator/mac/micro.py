"""LLVM IR of the inner loops of the Q15.16 multiply-accumulate: one tile of the result over one panel of k.

Law (M6 notes/numerics.md; reproduces ANEForge's published GEMM errors on M1..M5): every product is
rounded half away from zero to a multiple of 2^-16 and added to a signed 32-bit accumulator; a product
whose exponents sum to -17 or less is dropped.

How one fused multiply-add per product does it. Operand a is scaled by 2^16, so products count in units of
the last place. The accumulator is the float M + n with M = 1.5 * 2^23 and n the integer sum so far: as
long as |n| < 2^22 its unit in the last place is 1, so `fma(a, b, M + n)` rounds the exact product to an
integer and adds it, at once. The machine rounds ties to even; b is therefore stored one float32 step
further from zero. A product is p = j * 2^q with an integer |j| < 2^22 (two 11-bit significands), and the
step adds at most |p| * 2^-23 < 2^q / 2 to its magnitude: an exact tie (q < 0) goes outward, as the law
wants, and nothing else reaches or crosses a tie, the nearest being 2^q away (or 1/2 where q >= 0, and
|p| < 2^22 there). `narrow` does this in float32 and empties its accumulators into integers before |n|
can reach 2^22; `wide` in float64 (M = 1.5 * 2^52), where a panel of any operands stays in range. Sums
modulo 2^32 are order-free, so panels may be cut and mixed at will.

The drop rule: exp(a) + exp(b) >= -16 iff |b| >= 2^(-16 - exp(a)), a threshold stored beside each a
(0 where every b passes, as subnormals count as exponent -14); one compare masks the multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

from ane_trainer.ane.simulator.loops.ir import Function, constant, vector_constant

NARROW_BITS = 0x4B400000  # float32 1.5 * 2^23
WIDE_BITS = 0x4338000000000000  # float64 1.5 * 2^52


@dataclass(frozen=True)
class Tile:
    """Register block: `rows` x (`vectors` * `lanes`) results; `lanes` float32 per vector register.

    Packed a holds per k `padded_rows` scaled values, then as many thresholds; packed b `columns` values.
    `masks`: the CPU has mask registers, so a masked multiply-add is one instruction.
    """

    lanes: int
    rows: int
    padded_rows: int
    vectors: int
    masks: bool

    @property
    def columns(self) -> int:
        """Columns of the result in one tile."""
        return self.lanes * self.vectors


def tile_for(lanes: int) -> Tile:
    """The register block for vectors of 16 (AVX-512), 8 (AVX2) or 4 (NEON, SSE) float32 lanes."""
    if lanes == 16:
        return Tile(16, rows=12, padded_rows=16, vectors=2, masks=True)
    if lanes == 8:
        return Tile(8, rows=4, padded_rows=4, vectors=2, masks=False)
    return Tile(4, rows=4, padded_rows=4, vectors=4, masks=False)


_PARAMETERS = [("ptr", "a"), ("ptr", "b"), ("ptr", "c"), ("i64", "depth")]


def narrow(tile: Tile, *, drop: bool) -> str:
    """`c[rows][columns]` i32 += sums of `depth` products in float32, which must stay below 2^22 units."""
    f = Function("narrow_drop" if drop else "narrow", _PARAMETERS, internal=True)
    lanes, vector = tile.lanes, f"<{tile.lanes} x float>"
    start = vector_constant("float", constant(1.5 * 2**23), lanes)
    sums = {(r, v): f.variable(vector, start) for r in range(tile.rows) for v in range(tile.vectors)}
    with f.loop("0", "%depth") as k:
        a_row = f.element("float", "%a", f.mul(k, str(2 * tile.padded_rows)))
        b_row = f.element("float", "%b", f.mul(k, str(tile.columns)))
        bs = [f.load(vector, f.element("float", b_row, str(v * lanes))) for v in range(tile.vectors)]
        sizes = [f.op(f"call {vector} @llvm.fabs.v{lanes}f32({vector} {b})") for b in bs] if drop else []
        for r in range(tile.rows):
            a = f.splat("float", f.load("float", f.element("float", a_row, str(r))), lanes)
            place = f.element("float", a_row, str(tile.padded_rows + r))
            least = f.splat("float", f.load("float", place), lanes) if drop else ""
            for v in range(tile.vectors):
                keep = f.op(f"fcmp oge {vector} {sizes[v]}, {least}") if drop else ""
                _multiply_add(f, tile, vector, f"v{lanes}f32", a, bs[v], sums[r, v], keep)
    integers = f"<{lanes} x i32>"
    for (r, v), slot in sums.items():
        bits = f.op(f"bitcast {vector} {f.load(vector, slot, 1)} to {integers}")
        count = f.op(f"sub {integers} {bits}, {vector_constant('i32', str(NARROW_BITS), lanes)}")
        _add_to(f, integers, count, r * tile.columns + v * lanes)
    return f.text()


def wide(tile: Tile) -> str:
    """Tile += panel in float64, for products of any size; rows in two halves."""
    f = Function("wide", _PARAMETERS, internal=True)
    lanes = tile.lanes // 2
    narrow_vector, vector = f"<{lanes} x float>", f"<{lanes} x double>"
    columns = range(0, tile.columns, lanes)
    half = tile.rows // 2
    with f.loop("0", str(tile.rows), str(half)) as top:
        start = vector_constant("double", constant(1.5 * 2**52), lanes)
        sums = {(r, c): f.variable(vector, start) for r in range(half) for c in columns}
        with f.loop("0", "%depth") as k:
            a_row = f.element("float", "%a", f.add(f.mul(k, str(2 * tile.padded_rows)), top))
            b_row = f.element("float", "%b", f.mul(k, str(tile.columns)))
            bs = {c: f.load(narrow_vector, f.element("float", b_row, str(c))) for c in columns}
            sizes = {
                c: f.op(f"call {narrow_vector} @llvm.fabs.v{lanes}f32({narrow_vector} {bs[c]})")
                for c in columns
            }
            doubles = {c: _nudge_wide(f, bs[c], lanes) for c in columns}
            for r in range(half):
                scalar = f.op(f"fpext float {f.load('float', f.element('float', a_row, str(r)))} to double")
                a = f.splat("double", scalar, lanes)
                place = f.element("float", a_row, str(tile.padded_rows + r))
                least = f.splat("float", f.load("float", place), lanes)
                for c in columns:
                    keep = f.op(f"fcmp oge {narrow_vector} {sizes[c]}, {least}")
                    _multiply_add(f, tile, vector, f"v{lanes}f64", a, doubles[c], sums[r, c], keep)
        _empty_wide(f, tile, sums, top)
    return f.text()


def _empty_wide(f: Function, tile: Tile, sums: dict[tuple[int, int], str], top: str) -> None:
    lanes = tile.lanes // 2
    first = f.mul(top, str(tile.columns))
    for (r, c), slot in sums.items():
        value = f.load(f"<{lanes} x double>", slot, 1)
        bits = f.op(f"bitcast <{lanes} x double> {value} to <{lanes} x i64>")
        count = f.op(f"sub <{lanes} x i64> {bits}, {vector_constant('i64', str(WIDE_BITS), lanes)}")
        low = f.op(f"trunc <{lanes} x i64> {count} to <{lanes} x i32>")
        _add_to(f, f"<{lanes} x i32>", low, f.add(first, str(r * tile.columns + c)))


def _nudge_wide(f: Function, packed: str, lanes: int) -> str:
    """Float64 of a packed b: the step away from zero (bit 29 of the double) becomes a float64 step."""
    longs = f"<{lanes} x i64>"
    double = f.op(f"fpext <{lanes} x float> {packed} to <{lanes} x double>")
    bits = f.op(f"bitcast <{lanes} x double> {double} to {longs}")
    step = f.op(f"and {longs} {bits}, {vector_constant('i64', str(1 << 29), lanes)}")
    clean = f.op(f"xor {longs} {bits}, {step}")
    one = f.op(f"lshr {longs} {step}, {vector_constant('i64', '29', lanes)}")
    return f.op(f"bitcast {longs} {f.op(f'or {longs} {clean}, {one}')} to <{lanes} x double>")


def _multiply_add(
    f: Function, tile: Tile, vector: str, suffix: str, a: str, b: str, slot: str, keep: str
) -> None:
    """sum = fma(a, b, sum) where `keep` (everywhere if empty)."""
    lanes = vector[1 : vector.index(" ")]
    total = f.load(vector, slot, 1)
    if keep and not tile.masks:
        b = f.op(f"select <{lanes} x i1> {keep}, {vector} {b}, {vector} zeroinitializer")
    result = f.op(f"call {vector} @llvm.fma.{suffix}({vector} {a}, {vector} {b}, {vector} {total})")
    if keep and tile.masks:
        result = f.op(f"select <{lanes} x i1> {keep}, {vector} {result}, {vector} {total}")
    f.store(vector, result, slot, 1)


def _add_to(f: Function, kind: str, value: str, index: str | int) -> None:
    place = f.element("i32", "%c", str(index))
    f.store(kind, f.op(f"add {kind} {f.load(kind, place)}, {value}"), place)
