"""Non-maximum suppression against a plain double loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.simulator import simulate


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Shared area over joint area of boxes (centre x, centre y, width, height)."""
    wide = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    high = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    shared = max(wide, 0.0) * max(high, 0.0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), per_class=st.booleans())
def test_boxes_by_falling_score_without_those_that_overlap(seed: int, per_class: bool) -> None:
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(1, 4, (1, 9, 4)).astype(np.float16)
    scores = (rng.permutation(18).reshape(1, 9, 2) / 18).astype(np.float16)
    kept: list[int] = []
    best, label = scores[0].max(1), scores[0].argmax(1)
    for i in np.argsort(-best.astype(float)):
        rivals = [j for j in kept if label[j] == label[i] or not per_class]
        wide = boxes[0].astype(np.float64)
        if (
            best[i] >= 0.25
            and len(kept) < 5
            and all(overlap(wide[i], wide[j]) <= float(np.float16(0.3)) for j in rivals)
        ):
            kept.append(int(i))
    b = Builder()
    args = {
        "boxes": b.input("boxes", TensorType("fp16", (1, 9, 4))),
        "scores": b.input("scores", TensorType("fp16", (1, 9, 2))),
    }
    results = b.multi(
        "non_maximum_suppression",
        **args,
        iou_threshold=0.3,
        score_threshold=0.25,
        max_boxes=5,
        per_class_suppression=per_class,
    )
    got = simulate(Program((b.finish(results),)), {"boxes": boxes, "scores": scores}, chip="m5")
    found, found_scores, indices, count = (got[v.name] for v in results)
    assert indices[0].tolist() == kept + [-1] * (5 - len(kept))
    assert count.tolist() == [len(kept)]
    assert np.array_equal(found[0, : len(kept)], boxes[0, kept])
    assert np.array_equal(found_scores[0, : len(kept)], scores[0, kept])
