"""Tests of `open_data`: files and objects of every kind, what is found out about them, and refusals."""

import csv
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.data import DataDescription, DataOptions, load_dataset, open_data
from ane_trainer.training.datasets.splits import divide


def make_images(folder, counts, size=(12, 10), mode="RGB", shade=60):
    """`counts` images for each class, of one grey value a class; returns the folder."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", size, shade * (number + 1)).convert(mode).save(folder / name / f"{index}.png")
    return folder


def write_csv(path, header, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def together(batches):
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def refusal(data, **options):
    with pytest.raises(DataError) as caught:
        open_data(data, DataOptions(**options))
    return f"{caught.value.code} {caught.value.args[0]}"


# Images ------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_is_divided_by_class_and_normalised(tmp_path):
    splits = open_data(make_images(tmp_path / "pets", {"cat": 20, "dog": 40}))
    found = splits.description
    assert (found.name, found.kind, found.task, found.in_shape) == ("pets", "image", "classify", (3, 10, 12))
    assert found.class_names == ("cat", "dog")
    assert splits.test is None
    assert splits.held_out is splits.val
    assert splits.train.labels.bincount().tolist() == [18, 36]
    assert splits.val.labels.bincount().tolist() == [2, 4]
    x, y = together(splits.train)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-4)
    expected = (torch.tensor([60.0, 120.0])[y] / 255 - found.mean[0]) / found.std[0]
    assert torch.allclose(x[:, 0, 0, 0], expected, atol=1e-5)


def test_the_parts_of_a_folder_are_used_as_they_are(tmp_path):
    for part, count in (("train", 6), ("valid", 2), ("test", 3)):
        make_images(tmp_path / part, {"a": count, "b": count}, mode="L")
    splits = open_data(tmp_path)
    assert splits.description.examples == {"train": 12, "val": 4, "test": 6}
    assert splits.description.in_shape == (1, 10, 12)
    assert splits.held_out is splits.test
    assert splits.train.left_out == 0


def test_images_of_several_sizes_are_brought_to_one_in_the_middle(tmp_path):
    make_images(tmp_path, {"a": 3}, (40, 20))
    make_images(tmp_path, {"b": 3}, (20, 30))
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255  # cutting the middle leaves only white
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    splits = open_data(tmp_path, DataOptions(val_split=0.0))
    assert splits.description.in_shape == (3, 20, 20)
    assert int(splits.train.images[0].min()) == 255
    assert open_data(tmp_path, DataOptions(size=16, channels=1)).description.in_shape == (1, 16, 16)


def test_turned_16_bit_and_transparent_images_are_read_as_they_look(tmp_path):
    make_images(tmp_path, {"a": 1, "b": 1}, (8, 8), mode="L")
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "a" / "0.png")
    turned = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "b" / "0.png", exif=exif)
    images = open_data(tmp_path, DataOptions(val_split=0.0)).train.images
    assert np.array_equal(images[0, 0], deep >> 8)
    assert np.array_equal(images[1, 0], np.arange(64).reshape(8, 8)[::-1, ::-1])


def test_what_is_wrong_with_an_image_folder_is_said(tmp_path):
    assert "DATA117" in refusal(make_images(tmp_path / "one", {"a": 2}))
    (tmp_path / "none").mkdir()
    assert "got no image" in refusal(tmp_path / "none")
    make_images(tmp_path / "parts" / "train", {"a": 2, "b": 2})
    make_images(tmp_path / "parts" / "test", {"a": 2, "c": 2})
    assert "test part needs classes that the training part has; got c" in refusal(tmp_path / "parts")
    bad = make_images(tmp_path / "bad", {"a": 2, "b": 2})
    good = (bad / "a" / "1.png").read_bytes()
    (bad / "a" / "1.png").write_bytes(good[: len(good) // 2])
    text = refusal(bad)
    assert "DATA115" in text
    assert str(bad / "a" / "1.png") in text
    (bad / "a" / "1.png").write_bytes(good)
    (bad / "a" / "readme.txt").write_text("not an image")
    assert open_data(bad).description.notes == ("1 file that is not an image is left out",)


# Tables ------------------------------------------------------------------------------------------------------

CITIES = ("Bonn", "Oslo, N", "Rome")


def rows_of_a_table(count=60):
    return [[number, "" if number % 10 == 0 else number / 7, CITIES[number % 3], f"2024-01-{number % 28 + 1:02d}",
             f"note {number}", 5, 3 * number + 1] for number in range(count)]  # fmt: skip


HEADER = ("", "length", "city", "day", "remark", "same", "price")


def test_a_csv_file_to_regress(tmp_path):
    path = write_csv(tmp_path / "t.csv", HEADER, rows_of_a_table())
    splits = open_data(path, DataOptions(target=("price",)))
    found = splits.description
    assert (found.kind, found.task, found.class_names, found.in_shape) == (
        "table",
        "regress",
        ("price",),
        (6,),
    )
    assert [column.name for column in found.columns] == ["length", "city", "day"]
    assert [note.split("'")[1] for note in found.notes] == ["", "remark", "same"]
    x, y = together(splits.train)
    price = y[:, 0] * found.target_std[0] + found.target_mean[0]
    number = ((price - 1) / 3).round().long()
    length = torch.where(number % 10 == 0, torch.tensor(found.columns[0].mean), number / 7)
    assert torch.allclose(
        x[:, 0], ((length - found.columns[0].mean) / found.columns[0].std).float(), atol=1e-4
    )
    assert torch.equal(x[:, 1], (number % 10 == 0).float())
    assert torch.equal(x[:, 2:5].argmax(1), number % 3)
    assert torch.equal(x[:, 2:5].sum(1), torch.ones(len(x)))
    assert (float(y.mean()), float(y.std(correction=0))) == pytest.approx((0, 1), abs=1e-5)
    assert y.dtype == torch.float32


def test_a_csv_file_to_classify(tmp_path):
    path = write_csv(tmp_path / "t.tsv", HEADER, rows_of_a_table(), "\t")
    splits = open_data(path, DataOptions(target=("city",)))
    assert (splits.description.task, splits.description.class_names) == ("classify", CITIES)
    assert splits.train.labels.bincount().tolist() == [18, 18, 18]


def test_several_columns_of_zeros_and_ones_are_labels(tmp_path):
    rows = [[number, number % 2, number // 2 % 2] for number in range(20)]
    splits = open_data(
        write_csv(tmp_path / "t.csv", ("n", "odd", "half"), rows), DataOptions(target=("odd", "half"))
    )
    assert (splits.description.task, splits.description.default_loss) == ("multilabel", "bce_with_logits")
    assert splits.train.labels.shape == (18, 2)


@pytest.mark.parametrize(
    ("target", "task"), [("few", "classify"), ("many", "regress"), ("halves", "regress")]
)
def test_numbers_are_classes_if_they_are_few_and_whole(tmp_path, target, task):
    rows = [[number, number % 5, number % 40, number % 3 / 2] for number in range(200)]
    path = write_csv(tmp_path / "t.csv", ("x", "few", "many", "halves"), rows)
    assert open_data(path, DataOptions(target=(target,))).description.task == task


def test_parquet_and_data_frames_are_the_same_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(write_csv(tmp_path / "t.csv", HEADER, rows_of_a_table()))
    frame.to_parquet(tmp_path / "t.parquet")
    options = DataOptions(target=("price",))
    parts = [open_data(data, options) for data in (tmp_path / "t.csv", tmp_path / "t.parquet", frame)]
    assert len({part.description.columns for part in parts}) == 1
    for part in parts[1:]:
        assert torch.equal(part.train.images, parts[0].train.images)


def test_tables_by_split_and_rows_without_a_target(tmp_path):
    write_csv(tmp_path / "train.csv", ("a", "label"), [[1, "x"], [2, "y"], [3, ""], [4, "x"]])
    write_csv(tmp_path / "test.csv", ("a", "label"), [[9, "y"]])
    splits = open_data(tmp_path, DataOptions(val_split=0.0))
    assert splits.description.examples == {"train": 3, "test": 1}
    assert splits.description.notes == ("1 rows of train without label are left out",)
    write_csv(tmp_path / "test.csv", ("a", "label"), [[9, "z"]])
    assert "DATA117" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "target", "text"),
    [("a,b\n1,2\n3,4\n", (), "DATA116"), ("a,b\n1,2\n", ("c",), "got 'c'. Known: a, b"),
     ("a,b\n", ("b",), "no row below them"),
     ("a,b\n1,2,3\n", ("b",), "3 values in row 2 for 2 columns"), ("a,a\n1,2\n", ("a",), "two columns called 'a'"),
     ("1,2\n3,4\n", (), "numbers in its first line"), ("a,b\n\x00\xff\n", (), "DATA115"),
     ("b\n1\n2\n", ("b",), "needs a column besides the target"), ("a,b\n1,\n2,\n", ("b",), "DATA104"),
     ("a,b\n" + "1.5,1\n2.5,2\n" * 9 + "oops,1\n", ("b",), "got 'oops' beside 1")],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, target, text):
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    assert text in refusal(tmp_path / "t.csv", target=target, val_split=0.0)


# Arrays, text, objects ---------------------------------------------------------------------------------------


def test_npz_files_as_keras_and_numpy_users_write_them(tmp_path):
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (12, 8, 6, 3)).astype(np.uint8)
    np.savez(
        tmp_path / "a.npz", x_train=colour, y_train=np.arange(12) % 2, x_test=colour[:4], y_test=[0, 1, 0, 1]
    )
    splits = open_data(tmp_path / "a.npz", DataOptions(val_split=0.0))
    assert splits.description.in_shape == (3, 8, 6)
    assert torch.equal(splits.train.images, torch.from_numpy(colour.transpose(0, 3, 1, 2).copy()))
    assert splits.test.num_examples == 4
    np.savez(tmp_path / "b.npz", X=random.normal(5, 3, (40, 4)), y=random.normal(0, 1, (40, 2)))
    splits = open_data(tmp_path / "b.npz")
    assert (splits.description.task, splits.description.in_shape) == ("regress", (4,))
    assert torch.allclose(together(splits.train)[0].mean(0), torch.zeros(4), atol=1e-5)


def test_text_becomes_windows_and_their_next_tokens(tmp_path):
    (tmp_path / "t.txt").write_text("hello world! " * 40)
    splits = open_data(tmp_path / "t.txt", DataOptions(context=8, batch_size=4))
    assert splits.description.vocabulary == tuple(sorted(set("hello world! ")))
    x, y = together(splits.train)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert (x.dtype, splits.description.num_outputs) == (torch.int64, 9)
    text = "".join(splits.description.vocabulary[token] for token in splits.val.images.flatten().tolist())
    assert text in "hello world! " * 5
    assert open_data(tmp_path / "t.txt", DataOptions(tokens="bytes")).description.num_outputs == 256
    (tmp_path / "t.txt").write_text("short")
    assert "DATA104" in refusal(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00")
    assert "DATA115" in refusal(tmp_path / "t.txt")


class Pictures:
    """Items as torchvision's datasets give them, with a transform that draws random numbers."""

    classes = ("even", "odd")

    def __init__(self, count, transform=lambda image: image):
        self.count, self.transform = count, transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.transform(Image.new("L", (6, 5), index)), index % 2


