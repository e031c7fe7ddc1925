"""The numerics of training, task by task: the engine's arithmetic against fp32 from the same start on the same batches."""
