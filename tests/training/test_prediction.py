"""Tests of training, evaluating and predicting on a user's own data, from file to answer, through the core."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ane_trainer.ane.errors import AneTrainerError, DataError, UsageError
from ane_trainer.core import evaluate_run, export_run, predict_run, resume_training, run_training
from ane_trainer.training.config import make_config
from ane_trainer.training.prediction import as_lines, parse_rows, write_answers
from ane_trainer.training.reporting.report import Reporter


def trained(data: Path, out: Path, **options) -> Path:
    config = make_config({"dataset": str(data), "device": "cpu", "batch_size": 16, **options})
    run_training(config, out=out, report=Reporter())
    return out


def square(value: int, noise: int) -> Image.Image:
    random = np.random.default_rng(noise)
    return Image.fromarray(np.clip(random.normal(value, 12, (14, 12, 3)), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images by class, and a run on it."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, value in (("dark", 60), ("light", 200)):
        (folder / "imgs" / name).mkdir(parents=True)
        for number in range(24):
            square(value, number).save(folder / "imgs" / name / f"{number}.png")
    return folder / "imgs", trained(folder / "imgs", folder / "run", epochs=6)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Path, Path]:
    """A table whose price is 3 * size + 10 for a city, 0 for the other, and a run on it."""
    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    with open(folder / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "city", "price"])
        for number in range(200):
            size, city = random.uniform(0, 50), ("Oslo", "Rome")[number % 2]
            writer.writerow([round(size, 3), city, round(3 * size + 10 * (number % 2), 3)])
    return folder / "t.csv", trained(folder / "t.csv", folder / "run", target=("price",), epochs=60, lr=0.02)


def test_images_are_predicted_with_the_preprocessing_of_training(pictures, tmp_path, monkeypatch):
    images, run = pictures
    monkeypatch.chdir(tmp_path)  # a run holds from any folder
    square(200, 99).resize((120, 140)).save(tmp_path / "big.jpg")
    found = predict_run(run, [tmp_path / "big.jpg", images / "dark"])
    rows = found["predictions"]
    assert len(rows) == 25
    assert (rows[0]["name"], rows[0].get("truth")) == ("light", None)
    assert {row["name"] for row in rows[1:]} == {row["truth"] for row in rows[1:]} == {"dark"}
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)
    np.save(tmp_path / "pixels.npy", np.asarray(Image.open(images / "light" / "0.png")))
    by_array = predict_run(run, [tmp_path / "pixels.npy"])["predictions"][0]
    by_file = predict_run(run, [images / "light" / "0.png"])["predictions"][0]
    assert by_array["probabilities"] == by_file["probabilities"]
    assert len(predict_run(run, [images], limit=3)["predictions"]) == 3


def test_scores_of_a_run_by_class(pictures):
    found = evaluate_run(pictures[1])
    assert (found["split"], found["weights"], found["examples"]) == ("val", "weights.safetensors", 4)
    assert [row["name"] for row in found["scores"]["classes"]] == ["dark", "light"]
    assert found["scores"]["classes"][0]["recall"] == 1
    assert np.array(found["scores"]["confusion_TP"]).sum() == 4


def test_an_image_model_is_exported_with_its_preprocessing(pictures, tmp_path):
    found = export_run(pictures[1], "torch", tmp_path / "m.pt2").to_json()
    assert found["examples"] == 4
    assert "image" in json.dumps(found)


def test_a_table_is_predicted_in_its_own_units(table, tmp_path):
    run = table[1]
    (tmp_path / "new.csv").write_text("city,size\nRome,20\nOslo,20\n,\n")
    rows = predict_run(run, [tmp_path / "new.csv"])["predictions"]
    assert [rows[n]["values"]["price"] for n in (0, 1)] == pytest.approx([70, 60], abs=4)
    scores = evaluate_run(run)["scores"]["numbers"][0]
    assert (scores["name"], scores["r2"] > 0.98) == ("price", True)
    (tmp_path / "short.csv").write_text("city\nRome\n")
    with pytest.raises(DataError, match="'size' not there") as caught:
        predict_run(run, [tmp_path / "short.csv"])
    assert caught.value.code == "DATA116"


def test_answers_as_csv_and_json(pictures, tmp_path):
    found = predict_run(pictures[1], [pictures[0] / "dark"], limit=2)
    write_answers(tmp_path / "a.csv", found["predictions"], found["classes"])
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["dark", "dark"]
    assert float(rows[0]["probability of dark"]) == found["predictions"][0]["probabilities"][0]
    write_answers(tmp_path / "a.json", found["predictions"], found["classes"])
    assert json.loads((tmp_path / "a.json").read_text()) == found["predictions"]
    assert as_lines(found["predictions"]).count("dark   probability") == 2
    with pytest.raises(UsageError):
        write_answers(tmp_path / "a.txt", found["predictions"], found["classes"])


def test_text_is_continued(tmp_path):
    (tmp_path / "t.txt").write_text("abcd" * 200)
    run = trained(tmp_path / "t.txt", tmp_path / "run", context=8, epochs=8, lr=0.01)
    assert predict_run(run, prompt="ab", tokens=9)["predictions"][0]["text"] == "abcdabcdabc"
    drawn = predict_run(run, prompt="a", tokens=20, temperature=5.0)["predictions"][0]["text"]
    assert set(drawn) <= set("abcd")
    assert evaluate_run(run)["perplexity"] < 1.2
    with pytest.raises(DataError, match="got 'z'"):
        predict_run(run, prompt="z")
    assert export_run(run, "torch", tmp_path / "m.pt2").to_json()["examples"] == 9


def test_labels_are_scored_and_predicted(tmp_path):
    with open(tmp_path / "t.csv", "w") as file:
        file.write("x,odd,big\n" + "".join(f"{n},{n % 2},{int(n > 50)}\n" for n in range(100)))
    run = trained(tmp_path / "t.csv", tmp_path / "run", target=("odd", "big"), epochs=40, lr=0.05)
    found = evaluate_run(run)["scores"]["classes"]
    assert [row["name"] for row in found] == ["odd", "big"]
    assert found[1]["f1"] > 0.8
    assert "big" in predict_run(run, [tmp_path / "t.csv"])["predictions"][99]["labels"]


def test_an_interrupted_run_is_judged_by_its_checkpoint(pictures, tmp_path):
    images, _ = pictures
    run = trained(images, tmp_path / "run", epochs=2)
    whole = evaluate_run(run)
    (run / "weights.safetensors").unlink()
    (run / "result.json").unlink()
    found = evaluate_run(run)
    assert (found["weights"], found["test_loss"]) == ("checkpoint.safetensors", whole["test_loss"])


def test_changed_data_is_noticed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "imgs" / name).mkdir(parents=True)
        for number in range(6):
            square(100, number).save(tmp_path / "imgs" / name / f"{number}.png")
    run = trained(tmp_path / "imgs", tmp_path / "run", epochs=1)
    (tmp_path / "imgs" / "c").mkdir()
    square(1, 1).save(tmp_path / "imgs" / "c" / "0.png")
    for call in (lambda: evaluate_run(run), lambda: resume_training(run, epochs=2, report=Reporter())):
        with pytest.raises(DataError, match="class_names") as caught:
            call()
        assert caught.value.code == "DATA103"
    assert predict_run(run, [tmp_path / "imgs" / "a" / "0.png"])["predictions"]


@pytest.mark.parametrize(
    ("selection", "rows"), [("7", [7]), ("0:3", [0, 1, 2]), ("8:", [8, 9]), ("1,4:6", [1, 4, 5])]
)
def test_rows_are_chosen_by_number_and_range(selection, rows):
    assert parse_rows(selection, 10) == rows


@pytest.mark.parametrize("selection", ["10", "-1", "3:3", "5:11", "x", ""])
def test_rows_out_of_range_are_refused(selection):
    with pytest.raises(DataError) as caught:
        parse_rows(selection, 10)
    assert caught.value.code == "DATA108"


def lying_header(path: Path) -> None:
    """A .npy header that claims 23 TiB, and 16 bytes."""
    np.save(path, np.zeros(2))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(2,)", b"(3162277660168,)").replace(b" " * 13 + b"\n", b" \n"))


BAD = {
    "shape.npy": (lambda path: np.save(path, np.zeros((2, 5))), "DATA105"),
    "scalar.npy": (lambda path: np.save(path, np.float32(1)), "DATA105"),
    "empty.npy": (lambda path: np.save(path, np.zeros((0, 14, 12, 3))), "DATA105"),
    "strings.npy": (lambda path: np.save(path, np.array(["a"])), "DATA109"),
    "complex.npy": (lambda path: np.save(path, np.zeros((3, 14, 12), complex)), "DATA109"),
    "nan.npy": (lambda path: np.save(path, np.full((3, 14, 12), np.nan)), "DATA106"),
    "inf.npy": (lambda path: np.save(path, np.full((3, 14, 12), np.inf)), "DATA106"),
    "objects.npy": (lambda path: np.save(path, np.array([{}], object), allow_pickle=True), "DATA109"),
    "random.npy": (lambda path: path.write_bytes(bytes(range(256))), "DATA109"),
    "zero.npy": (lambda path: path.write_bytes(b""), "DATA109"),
    "lying.npy": (lying_header, "DATA109"),
    "missing.npy": (lambda path: None, "DATA109"),
    "damaged.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n and more"), "DATA115"),
    "unknown.doc": (lambda path: path.write_text("?"), "DATA109"),
    "none": (lambda path: path.mkdir(), "DATA104"),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_cannot_be_used_are_refused(pictures, tmp_path, name):
    write, code = BAD[name]
    write(tmp_path / name)
    with pytest.raises(AneTrainerError) as caught:
        predict_run(pictures[1], [tmp_path / name])
    assert caught.value.code == code
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"index": 0, "prompt": "a"}, {"prompt": "a"}])
def test_predict_needs_one_kind_of_input(pictures, options):
    with pytest.raises(UsageError) as caught:
        predict_run(pictures[1], **options)
    assert caught.value.code == "ANE108"


def test_a_damaged_description_is_refused(pictures, tmp_path):
    run = trained(pictures[0], tmp_path / "run", epochs=1)
    for content in (b"\xff\x00", b"{}", b"[" * 100_000):
        (run / "data.json").write_bytes(content)
        with pytest.raises(AneTrainerError) as caught:
            evaluate_run(run)
        assert caught.value.code == "CKPT103"


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_run_with_augmentation_is_resumed_in_the_middle_of_an_epoch_bit_for_bit(pictures, tmp_path, device):
    class Stop(Reporter):
        def step(self, loss, loss_scale, skipped_steps):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 4:
                raise KeyboardInterrupt

    options = {"augment": ("shift=1", "flip", "rotate", "erase", "mixup"), "epochs": 2, "val_split": 0.0,
               "model": "mlp", "hidden": (8,)}  # fmt: skip
    whole = trained(pictures[0], tmp_path / "whole", device=device, **options)
    config = make_config({"dataset": str(pictures[0]), "device": device, "batch_size": 16, **options})
    with pytest.raises(AneTrainerError):
        run_training(config, out=tmp_path / "cut", report=Stop())
    resume_training(tmp_path / "cut", report=Reporter())
    from safetensors.torch import load_file

    a, b = (load_file(folder / "weights.safetensors") for folder in (whole, tmp_path / "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
