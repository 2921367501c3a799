"""What soak.py asks vLLM's workers through /collective_rpc: the device's memory, and that the executor goes deaf."""

from typing import Any

import torch

from kt_vllm.bench import e2e_clock


class SoakWorker:
    """vllm serve --worker-extension-cls benchmarks.soak_worker.SoakWorker: methods of every worker."""

    model_runner: Any

    def soak_memory(self) -> dict[str, int]:
        """Bytes in use on this worker's device, by whomever."""
        if not torch.cuda.is_available():
            return {"device": 0}
        free, total = torch.cuda.mem_get_info()
        return {"device": total - free}

    def soak_stop_answering(self) -> dict[str, int]:
        """How many coordinators stopped."""
        e2e_clock.start_clock(self.model_runner.model)
        for handover in e2e_clock._handovers:
            handover.coordinator.stop_answering()
        return {"stopped": len(e2e_clock._handovers)}
