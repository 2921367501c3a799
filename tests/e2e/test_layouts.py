"""The tiny model, from the hub and in the layouts of old files, answers as the shipped one; no more is fetched than it
needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kt_vllm.gguf import GGUFModel
from tests import gguf_layouts as layouts
from tests import hub_server
from tests.e2e.score import GGUF, MODEL_DIR

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def write_repositories(folder: Path) -> dict[str, Path]:
    """Config and tokenizer beside safetensors that nobody may ask for; and the GGUF in all old layouts at once."""
    model, weights = folder / "model", folder / "weights"
    model.mkdir()
    for file in MODEL_DIR.glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):  # without which vLLM looks for it in the safetensors
        config.pop(key, None)
    (model / "config.json").write_text(json.dumps(config))
    (model / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
    (model / "model.safetensors.index.json").write_text("{}")
    (weights / "UD-Q4_K_XL").mkdir(parents=True)
    shipped = GGUFModel.open(str(GGUF))
    raws = layouts.read(shipped)
    raws = layouts.expert_each(raws) | {n: r for n, r in layouts.gate_up(raws).items() if n.startswith("blk.2.")}
    raws = {n: r for n, r in raws.items() if not n.startswith(("blk.2.ffn_gate.", "blk.2.ffn_up."))}
    raws = {n: r for n, r in raws.items() if not n.startswith("blk.2.ffn_down_exps")}
    raws = layouts.with_mtp_layer(layouts.bare_correction_bias(layouts.kv_b_fused(raws)))
    layouts.write(
        weights / "UD-Q4_K_XL" / "tiny-UD-Q4_K_XL.gguf",
        layouts.shuffled(raws),
        {**shipped.metadata, "deepseek2.block_count": 5, "deepseek2.nextn_predict_layer_count": 1},
        version=2,
        shards=4,
        empty_first=True,
    )
    (weights / "tiny-Q8_0.gguf").write_bytes(b"not asked for")
    return {"acme/tiny": model, "acme/tiny-GGUF": weights}


def test_log_probabilities_of_old_layouts_from_the_hub(tmp_path: Path) -> None:
    with hub_server.serving(write_repositories(tmp_path)) as hub:
        process = subprocess.run(
            [
                *(sys.executable, "-m", "tests.e2e.layout_logprobs"),
                json.dumps([["acme/tiny", "acme/tiny-GGUF:Q4_K_XL"], [str(MODEL_DIR), str(GGUF)]]),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "TQDM_POSITION": "-1"},
        )
    log = process.stdout + process.stderr
    found = [json.loads(line.partition("LOGPROBS ")[2]) for line in process.stdout.splitlines() if "LOGPROBS " in line]
    assert process.returncode == 0 and len(found) == 2, log[-6000:]
    old, shipped = found
    assert old["gguf"].endswith("UD-Q4_K_XL/tiny-UD-Q4_K_XL-00001-of-00004.gguf")
    assert old["text"] == shipped["text"] and old["text"].strip()
    values = np.array([old["values"], shipped["values"]])
    print(f"{values.shape[1]} log-probabilities, {np.abs(values[0] - values[1]).max()} the largest difference")
    assert values.shape[1] > 200 and values.min() < -1
    assert np.abs(values[0] - values[1]).max() <= 1e-6
    assert "a multi-token-prediction layer, which the main model does not use" in log
    asked = [path for _, path, _ in hub.requests]
    # vLLM takes everything but weights, so that the small index is among it.
    assert [path for path in asked if path.endswith((".safetensors", "Q8_0.gguf"))] == []
    assert len(hub.asked_for("GET", r"resolve/.*\.gguf$")) == 4
    assert hub.asked_for("GET", r"resolve/.*/config.json$") and hub.asked_for("GET", r"resolve/.*/tokenizer.json$")
    # Its progress bars, which TQDM_POSITION makes it draw without a terminal.
    assert "tiny-UD-Q4_K_XL-00002-of-00004.gguf: 100%" in log
