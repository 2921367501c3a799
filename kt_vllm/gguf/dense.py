"""Dense tensors: from quantised bytes in a file to torch, in bounded memory. torch is imported on first use."""

import os
from collections.abc import Callable, Mapping
from io import FileIO
from typing import TYPE_CHECKING

import gguf.quants
import numpy as np
from gguf.constants import GGMLQuantizationType

from kt_vllm import _native
from kt_vllm.errors import GGUFError
from kt_vllm.gguf.header import GGUFTensor, shown

if TYPE_CHECKING:
    import torch

# Threads that read and decode one tensor, at most: each does 0.6 to 0.7 G weights a second of K-quants.
MAX_THREADS = 16
# Decoded at once by the `gguf` package, which takes several times the memory of their float32.
_GGUF_ROWS = 64
# Decoded in C++, with the same bits. The `gguf` package decodes what is left: types that no expert has.
_NATIVE_TYPES = frozenset(_native.type_sizes())

# What gguf.quants can decode; tests/unit/test_dense.py holds this list to the installed package.
# fmt: off
DECODABLE_TYPES = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
    "TQ2_0", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
})
# fmt: on


def read_dense(tensor: GGUFTensor, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """The tensor's values, [*tensor.shape], as `dtype`, rounded to nearest.

    dtype: float32 (None too), float16 or bfloat16. On the CPU. Needs the result and, for each thread, the bytes of 2^18
    weights. Raises GGUFError when the file is no longer as it was.
    """
    values = empty_dense(tensor, dtype)
    fill_dense(tensor, values)
    return values


def empty_dense(tensor: GGUFTensor, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """For fill_dense(): uninitialised."""
    import torch

    return torch.empty(tensor.shape, dtype=dtype or torch.float32, device="cpu")  # whatever the default is


def fill_dense(tensor: GGUFTensor, values: "torch.Tensor") -> None:
    """read_dense() to memory that is there."""
    if tensor.type not in _NATIVE_TYPES:
        return _read_with_gguf(tensor, values)
    try:
        _native.read_dense(
            path=tensor.path,
            offset=tensor.offset,
            type=tensor.type,
            num_weights=values.numel(),
            name=shown(tensor.name),
            destination=values.data_ptr(),
            float_type=str(values.dtype).removeprefix("torch."),
            num_threads=min(MAX_THREADS, len(os.sched_getaffinity(0))),  # in vLLM's CPU workers: one
        )
    except _native.NativeError as error:
        raise GGUFError(str(error)) from None


def _read_with_gguf(tensor: GGUFTensor, values: "torch.Tensor") -> None:
    """values: [*tensor.shape], filled."""
    import torch

    kind = GGMLQuantizationType[tensor.type]
    rows = values.view(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes // len(rows)
    with _opened(tensor) as file:
        file.seek(tensor.offset)
        for target in rows.split(_GGUF_ROWS):
            data = np.fromfile(file, np.uint8, len(target) * row_bytes)
            if data.size != len(target) * row_bytes:
                raise GGUFError(
                    f"{tensor.path!r} ended inside tensor {shown(tensor.name)} though it was long enough when it was "
                    "opened: something is writing to it; wait for that and start again"
                )
            target.copy_(torch.from_numpy(gguf.quants.dequantize(data.reshape(len(target), row_bytes), kind)))


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
