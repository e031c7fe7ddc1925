"""The numerics of training: the engine's arithmetic against fp32, from the same start on the same batches."""
