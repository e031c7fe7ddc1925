"""The examples of Lightning, transformers and accelerate run and learn; skipped where these are not installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def run(example: str, *packages: str) -> str:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True, text=True, env=environment, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_lightning() -> None:
    output = run("lightning_compile.py", "lightning", "sklearn")
    assert "backward [" in output
    found = re.search(r"accuracy ([\d.]+)%", output)
    assert found is not None
    assert float(found[1]) > 80


def test_transformers_trainer_takes_the_backend_by_name() -> None:
    output = run("transformers_compile.py", "transformers", "accelerate")
    assert "backward [" in output
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", output)
    assert found is not None
    assert float(found[2]) < float(found[1]) - 0.01


def test_a_loop_of_accelerate_ends_as_on_the_cpu() -> None:
    output = run("accelerate_compile.py", "accelerate", "sklearn")
    assert "backward [" in output
    (plain, before), (loss, accuracy) = re.findall(r"loss ([\d.]+), accuracy ([\d.]+)%", output)
    assert float(loss) == pytest.approx(float(plain), rel=5e-3)
    assert float(accuracy) == pytest.approx(float(before), abs=1.0)


#: An autoencoder in the form of Lightning's introduction ("Lightning in 15 minutes"): networks made outside of the
#: module, losses logged, a hundred batches. {line} is where our page puts its one line.
INTRODUCTION = """
import sys, warnings
import torch
from torch import nn, optim, utils
import lightning as L
import ane_trainer as at

L.seed_everything(0)
encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
decoder = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 64))
{line}

class AutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=1e-3)

train, _ = at.load_dataset("digits", batch_size=1437, shuffle=False)
x, y = next(iter(train))
loader = utils.data.DataLoader(utils.data.TensorDataset(x, y), batch_size=16)
module = AutoEncoder(encoder, decoder)
trainer = L.Trainer(limit_train_batches=100, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model=module, train_dataloaders=loader)
with torch.no_grad():
    flat = x.flatten(1)
    print("loss", float(nn.functional.mse_loss(module.decoder(module.encoder(flat[:256])), flat[:256])))
from ane_trainer.ane.dynamo import report
print(report())
"""
LINE = 'encoder, decoder = (torch.compile(network, backend="ane") for network in (encoder, decoder))'


@pytest.mark.slow
def test_lightning_s_introduction_with_one_line_changed() -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    losses = []
    for line in ("", LINE):
        words, environment = (
            [sys.executable, "-c", INTRODUCTION.format(line=line)],
            {**os.environ, "PYTHONPATH": _PATH},
        )
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(float(re.search(r"loss ([\d.]+)", done.stdout)[1]))  # type: ignore[index]
        assert ("backward [" in done.stdout) == bool(line)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
