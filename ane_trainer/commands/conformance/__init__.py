"""Conformance: a fixed set of programs run on an engine and on the simulator, compared bit for bit."""
