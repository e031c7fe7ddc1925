"""PyTorch Lightning with the model on the engine: `python examples/lightning_compile.py`."""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ane_trainer


class Classifier(lightning.LightningModule):
    """Digits from 8x8 images; the network is compiled, the loop is Lightning's."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.network = torch.compile(network, backend="ane", options={"chip": "m4", "fidelity": "fast"})

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Logs the accuracy."""
        found = self.network(batch[0]).argmax(1)
        self.log("accuracy", (found == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, on the host."""
        return torch.optim.Adam(self.parameters(), lr=4e-3)


def main(epochs: int = 3) -> float:
    """Test accuracy."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1280], y[:1280]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(x[1280:1792], y[1280:1792]), batch_size=64)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Classifier()
    trainer.fit(model, train)
    accuracy = float(trainer.test(model, test, verbose=False)[0]["accuracy"])
    print(ane_trainer.ane.dynamo.report())
    return accuracy


if __name__ == "__main__":
    print(f"accuracy {main():.2%}")