def test_a_dataset_of_pil_images(tmp_path):
    splits = open_data((Pictures(30), Pictures(10)), DataOptions(val_split=0.0))
    assert (splits.description.class_names, splits.description.in_shape) == (("even", "odd"), (1, 5, 6))
    assert splits.train.images[:, 0, 0, 0].tolist() == list(range(30))


def test_a_users_random_transform_is_repeated_in_the_middle_of_a_pass():
    def noisy(image):
        return torch.full((1, 2, 2), float(image.getpixel((0, 0)))) + torch.rand(1) + np.random.rand()

    def batches():
        return open_data(Pictures(20, noisy), DataOptions(batch_size=4, val_split=0.0, seed=3)).train

    whole = [x for x, _ in batches()]
    first = batches()
    for _ in zip(range(2), first, strict=False):
        state = first.state_dict()
    torch.manual_seed(9)
    again = batches()
    again.load_state_dict(state)
    rest = [x for x, _ in again]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:5], strict=True))
    before = torch.get_rng_state()
    next(iter(again))
    assert torch.equal(torch.get_rng_state(), before)


def test_objects_of_other_kinds(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    for data in ((x, y), (torch.tensor(x), torch.tensor(y)), {"train": (x, y)},
                 torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))):  # fmt: skip
        splits = open_data(data)
        assert (splits.description.num_outputs, splits.description.in_shape) == (3, (4,))
    assert open_data((x, np.eye(3)[y])).description.task == "classify"
    assert open_data((x, np.array(["b", "a", "b"] * 10))).description.class_names == ("a", "b")
    assert open_data(((x, y), (x[:6], y[:6]), (x[:5], y[:5]))).description.examples == {
        "train": 30, "val": 6, "test": 5}  # fmt: skip
    (tmp_path / "mine.py").write_text(
        "import numpy as np\ndef make(seed):\n    return np.full((20, 3), float(seed)), np.arange(20) % 2\n"
        "def broken():\n    return 5\n"
    )
    assert float(open_data(f"{tmp_path / 'mine.py'}:make", DataOptions(seed=7)).train.images[0, 0]) == 7
    assert "DATA105" in refusal(f"{tmp_path / 'mine.py'}:broken")
    with pytest.raises(UsageError, match=r"data: needs a class or function .*'absent'.*broken, make"):
        open_data(f"{tmp_path / 'mine.py'}:absent")


