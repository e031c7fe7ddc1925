"""Detect tensors whose values leave PyTorch during a trace: what comes back is a constant of the program.

`x.numpy()`, `np.asarray(x)` and `x.tolist()` copy memory without an operation, so that no recorder sees them; a step
would go on with the first batch's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: The methods that give a tensor's memory away, by the name that people write.
_READS = {
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "numpy.asarray()",
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.__dlpack__: "from_dlpack()",
    torch.Tensor.untyped_storage: "untyped_storage()",
}


class MemoryReads(TorchFunctionMode):
    """Calls `found(name)` for each such read of a tensor of which `knows` is false."""

    def __init__(self, knows: Callable[[torch.Tensor], bool], found: Callable[[str], None]) -> None:
        super().__init__()
        self._knows, self._found = knows, found

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Any = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = _READS.get(func)
        if name is not None and isinstance(args[0], torch.Tensor) and not self._knows(args[0]):
            self._found(name)
        return func(*args, **(kwargs or {}))
