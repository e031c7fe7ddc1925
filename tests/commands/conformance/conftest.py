"""The stand-in library for examining `e5rt` without a Mac."""

from tests.standin.fixtures import engine, library

__all__ = ["engine", "library"]
