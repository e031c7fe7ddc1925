"""Feeds the MIL parser mutated texts: whatever comes in, it gives a Program or a ProgramError, and soon.

    python -m tests.ane.mil.text.fuzz_parser --inputs 1000000 --seed 0     # or --seconds 60

Each input starts from a valid text of the corpus (this printer's, other writers' dialects) and gets a few
mutations: tokens swapped, dropped, doubled, spliced from another text, numbers replaced by extreme ones,
characters flipped, ends cut off, brackets nested. An accepted text must survive printing and parsing. Any
other exception, or more than `--limit` seconds for one input, is a failure: the input is written out.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, Program, TensorType
from ane_trainer.ane.mil.text.parser import parse_program
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.ane.mil.weights import from_array

Sample = tuple[str, bytes]

_TOKEN = re.compile(r'"[^"]*"|[A-Za-z_]\w*|[-+]?[\w.]+(?:p[-+]?\d+)?|\s+|.', re.DOTALL)
EXTREMES = (
    "0", "1", "-1", "2", "3", "5", "-2147483648", "2147483647", "2147483648", "4294967296", "9223372036854775807",
    "18446744073709551616", "1e999", "-0x1p-9999", "0x", "0x1p", "nan", "-inf", "1.5", ".", "99999999999999999999",
    "true", "false", "fp16", "bool", "int32", "uint4", "string", "tensor", "state", "BLOBFILE", "\"\"", "\"x", "?",
    "tensor<fp16, [2, 4]>", "tensor<int32, []>", "int32(1)", "(", ")", "[", "]", "{", "}", "<", ">", ",", ";", "=",
    "->", "x", "t0", "\0", "\u2028", "\ud800", "//", "/*", "*/", "\\", "[" * 60, "(" * 60, "tensor<" * 20,
)  # fmt: skip

DIALECT = """program(1.0)
[buildInfo = dict<tensor<string, []>, tensor<string, []>>({{"coremlc-version", "3505.4.1"}})] // old
{
    func main<ios16>(state<tensor<fp16, [2, 4]>> s, tensor<fp16, [2,4]> x) [Flexible = tuple<string>(("a"))] {
        tensor<string, []> m = const()[name=tensor<string, []>("m"), val=tensor<string, []>("EXACT")];
        tensor<fp16, [2,4]> h = read_state(input=s)[name=tensor<string, []>("h")];
        tensor<fp16, [2,4]> g = gelu(mode=m, x=h)[name=tensor<string, []>("g")];
        write_state(data=g, input=s)[name=tensor<string, []>("w")];
        tensor<fp16, [2,4]> q = constexpr_affine_dequantize()[axis=int32(0), name=string("q"),
          quantized_data=tensor<int8, [2,4]>([[1,2,3,4],[5,6,7,8]]), scale=fp16(0x1p-3), zero_point=int8(0)];
        tensor<fp16, [2,4]> y = add(x=g, y=q)[name=tensor<string, []>("y")];
    } -> (y, h);
    func other<ios18>(tensor<fp16, [4, 6]> x) {
        tensor<fp16, [4, 2]> a, tensor<fp16, [4, 4]> b = split(axis = int32(1),
          split_sizes = tensor<int32, [2]>([2, 4]), x = x)[name = string("s")];
    } -> (b, a);
}
"""


def corpus() -> list[Sample]:
    """Valid texts with their blobs: an MLP step's ops, convolution and pooling, moves, a mixed dialect."""
    return [(DIALECT, b""), *(print_program(Program((f,))) for f in (_dense(), _image(), _moves()))]


def _dense() -> Function:
    b = Builder()
    x, lr = b.input("x", TensorType("fp16", (4, 8))), b.input("lr", TensorType("fp16", (1, 1)))
    w = from_array(np.arange(24, dtype=np.float16).reshape(8, 3), name="w")
    y = b.op("softmax", x=b.op("gelu", x=b.op("matmul", x=x, y=w)), axis=-1)
    ok = b.op("less", x=y, y=0.5)
    z = b.op("select", cond=ok, a=b.op("mul", x=y, y=lr), b=y)
    return b.finish((b.op("reduce_sum", x=z, axes=[0], keep_dims=True), z))


def _image() -> Function:
    b = Builder()
    x = b.input("x", TensorType("fp16", (1, 4, 8, 8)))
    w = from_array(np.arange(72, dtype=np.uint8).reshape(2, 4, 3, 3) % 16, dtype="uint4")
    lut = from_array(np.arange(16, dtype=np.float16).reshape(1, 1, 1, 1, 16, 1))
    dense = b.op("constexpr_lut_to_dense", indices=w, lut=lut)
    y = b.op(
        "conv",
        x=x,
        weight=dense,
        strides=[2, 1],
        pad_type="custom",
        pad=[1, 1, 0, 2],
        dilations=[1, 1],
        groups=1,
    )
    z = b.op("max_pool", x=y, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True)
    return b.finish(
        (b.op("upsample_bilinear", x=z, scale_factor_height=2, scale_factor_width=2, align_corners=False),)
    )


