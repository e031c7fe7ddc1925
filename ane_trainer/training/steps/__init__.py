"""Ways to train besides the engine's program: plain PyTorch, and a step in parts."""
