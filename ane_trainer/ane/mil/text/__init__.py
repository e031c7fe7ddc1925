"""MIL text: read and printed."""
