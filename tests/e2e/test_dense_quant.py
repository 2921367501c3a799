"""Dense weights in int4 through real vLLM, whose CPU platform has a kernel for them; fp8 is for tests/gpu."""

from pathlib import Path

import pytest

from tests.e2e.test_accuracy import score
from tests.tolerances import (
    KL_OF_INT4_HEAD,
    MAX_MEAN_KL,
    MAX_MEAN_KL_QUANTISED,
    MAX_MEAN_NLL_DIFFERENCE,
    MAX_MEAN_NLL_DIFFERENCE_QUANTISED,
    MAX_MISSING_MASS,
    NLL_OF_INT4_HEAD,
)

pytestmark = pytest.mark.e2e


def assert_close(result: dict) -> None:
    print(result)  # for pytest -rP
    assert result["missing_mass"] < MAX_MISSING_MASS, result
    assert result["nll_difference"] < MAX_MEAN_NLL_DIFFERENCE_QUANTISED, result
    # Below the lower one nothing was quantised.
    assert 0.003 < result["kl"] < MAX_MEAN_KL_QUANTISED, result


@pytest.mark.full
def test_int4() -> None:
    result, log = score({"enforce_eager": True}, {"gpu_quant": "int4"})
    assert_close(result)
    assert (
        "dense modules on the device: 4 in bf16, 28 in int4; the head in bf16, as there are no kernels for fp8 on this "
        "platform; embedding, norms and routers in the model's type." in log
    )
    assert log.count("dense linear layers on the device: 4 in bf16, 20 in int4; the head in bf16.") == 1


def test_int4_by_rules_and_parts_of_one_weight(tmp_path: Path) -> None:
    """q_a_proj and kv_a_proj_with_mqa are one weight in vLLM, which takes the more exact of the two wishes."""
    rules = tmp_path / "r.yaml"
    rules.write_text(
        "rules:\n  - match: kv_a_proj\n    gpu_quant: bf16\n  - match: self_attn\n    gpu_quant: int4\n"
        "  - match: shared_experts\n    layers: 2-3\n    gpu_quant: int4\n"
    )
    result, log = score({"enforce_eager": True}, {"rules": str(rules)})
    assert_close(result)
    assert "dense linear layers on the device: 12 in bf16, 12 in int4; the head in bf16." in log
    assert "4 of them are in bf16, as it is one weight with another that is, and q_a_proj was to be in int4" in log


@pytest.mark.full
def test_int4_compiled_in_two_halves() -> None:
    result, _ = score({"tensor_parallel_size": 2}, {"gpu_quant": "int4"})
    assert_close(result)


def check_int4_head(llm: dict, tmp_path: Path) -> None:
    """Alone, by a rule: its error is that of the same head in exact arithmetic, and what bfloat16 adds."""
    rules = tmp_path / "r.yaml"
    rules.write_text("rules:\n  - match: ^lm_head$\n    gpu_quant: int4\n")
    result, log = score(llm, {"rules": str(rules)})
    print(result)  # for pytest -rP
    assert result["missing_mass"] < MAX_MISSING_MASS, result
    assert abs(result["nll"] / NLL_OF_INT4_HEAD - 1) < MAX_MEAN_NLL_DIFFERENCE, result
    # Below nothing was quantised, above more than the head.
    assert abs(result["kl"] - KL_OF_INT4_HEAD) < MAX_MEAN_KL, result
    assert "dense modules on the device: 32 in bf16; the head in int4; embedding, norms and routers" in log
    assert log.count("dense linear layers on the device: 24 in bf16; the head in int4.") == 1


def test_int4_head_by_a_rule(tmp_path: Path) -> None:
    check_int4_head({"enforce_eager": True}, tmp_path)


@pytest.mark.full
def test_int4_head_compiled_in_two_halves(tmp_path: Path) -> None:
    check_int4_head({"tensor_parallel_size": 2}, tmp_path)
