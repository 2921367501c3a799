"""How dense weights are kept on the device, in numbers: what each way takes, whom it fits, and which one fits a device.

Needs neither vLLM nor torch; dense_methods.py does what is decided here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from kt_vllm.errors import ResourceError

# The most exact first. "bf16" stands for the model's own type.
QUANTS = ("bf16", "fp8", "int4")

# Scale and zero point for so many weights of a row: 4.31 bits a weight. 32 would be more exact and take 4.63, 0.6 GB
# more of DeepSeek-R1's dense weights; 128 saves 0.3 GB and has 13 % more error.
INT4_GROUP = 64
# float8_e4m3 with a scale for each block of so many rows and columns: DeepSeek's own, and vLLM's fp8_per_block. Marlin
# keeps it for each row, in two bytes.
FP8_BLOCK = 128
# Rows that the kernels compute at once; vLLM would pad.
_ROWS = 64
# vLLM fills a vocabulary up to a multiple of this, with rows of zeros.
VOCABULARY_PADDING = 64


def for_head(quant: str) -> str:
    """What the language model's head is kept in where linear layers are in `quant`: one step more exact.

    Its errors are those of the logits, which no layer after it evens out.
    """
    return QUANTS[max(0, QUANTS.index(quant) - 1)]


def head_rows(vocabulary: int, tensor: int) -> int:
    """Of the head's weight on each of `tensor` devices."""
    return ceil(vocabulary / VOCABULARY_PADDING) * VOCABULARY_PADDING // tensor


def why_not(quant: str, rows: int, cols: int) -> str | None:
    """Why a weight [rows, cols], as one device has it, cannot be kept this way; None when it can."""
    wanted = {"fp8": FP8_BLOCK, "int4": INT4_GROUP}.get(quant)
    if wanted is None:
        return None
    if cols % wanted:
        return f"{quant} needs columns in groups of {wanted} and there are {cols}"
    return f"{quant} needs rows in groups of {_ROWS} and there are {rows}" if rows % _ROWS else None


def fitting(quant: str, rows: int, cols: int, served: Sequence[str] = QUANTS) -> tuple[str, str | None]:
    """`quant`, or else the next more exact one that the weight fits; and why it is not the one asked for.

    served: what the platform has kernels for.
    """
    reason = None
    for candidate in QUANTS[QUANTS.index(quant) :: -1]:
        unserved = None if candidate in served else f"there are no kernels for {candidate} on this platform"
        found = unserved or why_not(candidate, rows, cols)
        if found is None:
            return candidate, reason
        reason = reason or found
    raise AssertionError("bf16 is always served")


def weight_bytes(quant: str, rows: int, cols: int, itemsize: int) -> int:
    """Of a weight [rows, cols] with its scales; itemsize: bytes a weight in the model's own type."""
    if quant == "fp8":
        return rows * cols + 2 * rows * ceil(cols / FP8_BLOCK)
    if quant == "int4":
        num_groups = rows * cols // INT4_GROUP
        return rows * cols // 2 + 2 * num_groups + num_groups // 2
    return rows * cols * itemsize


@dataclass(frozen=True)
class DeviceBudget:
    """The memory of one device, in bytes. total: of which vLLM takes `utilization`.

    kv_cache: what was asked for; taken: name -> bytes, for all else but the dense weights.
    """

    total: int
    utilization: float
    kv_cache: int
    taken: Mapping[str, int]

    @property
    def for_dense(self) -> int:
        return int(self.total * self.utilization) - self.kv_cache - sum(self.taken.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {_gb(count)}" for what, count in self.taken.items() if count)
        return (
            f"{_gb(self.total)} x {self.utilization:g} less {_gb(self.kv_cache)} of KV cache and {parts} leaves "
            f"{_gb(max(0, self.for_dense))}"
        )


def choose(dense_bytes: Mapping[str, int], budget: DeviceBudget) -> tuple[str, str]:
    """The most exact of `dense_bytes` (quant -> bytes on one device) that fits, and the reason as one line.

    Raises ResourceError when none does.
    """
    sizes = ", ".join(f"{quant} {_gb(count)}" for quant, count in dense_bytes.items())
    for quant, count in dense_bytes.items():
        if count <= budget.for_dense:
            return quant, f"--kt-gpu-quant auto takes {quant} for the dense weights: {sizes}; {budget}."
    raise ResourceError(
        f"the dense weights take {sizes}, and of the GPU's memory {budget} for them: give a smaller --max-model-len or "
        "--max-num-batched-tokens, a higher --gpu-memory-utilization, or a larger GPU."
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
