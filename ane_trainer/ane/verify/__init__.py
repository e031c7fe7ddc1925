"""The simulator against double precision and against published numbers."""
