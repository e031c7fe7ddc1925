"""Train PyTorch models on the Apple Neural Engine, or on a simulator that computes what the engine computes."""
