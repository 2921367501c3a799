"""The whole way of a token, through real vLLM, against exact float32 log-probabilities."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tolerances import MAX_MEAN_KL, MAX_MEAN_NLL_DIFFERENCE, MAX_MISSING_MASS

SCORE = Path(__file__).with_name("score.py")

pytestmark = pytest.mark.e2e

# The longest first, as they run side by side. Compiling is what takes a minute: the rest of it is in FULL.
CONFIGURATIONS = {
    "tensor_parallel_2": {"tensor_parallel_size": 2},
    "pipeline_parallel_2": {"pipeline_parallel_size": 2},
    "compiled": {},
}
FULL = {
    "tensor_parallel_2_eager": {"tensor_parallel_size": 2, "enforce_eager": True},
}


def workers(llm: dict) -> int:
    return llm.get("tensor_parallel_size", 1) * llm.get("pipeline_parallel_size", 1)


def score(llm: dict, kt: dict | None = None, *flags: str) -> tuple[dict, str]:
    """What score.py printed for these arguments, and its whole log."""
    process = subprocess.run(
        [sys.executable, str(SCORE), "--llm", json.dumps(llm), "--kt", json.dumps(kt or {}), *flags],
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
        # vLLM binds one worker to each NUMA node by itself; two workers on one node are told their cores.
        env={**os.environ, **({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if workers(llm) == 2 else {})},
    )
    log = process.stdout + process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("SCORE ")]
    assert process.returncode == 0 and lines, log[-6000:]
    return json.loads(lines[-1].removeprefix("SCORE ")), log


def assert_exact_enough(result: dict) -> None:
    print(result)  # for pytest -rP
    assert result["missing_mass"] < MAX_MISSING_MASS, result
    assert result["nll_difference"] < MAX_MEAN_NLL_DIFFERENCE, result
    assert result["kl"] < MAX_MEAN_KL, result


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_log_probabilities(name: str) -> None:
    result, _ = score(CONFIGURATIONS[name])
    assert_exact_enough(result)


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_log_probabilities_in_other_modes(name: str) -> None:
    result, _ = score(FULL[name])
    assert_exact_enough(result)


@pytest.mark.full
def test_eager_is_wrong_without_our_workaround() -> None:
    """Holds only while vLLM's CPU rotary_embedding is broken; when this fails, remove compat.disable_cpu_rotary_op."""
    result, _ = score({"enforce_eager": True, "compilation_config": {"custom_ops": ["+rotary_embedding"]}})
    assert result["nll_difference"] > 0.5
