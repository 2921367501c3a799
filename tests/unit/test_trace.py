"""kt_vllm/bench/trace.py: a profile with known times."""

import json
from pathlib import Path

import pytest

from kt_vllm.bench.trace import summarise_trace


def _step(begin: float, layers: int) -> list[dict]:
    """A graph launch, 10 us of work, then for each layer: 2 us request, 3 us shared experts, 20 us reply, 5 us work."""
    events = [{"name": "cudaGraphLaunch", "ph": "X", "cat": "cuda_runtime", "ts": begin + 1, "dur": 2}]
    now = begin

    def kernel(name: str, us: float, category: str = "kernel") -> None:
        nonlocal now
        events.append({"name": name, "ph": "X", "cat": category, "ts": now, "dur": us})
        now += us

    kernel("embedding", 10)
    for _ in range(layers):
        kernel("_send_rows", 2)
        kernel("shared", 3)
        kernel("_receive_rows", 20)
        kernel("attention", 4)
        kernel("Memcpy DtoD", 1, "gpu_memcpy")
    return events


def _write(path: Path, events: list[dict]) -> Path:
    # Not in order, and with what else such a file has.
    path.write_text(json.dumps({"traceEvents": [*reversed(events), {"name": "process_name", "ph": "M"}]}))
    return path


@pytest.mark.parametrize("first", [0, 7])
def test_a_step_and_its_parts(tmp_path: Path, first: int) -> None:
    """first: events that the profiler came too late for; whole steps count all the same."""
    events = [event for step in range(5) for event in _step(step * 120.0, 3)]
    summary = summarise_trace(_write(tmp_path / "trace.json", events[first:]), 3)
    assert summary is not None
    assert summary["step_us"] == pytest.approx(120) and summary["steps"] in (3, 4)
    assert summary["calls_us"] == pytest.approx(3 * 25)
    assert summary["overlapped_us"] == pytest.approx(3 * 3)
    assert summary["serial_us"] == pytest.approx(10 + 3 * 5)
    assert summary["idle_us"] == pytest.approx(120 - 10 - 3 * 30)
    assert summary["graph_launches"] == pytest.approx(1)
    assert summary["kernels"] == pytest.approx(1 + 3 * 5)
    assert summary["longest"][0] == {"name": "_receive_rows", "count": 3, "us": 60}


def test_nothing_to_say(tmp_path: Path) -> None:
    """Without calls by kernels, and with less than a step of them."""
    assert summarise_trace(_write(tmp_path / "a.json", []), 3) is None
    assert summarise_trace(_write(tmp_path / "b.json", _step(0, 3)), 3) is None
    assert summarise_trace(_write(tmp_path / "c.json", _step(0, 3)), 0) is None
