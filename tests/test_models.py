"""Tests of ane_trainer/models.py: the ready-made networks, users' files, Keras."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from ane_trainer.ane.errors import UsageError
from ane_trainer.data import load_dataset
from ane_trainer.models import ACTIVATIONS, MODELS, build_model, load_model_class


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


IMAGE_MODELS = sorted(MODELS.keys() - {"gpt"})


def test_the_model_of_text_sees_only_what_came_before():
    model = build_model("gpt", in_shape=(6,), num_classes=11, seed=0)
    tokens = torch.randint(11, (3, 6))
    scores = model(tokens)
    assert scores.shape == (3, 11, 6)
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 11
    assert torch.allclose(model(later)[:, :, :4], scores[:, :, :4], atol=1e-6)
    assert not torch.allclose(model(later)[:, :, 4:], scores[:, :, 4:], atol=1e-3)
    with pytest.raises(UsageError, match="in_shape="):
        build_model("gpt", in_shape=(1, 8, 8))


def test_the_default_mlp_is_784_256_10_gelu():
    model = build_model("mlp")
    assert [type(layer).__name__ for layer in model] == ["Flatten", "Linear", "GELU", "Linear"]
    assert parameters(model) == 784 * 256 + 256 + 256 * 10 + 10 == 203_530


def test_mlp_hidden_sizes():
    model = build_model("mlp", in_shape=(1, 8, 8), num_classes=3, hidden=(32, 16), activation="tanh")
    assert [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)] == [
        (32, 64),
        (16, 32),
        (3, 16),
    ]
    assert sum(isinstance(layer, nn.Tanh) for layer in model) == 2
    assert parameters(build_model("mlp", hidden=64)) == parameters(build_model("mlp", hidden=[64]))
    assert parameters(build_model("mlp", hidden=())) == 7850


def test_the_default_cnn_is_two_convolutions_with_pooling_and_one_linear():
    kinds = [type(layer).__name__ for layer in build_model("cnn")]
    assert kinds == ["Conv2d", "ReLU", "MaxPool2d"] * 2 + ["Flatten", "Linear"]


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("in_shape", [(1, 28, 28), (1, 8, 8), (3, 32, 32)])
def test_every_model_maps_images_to_scores_and_every_parameter_gets_a_gradient(name, in_shape):
    model = build_model(name, in_shape=in_shape, num_classes=7, seed=0)
    output = model(torch.randn(4, *in_shape))
    assert output.shape == (4, 7)
    nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_model_learns_digits(name):
    train, test = load_dataset("digits", batch_size=64, seed=0)
    model = build_model(name, in_shape=train.in_shape, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    assert right / test.num_examples > 0.93


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_builds_a_working_model(activation):
    output = build_model("mlp", in_shape=(4,), hidden=(8,), activation=activation)(torch.randn(2, 4))
    assert torch.isfinite(output).all()


def test_the_transformer_is_not_blind_to_the_order_of_patches():
    model = build_model("transformer", seed=0)
    image = torch.randn(1, 1, 28, 28)
    assert not torch.allclose(model(image), model(image.roll(7, dims=3)), atol=1e-4)


def test_the_transformer_cuts_the_image_into_its_square_patches():
    model = build_model("transformer", in_shape=(2, 8, 8), patch=4)
    image = torch.arange(2 * 8 * 8, dtype=torch.float32).reshape(1, 2, 8, 8)
    seen = []
    model.embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(image)
    assert torch.equal(seen[0][0, 1], image[0, :, 0:4, 4:8].flatten())
    assert torch.equal(seen[0][0, 2], image[0, :, 4:8, 0:4].flatten())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = build_model(name, seed=11)
    assert torch.equal(torch.rand(2), expected)
    again, other = build_model(name, seed=11), build_model(name, seed=12)
    pairs = zip(first.state_dict().items(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert not torch.equal(list(first.parameters())[-2], list(other.parameters())[-2])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ({"name": "mpl"}, "ANE102", "Did you mean 'mlp'?"),
        ({"name": "mlp", "activation": "RELU6X"}, "ANE102", "Did you mean 'relu6'?"),
        ({"name": "mlp", "framework": "kears"}, "ANE102", "Did you mean 'keras'?"),
        ({"name": "mlp", "hiden": 3}, "ANE103", "Did you mean 'hidden'?"),
        ({"name": "cnn", "hidden": (3,)}, "ANE103", "'hidden'"),
        ({"name": "mlp", "hidden": (16, 0)}, "ANE103", "(16, 0)"),
        ({"name": "mlp", "num_classes": 0}, "ANE103", "num_classes"),
        ({"name": "cnn", "in_shape": (1, 3, 28)}, "ANE103", "3x28"),
        ({"name": "cnn", "in_shape": (784,)}, "ANE103", "(784,)"),
        ({"name": "transformer", "patch": 5}, "ANE103", "patch=5"),
        ({"name": "transformer", "width": 62}, "ANE103", "width=62"),
    ],
)
def test_refusals_name_the_value_and_the_way_out(arguments, code, text):
    with pytest.raises(UsageError) as caught:
        build_model(**arguments)
    assert caught.value.code == code
    assert text in str(caught.value)


def test_the_smallest_image_that_the_cnn_takes():
    assert build_model("cnn", in_shape=(1, 4, 4))(torch.zeros(1, 1, 4, 4)).shape == (1, 10)


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "ane_trainer_test_helper.py").write_text("WIDTH = 5\n")
    path = tmp_path / "net.py"
    path.write_text(
        textwrap.dedent(
            """
            from torch import nn
            from ane_trainer_test_helper import WIDTH

            class Plain(nn.Sequential):
                def __init__(self):
                    super().__init__(nn.Flatten(), nn.Linear(784, WIDTH))

            class Shaped(nn.Sequential):
                def __init__(self, in_shape, num_classes=2, bias=True):
                    super().__init__(nn.Flatten(), nn.Linear(in_shape[-1], num_classes, bias=bias))

            def make(num_classes):
                return nn.Linear(3, num_classes)

            class Greedy(nn.Module):
                def __init__(self, vocabulary):
                    super().__init__()

            def wrong():
                return 3

            CONSTANT = 1
            """
        )
    )
    return path


def test_a_users_class_gets_the_arguments_that_it_takes(user_file):
    assert build_model(f"{user_file}:Plain")[1].out_features == 5
    shaped = build_model(f"{user_file}:Shaped", in_shape=(6,), num_classes=4, bias=False)
    assert (shaped[1].in_features, shaped[1].out_features, shaped[1].bias) == (6, 4, None)
    assert build_model(f"{user_file}:make", num_classes=9).out_features == 9
    assert load_model_class(f"{user_file}:Plain").__name__ == "Plain"


@pytest.mark.parametrize(
    ("attribute", "code", "text"),
    [
        ("Plan", "ANE102", "Did you mean 'Plain'?"),
        ("CONSTANT", "ANE102", "needs a class or function"),
        ("Greedy", "ANE103", "vocabulary"),
        ("wrong", "ANE103", "got int"),
    ],
)
def test_a_users_class_that_does_not_do(user_file, attribute, code, text):
    with pytest.raises(UsageError) as caught:
        build_model(f"{user_file}:{attribute}")
    assert caught.value.code == code
    assert text in str(caught.value)


def test_options_that_a_users_class_does_not_take_are_refused(user_file):
    with pytest.raises(UsageError, match="activation"):
        build_model(f"{user_file}:Plain", activation="relu")


def test_a_missing_file_and_a_broken_file(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        build_model(f"{tmp_path}/none.py:Net")
    (tmp_path / "broken.py").write_text("class Net(:\n")
    with pytest.raises(UsageError, match="cannot be imported"):
        build_model(f"{tmp_path}/broken.py:Net")
    with pytest.raises(UsageError, match="ClassName"):
        load_model_class("net.py:")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
    )  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is optional")
def test_keras_models_are_modules_that_learn_in_the_layout_of_torch(tmp_path):
    code = """
        import torch
        from torch import nn
        from ane_trainer.models import build_model
        torch.manual_seed(0)
        for name, options in (("mlp", {"hidden": 16}), ("cnn", {"channels": (4, 8)})):
            options |= {"in_shape": (1, 8, 12), "num_classes": 5}
            keras_model = build_model(name, framework="keras", seed=1, **options)
            torch_model = build_model(name, **options)
            assert isinstance(keras_model, nn.Module)
            shapes = [sorted(p.numel() for p in m.parameters()) for m in (keras_model, torch_model)]
            assert shapes[0] == shapes[1], shapes
            again = build_model(name, framework="keras", seed=1, **options)
            assert all(map(torch.equal, keras_model.parameters(), again.parameters()))
            x, y = torch.randn(20, 1, 8, 12), torch.arange(20) % 5
            optimizer = torch.optim.Adam(keras_model.parameters(), lr=0.01)
            losses = []
            for _ in range(15):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(keras_model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
            assert losses[-1] < 0.7 * losses[0], losses
        print("good")
    """
    done = run_python(code, HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.stdout.strip() == "good", done.stderr[-2000:]


KERAS_REFUSED = """
    from ane_trainer.ane.errors import AneTrainerError
    from ane_trainer.models import build_model
    try:
        build_model("mlp", framework="keras")
    except AneTrainerError as error:
        print(error.exit_code, error)
"""


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is optional")
def test_keras_on_another_backend_is_refused(tmp_path):
    done = run_python(KERAS_REFUSED, HOME=str(tmp_path), KERAS_BACKEND="jax")
    assert done.stdout.startswith("2 ANE203"), done.stderr[-2000:]
    assert "KERAS_BACKEND=torch" in done.stdout


def test_without_keras_the_extra_is_named(tmp_path):
    # A package that fails to import stands before the real one, as where Keras is missing.
    (tmp_path / "keras.py").write_text("raise ModuleNotFoundError(\"No module named 'keras'\")\n")
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(KERAS_REFUSED))
    assert done.stdout.startswith("2 ANE201"), done.stderr[-2000:]
    assert "ane_trainer[keras]" in done.stdout


def test_a_transformer_in_keras_is_refused():
    done = run_python(KERAS_REFUSED.replace('"mlp"', '"transformer"'))
    assert done.stdout.startswith("1 ANE103"), done.stderr[-2000:]
