"""A forward and its backward graph as one, for the proof: what the forward's kept values lost counts in gradients.

    forward  `a = mul(t, 1000.0); s = sin(a); ...; return loss, s`    backward  `g = tangent * s; ...; return gradients`
    joint    `a = mul(t, 1000.0); s = sin(a); ...; g = tangent * s; ...; return gradients`

Each graph alone may be right on what it is fed: here the loss hardly depends on `s`, and the backward program computes
the gradients of the wrong one. Test: `test_proof.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.trace.torch_private import version

#: Key of a forward and its backward module's meta: what the one keeps for the other, `Kept`.
KEPT = "ane_kept"
#: Backward calls of which one may be that of the forward call that is held.
_TRIES = 8


class Kept:
    """What a forward graph keeps for its backward graph; holds the last compared call until its backward pass.

    `places`: by number of a backward input, that of the forward result which it is.
    """

    def __init__(self, places: Mapping[int, int]) -> None:
        self.places = dict(places)
        self._graph: GraphModule | None = None
        self._values: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._results: dict[int, tuple[Node, torch.Tensor]] = {}
        self._tries = 0

    def __deepcopy__(self, memo: object) -> Kept:
        """Itself: AOTAutograd gives its compiler a copy of the backward module."""
        return self

    def hold(
        self, graph: GraphModule, values: Sequence[torch.Tensor], results: Mapping[int, tuple[Node, object]]
    ) -> None:
        """Hold a call: what the graph took, and by number the nodes of the results with the tensors that they gave.

        Copied is what may change before the backward pass: buffers, parameters without gradients that the forward
        writes to (power iterations), and batches whose memory is used again.
        """
        self._graph, self._tries = graph, _TRIES
        self._values = [v if _is_trained(v) else v.detach().clone() for v in values]
        self._versions = [version(v) for v in self._values]
        found = {i: results[i] for i in self.places.values() if i in results}
        self._results = {
            i: (n, t) for i, (n, t) in found.items() if isinstance(t, torch.Tensor) and t.numel()
        }

    def are(self, given: Sequence[object]) -> bool:
        """Whether a backward pass got what the call that is held kept."""
        if self._graph is None or not self._results:
            return False
        if self._versions != [version(v) for v in self._values]:
            self._release()  # the forward writes to weights, or the loop did
            return False
        pairs = [(self._results[i][1], given[n]) for n, i in self.places.items() if i in self._results]
        if all(isinstance(g, torch.Tensor) and k.data_ptr() == g.data_ptr() for k, g in pairs):
            return True
        self._tries -= 1
        if not self._tries:
            self._release()
        return False

    def joined(
        self, backward: GraphModule, numbers: Sequence[int], values: Sequence[torch.Tensor]
    ) -> tuple[GraphModule, list[torch.Tensor]]:
        """Both graphs as one, with the results of `backward`, and what it takes; the call is let go.

        `values` is what `backward` takes for the call that is held, from its inputs of these numbers first.
        """
        assert self._graph is not None
        inputs = [n for n in backward.graph.nodes if n.op == "placeholder"]
        known = {n: self._results[i][0] for n, i in self.places.items() if i in self._results}
        sources = {n: known[number] for n, number in zip(inputs, numbers, strict=False) if number in known}
        graph = _joined(self._graph, backward, sources)
        given = [*self._values, *(v for n, v in zip(inputs, values, strict=True) if n not in sources)]
        self._release()
        return graph, given

    def _release(self) -> None:
        self._graph, self._values, self._versions, self._results = None, [], [], {}


def _is_trained(value: torch.Tensor) -> bool:
    return isinstance(value, torch.nn.Parameter) and value.requires_grad


def _joined(forward: GraphModule, backward: GraphModule, sources: Mapping[Node, Node]) -> GraphModule:
    """One graph: a backward input is the forward's result of `sources`; placeholders come first."""
    graph, copies, constants = Graph(), dict[Node, Node](), dict[str, object]()
    for wanted in (True, False):
        for module in (forward, backward):
            for node in module.graph.nodes:
                if (node.op == "placeholder") is not wanted or node.op == "output":
                    continue
                if node in sources:
                    continue
                copies[node] = graph.node_copy(node, lambda n: copies[sources.get(n, n)])
                if node.op == "placeholder":
                    copies[node].target = copies[node].name  # both may have one of this name
                if node.op == "get_attr":
                    name = f"constant_{len(constants)}"
                    copies[node].target, constants[name] = name, operator.attrgetter(str(node.target))(module)
    results = cast("Sequence[Node]", backward.graph.output_node().args[0])
    graph.output(tuple(copies[sources.get(n, n)] for n in results))
    return GraphModule(constants, graph)