def _moves() -> Function:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2, 3, 4)))
    y = b.op("transpose", x=b.op("reshape", x=x, shape=[4, 6]), perm=[1, 0])
    z = b.op("concat", values=(y, b.op("tile", x=y, reps=[1, 2])), axis=1, interleave=False)
    cut = b.op("slice_by_index", x=z, begin=[0, 1], end=[0, 9], stride=[2, 1], end_mask=[True, False])
    values, places = b.multi("topk", x=cut, k=2, axis=-1)
    return b.finish(
        (values, places, b.op("expand_dims", x=b.op("pad", x=cut, pad=[1, 0], mode="reflect"), axes=[0]))
    )


def mutate(rng: random.Random, words: list[str], tokens: list[list[str]]) -> str:
    """One to four mutations of the text `words`; `tokens` are the texts that pieces are taken from."""
    words = list(words)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(words) + 1)
        way = rng.randrange(8)
        if way == 0:
            words[at : at + rng.randint(1, 6)] = []
        elif way == 1:
            words[at:at] = words[at : at + rng.randint(1, 12)]
        elif way == 2:
            words[at : at + 1] = [rng.choice(EXTREMES)]
        elif way == 3:
            words.insert(at, rng.choice(EXTREMES))
        elif way == 4 and words:
            other = rng.randrange(len(words))
            at = min(at, len(words) - 1)
            words[at], words[other] = words[other], words[at]
        elif way == 5:
            donor = rng.choice(tokens)
            start = rng.randrange(len(donor))
            words[at : at + rng.randint(0, 9)] = donor[start : start + rng.randint(1, 30)]
        elif way == 6:
            words[at:] = [] if rng.random() < 0.2 else words[at:]
        else:
            text = "".join(words)
            spot = rng.randrange(len(text) + 1)
            return (
                text[:spot]
                + chr(rng.choice((rng.randrange(128), rng.randrange(0x110000))))
                + text[spot + 1 :]
            )
        if not words:
            break
    return "".join(words)


def check(text: str, blob: bytes) -> bool:
    """Parse one text; true when it was accepted (then it must survive printing and parsing)."""
    try:
        program = parse_program(text, blob)
    except ProgramError:
        return False
    try:
        again = parse_program(*print_program(program))
    except ProgramError as fault:
        if fault.code != "MIL104":  # a value named like a word of the language cannot be printed
            raise
        return True
    if again != program:
        raise AssertionError("an accepted text does not survive printing and parsing")
    return True


def run(
    inputs: int | None, seconds: float | None, seed: int, limit: float
) -> Iterator[tuple[int, int, float]]:
    """Fuzz; yields (inputs so far, accepted, slowest seconds) about once a second."""
    rng, samples = random.Random(seed), corpus()
    tokens = [_TOKEN.findall(text) for text, _ in samples]
    blobs = [blob for _, blob in samples]
    for text, blob in samples:
        assert check(text, blob), "the corpus has to be valid"
    start = shown = time.perf_counter()
    done, accepted, slowest = 0, 0, 0.0
    while (inputs is None or done < inputs) and (seconds is None or time.perf_counter() - start < seconds):
        which = rng.randrange(len(samples))
        text, blob = mutate(rng, tokens[which], tokens), blobs[which]
        began = time.perf_counter()
        try:
            accepted += check(text, blob)
        except BaseException:
            Path("fuzz_failure.mil").write_text(text, errors="surrogatepass")
            print(f"input {done} of seed {seed} fails; it is in fuzz_failure.mil", file=sys.stderr)
            raise
        took = time.perf_counter() - began
        done, slowest = done + 1, max(slowest, took)
        if took > limit:
            Path("fuzz_failure.mil").write_text(text, errors="surrogatepass")
            raise AssertionError(f"input {done} of seed {seed} took {took:.1f} s; it is in fuzz_failure.mil")
        if time.perf_counter() - shown > 1:
            shown = time.perf_counter()
            yield done, accepted, slowest
    yield done, accepted, slowest


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, help="stop after this many inputs")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0, help="largest time for one input, in seconds")
    options = parser.parse_args(arguments)
    if options.inputs is None and options.seconds is None:
        options.seconds = 60.0
    done = accepted = 0
    slowest = 0.0
    for done, accepted, slowest in run(options.inputs, options.seconds, options.seed, options.limit):  # noqa: B007
        pass
    print(f"{done} inputs, {accepted} accepted, none crashed; the slowest took {1e3 * slowest:.1f} ms")


if __name__ == "__main__":
    main()
