"""What each MIL op computes on the engine, by family."""
