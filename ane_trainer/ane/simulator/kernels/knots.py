"""Knot values of the two activation tables that the engine's compiler fits; a pure table.

The other tables hold samples of their function (`tables.py`). The gelu and silu knots are fitted by Apple's
compiler and only a few of their values are published; these are reconstructed in two steps:

- least squares of the function over all normal fp16 inputs of the domain (gelu's ends held at 0 and 4). This
  alone gives the published knots gelu(0.25) = 0.1436 and silu(0.5) = 0.296 and, within 1 %, the published
  values left of 0, so it is probably what the compiler does;
- knots 0 to 10 (the left tail) moved by a few units in the last place until the published zero crossings of
  the error come out (M6 data/06_numerics/f3_lut_m6.txt, the first 20 of each function).

Maximum absolute error, maximum ulp error and all 20 crossings then equal the published ones. A knot that
those figures do not fix may be off by about two units in the last place.
"""

from __future__ import annotations

#: gelu at -4, -3.75, ..., 4.
GELU: tuple[float, ...] = (
    0.0, -0.0003989, -0.0007544, -0.001792, -0.003876, -0.00794, -0.01513, -0.02704,
    -0.0449, -0.06964, -0.10004, -0.1324, -0.1599, -0.1724, -0.1567, -0.1064,
    -0.000754, 0.1436, 0.3433, 0.5776, 0.84, 1.117, 1.4, 1.681,
    1.955, 2.223, 2.484, 2.742, 2.996, 3.248, 3.5, 3.75, 4.0,
)  # fmt: skip

#: silu at -8, -7.5, ..., 8.
SILU: tuple[float, ...] = (
    -0.002352, -0.00426, -0.006245, -0.009636, -0.01461, -0.02211, -0.03305, -0.04898,
    -0.07117, -0.10187, -0.1416, -0.1895, -0.2394, -0.2773, -0.2734, -0.2036,
    -0.001704, 0.2964, 0.7266, 1.223, 1.761, 2.31, 2.86, 3.398,
    3.93, 4.45, 4.97, 5.477, 5.984, 6.492, 6.992, 7.496, 7.996,
)  # fmt: skip
