"""The torch.compile backend's shapes, refusals, fallback, graph breaks, options and registration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ane_trainer.ane import dynamo
from ane_trainer.ane.dynamo.report import GraphBreakWarning
from ane_trainer.ane.errors import UnsupportedModel, UsageError

ROOT = Path(__file__).resolve().parents[3]


class Odd(nn.Module):
    """Two layers with operations between them that have no lowering rule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = torch.special.bessel_j0(x.detach()) + x
        return self.b(torch.linalg.inv(x @ x.T + 3 * torch.eye(len(x))) @ x)


def test_each_batch_size_is_compiled_once_up_to_the_limit() -> None:
    model = nn.Linear(8, 4)
    fast = torch.compile(model, backend="ane", options={"recompile_limit": 3})
    for size in (4, 5, 6, 5, 4, 6):
        x = torch.randn(size, 8)
        output = fast(x)
        torch.testing.assert_close(output, model(x), atol=4e-3, rtol=4e-3)
        output.sum().backward()
    assert dynamo.report().compiles == 2 * 3
    with pytest.raises(UsageError, match=r"ANE114 .* at most 3 .* got another one, \[7, 8\]"):
        fast(torch.randn(7, 8))
    fast(torch.randn(5, 8))  # what is compiled goes on working


def test_sizes_that_decide_numbers_are_not_taken_for_others() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, k: int) -> torch.Tensor:
            return (x * k + x.shape[0]).reshape(-1, x.shape[0])

    fast = torch.compile(Scaled(), backend="ane")
    for size, k in ((4, 3), (6, 3), (4, 5), (6, 7), (4, 3), (4, 7)):
        x = torch.randn(size, 2)
        torch.testing.assert_close(fast(x, k), Scaled()(x, k), atol=4e-3, rtol=4e-3)


def test_refusals_come_all_at_once_with_their_lines() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        torch.compile(Odd(), backend="ane")(torch.randn(4, 8))
    assert {finding.op for finding in caught.value.findings} == {
        "aten.special_bessel_j0.default", "aten.linalg_inv_ex.default",
    }  # fmt: skip
    assert all("test_dynamo.py:" in finding.where for finding in caught.value.findings)


def test_fallback_runs_what_is_refused_on_the_cpu_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(4, 8)
    output = torch.compile(model, backend="ane", options={"fallback": "cpu"})(x)
    output.sum().backward()
    assert model.a.weight.grad is not None
    gradient = model.a.weight.grad.clone()
    model.zero_grad()
    expected = model(x)
    expected.sum().backward()
    torch.testing.assert_close(output, expected, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(gradient, model.a.weight.grad, atol=4e-3, rtol=4e-3)
    forward = dynamo.report().programs[0]
    assert len(forward.cpu) == 2
    assert forward.programs >= 2
    assert 0.5 < forward.engine_flop_fraction < 1.0
    assert "on the CPU (fallback)" in str(dynamo.report())


def test_fallback_takes_what_the_chip_refuses() -> None:
    class Long(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).reshape(20000, 2).softmax(0).reshape(200, 200) + 1

    x = torch.randn(200, 200)
    with pytest.raises(UnsupportedModel, match="ANE302"):
        torch.compile(Long(), backend="ane", options={"chip": "m1"})(x)
    torch._dynamo.reset()
    output = torch.compile(Long(), backend="ane", options={"chip": "m1", "fallback": "cpu"})(x)
    torch.testing.assert_close(output, Long()(x), atol=4e-3, rtol=4e-3)
    assert dynamo.report().programs[-1].cpu


def test_a_graph_break_is_reported_in_words() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x * 2 if x.sum() > 0 else x)

    model, x = Broken(), torch.randn(4, 8)
    with pytest.warns(GraphBreakWarning, match=r"cut the model in two: .*test_dynamo.py:\d+"):
        output = torch.compile(model, backend="ane")(x)
    torch.testing.assert_close(output, model(x), atol=4e-3, rtol=4e-3)
    assert len(dynamo.report().graph_breaks) == 1
    assert dynamo.report().graphs == 2


def test_structures_integers_and_constants_pass() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls += 1
            x = self.table(ids + 1) * torch.tensor([2.0])
            return {"x": x, "best": x.argmax(-1), "mask": x > 0, "next": ids + 1}

    model, ids = Tokens(), torch.arange(6).reshape(2, 3)
    got = torch.compile(model, backend="ane")(ids)
    expected = model(ids)
    assert int(model.calls) == 2
    for key in expected:
        assert got[key].dtype == expected[key].dtype
        torch.testing.assert_close(got[key], expected[key], atol=4e-3, rtol=4e-3)
    got["x"].sum().backward()
    assert model.table.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chipp": "m4"}, "Did you mean 'chip'"),
        ({"fallback": "gpu"}, "fallback none or cpu"),
        ({"recompile_limit": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(Exception, match=text):
        torch.compile(nn.Linear(2, 2), backend="ane", options=options)(torch.ones(1, 2))


@pytest.mark.parametrize("first", ["import torch._dynamo, ane_trainer", "import ane_trainer, torch._dynamo"])
def test_the_backend_is_known_without_an_entry_point(first: str) -> None:
    code = f"{first}\nprint('ane' in torch._dynamo.list_backends())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "True"


def test_the_entry_point_alone_is_enough() -> None:
    """An installed package, not imported by the user's script."""
    code = (
        "import torch, importlib.metadata as m\n"
        "from torch._dynamo.backends import registry\n"
        "registry._discover_entrypoint_backends()\n"
        "registry._BACKENDS['ane'] = m.EntryPoint('ane', 'ane_trainer.ane.dynamo:ane', 'torch_dynamo_backends')\n"
        "model, x = torch.nn.Linear(3, 2), torch.ones(1, 3)\n"
        "print(torch.allclose(torch.compile(model, backend='ane')(x), model(x), atol=1e-2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "True"


def test_importing_the_package_does_not_import_dynamo() -> None:
    code = "import sys, ane_trainer\nprint('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "False"


def test_labels_shifted_as_language_models_do_are_taken() -> None:
    """Padded, sliced and flattened on the host; Hugging Face's models compute their loss so."""
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10)
    tokens = torch.arange(12).reshape(3, 4) % 10

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shifted = nn.functional.pad(y, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
        return nn.functional.cross_entropy(head(table(x)).view(-1, 10), shifted, ignore_index=-100)

    found = torch.compile(loss, backend="ane")(tokens, tokens)
    torch.testing.assert_close(found, loss(tokens, tokens), rtol=2e-3, atol=1e-3)
    found.backward()
    assert table.weight.grad is not None


def test_tokens_written_into_another_tensor_look_rows_up() -> None:
    """As encoder-decoder models of Hugging Face's shift their labels to the right; floats are cut on the way."""
    torch.manual_seed(0)
    table = nn.Embedding(5000, 4)
    labels = torch.tensor([[4001, 7, 2999], [1, 4999, 3000]])

    def start(labels: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shifted = labels.new_zeros(labels.shape)
        shifted[:, 1:] = labels[:, :-1].clone()
        shifted[:, 0] = 2
        whole = torch.zeros(2, 3, dtype=torch.int32)
        return table(shifted), whole.copy_(x)

    x = torch.tensor([2.6, -2.6, 0.4])
    found, expected = torch.compile(start, backend="ane")(labels, x), start(labels, x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(found[1], expected[1])
