"""Compiled loops: LLVM code for pointwise work, reductions and rounding, bound to arrays and run on threads."""
