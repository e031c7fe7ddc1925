"""`python -m bench.scripts` changes the one line that docs/integrations.md names, and finds the script of a page."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from bench.hub import STANDINS, write_standins
from bench.scripts import ROOT, both_ends, changed, for_cpu, run, script_of

MARKDOWN = """# Page
```py
from huggingface_hub import login

login()
```
Text.
```py
from transformers import AutoModelForCausalLM, TrainingArguments, Trainer
x = 1
```
```bash
pip install nothing
```
```py
trainer.train()
trainer.push_to_hub()
```
"""
RST = """Page
====
.. testcode::
    :skipif: not _TORCHVISION_AVAILABLE

    import pytorch_lightning as pl

    x = 1

.. code-block:: bash

    import nothing

.. code-block:: python

    trainer.fit(model=x)

After.
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from accelerate import Accelerator, X", "from ane_trainer.interop.accelerate import Accelerator, X"),
        ("import lightning as L", "from ane_trainer.interop import lightning as L"),
        ("import pytorch_lightning as pl", "from ane_trainer.interop import lightning as pl"),
        (
            "from lightning.pytorch import Callback, Trainer",
            "from ane_trainer.interop.lightning import Callback, Trainer",
        ),
        ("model.fit(x, y, epochs=2)", "import ane_trainer as at; at.fit_keras(model, x, y, epochs=2)"),
    ],
)  # fmt: skip
def test_one_line_changes_and_the_page_names_what_it_becomes(old: str, new: str) -> None:
    before = f"import torch\n{old}\nprint(1)\n"
    after, line, was = changed(before)
    assert (line, was) == (new, old)
    assert after == before.replace(old, new)
    page = (ROOT / "docs" / "integrations.md").read_text()
    assert new.partition("(")[0].split("; ")[-1].split(",")[0].replace(" pl", " L") in page


def test_a_page_is_one_script_without_what_needs_an_account(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(MARKDOWN)
    (tmp_path / "page.rst").write_text(RST)
    markdown, rst = (script_of(tmp_path / name) for name in ("page.md", "page.rst"))
    assert "trainer.train()" in markdown
    assert not any(word in markdown for word in ("login", "push_to_hub", "pip"))
    assert changed(markdown)[1].startswith("from ane_trainer.interop.transformers import Auto")
    assert rst.split() == "import pytorch_lightning as pl x = 1 trainer.fit(model=x)".split()


def test_an_import_over_several_lines_changes_where_it_has_the_trainer() -> None:
    other = "from transformers import (\n    AutoConfig,\n)\n"
    before = other + "from transformers import (\n    AutoConfig,\n    Trainer,\n)\n"
    after, line, was = changed(before)
    assert (line, was) == ("from ane_trainer.interop.transformers import (", "from transformers import (")
    assert after == other + line + before.removeprefix(other).removeprefix(was)


def test_a_script_for_gpus_is_told_how_it_ran_on_the_cpu() -> None:
    script = 'model = load(dtype="auto")\nArguments(bf16=True, learning_rate=2e-5)\n'
    after, notes = for_cpu(script)
    assert after == 'model = load(dtype="float32")\nArguments(use_cpu=True, learning_rate=2e-5)\n'
    assert notes == ["bf16=True -> use_cpu=True", 'dtype="auto" -> dtype="float32"']
    assert for_cpu("x = 1\n") == ("x = 1\n", [])


def test_both_begin_from_one_seed_and_keras_takes_what_stands_for_its_data(tmp_path: Path) -> None:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    given = write_standins("mnist", tmp_path)
    script = (
        "import random, torch, keras\n(x, y), _ = keras.datasets.mnist.load_data()\n"
        "print(len(x), random.random(), torch.rand(1).item(), keras.random.uniform(()).item())\n"
    )
    first, again, other = (run(script, tmp_path, [], given, seed) for seed in (0, 0, 1))
    assert first.split()[0] == "1500"
    assert first == again
    assert not set(first.split()[1:]) & set(other.split())


def test_nothing_to_change_is_told() -> None:
    with pytest.raises(SystemExit, match="needs a line"):
        changed("import torch\n")


def test_a_script_finds_what_it_names_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert "KERAS_HOME" in write_standins('load_dataset("nyu-mll/glue"); MNIST(".")', tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "nyu-mll/glue/train.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("sentence1", "sentence2", "label", "idx")}
    assert (tmp_path / "MNIST/raw/train-images-idx3-ubyte").stat().st_size == 16 + 1500 * 784
    assert len(STANDINS) == 6


@pytest.mark.slow
def test_keras_script_ends_as_it_is(tmp_path: Path) -> None:
    """A script in the form of Keras' on MNIST: labels in classes, softmax, dropout left out so that both draw alike."""
    if importlib.util.find_spec("keras") is None:  # importing it would look for a backend
        pytest.skip("keras is not installed")
    script = (
        "import keras\nfrom keras import layers\nkeras.utils.set_random_seed(0)\n"
        "(x, y), (a, b) = keras.datasets.mnist.load_data()\nx, a = x[..., None] / 255, a[..., None] / 255\n"
        "model = keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(4, 5, strides=3, activation='relu'),\n"
        "                          layers.Flatten(), layers.Dense(10, activation='softmax')])\n"
        "model.compile(loss='categorical_crossentropy', optimizer='adam', metrics=['accuracy'])\n"
        "model.fit(x, keras.utils.to_categorical(y, 10), batch_size=50, epochs=4, shuffle=False, verbose=0)\n"
        "print('score', *model.evaluate(a, keras.utils.to_categorical(b, 10), verbose=0))\n"
    )
    ends = both_ends(
        script, tmp_path, environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    )
    plain, ours = ([float(n) for n in end.split("score")[1].split()[:2]] for end in ends)
    assert ours[0] == pytest.approx(plain[0], rel=0.02)
    assert ours[1] == pytest.approx(plain[1], abs=0.01)
    assert plain[1] > 0.6
