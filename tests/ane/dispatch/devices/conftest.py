"""The stand-in library for tests of direct dispatch."""

from tests.standin.fixtures import engine, library

__all__ = ["engine", "library"]
