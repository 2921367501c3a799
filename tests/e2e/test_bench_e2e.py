"""`kt-vllm bench e2e` on vLLM's CPU platform: the times add up, and the executor's are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.score import GGUF, MODEL_DIR

pytestmark = pytest.mark.e2e


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kt_vllm.cli", "bench", "e2e", str(MODEL_DIR), "--kt-gguf", str(GGUF), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
    )


def test_prefill_and_decode(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    process = bench(
        *("--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager", "--json", str(path)),
        *("--prompt-tokens", "64,256", "--batch", "1,3", "--decode-tokens", "8", "--runs", "2"),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "ms/step" in process.stdout and "experts' share" in process.stdout
    report = json.loads(path.read_text())
    assert report["clock"] == ["host"] and report["moe_layers"] == 3
    assert [row["prompt_tokens"] for row in report["prefill"]] == [64, 256]
    for row in report["prefill"]:
        assert row["calls"] == 3 and 0 < row["executor_s"] < row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(row["prompt_tokens"] / row["seconds"])
    assert [row["batch"] for row in report["decode"]] == [1, 3]
    for row in report["decode"]:
        assert row["steps"] == 7 and 0 < row["executor_ms"] < row["step_ms"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
    # 4 of 16 experts of 512 x 256 in Q4_K, and a down projection of more bits, in each of 3 layers.
    assert 3 * 4 * 3 * 512 * 256 * 0.56 < report["experts"]["bytes_per_token"] < 3 * 4 * 3 * 512 * 256 * 0.8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch", "1,x"], "--batch is '1,x', expected numbers such as 1,8,64"),
        (["--trace", "trace.json"], "--trace shows what a GPU does"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    process = bench(*arguments)
    assert process.returncode == 2 and sentence in process.stderr.splitlines()[-1], process.stderr[-2000:]
