"""What soak.py asks vLLM's workers through /collective_rpc: the device's memory, and that the executor goes deaf."""

import torch

from kt_vllm.handover.device_layer import handovers


class SoakWorker:
    """vllm serve --worker-extension-cls benchmarks.soak_worker.SoakWorker: methods of every worker."""

    def soak_memory(self) -> dict[str, int]:
        """Bytes in use on this worker's device: by whomever, and by this process's allocator."""
        if not torch.cuda.is_available():
            return {"device": 0, "allocator": 0}
        free, total = torch.cuda.mem_get_info()
        return {"device": total - free, "allocator": torch.cuda.memory_reserved()}

    def soak_stop_answering(self) -> dict[str, int]:
        """How many coordinators stopped."""
        for handover in handovers:
            handover.coordinator.stop_answering()
        return {"stopped": len(handovers)}
