"""The trainer around the compiled step: loop, data, runs, reports."""
