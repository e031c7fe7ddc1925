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
    environment = {**os.environ, "PYTHONPATH": _PATH, "HF_HUB_OFFLINE": "1"}
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


#: transformers' page on fine-tuning a causal language model, from its collator on; a model and texts in small stand in
#: for the hub's. {line} is where the page imports the Trainer, {host} what a CPU needs without our line.
PAGE = """
import random, sys
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from tokenizers import Tokenizer, models

random.seed(0); torch.manual_seed(0)
words = ["<end>", *"abcdefghijklmnop"]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(dict(zip(words, range(99))), "<end>")),
    eos_token="<end>", pad_token="<end>"
)
texts = [[1 + (3 * k + n) % 16 for n in range(random.randint(4, 40))] for k in range(90)]
data = [{{"input_ids": text, "attention_mask": [1] * len(text)}} for text in texts]
dataset = {{"train": data[:79], "test": data[79:]}}
model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=17, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64)).to(torch.bfloat16){single}

{line}

training_args = TrainingArguments(
    output_dir=sys.argv[1],
    num_train_epochs=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    gradient_checkpointing=True,
    {host}
    learning_rate=2e-3,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    disable_tqdm=True,
    report_to=[],
)

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)

trainer.train()
print("losses", [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
print("saved", len(Qwen3ForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()))
from ane_trainer.ane.dynamo import report
print(report())
"""
WAYS = {
    "cpu": ("from transformers import Trainer, TrainingArguments", "use_cpu=True,", ".float()"),
    "ane": (
        "from ane_trainer.interop.transformers import Trainer, TrainingArguments",
        "bf16=True,",
        "",
    ),
}


@pytest.mark.slow
def test_transformers_page_with_its_import_line_changed(tmp_path: Path) -> None:
    """To the same losses as on the CPU in single precision, in few programs, from weights and options in bfloat16."""
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    losses = {}
    for name, (line, host, single) in WAYS.items():
        script = PAGE.format(line=line, host=host, single=single)
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": _PATH, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = [float(n) for n in re.search(r"losses \[(.*)\]", done.stdout)[1].split(",")]  # type: ignore[index]
        assert ("backward [" in done.stdout) == (name == "ane")
        assert "saved 14" in done.stdout
    assert "batches are padded to multiples of 16: each length is a program" in done.stderr
    assert "bf16 is left out" in done.stderr
    assert losses["cpu"][1] < losses["cpu"][0] < 2.8
    assert losses["ane"] == pytest.approx(losses["cpu"], rel=5e-3)


def test_transformers_trainer_settles_what_the_engine_needs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ane_trainer.interop import transformers as ours

    arguments = ours.TrainingArguments(str(tmp_path), bf16=True, report_to=[])
    assert (arguments.bf16, arguments.use_cpu, arguments.mixed_precision) == (False, True, "no")
    assert ours.AutoModelForCausalLM.__module__.startswith("transformers.")


NETWORKS = """
import torch
from torch import nn
from ane_trainer.ane.dynamo import report
from ane_trainer.interop import lightning as L
from ane_trainer.interop.lightning import networks

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.list = nn.ModuleList([nn.Linear(8, 2)])
        self.unused = nn.Linear(2, 2)
        self.criterion = nn.MSELoss()

    def training_step(self, batch, index):
        return self.criterion(self.list[0](self.first(batch)), batch[:, :2])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

net = Net()
print("found", [name for name, _ in networks(net)])
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(accelerator="gpu", max_epochs=1, **quiet)
trainer.fit(net, torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=4))
saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
print("names", list(saved))
print(report())
"""
#: An autoencoder in the form of Lightning's introduction ("Lightning in 15 minutes"): networks made outside of the
#: module, losses logged, a hundred batches. {line} is where our page puts its one line.
INTRODUCTION = """
import sys, warnings
import torch
from torch import nn, optim, utils
{imported}
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
IMPORT = "from ane_trainer.interop import lightning as L"


@pytest.mark.slow
def test_lightning_s_introduction_with_one_line_changed() -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    losses = []
    for imported, line in (("import lightning as L", ""), (IMPORT, ""), ("import lightning as L", LINE)):
        words = [sys.executable, "-c", INTRODUCTION.format(imported=imported, line=line)]
        environment = {**os.environ, "PYTHONPATH": _PATH}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(float(re.search(r"loss ([\d.]+)", done.stdout)[1]))  # type: ignore[index]
        assert ("backward [" in done.stdout) == bool(line or imported == IMPORT)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.01)


def test_lightning_s_trainer_compiles_what_a_module_calls(tmp_path: Path) -> None:
    """Its own forward, parts with parameters and members of lists; state has the same names, unused parts are told."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    done = subprocess.run(
        [sys.executable, "-c", NETWORKS], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": _PATH}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "names ['first.0.weight', 'first.0.bias', 'list.0.weight', 'list.0.bias', 'unused.weight'"
        in done.stdout
    )
    assert "found ['first', 'list.0', 'unused']" in done.stdout
    assert "backward [" in done.stdout
    assert "never called as a whole, so on the CPU if at all: 'unused'" in done.stderr
    assert "accelerator='gpu' is left out for 'cpu'" in done.stderr
