"""Calls of the layer that do not end well. In a process of their own, as everything that imports vLLM."""

import pytest

from tests.unit.test_plugin import run


@pytest.mark.e2e
def test_a_failing_shared_expert_leaves_no_call_in_flight() -> None:
    run(
        """
        from types import SimpleNamespace
        from kt_vllm import layer

        calls = []

        def shared_experts(*_):
            calls.append("shared")
            raise RuntimeError("out of memory")

        method = SimpleNamespace(submit=lambda *_: calls.append("submit"), wait=lambda: calls.append("wait"))
        layer._runner = lambda _: SimpleNamespace(
            routed_experts=SimpleNamespace(quant_method=method), shared_experts=shared_experts
        )
        try:
            layer._moe_forward_shared(None, None, None, None, "layer")
            raise AssertionError("no error")
        except RuntimeError as error:
            assert str(error) == "out of memory"
        assert calls == ["submit", "shared", "wait"], calls
        """
    )
