"""Probabilities at the end of what is compiled: the last sigmoid, softmax or tanh is computed by the host, in fp32.

    before: forward  `x = addmm(...); p = sigmoid(x); return p`     backward  `g = tangent * p * (1 - p); mm(g, ...)`
    after:  engine   `x = addmm(...); return x`                     engine    `mm(g, ...)`, g is fed
            host     `p = sigmoid(x)`                               host      `g = tangent * p * (1 - p)`

fp16 rounds a probability to 1 from a score of 8.4 on, and knows none below 6e-8. A loss outside of the compiled model
(`nn.BCELoss()(p, y)`, `log(p)`, `log(1 - a * a + 1e-6)`) then has another value, and its gradient is infinite, or lost
in 1 - p. The scores have no such end. Test: `test_ends.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.trace.moves import TAKEN
from ane_trainer.ane.capture.trace.simplify import drop_dead
from ane_trainer.ane.dynamo.parts import ancestors, part_of

aten = torch.ops.aten

#: Meta key of the nodes that the host computes behind a forward program.
HOST = "ane_host_end"

_LAST = (aten.sigmoid.default, aten._softmax.default, aten.tanh.default)
#: What may follow the last activation; each operand that is a tensor follows from one, too.
_FOLLOWING = (
    *TAKEN, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.add.Tensor, aten.sub.Tensor,
    aten.rsub.Scalar, aten.neg.default, aten.cat.default, aten._to_copy.default, aten.log.default,
)  # fmt: skip
_TIMES = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class ForwardEnd:
    """A forward graph, cut before its last activations: `module` is the engine's, `tail` the host's.

    `users`: how many results of `module` are the user's. `tail` takes the results of `module` numbered `taken`.
    `results`: where each of the whole graph's comes from, ("module", number) or ("tail", number).
    """

    module: GraphModule
    users: int
    tail: GraphModule
    taken: tuple[int, ...]
    results: tuple[tuple[str, int], ...]

    def whole(self, found: Sequence[object]) -> list[object]:
        """All results, from those of `module`."""
        with torch.no_grad():
            made = self.tail(*(_single(found[i]) for i in self.taken))
        return [{"module": found, "tail": made}[source][number] for source, number in self.results]


@dataclass(frozen=True)
class BackwardStart:
    """A backward graph, cut behind the gradients of the last activations: `head` is the host's, in fp32.

    `module` takes the inputs numbered `taken`, then the results of `head`, which takes those numbered `read`.
    """

    module: GraphModule
    head: GraphModule
    taken: tuple[int, ...]
    read: tuple[int, ...]

    def inputs(self, given: Sequence[object]) -> list[object]:
        """What `module` takes."""
        with torch.no_grad():
            made = self.head(*(_single(given[i]) for i in self.read))
        return [*(given[i] for i in self.taken), *made]


def mark_ends(graph: Graph, results: Sequence[object], kept: Sequence[object] = ()) -> None:
    """Mark the last activations of the results, and what follows from them; not what `kept`, or the engine, needs."""
    following: dict[Node, None] = {}
    for node in graph.nodes:
        if _is_last(node) or _follows(node, following):
            following[node] = None
    wanted = ancestors([n for n in results if isinstance(n, Node)], following)
    behind, count = _behind_gradients(graph), 0
    while count != len(wanted):
        count = len(wanted)
        wanted = {
            n
            for n in wanted
            if n not in kept
            and all(u in wanted or u in behind or u.op == "output" for u in n.users)
            and (_is_last(n) or all(s in wanted for s in n.all_input_nodes))
        }
    for node in wanted:
        node.meta[HOST] = True


def split_forward(module: GraphModule, users: int) -> ForwardEnd | None:
    """Cut a forward graph (changed in place) before what `mark_ends` marked; None if there is nothing."""
    results = cast("Sequence[object]", module.graph.output_node().args[0])
    marked = [n for n in module.graph.nodes if n.op == "call_function" and HOST in n.meta]
    tails = [n for n in results if n in marked]
    if not tails:
        return None
    sources = list(dict.fromkeys(n for m in marked for n in m.all_input_nodes if n not in marked))
    own: list[object] = [n for n in results[:users] if n not in marked]
    own += [n for n in sources if n not in own]
    rest = [*own, *(n for n in results[users:] if n not in marked)]
    made, others = cast("list[Node]", list(dict.fromkeys(tails))), iter(range(len(own), len(rest)))
    places = [
        ("tail", made.index(n)) if n in made else ("module", own.index(n) if i < users else next(others))
        for i, n in enumerate(results)
    ]
    tail = part_of(module, sources, marked, made)
    taken = tuple(rest.index(n) for n in sources)
    module.graph.output_node().args = (cast("tuple[Node, ...]", tuple(rest)),)
    drop_dead(module.graph)
    module.recompile()
    return ForwardEnd(module, len(own), tail, taken, tuple(places))


def split_backward(module: GraphModule) -> BackwardStart | None:
    """Cut a backward graph (changed in place) behind the gradients of what `mark_ends` marked; None without any."""
    graph = module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    kept = {n for n in inputs if HOST in n.meta}
    tangents = {n for n in inputs if n.name.startswith("tangents")}
    known, linear, touching = kept | tangents, set(tangents), set[Node]()
    for node in graph.nodes:
        if node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            known.add(node)
            if any(n in linear for n in node.all_input_nodes):
                linear.add(node)
                if any(n not in linear for n in node.all_input_nodes):
                    touching.add(node)
    host = ancestors(touching) - set(inputs)
    border = [n for n in graph.nodes if n in host & linear and any(u not in host for u in n.users)]
    if not border:
        return None
    read = [n for n in inputs if n in ancestors(border)]
    head = part_of(module, read, [n for n in graph.nodes if n in host], border)
    for number, node in enumerate(border):
        with graph.inserting_after(next(n for n in reversed(graph.nodes) if n.op == "placeholder")):
            new = graph.placeholder(f"tangents_host_{number}")
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    drop_dead(graph)
    for node in inputs:
        if not node.users:
            graph.erase_node(node)
    taken = tuple(i for i, n in enumerate(inputs) if n.users)
    module.recompile()
    return BackwardStart(module, head, taken, tuple(inputs.index(n) for n in read))


def _is_last(node: Node) -> bool:
    """Whether a node is such an activation of something that the engine computed."""
    if node.target not in _LAST:
        return False
    source = node.all_input_nodes[0]
    while source.op == "call_function" and source.target in TAKEN:
        source = source.all_input_nodes[0]
    return source.op == "call_function"


def _follows(node: Node, following: dict[Node, None]) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if node.target in _TIMES:
        return (
            len(node.all_input_nodes) == 1
            and node.args[0] in following
            and not isinstance(node.args[1], Node)
        )
    return node.target in _FOLLOWING and all(n in following for n in node.all_input_nodes)


def _behind_gradients(graph: Graph) -> set[Node]:
    """The nodes of a joint graph that only serve gradients: no result of the forward follows from them."""
    tangents = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("tangents")]
    found = set(tangents)
    for node in graph.nodes:
        if node.op != "output" and any(n in found for n in node.all_input_nodes):
            found.add(node)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and all(u in found for u in node.users):
            found.add(node)
    return found


def _single(value: object) -> object:
    """What the engine gave in fp16, in fp32."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value
