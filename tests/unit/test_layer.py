"""Calls of the layer that do not end well."""

from types import SimpleNamespace

import pytest


def test_a_failing_shared_expert_leaves_no_call_in_flight(monkeypatch):
    pytest.importorskip("vllm")
    from kt_vllm import layer

    calls = []

    def shared_experts(*_):
        calls.append("shared")
        raise RuntimeError("out of memory")

    method = SimpleNamespace(submit=lambda *_: calls.append("submit"), wait=lambda: calls.append("wait"))
    runner = SimpleNamespace(routed_experts=SimpleNamespace(quant_method=method), shared_experts=shared_experts)
    monkeypatch.setattr(layer, "_runner", lambda _: runner)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer._moe_forward_shared(None, None, None, None, "layer")
    assert calls == ["submit", "shared", "wait"]
