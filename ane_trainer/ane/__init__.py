"""The Neural Engine: programs, legality, simulator, devices."""
