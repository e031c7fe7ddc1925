"""Generators of pages: `python -m docs._generate.NAME > docs/NAME.md`."""
