"""Tests of the conformance suite and its reports."""
