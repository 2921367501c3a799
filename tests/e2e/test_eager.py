"""The same as test_accuracy.py in other ways, eager; a file of its own, since files run side by side."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.score import MODEL_DIR
from tests.e2e.test_accuracy import SCORE, assert_exact_enough, score

pytestmark = pytest.mark.e2e


def test_reference_isa_two_threads_and_small_batches() -> None:
    """max_num_seqs 2: the 8 sequences of 256 tokens come in other batches than everywhere else."""
    result, log = score({"enforce_eager": True, "max_num_seqs": 2}, {"isa": "reference", "cpu_infer": 2})
    assert_exact_enough(result)
    assert "reference" in log and "its CPU op is wrong for interleaved RoPE" in log
    for once in ("layers run here. reference", "pinned 2 threads", "of experts in host memory"):
        assert log.count(once) == 1, once


def test_hand_over_to_a_coordinator() -> None:
    """As on a device, but for its kernels: the host plays the stream, in pieces of 300 tokens."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.e2e.handover_on_host"],
        cwd=SCORE.parents[2],
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    log = process.stdout + process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("SCORE ")]
    assert process.returncode == 0 and lines, log[-6000:]
    assert_exact_enough(json.loads(lines[-1].removeprefix("SCORE ")))


def test_eager_with_a_quantization_config_in_the_model_folder(tmp_path: Path) -> None:
    """DeepSeek-R1's config.json announces fp8 weights, for which vLLM's CPU platform has no kernels at all."""
    model = tmp_path / "model"
    model.mkdir()
    for file in MODEL_DIR.glob("*.json"):
        shutil.copy(file, model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (model / "config.json").write_text(json.dumps(config))
    result, log = score({"enforce_eager": True}, {}, "--model", str(model))
    assert_exact_enough(result)
    assert "ignoring the fp8 quantization of config.json" in log
