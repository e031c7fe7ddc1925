"""Integers beyond what fp16 holds exactly: index encodings."""
