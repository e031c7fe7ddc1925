"""Other frameworks on the simulator: `interop.aneforge`."""
