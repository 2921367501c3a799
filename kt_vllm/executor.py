"""The C++ executor as the layer sees it: tensors in, addresses out."""

import weakref
from collections.abc import Sequence

import torch

from kt_vllm import _native
from kt_vllm.checkpoint import LayerExperts

_FLOAT_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# Tokens of one executor call; longer batches are cut. Enough for every expert of a 256-expert layer to see over a
# hundred tokens, where reading weights no longer dominates; bounds the workspace.
MAX_TOKENS_PER_CALL = 4096


class CPUExpertExecutor:
    """Owns the worker threads and the expert weights of this process. One call is in flight at a time."""

    def __init__(self, *, isa: str, cpus: Sequence[int], max_num_tokens: int) -> None:
        self.native = _native.Executor(
            isa=isa, cpus=list(cpus), max_num_tokens=max(1, min(max_num_tokens, MAX_TOKENS_PER_CALL))
        )
        self._finalizer = weakref.finalize(self, self.native.close)

    def add_layer(self, experts: LayerExperts) -> "LayerHandle":
        """Declares one MoE layer; reads nothing yet. Raises NativeError for shapes or types that cannot be."""
        gate, up, down = (
            _native.ExpertTensor(tensor.type, tensor.shape, list(tensor.spans))
            for tensor in (experts.gate, experts.up, experts.down)
        )
        return LayerHandle(self, self.native.add_layer(gate, up, down))

    def close(self) -> None:
        """Joins the threads and frees the weights."""
        self._finalizer()


class LayerHandle:
    """One layer of the executor."""

    def __init__(self, executor: CPUExpertExecutor, index: int) -> None:
        self._executor = executor  # keeps the weights alive as long as a layer refers to them
        self._native = executor.native
        self._index = index

    def submit(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, output: torch.Tensor
    ) -> None:
        """hidden_states, output: [num_tokens, hidden_size] of one float type; topk_weights float32, topk_ids int32:
        [num_tokens, top_k]; all contiguous, and the caller keeps them alive until wait()."""
        num_tokens, top_k = topk_ids.shape
        if not (
            hidden_states.is_contiguous()
            and topk_weights.is_contiguous()
            and topk_ids.is_contiguous()
            and topk_weights.dtype == torch.float32
            and topk_ids.dtype == torch.int32
        ):
            raise ValueError(
                f"layer {self._index}: expected contiguous tensors, float32 weights and int32 ids; got strides "
                f"{hidden_states.stride()}, {topk_weights.stride()} ({topk_weights.dtype}), "
                f"{topk_ids.stride()} ({topk_ids.dtype})"
            )
        self._native.submit(
            self._index,
            hidden_states.data_ptr(),
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            output.data_ptr(),
            _FLOAT_TYPES[hidden_states.dtype],
            num_tokens,
            top_k,
        )

    def wait(self) -> None:
        """Returns when the output of the last submit() is complete."""
        self._native.wait()
