"""Data parallel training: a batch in shards, a backward program on each, their sums between processes, one update.

    process 0   shard 0: backward   shard 1: backward  \\
                                                         sum of gradients -> update (the same in every process)
    process 1   shard 2: backward   shard 3: backward  /

Every process reads the whole batch and takes its shards of it. Gradients are fp16 numbers: multiples of 2^-24 below
2^16, of which float64 holds sums of up to 2^13 shards exactly. So the order of summation does not matter, all processes
hold the same bits, and how many processes share the shards changes nothing.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ane_trainer.ane.capture.calibrate import loss_of
from ane_trainer.ane.capture.losses import Loss, get_loss
from ane_trainer.ane.capture.parts import ALL_FIT, PEAKS, is_partial
from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.dispatch.devices import Session
from ane_trainer.ane.dispatch.devices.protocol import Floats
from ane_trainer.ane.errors import DataError, NumericsWarning, PeerLost, UsageError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled, Port

T = TypeVar("T")
Batch = tuple[Any, Any]
F64 = NDArray[np.float64]

#: A loss whose value on the batch is the sum of its shards', to within this, is no mean.
_ALIKE = 1e-3
#: Modules whose results differ from call to call.
_DROPOUTS = (
    torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """A batch in `count` parts of equal size, which `world` processes share; this one is number `rank`."""

    count: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.count < self.world:
            raise UsageError(
                f"shards: needs at least one for each of {self.world} processes; got {self.count}. "
                f"Choose {self.world} or more, or start fewer processes.",
                code="ANE104",
            )

    @property
    def own(self) -> range:
        """The numbers of this process's shards."""
        return range(self.rank * self.count // self.world, (self.rank + 1) * self.count // self.world)

    def of(self, batch: Batch) -> list[Batch]:
        """All shards of a batch (x, y). UsageError if its examples cannot be divided among them."""
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        rows = {len(leaf) for leaf in leaves}
        if len(rows) != 1 or rows == {0} or next(iter(rows)) % self.count:
            got = ", ".join(map(str, sorted(rows))) or "none"
            raise UsageError(
                f"batch: needs a number of examples that {self.count} shards can share, first axis of every tensor; "
                f"got {got}. Choose a batch size that is a multiple of {self.count}.",
                code="ANE104",
            )
        size = next(iter(rows)) // self.count

        def part(number: int) -> Batch:
            rows = slice(number * size, (number + 1) * size)
            x, y = pytree.tree_map(lambda t: t[rows] if isinstance(t, torch.Tensor) and t.dim() else t, batch)
            return x, y

        return [part(number) for number in range(self.count)]


@dataclass(frozen=True)
class Exchange:
    """What the processes of a training tell each other."""

    shards: Shards

    @property
    def leads(self) -> bool:
        """Whether this process writes the run and reports."""
        return self.shards.rank == 0

    def sum(self, values: F64) -> F64:
        """The sum over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: F64) -> F64:
        """The largest over all processes, entry by entry; nan counts as infinite."""
        return self._reduced(
            np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=-np.inf), dist.ReduceOp.MAX
        )

    def broadcast(self, model: torch.nn.Module) -> None:
        """Give the model the parameters and buffers that process 0 has."""
        if self.shards.world > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                given = tensor.detach().contiguous()
                _told(lambda given=given: dist.broadcast(given, 0))  # type: ignore[misc]
                with torch.no_grad():
                    tensor.copy_(given)

    def share(self, value: T) -> T:
        """What process 0 has."""
        box = [value]
        if self.shards.world > 1:
            _told(lambda: dist.broadcast_object_list(box, 0))
        return box[0]

    def agree(self, *wishes: int) -> list[int]:
        """The largest of each wish among all processes."""
        return [int(wish) for wish in self.largest(np.array(wishes, np.float64))]

    def check_alike(self, digest: int, what: str) -> None:
        """DataError DATA118 if the processes have different numbers."""
        highest, lowest = self.largest(np.array([digest, -digest], np.float64))
        self.refuse_different(float(highest), -float(lowest), what)

    @staticmethod
    def refuse_different(highest: float, lowest: float, what: str) -> None:
        """DataError DATA118 unless both are the same."""
        if highest != lowest:
            raise DataError(
                f"train: needs {what} in every process; got different ones. Build data and model from one seed, and "
                "read whole batches in each process (no DistributedSampler): each takes its rows of them.",
                code="DATA118",
            )

    def _reduced(self, values: F64, how: dist.ReduceOp.RedOpType) -> F64:
        if self.shards.world > 1:
            tensor = torch.from_numpy(values)
            _told(lambda: dist.all_reduce(tensor, how))
        return values


def _told(call: Callable[[], object]) -> None:
    """Run a collective call; PeerLost if another process does not answer."""
    try:
        call()
    except RuntimeError as error:
        raise PeerLost(
            f"train: needs all {dist.get_world_size()} processes; one does not answer "
            f"({str(error).splitlines()[0][:120]}). Go on from the last checkpoint, with as many as there are."
        ) from None


def find_exchange(shards: int | None) -> Exchange | None:
    """The exchange of a training in `shards` parts, by default one for each process; None for one part.

    0: this process alone, whatever others there are. Joins the processes that torchrun started, unless the program
    has done so.
    """
    if shards is not None and (not isinstance(shards, int) or shards < 0):
        raise UsageError(
            f"shards: needs a whole number from 0 on; got {shards!r}. Choose one.", code="ANE104"
        )
    if shards == 0:
        return None
    if not dist.is_available():
        return None if shards in (None, 1) else Exchange(Shards(shards or 1))
    if not dist.is_initialized() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        _join()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = Shards(shards or world, rank, world)
    return Exchange(found) if found.count > 1 else None


def _join() -> None:
    """Join the processes that torchrun started; its store outlives a restart, and holds addresses of lost processes."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group("gloo", store=PrefixStore(attempt, store), rank=rank, world_size=world)


def share_of_cores(exchange: Exchange | None) -> int | None:
    """Threads for one of several processes on this machine; None (all cores) where there is one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if exchange and exchange.shards.world > 1 else 1
    return None if here == 1 else max(1, (os.cpu_count() or 1) // here)


def digest_of(model: torch.nn.Module) -> int:
    """A number that tells whether two models have the same bits."""
    found = 0
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = zlib.crc32(raw.numpy().tobytes(), found)
    return found


def check_mean(model: torch.nn.Module, loss: str | Loss, batch: Batch, shards: Shards) -> None:
    """UsageError ANE132 for a loss that is a sum over examples; a warning where the mean over shards is another."""
    function = get_loss(loss)
    whole = loss_of(model, function, batch)
    total = sum(loss_of(model, function, part) for part in shards.of(batch))
    if not whole or not np.isfinite(whole):
        return
    if abs(total / whole - 1.0) < _ALIKE:
        raise UsageError(
            f"loss: needs a mean over examples, so that shards of a batch can be averaged; got a sum ({whole:.4g} on "
            f"the batch, {total:.4g} on its {shards.count} shards together). Divide it by the number of examples.",
            code="ANE132",
        )
    draws = any(isinstance(m, _DROPOUTS) for m in model.modules())
    if not draws and abs(total / shards.count / whole - 1.0) > _ALIKE / 10:
        warnings.warn(
            f"loss: {whole:.4g} on the batch, {total / shards.count:.4g} as the mean over its {shards.count} shards. "
            "Examples influence each other (batch norm, weights by class): each shard is on its own, as in torch's "
            "DistributedDataParallel. Larger batches, or group norm, make the difference small.",
            NumericsWarning,
            stacklevel=4,
        )


class DividedSession:
    """A step in two programs as one session; see the module. Feeds of the batch hold the rows of all shards."""

    def __init__(
        self,
        sessions: tuple[Session, Session],
        programs: tuple[Compiled, Compiled],
        exchange: Exchange,
        dtype: type[np.float16] | type[np.float32],
    ) -> None:
        self._backward, self._update = sessions
        self._exchange, self._dtype = exchange, dtype
        first, second = programs
        self._targets = {p.name: p.target for p in joined_ports(first.inputs, second.inputs)}
        self._names = tuple({p.target: p.name for p in program.inputs} for program in programs)
        self._rows = [p for p in first.inputs if p.role == "batch"]
        self._sums = [p for p in first.outputs if p.target not in (PEAKS, ALL_FIT)]
        self._tests = [next(p for p in first.outputs if p.target == target) for target in (PEAKS, ALL_FIT)]
        self._fed = {p.target: p for p in second.inputs if is_partial(p)}
        updated = {p.target for p in second.inputs if p.name in {alias.input for alias in second.aliases}}
        self._shared = sorted(updated & self._names[0].keys())

    def write(self, port: str, array: Array) -> None:
        """Set an input of the programs that have it."""
        target = self._targets[port]
        for session, names in zip((self._backward, self._update), self._names, strict=True):
            if target in names:
                session.write(names[target], array)

    def read(self, port: str) -> Floats:
        """A copy of a resident input."""
        session, name = self._holder(port)
        return session.read(name)

    def values(self, port: str) -> NDArray[np.float32]:
        """A resident input as float32 numbers."""
        session, name = self._holder(port)
        return session.values(name)

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Floats]:
        """Backward on each own shard, the exchange, the update. PeerLost, before anything changed."""
        sums, tests = self._run_backward(feeds)
        digest = 0
        for name in sorted(feeds):
            digest = zlib.crc32(feeds[name].tobytes(), digest)
        exchange = self._exchange
        agreed = exchange.largest(np.concatenate([tests, [digest, -digest]]))
        exchange.refuse_different(float(agreed[-2]), -float(agreed[-1]), "the same batch and settings")
        means = exchange.sum(sums) / exchange.shards.count
        given, loss = self._partials(means, agreed[:-2])
        results = self._update.run(self._part_of(feeds, 1) | given)
        for target in self._shared:
            self._backward.write(self._names[0][target], self._update.read(self._names[1][target]))
        return {**results, "loss": loss}

    def _run_backward(self, feeds: Mapping[str, Array]) -> tuple[F64, F64]:
        """Sums over this process's shards of what is averaged; the largest of the peaks, and of 1 - fits."""
        shards, found = self._exchange.shards, []
        for number in shards.own:
            own = self._part_of(feeds, 0)
            for port in self._rows:
                given, size = own[port.name], port.shape[0]
                if len(given) == size * shards.count:
                    own[port.name] = given[number * size : (number + 1) * size].reshape(port.shape)
            results = self._backward.run(own)
            sums = [results[p.name].astype(np.float64).reshape(-1) / p.scale for p in self._sums]
            peaks, fits = (results[p.name].astype(np.float64).reshape(-1) / p.scale for p in self._tests)
            found.append((np.concatenate(sums), np.concatenate([peaks, 1.0 - fits])))
        total = np.sum([sums for sums, _ in found], axis=0)
        return total, np.max([np.nan_to_num(tests, nan=np.inf, posinf=np.inf) for _, tests in found], axis=0)

    def _partials(self, means: F64, tests: F64) -> tuple[dict[str, Array], Floats]:
        """What the update is fed, and the loss; gradients that do not fit are zeros, for the update is skipped."""
        fits = bool(np.isfinite(tests).all()) and tests[-1] <= 0.0
        values: dict[str, F64] = {PEAKS: tests[:-1], ALL_FIT: 1.0 - tests[-1:]}
        place, loss = 0, np.zeros(1, np.float32)
        for port in self._sums:
            size = int(np.prod(port.shape))
            part = means[place : place + size]
            place += size
            if port.target == "loss":
                loss = (part * port.scale).astype(np.float32)
            else:
                values[port.target] = part if fits else np.zeros_like(part)
        given = {
            port.name: (values[target] * port.scale).reshape(port.shape).astype(self._dtype)
            for target, port in self._fed.items()
        }
        return given, loss

    def _part_of(self, feeds: Mapping[str, Array], number: int) -> dict[str, Array]:
        """The feeds that a program takes, by its own names."""
        names = self._names[number]
        return {names[t]: value for name, value in feeds.items() if (t := self._targets[name]) in names}

    def close(self) -> None:
        """Release both programs."""
        self._backward.close()
        self._update.close()

    def _holder(self, port: str) -> tuple[Session, str]:
        target = self._targets[port]
        if target in self._names[1]:
            return self._update, self._names[1][target]
        return self._backward, self._names[0][target]


def joined_ports(first: Sequence[Port], second: Sequence[Port]) -> tuple[Port, ...]:
    """The ports of both parts by target, those of the second first; without partial results."""
    known = {p.target for p in second}
    return tuple(p for p in (*second, *(p for p in first if p.target not in known)) if not is_partial(p))


def repeated_draws(ports: Sequence[Port], count: int, make: Callable[[Port], Array]) -> dict[str, Array]:
    """Random draws for `count` shards one after the other, as rows of one feed by port."""
    if count == 1:
        return {p.name: make(p) for p in ports}
    shards = [[make(p) for p in ports] for _ in range(count)]
    return {p.name: np.concatenate([shard[i] for shard in shards]) for i, p in enumerate(ports)}
