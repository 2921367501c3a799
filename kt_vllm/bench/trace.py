"""One decode step by torch's profiler: what the device did, and when it waited for the executor."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The kernels of kt_vllm/handover/kernels.py that begin and end a call.
_SENDS = ("_send_rows", "_request")
_RECEIVES = ("_receive_rows", "_await_reply")
_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_NAMED = 12  # kernels with a line of their own


@dataclass(frozen=True)
class _Span:
    name: str
    begin: float  # us
    end: float


def summarise_trace(path: Path, num_layers: int) -> dict[str, Any] | None:
    """Means of a step, in us, of a chrome trace of decode steps; num_layers: calls of the executor in a step.

    calls_us: from the begin of a request to the reply's end, all layers together; overlapped_us: what else the device
    did meanwhile; serial_us: what it did outside; idle_us: neither, between kernels and between steps. None without
    calls by kernels: on the CPU platform, and with host functions.
    """
    events = json.loads(path.read_text())["traceEvents"]
    spans = sorted(
        (
            _Span(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"]))
            for e in events
            if e.get("ph") == "X" and e.get("cat") in _DEVICE_CATEGORIES
        ),
        key=lambda span: span.begin,
    )
    sends = [span for span in spans if span.name.startswith(_SENDS)]
    steps = (len(sends) - 1) // num_layers if num_layers else 0
    if steps < 1:
        return None
    # From a request to the same one some steps later, so that whole steps count wherever the trace began.
    begin, end = sends[0].begin, sends[steps * num_layers].begin
    inside = [span for span in spans if begin <= span.begin < end]
    receives = [span for span in inside if span.name.startswith(_RECEIVES)]
    calls = _pairs([span for span in sends if span.begin < end], receives)
    others = [span for span in inside if not span.name.startswith(_SENDS + _RECEIVES)]
    overlapped = _length(_clip(others, calls))
    call_time = sum(b - a for a, b in calls)
    work = _length([(span.begin, min(span.end, end)) for span in others])
    launches = [
        e
        for e in events
        if e.get("ph") == "X" and e["name"].startswith("cudaGraphLaunch") and begin <= float(e["ts"]) < end
    ]
    times: dict[str, list[float]] = defaultdict(list)
    for span in inside:
        times[span.name].append(span.end - span.begin)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:_NAMED]
    return {
        "steps": steps,
        "step_us": (end - begin) / steps,
        "calls_us": call_time / steps,
        "overlapped_us": overlapped / steps,
        "serial_us": (work - overlapped) / steps,
        "idle_us": (end - begin - call_time - (work - overlapped)) / steps,
        "kernels": len(inside) / steps,
        "graph_launches": len(launches) / steps,
        "longest": [{"name": name, "count": len(t) / steps, "us": sum(t) / steps} for name, t in longest],
    }


def _pairs(sends: list[_Span], receives: list[_Span]) -> list[tuple[float, float]]:
    """From each request to its reply's end; the two alternate."""
    calls, left = [], list(receives)
    for send in sends:
        while left and left[0].begin < send.begin:
            left.pop(0)
        if left:
            calls.append((send.begin, left.pop(0).end))
    return calls


def _clip(spans: list[_Span], windows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The parts of the spans that are within the windows."""
    return [
        (max(span.begin, a), min(span.end, b)) for span in spans for a, b in windows if span.begin < b and span.end > a
    ]


def _length(parts: list[tuple[float, float]]) -> float:
    """Of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(parts):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
