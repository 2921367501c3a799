"""Every model family through vLLM against the exact log-probabilities of Hugging Face's float32 model (tests/zoo)."""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.tolerances import MAX_MEAN_KL, MAX_MEAN_NLL_DIFFERENCE
from tests.zoo.make import MIXES
from tests.zoo.models import MODELS

pytestmark = pytest.mark.e2e

# Each model with other types: every type meets some family here, and all of them in the full zoo.
EAGER = [
    "deepseek-v2:UD-Q2_K_XL:eager",
    "deepseek-v2-lite:Q8_0:eager",
    "deepseek-v3:Q4_K_M:eager",
    "moonlight:IQ2_XXS:eager",
    "kimi-k2:Q6_K:eager",
    "qwen2-moe:Q4_K_M:eager",
    "qwen3-moe:UD-Q2_K_XL:eager",
    "mixtral:Q4_K_M:eager",
    "glm-4.5:Q8_0:eager",
    "glm-4.5-air:BF16:eager",
]
# A compilation takes four times as long as all the rest: a model with no shared expert. DeepSeek-V3's is in
# test_accuracy.py.
COMPILED = ["qwen3-moe:UD-Q2_K_XL:compiled"]
MODES = ("eager", "compiled")
FULL = [f"{name}:{mix}:{mode}" for mode in MODES for name in MODELS for mix in MIXES]


@functools.cache
def results(cases: tuple[str, ...]) -> tuple[dict[str, dict], str]:
    """What tests/zoo/score.py printed for each case, and its whole log; one process for all."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.zoo.score", *cases],
        capture_output=True,
        text=True,
        timeout=120 * len(cases),
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
    )
    lines = [line.removeprefix("ZOO ") for line in process.stdout.splitlines() if line.startswith("ZOO ")]
    return {result["case"]: result for result in map(json.loads, lines)}, process.stdout + process.stderr


def check(cases: list[str], case: str) -> None:
    found, log = results(tuple(cases))
    result = found.get(case, {"error": "no result"})
    print(result)  # for pytest -rP
    assert "error" not in result, f"{result}\n{log[-6000:]}"
    for kind in ("random", "text"):
        assert abs(result[f"{kind}_nll_difference"]) < MAX_MEAN_NLL_DIFFERENCE, result
        assert result[f"{kind}_kl"] < MAX_MEAN_KL, result


def test_every_model_is_served() -> None:
    assert [case.split(":")[0] for case in EAGER] == list(MODELS)
    assert {case.split(":")[1] for case in EAGER} == set(MIXES)


@pytest.mark.slow
@pytest.mark.parametrize("case", EAGER)
def test_log_probabilities(case: str) -> None:
    check(EAGER, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_log_probabilities(case: str) -> None:
    check(COMPILED, case)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("case", FULL)
def test_full_zoo(case: str) -> None:
    name, _, mode = case.split(":")
    check([c for c in FULL if c.startswith(name) and c.endswith(mode)], case)
