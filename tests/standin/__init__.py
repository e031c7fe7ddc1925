"""A stand-in for ANEForge's dispatch library, built from C, with the simulator as its engine."""
