"""Shape arithmetic that several type rules share: broadcasting, axes, windows."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call


def broadcast(call: Call, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape under NumPy's broadcasting rule."""
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    result = []
    for extents in zip(*padded, strict=True):
        sizes = {e for e in extents if e != 1}
        if len(sizes) > 1:
            raise call.refuse(f"needs shapes that broadcast; got {' and '.join(map(str, shapes))}")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def axis(call: Call, value: int, rank: int) -> int:
    """A non-negative axis below `rank`."""
    if not -rank <= value < rank:
        raise call.refuse(f"needs an axis in [{-rank}, {rank}); got {value}")
    return value % rank


def axes(call: Call, name: str, rank: int) -> tuple[int, ...]:
    """The axes parameter `name`, non-negative; absent means all."""
    if not call.has(name):
        return tuple(range(rank))
    found = tuple(axis(call, a, rank) for a in call.integers(name))
    if len(set(found)) != len(found):
        raise call.refuse(f"needs distinct {name}; got {found}")
    return found


def spatial_padding(
    call: Call,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """(before, after) per spatial axis for MIL's pad_type valid, custom, same and same_lower."""
    pad_type = call.text("pad_type")
    if not len(sizes) == len(kernel) == len(strides) == len(dilations):
        raise call.refuse(f"strides and dilations need {len(sizes)} numbers; got {strides} and {dilations}")
    if any(n < 1 for n in (*kernel, *strides, *dilations)):
        raise call.refuse(
            f"needs kernel, strides and dilations of at least 1; got {kernel}, {strides}, {dilations}"
        )
    if pad_type == "valid":
        return ((0, 0),) * len(sizes)
    if pad_type == "custom":
        pad = call.integers("pad") if call.has("pad") else (0,) * (2 * len(sizes))
        if len(pad) != 2 * len(sizes) or any(p < 0 for p in pad):
            raise call.refuse(f"pad needs {2 * len(sizes)} numbers of at least 0; got {pad}")
        return tuple((pad[2 * i], pad[2 * i + 1]) for i in range(len(sizes)))
    if pad_type not in ("same", "same_lower"):
        raise call.refuse(f"pad_type needs valid, custom, same or same_lower; got {pad_type!r}")
    result = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, ((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size)
        small, large = total // 2, total - total // 2
        result.append((small, large) if pad_type == "same" else (large, small))
    return tuple(result)


def windows(
    call: Call,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    *,
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """Output extents of a sliding window; a window that does not fit is refused."""
    result = []
    for size, k, s, d, (before, after) in zip(sizes, kernel, strides, dilations, padding, strict=True):
        span = size + before + after - (k - 1) * d - 1
        if span < 0:
            raise call.refuse(f"the window {k} (dilation {d}) needs an input of its size; got {size}")
        count = (span + s - 1 if ceil_mode else span) // s + 1
        if ceil_mode and before + after and (count - 1) * s >= size + before:
            count -= 1
        result.append(count)
    return tuple(result)