def test_what_is_wrong_with_arrays_is_said():
    x = np.zeros((4, 2))
    assert "as many targets as examples" in refusal((x, np.zeros(3, int)))
    assert "DATA104" in refusal((x[:0], np.zeros(0, int)))
    assert "DATA105" in refusal((x.astype(str), np.zeros(4, int)))
    assert "DATA106" in refusal((np.full((4, 2), np.nan), np.zeros(4, int)))
    assert "DATA105" in refusal(types.SimpleNamespace())
    assert "DATA117" in refusal({"train": (x, np.array([0, 1, 0, 1])), "test": (x, np.array([0, 1, 2, 1]))})


def test_a_dataset_of_the_hub_in_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"x": [1.0, 2.0, 3.0, 4.0] * 5, "label": [0, 1] * 10}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "hub"))
    found = open_data(f"hf:{tmp_path / 'hub'}").description
    assert (found.kind, found.class_names, found.examples) == ("table", ("0", "1"), {"train": 18, "val": 2})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    images = {"image": [Image.new("L", (5, 5), value) for value in range(10)], "label": [0, 1] * 5}
    datasets.Dataset.from_dict(images, features).save_to_disk(str(tmp_path / "pictures"))
    found = open_data(f"hf:{tmp_path / 'pictures'}").description
    assert (found.kind, found.class_names, found.in_shape) == ("image", ("no", "yes"), (1, 5, 5))
    assert "DATA115" in refusal(f"hf:{tmp_path / 'nothing'}")


