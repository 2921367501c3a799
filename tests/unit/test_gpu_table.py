"""benchmarks/gpu_table.py: from two depths to all layers, with times that are known."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(layers: int) -> dict[str, Any]:
    """2 ms of experts and 0.1 ms of all else a layer, beside 1 ms a step; 10 ms of prefill a layer, beside 5."""
    step, experts = 1 + 2.1 * layers, 2.0 * layers
    seconds = 0.005 + 0.01 * layers
    return {
        "moe_layers": layers,
        "start_seconds": 50.0,
        "memory": {"kv_cache_tokens": 1000},
        "experts": {"bytes_per_token": layers * 200_000_000, "dram_gb_per_s": 150.0},
        "prefill": [{"prompt_tokens": 512, "seconds": seconds, "tokens_per_s": 1, "executor_s": 0, "calls": 1}],
        "decode": [
            {
                "batch": 1,
                "step_ms": step,
                "tokens_per_s": 1e3 / step,
                "executor_ms": experts,
                "between_ms": 0.1,
                "rest_ms": 0.1,
                "graphs": {"FULL": 63},
            }
        ],
    }


def test_all_layers(script: ModuleType) -> None:
    layers, nbytes = script.whole_model("deepseek-r1", "Q4_K_M")
    # 8 of 256 experts of 394 GB.
    assert layers == 58 and nbytes / 1e9 == pytest.approx(393.98 / 32, rel=1e-3)
    rows = {what: (figure, text) for what, figure, text in script.extrapolate(report(3), report(7), layers, nbytes)}
    experts = 2.0 * nbytes / 200e6
    beyond = 1 + 0.1 * 58
    assert float(rows["58 MoE layers, batch 1: tokens/s"][0]) == pytest.approx(1e3 / (experts + beyond), abs=0.01)
    assert "2.100 ms a further layer" in rows["58 MoE layers, batch 1: tokens/s"][1]
    assert float(rows["58 MoE layers, batch 1: beyond the experts, ms"][0]) == pytest.approx(beyond, abs=0.01)
    assert rows["58 MoE layers, batch 1: beyond the experts, ms"][1].startswith("ok")
    bound = float(rows["58 MoE layers, batch 1: DRAM bound, tokens/s"][0])
    assert bound == pytest.approx(1e3 / (nbytes / 150e9 * 1e3), abs=0.01)
    assert float(rows["58 MoE layers, prompt of 512: tokens/s"][0]) == pytest.approx(512 / 0.585, abs=0.1)


def test_the_table_of_a_folder(tmp_path: Path) -> None:
    trace = {
        "batch": 1,
        "serial_us": 800.0,
        "overlapped_us": 300.0,
        "executor_us": 14000.0,
        "handover_us_per_layer": 10.0,
        "idle_us": 100.0,
        "graph_launches": 1.0,
    }
    (tmp_path / "e2e-many.json").write_text(json.dumps({**report(7), "trace": trace}))
    (tmp_path / "e2e-few.json").write_text(json.dumps(report(3)))
    found = {"score": {"nll_difference": 0.0007, "kl": 0.0012}, "decode": {"1": {"mean": 0.01, "graphs": {"FULL": 23}}}}
    (tmp_path / "accuracy-graphs.json").write_text(json.dumps({"status": 0, **found, "trace": {"error": "no CUPTI"}}))
    (tmp_path / "soak.log").write_text("noise\nsoak: 600 s, 10 requests completed\n")
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert process.returncode == 0, process.stderr
    # 15.7 ms beside 0.8 + 14 + 7 x 0.01.
    for text in ("0.070%, 0.0012", "10 requests completed", "no CUPTI", "1.056", "ok: at most 1.1", "58 MoE layers"):
        assert text in process.stdout, text


def test_an_empty_folder(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, check=False, timeout=60)
    assert process.returncode == 0
