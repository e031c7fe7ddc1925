"""Hugging Face's Trainer, imported through `ane_trainer`: `python examples/transformers_compile.py`."""

from __future__ import annotations

import tempfile

import torch

from ane_trainer.ane.dynamo import report
from ane_trainer.interop.transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)


def main(steps: int = 30) -> tuple[float, float]:
    """First and last loss of a tiny BERT that learns which of two tokens is more frequent."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    ids = torch.randint(1, 3, (256, 9))
    labels = ((ids == 2).sum(1) > 4).long()
    data = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3, report_to=[],
            save_strategy="no", logging_steps=5, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=data)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(report())
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
