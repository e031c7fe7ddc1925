"""What capture refuses: random operations, and tensor values that decide the program's shape."""

from __future__ import annotations

import torch

from ane_trainer.ane.errors import Finding, UnsupportedModel

_RANDOM = (
    "bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal",
    "normal_functional", "uniform", "native_dropout", "multinomial", "exponential", "rrelu_with_noise",
    "rrelu_with_noise_functional", "poisson",
)  # fmt: skip


def refuse_unsupported(graph: torch.fx.GraphModule) -> None:
    """Raises: UnsupportedModel listing every random operation left in the graph, with its place."""
    findings = []
    for node in graph.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet is not None and packet._qualified_op_name.removeprefix("aten::") in _RANDOM:
            findings.append(
                Finding(
                    node.meta.get("ane_source", node.name),
                    str(node.target),
                    "draws random numbers inside the step, which the engine cannot repeat from a seed.",
                    "Use nn.Dropout, or draw the numbers outside and pass them as an input.",
                )
            )
    if findings:
        raise UnsupportedModel("The model draws random numbers that the engine cannot:", findings)
