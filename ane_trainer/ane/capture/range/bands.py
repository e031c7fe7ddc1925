"""Which values of a graph are in range, and how far rounding moves them: the cost function behind the exponents."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.calibration import Magnitude
from ane_trainer.ane.capture.range.editing import Editor, dims_of, in_update, is_float, number, shape_of

#: A stored value is in range while its largest entry is below the first (squares: the second, since they grow twice
#: as fast in later batches) and its entries are above the third on average.
LARGEST, LARGEST_SQUARE, SMALLEST = 2.0**15, 2.0**10, 2.0**-13
#: An exponent that a value has from its operands stays while the value is between these.
LARGEST_KEPT, SMALLEST_KEPT = 2.0**12, 2.0**-5
#: Where the largest entry of a value, or square, is put that was too large, and the average one that was too small.
WANTED, WANTED_SQUARE, RAISED = 2.0**12, 2.0**5, 2.0**-6
#: Relative rounding error of fp16.
ROUNDING = 2.0**-12


def _aligned_with_number(name: str) -> dict[str, tuple[int, ...]]:
    return {f"aten.{name}.{kind}": (0, 1) for kind in ("Tensor", "Scalar")}


#: Operands that must have one exponent.
ALIGNED: dict[str, tuple[int, ...]] = {
    **_aligned_with_number("add"), **_aligned_with_number("sub"),
    **{k: v for n in ("eq", "ne", "lt", "le", "gt", "ge") for k, v in _aligned_with_number(n).items()},
    "aten.maximum.default": (0, 1), "aten.minimum.default": (0, 1), "aten.where.self": (1, 2), "aten.cat.default": (0,),
    "aten.stack.default": (0,), "aten.clamp.default": (0, 1, 2), "aten.clamp_min.default": (0, 1),
    "aten.clamp_max.default": (0, 1), "aten.clamp.Tensor": (0, 1, 2), "aten.masked_fill.Scalar": (0, 2),
    "aten.hardtanh.default": (0, 1, 2), "aten.select_scatter.default": (0, 1), "aten.slice_scatter.default": (0, 1),
    "aten.constant_pad_nd.default": (0, 2),
}  # fmt: skip
_LINEAR = (
    "neg abs relu view permute expand alias clone unsqueeze squeeze.dim squeeze.dims slice.Tensor select.int "
    "leaky_relu amax amin flip roll repeat _to_copy gather index_select index.Tensor unbind.int split_with_sizes "
    "slice_backward select_backward detach max_pool2d_with_indices avg_pool2d avg_pool2d_backward avg_pool1d "
    "_adaptive_avg_pool2d _adaptive_avg_pool2d_backward max_pool2d_with_indices_backward embedding threshold_backward "
    "embedding_dense_backward upsample_nearest2d upsample_bilinear2d gelu_backward silu_backward "
    "leaky_relu_backward softplus_backward _softmax_backward_data _log_softmax_backward_data nll_loss_forward "
    "nll_loss_backward nll_loss2d_forward nll_loss2d_backward tril triu cumsum "
    "max.dim min.dim max.default min.default diagonal "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle pixel_unshuffle im2col col2im "
    "elu_backward hardswish_backward mish_backward"
)
#: Contractions: places of bias, left and right operand.
CONTRACTIONS: dict[str, tuple[int | None, int, int]] = {
    "aten.mm.default": (None, 0, 1), "aten.bmm.default": (None, 0, 1), "aten.addmm.default": (0, 1, 2),
    "aten.baddbmm.default": (0, 1, 2), "aten.mv.default": (None, 0, 1), "aten.dot.default": (None, 0, 1),
    "aten.convolution.default": (2, 0, 1), "aten.matmul.default": (None, 0, 1),
}  # fmt: skip
TOTALS = ("aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim")
POWERS = ("aten.pow.Tensor_Scalar", "aten.sqrt.default", "aten.rsqrt.default", "aten.reciprocal.default")
PRODUCTS = ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")
#: Sums of entries by their place.
PLACED = frozenset(("aten.index_put.default", "aten.scatter_add.default", "aten.index_add.default",
                    "aten.scatter_reduce.two"))  # fmt: skip
#: Functions of magnitude 1 at most: saturated ones are next to 0 in one batch, and near 1 in another.
BOUNDED = frozenset(f"aten.{n}.default" for n in ("sigmoid", "tanh", "_softmax", "sin", "cos", "erf"))
#: Operations that are linear in their first argument.
LINEAR = frozenset(f"aten.{n}" if "." in n else f"aten.{n}.default" for n in _LINEAR.split())


#: Numbers from here down stand for minus infinity where they are put into others.
MASK = -1e4
_MAKE_MASKS = ("aten.masked_fill.Scalar", "aten.full.default", "aten.scalar_tensor.default")
#: Operations through which they stay what they are.
_KEEP_MASKS = (frozenset(ALIGNED) | LINEAR | frozenset(PRODUCTS)) - frozenset(
    f"aten.{n}" for n in ("relu.default", "abs.default", "neg.default", "maximum.default", "amax.default",
                          "max.default", "max.dim", "clamp_min.default", "clamp.default", "hardtanh.default")
)  # fmt: skip


def reads_number(node: Node, source: Node) -> bool:
    """Whether an operation with floats as its result reads integers as numbers, not as places."""
    name = str(node.target)
    if name in LINEAR:
        return source is node.args[0]
    return any(name in kind for kind in (ALIGNED, PRODUCTS, POWERS, TOTALS)) or name.startswith("aten.log")


class Bands(Editor):
    """Magnitudes of a graph's values, with the noise that rounding leaves in them."""

    def __init__(self, graph: Graph, found: Mapping[str, Magnitude]) -> None:
        super().__init__(graph)
        self.found = dict(found)
        for node in graph.find_nodes(op="call_function", target=operator.getitem):
            source = cast("Node", node.args[0])
            if node.args[1] == 0 and node.name in found and str(source.target).startswith("aten.nll_loss"):
                self.found[source.name] = found[node.name]  # the other result is a count
        self.noise: dict[Node, float] = {}
        self.squares: set[Node] = set()
        self.masked: set[Node] = set()  # which hold, or may hold, numbers that stand for minus infinity
        self._bounds: dict[Node, float] = {}

    def risky(self, node: Node, exponent: int) -> bool:
        """Whether the value, stored with this exponent, leaves the range."""
        size = self.size(node)
        if size is None:
            return False
        most = LARGEST_SQUARE if node in self.squares else LARGEST if exponent == 0 else LARGEST_KEPT
        least = SMALLEST if exponent == 0 else SMALLEST_KEPT
        return size.peak * 2.0**-exponent > most or size.rms * 2.0**-exponent < least

    def why(self, node: Node) -> str:
        """What makes the value, or those that it is made of, leave the range."""
        size = self.size(node)
        if size is None or not self.risky(node, 0):
            return "what it is made of carries one"
        if self.size_is_large(node):
            return f"reaches {size.peak:,.3g}"
        return f"is as small as {size.rms:.2g} (root mean square)"

    def wanted(self, node: Node, natural: int) -> int:
        """The exponent to store the value with: the natural one or none, if they do, else one that fits.

        What stands for minus infinity is not stored larger than it is: saturated and taken back it would be a number.
        """
        if node in self.masked:
            natural = max(natural, 0)
        for exponent in (natural, 0):
            if not self.risky(node, exponent):
                return exponent
        if node in self.masked and not self.size_is_large(node):
            return 0
        size = cast("Magnitude", self.size(node))
        square = node in self.squares
        fewest = math.ceil(math.log2(size.peak / (WANTED_SQUARE if square else WANTED)))
        if self.size_is_large(node):
            return fewest
        bound = self.bound(node)
        room = math.ceil(math.log2(bound / LARGEST)) if 0.0 < bound < math.inf else fewest
        return max(fewest, min(room, 0), math.floor(math.log2(size.rms / RAISED)))

    def bound(self, node: Node) -> float:
        """The magnitude that no batch exceeds, as far as the other factors are as in the example; else infinite."""
        if node not in self._bounds:
            self._bounds[node] = self._bound(node)
        return self._bounds[node]

    def _bound(self, node: Node) -> float:
        name, operands = str(node.target), [a for a in node.args if isinstance(a, Node)]
        if name in BOUNDED:
            return 1.0
        if name.startswith("aten.mul.") and len(node.args) == 2:
            factors = [abs(c) for c in map(number, node.args) if c is not None]
            bounds = [self.bound(a) for a in operands]
            if math.inf in bounds and min(bounds) < math.inf:
                bounds = [b if b < math.inf else self._peak(a) for a, b in zip(operands, bounds, strict=True)]
            return math.prod((*factors, *bounds)) if bounds else math.inf
        return math.inf

    def _peak(self, node: Node) -> float:
        size = self.found.get(node.name)
        return math.inf if size is None else size.peak

    def size(self, node: Node) -> Magnitude | None:
        """A value's magnitude, at least that of what its operands' rounding leaves in it; None where it is 0.

        The mean of a normalized value is 1e-9 by cancellation: no number that a later batch would repeat.
        """
        size = self.found.get(node.name)
        if size is None or size.peak == 0.0:
            return None
        least = 4.0 * self.noise.get(node, 0.0)
        if least <= size.rms or size.spread:
            return size
        return Magnitude(max(size.peak, least), least, size.density)

    def size_is_large(self, node: Node) -> bool:
        """Whether it is its largest entry that leaves the range."""
        size = self.size(node)
        return size is not None and size.peak > (LARGEST_SQUARE if node in self.squares else LARGEST)

    def follow_masks(self, node: Node) -> None:
        """Whether numbers that stand for minus infinity get into the node, in the example or by what it does."""
        size, name = self.found.get(node.name), str(node.target)
        made = name in _MAKE_MASKS and any(c is not None and c <= MASK for c in map(number, node.args))
        kept = name in _KEEP_MASKS and not self.masked.isdisjoint(node.all_input_nodes)
        if made or kept or (size is not None and size.masked):
            self.masked.add(node)

    def _rounding(self, node: Node) -> float:
        """About how far rounding moves the entries of a value."""
        return max(self.noise.get(node, 0.0), self._rms(node) * ROUNDING)

    def _rms(self, node: Node) -> float:
        size = self.found.get(node.name)
        return 0.0 if size is None else size.rms

    def follow_noise(self, node: Node) -> None:
        """How far the rounding of a node's operands moves its entries."""
        nodes = [a for a in node.all_input_nodes if is_float(a)]
        name = str(node.target)
        if not nodes or in_update(node):
            return
        noises = [self._rounding(a) for a in nodes]
        if name in TOTALS:
            count = math.prod(shape_of(nodes[0])[a] for a in dims_of(node) or ()) or 1
            self.noise[node] = noises[0] * (math.sqrt(count) if "sum" in name else 1.0 / math.sqrt(count))
        elif name in ALIGNED or name in PLACED:
            self.noise[node] = max(noises)
        elif name in LINEAR:
            self.noise[node] = noises[0]
        elif name in PRODUCTS or name in CONTRACTIONS:  # nothing cancels in a product: relative errors add
            sizes = [self._rms(a) for a in nodes]
            self.noise[node] = self._rms(node) * sum(n / r for n, r in zip(noises, sizes, strict=True) if r)

    def terms(self, node: Node, a: Node) -> int:
        """How many products each sum has."""
        name = str(node.target)
        if "convolution" in name:
            weight = shape_of(cast("Node", node.args[1]))
            return math.prod(weight[1:])
        return shape_of(a)[-1]
