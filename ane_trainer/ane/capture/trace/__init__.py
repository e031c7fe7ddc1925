"""From Python functions over tensors to functional FX graphs of ATen ops."""
