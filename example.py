"""Train a PyTorch model by programs for the Apple Neural Engine: `python example.py` (about a minute).

Without Apple hardware the programs run on a simulator of the engine's arithmetic.
"""

import torch
from torch import nn

import ane_trainer as at

# Data: any iterable of (x, y) batches does; this one is fetched, verified and cached.
train, test = at.load_dataset("mnist", batch_size=128, seed=0)

# A model as you would write it anyway.
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 10))

# Forward, loss, backward and the optimizer's update become one program, compiled once.
trainer = at.Trainer(
    model,
    loss="cross_entropy",
    optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
    device="auto",
    chip="m4",
)
result = trainer.fit(train, epochs=1, val=test)

print(f"test accuracy {result.test_accuracy:.2%} after {result.steps} steps on {result.device}")
print(f"{result.compiles} compile, {result.host_bytes_per_step:,} bytes from and to the host a step")
print("the program begins:")
print("\n".join(trainer.step.text().splitlines()[:6]))

# Inference runs as a program too.
x, y = next(iter(test))
print("predicted", trainer.predict(x[:8]).argmax(dim=1).tolist())
print("truth    ", y[:8].tolist())
