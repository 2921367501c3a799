"""Dense tensors: from quantised bytes in a file to torch, in bounded memory. torch is imported on first use."""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import TYPE_CHECKING

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from kt_vllm import _native
from kt_vllm.errors import GGUFError
from kt_vllm.gguf.header import GGUFTensor, shown

if TYPE_CHECKING:
    import torch

# Of float32 at a time: stays in a core's cache, and malloc does not ask the kernel for fresh pages each time, which
# halves the speed from 4 MiB on; large beside the cost of a call.
CHUNK_BYTES = 1 << 20
# Chunks decoded at once: one thread does 0.4 G weights a second of Q4_K, and disks are no faster than eight.
MAX_THREADS = 8
# Converted at once: from 32768 on torch would start threads of its own, for each of ours.
_SERIAL_WEIGHTS = 32000
# Written in C++, and the same bits. What is left is decoded by the `gguf` package: float32, which it only views, and
# types that no expert has.
_NATIVE_TYPES = frozenset(_native.type_sizes()) - {"F32"}

# What gguf.quants can decode; tests/unit/test_dense.py holds this list to the installed package.
# fmt: off
DECODABLE_TYPES = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
    "TQ2_0", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
})
# fmt: on


def read_dense(tensor: GGUFTensor, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """The tensor's values, [*tensor.shape], as `dtype` (None: float32), rounded to nearest.

    On the CPU. Needs the result and about two chunks a thread. Raises GGUFError when the file is no longer as it was.
    """
    import torch

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]]
    num_cols = tensor.shape[-1]
    row_bytes = num_cols // block * block_bytes
    num_rows = tensor.nbytes // row_bytes
    chunk_rows = max(1, CHUNK_BYTES // (4 * num_cols))
    values = torch.empty(tensor.shape, dtype=dtype or torch.float32, device="cpu")  # whatever the default is
    rows = values.view(num_rows, num_cols)

    def decode(start: int) -> None:
        count = min(chunk_rows, num_rows - start)
        with _opened(tensor) as file:
            file.seek(tensor.offset + start * row_bytes)
            data = np.fromfile(file, np.uint8, count * row_bytes)
        if data.size != count * row_bytes:
            raise GGUFError(
                f"{tensor.path!r} ended inside tensor {shown(tensor.name)} though it was long enough when it was "
                "opened: something is writing to it; wait for that and start again"
            )
        decoded = torch.from_numpy(dequantize(data, tensor.type))
        target = rows[start : start + count].view(-1)
        for piece in range(0, len(decoded), _SERIAL_WEIGHTS):
            part = slice(piece, piece + _SERIAL_WEIGHTS)
            target[part].copy_(decoded[part])

    starts = range(0, num_rows, chunk_rows)
    threads = _threads(len(os.sched_getaffinity(0)))
    if len(starts) == 1 or threads is None:
        for start in starts:
            decode(start)
    else:
        list(threads.map(decode, starts))
    return values


def dequantize(data: NDArray[np.uint8], type_: str) -> NDArray[np.float32]:
    """Whole blocks [num_bytes] -> [num_weights], bit for bit as gguf.quants.dequantize. Releases the GIL for long."""
    if type_ in _NATIVE_TYPES:
        return _native.dequantize(type_, data)
    kind = GGMLQuantizationType[type_]
    return gguf.quants.dequantize(data.reshape(-1, GGML_QUANT_SIZES[kind][1]), kind).reshape(-1)


@functools.cache
def _threads(num_cpus: int) -> ThreadPoolExecutor | None:
    """Shared by all tensors; None where there is one CPU, as in vLLM's CPU workers."""
    return ThreadPoolExecutor(min(MAX_THREADS, num_cpus), "kt_vllm dense") if num_cpus > 1 else None


def _opened(tensor: GGUFTensor) -> FileIO:
    try:
        return FileIO(tensor.path)  # unbuffered: np.fromfile reads straight into its own array
    except OSError as e:
        raise GGUFError(
            f"{tensor.path!r} cannot be opened any more ({os.strerror(e.errno or 0)}): restore it and start again"
        ) from None


def _copy(values: "torch.Tensor") -> "torch.Tensor":
    return values


def _mla_kv_b(k_b: "torch.Tensor", v_b: "torch.Tensor") -> "torch.Tensor":
    """k_b [heads, kv_lora, nope] and v_b [heads, v, kv_lora] -> kv_b [heads * (nope + v), kv_lora].

    llama.cpp stores the key half transposed, ready for absorbing it into the query.
    """
    import torch

    return torch.cat([k_b.transpose(1, 2), v_b], dim=1).reshape(-1, k_b.shape[1])


def _row(values: "torch.Tensor") -> "torch.Tensor":
    """[n] or [1, n] -> [1, n]."""
    return values.reshape(1, -1)


def _llama_rope_rows(values: "torch.Tensor", num_heads: int) -> "torch.Tensor":
    """[num_heads * head_dim, ...] with the two halves of each head's rows interleaved -> one half after the other.

    llama.cpp's `llama` rotates neighbouring pairs; Hugging Face's model rotates row i with row i + head_dim / 2.
    """
    return values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(values.shape)


TRANSFORMS: Mapping[str, Callable[..., "torch.Tensor"]] = {
    "copy": _copy,
    "mla_kv_b": _mla_kv_b,
    "row": _row,
    "llama_rope_rows": _llama_rope_rows,
}
