"""Tests of the range pass."""
