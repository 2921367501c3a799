"""The C++ executor as the layer sees it: tensors in, addresses out."""

import weakref
from collections.abc import Sequence

import torch

from kt_vllm import _native
from kt_vllm.checkpoint import LayerExperts
from kt_vllm.log import init_logger

logger = init_logger(__name__)

_FLOAT_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class CPUExpertExecutor:
    """Owns the worker threads and the expert weights of this process. One call is in flight at a time."""

    def __init__(
        self,
        *,
        isa: str,
        cpus: Sequence[int],
        max_num_tokens: int,
        nodes: Sequence[int] | None = None,
        spin_ns: int = _native.SPIN_NS,
        caller_works: bool = False,
    ) -> None:
        """One thread an entry of cpus; nodes: the memory node of each, -1 where it is unknown.

        spin_ns: for how long idle threads spin before they sleep. caller_works: the last thread is that of a
        coordinator.
        """
        self.native = _native.Executor(
            isa=isa,
            cpus=list(cpus),
            max_num_tokens=max_num_tokens,
            nodes=None if nodes is None else list(nodes),
            spin_ns=spin_ns,
            caller_works=caller_works,
        )
        self._warned = False
        self._finalizer = weakref.finalize(self, self.native.close)

    def add_layer(self, experts: LayerExperts) -> "LayerHandle":
        """Declares one MoE layer; reads nothing yet. Raises NativeError for shapes or types that cannot be."""
        gate, up, down = (
            _native.ExpertTensor(tensor.type, tensor.shape, list(tensor.spans))
            for tensor in (experts.gate, experts.up, experts.down)
        )
        return LayerHandle(self, self.native.add_layer(gate, up, down), hidden_size=experts.gate.shape[2])

    def warn_of_invalid_ids(self) -> None:
        """Logs once which layer was the first to get expert ids that do not exist, if any did. Calls may go on."""
        layer = self.native.first_layer_with_invalid_ids
        if layer >= 0 and not self._warned:
            self._warned = True
            logger.warning(
                "kt_vllm: the router named experts that do not exist (first seen in layer %d of this process); such "
                "choices count as none. The usual cause is a NaN before this layer.",
                layer,
            )

    def close(self) -> None:
        """Joins the threads and frees the weights."""
        self._finalizer()


class ZeroHandle:
    """A layer whose routed experts were left out: their output is zero."""

    @staticmethod
    def is_capturing() -> bool:
        return False

    def submit(self, *tensors: torch.Tensor | None) -> None:
        """As LayerHandle.submit()."""
        output = tensors[3]
        assert output is not None
        output.zero_()

    def wait(self) -> None:
        """Nothing is in flight."""


class LayerHandle:
    """One layer of the executor."""

    def __init__(self, executor: CPUExpertExecutor, index: int, hidden_size: int) -> None:
        self._executor = executor  # keeps the weights alive as long as a layer refers to them
        self._native = executor.native
        self.index = index
        self._hidden_size = hidden_size

    @staticmethod
    def is_capturing() -> bool:
        """There are no graphs on the host."""
        return False

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        output: torch.Tensor,
        padding: torch.Tensor | None = None,
    ) -> None:
        """hidden_states, output: [num_tokens, hidden_size] of one float type; topk_weights float32, topk_ids int32:
        [num_tokens, top_k]; all contiguous in host memory, and the caller keeps them alive until wait().

        padding: bool [num_tokens], rows of which nobody reads the output; without graphs there are none.
        """
        num_tokens, top_k = topk_ids.shape
        float_type = _FLOAT_TYPES.get(hidden_states.dtype)
        tensors = (hidden_states, topk_weights, topk_ids, output)
        # The executor sees addresses only: what is wrong here would be read or written past the end.
        if not (
            float_type is not None
            and hidden_states.shape == output.shape == (num_tokens, self._hidden_size)
            and output.dtype == hidden_states.dtype
            and topk_weights.shape == topk_ids.shape
            and topk_weights.dtype == torch.float32
            and topk_ids.dtype == torch.int32
            and all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
        ):
            seen = ", ".join(f"{t.dtype} {tuple(t.shape)} strides {t.stride()} on {t.device}" for t in tensors)
            raise ValueError(
                f"layer {self.index}: hidden_states, topk_weights, topk_ids and output are {seen}, expected "
                f"contiguous host tensors, the first and last [num_tokens, {self._hidden_size}] of one float type, "
                f"the others [num_tokens, top_k] of float32 and int32; convert them before submit()."
            )
        self._native.submit(
            self.index,
            hidden_states.data_ptr(),
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
            output.data_ptr(),
            float_type,
            num_tokens,
            top_k,
        )

    def wait(self) -> None:
        """Returns when the output of the last submit() is complete."""
        self._native.wait()
        self._executor.warn_of_invalid_ids()
