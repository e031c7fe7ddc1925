"""accelerate as it is, and imported through `ane_trainer`: `python examples/accelerate_compile.py`."""

from __future__ import annotations

import accelerate
import torch
from accelerate.state import AcceleratorState
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ane_trainer.ane.dynamo import report
from ane_trainer.interop.accelerate import Accelerator


def main(make: type[accelerate.Accelerator], epochs: int = 3) -> tuple[float, float]:
    """The last loss and the accuracy on digits that were held out."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may have one setting only
    accelerator = make(cpu=True)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    data = DataLoader(TensorDataset(x[:1280], y[:1280]), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    loss = torch.zeros(())
    for _ in range(epochs):
        for images, labels in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found = [model(x[start : start + 64]).argmax(1) for start in range(1280, 1792, 64)]
    return float(loss.detach()), float((torch.cat(found) == y[1280:1792]).float().mean())


if __name__ == "__main__":
    for name, kind in (("as it is", accelerate.Accelerator), ("ane", Accelerator)):
        print("{}: loss {:.4f}, accuracy {:.2%}".format(name, *main(kind)))
    print(report())
