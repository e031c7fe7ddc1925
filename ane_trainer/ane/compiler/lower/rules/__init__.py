"""Lowering rules by family: `aten -> MIL`, one function per ATen overload."""