# Division and description ------------------------------------------------------------------------------------


def test_a_division_keeps_classes_in_proportion_and_depends_on_the_seed():
    labels = np.repeat([0, 1, 2], [100, 50, 2])
    rest, taken = divide(labels, 0.2, 0)
    assert np.bincount(labels[taken]).tolist() == [20, 10, 1]
    assert np.array_equal(np.sort(np.concatenate([rest, taken])), np.arange(152))
    assert np.array_equal(divide(labels, 0.2, 0)[1], taken)
    assert not np.array_equal(divide(labels, 0.2, 1)[1], taken)


def test_validation_of_a_known_dataset_comes_out_of_its_training_part():
    whole, test = load_dataset("digits")
    splits = open_data("digits", DataOptions(val_split=0.1))
    assert torch.equal(splits.test.images, test.images)
    assert splits.description.examples == {"train": 1437 - splits.val.num_examples, "val": 143, "test": 360}
    both = {row.numpy().tobytes() for part in (splits.train, splits.val) for row in part.images}
    assert both == {row.numpy().tobytes() for row in whole.images}


@pytest.mark.parametrize("options", [{"val_split": 1.0}, {"val_split": -0.1}, {"size": 0}, {"channels": 2},
                                     {"task": "guess"}, {"augment": ("blur",)}, {"augment": ("shift=-1",)},
                                     {"limit": (0, None)}, {"tokens": "words"}])  # fmt: skip
def test_options_out_of_range_are_refused(options, tmp_path):
    (tmp_path / "t.txt").write_text("some text " * 100)
    data = tmp_path / "t.txt" if "tokens" in options else "digits"
    assert refusal(data, **options).startswith("DATA102")


def test_a_limit_takes_of_each_class(tmp_path):
    splits = open_data(make_images(tmp_path, {"a": 30, "b": 60}), DataOptions(limit=(30, 3)))
    assert splits.train.labels.bincount().tolist() == [10, 20]
    assert splits.val.num_examples == 3


def test_a_description_is_plain_json(tmp_path):
    path = write_csv(tmp_path / "t.csv", HEADER, rows_of_a_table())
    found = open_data(path, DataOptions(target=("price",))).description
    assert DataDescription.from_json(json.loads(json.dumps(found.to_json()))) == found
    for wrong in (5, {}, {**found.to_json(), "kind": "video"}, {**found.to_json(), "in_shape": [0]},
                  {**found.to_json(), "columns": [5]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"needs|unknown|missing|mapping|argument|object"):
            DataDescription.from_json(wrong)


def test_what_does_not_exist_or_has_no_known_ending_is_refused(tmp_path):
    assert "DATA101" in refusal(tmp_path / "nothing")
    (tmp_path / "x.doc").write_text("?")
    assert "got '.doc'" in refusal(tmp_path / "x.doc")
    (tmp_path / "mine.py").write_text("def make(): ...")
    assert "mine.py:FUNCTION" in refusal(tmp_path / "mine.py")


def test_a_folder_called_like_a_known_dataset_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_data("digits").description.notes == ()
    make_images(tmp_path / "digits", {"a": 4, "b": 4})
    assert "./digits" in open_data("digits").description.notes[0]
    assert open_data("./digits").description.class_names == ("a", "b")
