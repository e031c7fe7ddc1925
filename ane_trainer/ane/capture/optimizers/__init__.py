"""Rules for the optimizers of `torch.optim`: what each keeps, and its update in operations that survive fp16."""
