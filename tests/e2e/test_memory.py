"""Loading needs the dense model and the experts once, and little else."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.gguf import GGUFModel
from tests import gguf_files as files

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
# Layers of DeepSeek-V2-Lite (its 1408 rounded up to whole Q4_K blocks), four of them with experts: 1.4 GB.
SHAPE = files.Shape(
    vocab=4096,
    hidden=2048,
    dense_intermediate=4096,
    intermediate=1536,
    layers=5,
    first_dense=1,
    experts=64,
    top_k=6,
    heads=16,
    q_lora=512,
    kv_lora=512,
    nope=128,
    rope=64,
    v=128,
)
# The peak beside the dense weights while all of it is read: so many times the experts, and what a process takes by
# itself (modules imported meanwhile, tensors on their way, the executor's workspace: 40 to 80 MB).
MAX_EXPERTS_RATIO = 1.05
OF_THE_PROCESS = 64 << 20
# Then vLLM packs the dense weights for its CPU kernels, each beside its packed copy: 40 to 70 MB.
OF_PACKING = 96 << 20


def type_of(name: str) -> str:
    if "_exps." in name:
        return "Q4_K"
    return "F32" if "norm" in name or "exp_probs" in name or "gate_inp" in name else "Q8_0"


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """Not in tmp_path, which pytest keeps."""
    with tempfile.TemporaryDirectory() as folder:
        path = files.model_folder(
            Path(folder) / "model",
            hidden_size=SHAPE.hidden,
            intermediate_size=SHAPE.dense_intermediate,
            moe_intermediate_size=SHAPE.intermediate,
            num_hidden_layers=SHAPE.layers,
            n_routed_experts=SHAPE.experts,
            num_experts_per_tok=SHAPE.top_k,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.heads,
            q_lora_rank=SHAPE.q_lora,
        )
        files.write_random(path / "model.gguf", SHAPE, type_of)
        yield path


def test_peak_at_load(model: Path) -> None:
    plan = CheckpointPlan.build(
        GGUFModel.open(str(model / "model.gguf")), json.loads((model / "config.json").read_text())
    )
    dense, experts = plan.dense_bytes_at(2), plan.expert_bytes
    assert experts > 1e9
    process = subprocess.run(
        [sys.executable, "-m", "tests.e2e.load_memory", str(model), str(model / "model.gguf")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    found = [line.partition("MEMORY ")[2] for line in process.stdout.splitlines() if "MEMORY " in line]
    assert process.returncode == 0 and len(found) == 1, process.stdout[-3000:] + process.stderr[-3000:]
    memory = json.loads(found[0])
    most = MAX_EXPERTS_RATIO * experts + OF_THE_PROCESS
    loaded, packed = (memory[stage] - memory["before"] - dense for stage in ("loaded", "packed"))
    report = (
        f"dense {dense / 1e6:.0f} MB, experts {experts / 1e6:.0f} MB: the peak is dense + {loaded / 1e6:.0f} MB when "
        f"all is loaded, at most {most / 1e6:.0f} expected, and {(packed - loaded) / 1e6:.0f} MB more when vLLM has "
        "packed it"
    )
    print(report)
    # Less than all of it would mean that the wrong process or the wrong moment was looked at.
    assert 0.95 * experts < loaded < most, report
    assert 0 <= packed - loaded < OF_PACKING, report
