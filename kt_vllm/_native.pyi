"""The typed face of the C++ core (csrc/bindings.cpp). Importing it needs neither torch nor vLLM."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

class NativeError(ValueError):
    """kt::Error: what was seen, what was expected, what to do."""

class ExpertTensor:
    """One projection of all experts of a layer, as runs of bytes in files.

    shape: (num_experts, num_rows, num_cols); spans: [(path, offset, bytes), ...] in order, together the whole tensor.
    """

    def __init__(self, type: str, shape: tuple[int, int, int], spans: list[tuple[str, int, int]]) -> None: ...

class Executor:
    """csrc/executor/moe_executor.h. Methods that block release the GIL."""

    def __init__(
        self,
        *,
        isa: str,
        cpus: list[int],
        max_num_tokens: int,
        nodes: list[int] | None = None,
        spin_ns: int = ...,
        caller_works: bool = False,
    ) -> None:
        """One worker an entry of cpus; nodes: the memory node of each, -1 (as without nodes) where it is unknown.

        spin_ns: for how long idle workers spin before they sleep (SPIN_NS). caller_works: the last worker is whoever
        calls submit() and wait(), as a Coordinator does.
        """
    @property
    def isa(self) -> str: ...
    @property
    def isa_reason(self) -> str: ...
    @property
    def placement_report(self) -> str:
        """One line: which CPUs the workers are pinned to, and why not where they are not."""
    @property
    def memory_report(self) -> str:
        """One line: bytes of the experts, how much of them in huge pages, on which memory nodes."""
    @property
    def num_invalid_ids(self) -> int: ...
    @property
    def first_layer_with_invalid_ids(self) -> int:
        """-1: none so far. Both may be asked for while calls go on."""
    @property
    def num_parks(self) -> int:
        """How often a worker was left out for a while because others took its CPU."""
    def add_layer(self, gate: ExpertTensor, up: ExpertTensor, down: ExpertTensor) -> int: ...
    def workspace_bytes(self, top_k: int, layer: int) -> int:
        """Host memory that calls of a layer take beside the weights; layers share it, so the largest counts."""
    def start_loading(self) -> None: ...
    def load_progress(self) -> tuple[int, int, bool]:
        """(bytes_done, bytes_total, finished); raises what a reader met."""
    def cancel_loading(self) -> None: ...
    def choose_prefetch(self, top_k: int) -> str:
        """Times single tokens with each way of prefetching weights, keeps the faster one, and says which."""
    def submit(
        self,
        layer: int,
        hidden_states: int,
        topk_ids: int,
        topk_weights: int,
        output: int,
        float_type: str,
        num_tokens: int,
        top_k: int,
    ) -> None:
        """Addresses of contiguous host memory: see MoEForwardParams. float_type: "float32" | "float16" | "bfloat16"."""
    def wait(self) -> None: ...
    def close(self) -> None:
        """Joins the workers and frees the weights; idempotent. Every other method then raises NativeError."""

class Coordinator:
    """csrc/handover/coordinator.h: answers the calls that a device makes through mailboxes in pinned memory."""

    def __init__(
        self,
        *,
        executor: Executor | None,
        slots: list[tuple[int, int, int, int, int]],
        layers: list[tuple[int, int]],
        float_type: str,
        hidden_size: int,
        max_tokens: int,
        worker_cpus: list[int],
        watchdog_seconds: float,
        spin_ns: int = ...,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """slots: addresses of mailbox, hidden states, ids, weights and output. layers: (executor's number, top_k).

        spin_ns: for how long it spins after a call (twice STEP_SPIN_NS). executor None answers all calls at once and
        leaves the output as it is. on_failure: gets a sentence, in a thread of its own, some seconds before the
        process ends.
        """
    @property
    def stats(self) -> dict[str, int]:
        """num_calls, num_tokens, executor_ns, between_ns: CoordinatorStats."""
    def wake(self) -> None:
        """Calls are about to come."""
    def stop_answering(self) -> None:
        """For tests: from now on no call is answered."""
    def close(self) -> None:
        """Stops its threads; idempotent. Comes before the executor's."""

class HostFunctions:
    """csrc/handover/host_functions.h: functions for cuLaunchHostFunc, and the arguments that they get."""

    request: int
    await_reply: int

    def __init__(self) -> None: ...
    def call(self, mailbox: int, layer: int, num_tokens: int) -> int:
        """The address of an argument for both functions; lives as long as this object."""

SPIN_NS: int
"""For how long threads spin that share their CPUs with others."""
STEP_SPIN_NS: int
"""For how long workers spin that a device keeps busy."""
ECHO_LAYER: int
"""As a layer of a request: the hidden states come back."""

def isas() -> list[str]:
    """Every compiled instruction set, best first."""

def available_isas() -> list[str]:
    """Those of isas() this CPU can run."""

def choose_isa(requested: str) -> tuple[str, str]:
    """(isa, reason) as an Executor would choose; raises NativeError where it would."""

def supported_types(isa: str) -> list[str]:
    """GGML type names the table has kernels for."""

def type_sizes() -> dict[str, tuple[int, int]]:
    """{type name: (block_size, block_bytes)}."""

def dequantize(type: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks of one type (1-D bytes) to float32 [num_weights], bit for bit as gguf.quants.dequantize."""

def read_dense(
    *,
    path: str,
    offset: int,
    type: str,
    num_weights: int,
    name: str,
    destination: int,
    float_type: str,
    num_threads: int,
) -> None:
    """Blocks of one type in a file to `num_weights` numbers at the address `destination`; releases the GIL.

    float_type: "float32" | "float16" | "bfloat16", rounded to nearest even. name: of the tensor, for errors. See
    csrc/gguf/dense_reader.h.
    """

def peak_kinds() -> list[str]:
    """What measure_peak() can measure on this CPU; fastest first among those that end alike (_int8, _bf16, _fp32)."""

def measure_peak(kind: str, cpus: list[int], seconds: float) -> float:
    """Operations a second of one thread on each of cpus, all at once, operands in registers. Releases the GIL."""

def measure_dram_read(cpus: list[int], bytes: int, seconds: float) -> float:
    """GB/s that one thread on each of cpus read together from `bytes` of memory. Releases the GIL."""
