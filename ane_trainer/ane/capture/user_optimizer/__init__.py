"""Optimizers that users write: followed through a step, planned for fp16, tried, and put on the engine."""
