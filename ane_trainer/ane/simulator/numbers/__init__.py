"""Values in memory: fp16 bit patterns, the border, buffers, constants, states."""
