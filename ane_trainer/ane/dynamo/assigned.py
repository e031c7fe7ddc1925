"""`x.data = value` in what is compiled, as a write into x.

    before: `set_(x, value)`, another storage for x      after: `x.data.copy_(value)`

So momentum encoders and power iterations are written (`k.data = k.data * m + q.data * (1 - m)`). AOTAutograd takes
`set_` only where it may stay in the graph, which a program has no place for. A value that is an input's own storage
(`k.data = q.data`) is left as it is: the two would be one tensor from there on. Test: `test_assigned.py`.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.dynamo.torch_private import data_of

_OWN = ("_get_data_attr", "detach", "view", "t", "transpose", "permute", "__getitem__", "getitem", "reshape")


def as_writes(module: GraphModule) -> GraphModule:
    """The graph with its assignments of data written so, changed in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.Tensor.set_ or len(node.args) != 2:
            continue
        x, value = node.args
        if not isinstance(x, Node) or not isinstance(value, Node) or not _alike(x, value) or _is_own(value):
            continue
        with graph.inserting_before(node):
            held = graph.call_function(data_of, (x,))
            written = graph.call_method("copy_", (held, value))
        held.meta = written.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        for user in list(node.users):  # Dynamo hides the write from the version count
            if user.users:
                user.replace_all_uses_with(x)
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()
    return module


def _alike(x: Node, value: Node) -> bool:
    """Whether both have one shape and type."""
    a, b = x.meta.get("example_value"), value.meta.get("example_value")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype


def _is_own(node: Node) -> bool:
    """Whether a tensor is an input, or a view of one."""
    while node.op != "placeholder" and getattr(node.target, "__name__", node.target) in _OWN:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"
