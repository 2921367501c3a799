"""vLLM's GPU worker, which says when a step begins."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from kt_vllm.handover.device_layer import begin_step


class KTWorker(Worker):
    """Chosen by vLLM's own setting worker_cls. Graphs run no code of ours, and an idle coordinator sleeps."""

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        begin_step()
        return super().execute_model(*args, **kwargs)
