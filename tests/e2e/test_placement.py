"""Experts on vLLM's device, and fewer of them a token, through real vLLM against exact float32 log-probabilities."""

from pathlib import Path

import pytest

from tests.e2e.test_accuracy import assert_exact_enough, score
from tests.tolerances import MAX_MEAN_NLL_DIFFERENCE, NLL_OF_3_EXPERTS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# The tiny model has experts in layers 1 to 3, 16 in each.
WHOLE_AND_SPLIT = """rules:
  - layers: 1-2
    experts: gpu
  - layers: 3
    gpu_experts: [0, 3, 5, 11]
"""
SPLIT_AND_WHOLE = """rules:
  - layers: 1
    gpu_experts: 7
  - layers: 2
    experts: gpu
    num_experts_per_tok: 4
"""


def rules(folder: Path, text: str) -> dict[str, str]:
    (folder / "rules.yaml").write_text(text)
    return {"rules": str(folder / "rules.yaml")}


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.full)])
def test_two_of_three_layers_and_part_of_the_third_on_the_device(mode: str, tmp_path: Path) -> None:
    result, log = score({"enforce_eager": mode == "eager"}, rules(tmp_path, WHOLE_AND_SPLIT))
    assert_exact_enough(result)
    assert "routed experts of layers 1-2 are on vLLM's device" in log
    assert "some routed experts of layers 3 are on vLLM's device" in log
    assert log.count("experts of 1 layers run here") == 1


@pytest.mark.full
def test_tensor_parallel_eager(tmp_path: Path) -> None:
    """The device's experts are cut over the ranks, the executor's are computed by the first."""
    result, log = score({"tensor_parallel_size": 2, "enforce_eager": True}, rules(tmp_path, SPLIT_AND_WHOLE))
    assert_exact_enough(result)
    assert log.count("experts of 2 layers run here") == 1


def test_fewer_experts_a_token() -> None:
    """Against the loss that the model has with 3 of its 4 experts, which is three times the tolerance."""
    result, log = score({"enforce_eager": True}, {"num_experts_per_tok": 3})
    assert "3 experts for each token in layers 1-3" in log
    assert abs(result["nll"] / NLL_OF_3_EXPERTS - 1) < MAX_MEAN_NLL_DIFFERENCE, result
    assert result["nll_difference"] > 2 * MAX_MEAN_NLL_DIFFERENCE, result
