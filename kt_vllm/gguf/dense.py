"""Dense tensors: from quantised bytes in a file to torch, in bounded memory. torch is imported on first use."""

import os
from collections.abc import Callable, Mapping
from io import FileIO
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kt_vllm.errors import GGUFError
from kt_vllm.gguf.header import GGUFTensor, shown

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 32 << 20  # of float32 at a time: small beside any dense model, large beside the cost of a numpy call

# What gguf.quants can decode; tests/unit/test_dense.py holds this list to the installed package.
# fmt: off
DECODABLE_TYPES = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
    "TQ2_0", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
})
# fmt: on


def read_dense(tensor: GGUFTensor, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """The tensor's values, [*tensor.shape], as `dtype` (None: float32), rounded to nearest.

    On the CPU. Needs the result and about three chunks. Raises GGUFError when the file is no longer as it was.
    """
    import torch

    type_ = GGMLQuantizationType[tensor.type]
    block, block_bytes = GGML_QUANT_SIZES[type_]
    num_cols = tensor.shape[-1]
    row_bytes = num_cols // block * block_bytes
    num_rows = tensor.nbytes // row_bytes
    chunk_rows = max(1, CHUNK_BYTES // (4 * num_cols))
    values = torch.empty(tensor.shape, dtype=dtype or torch.float32, device="cpu")  # whatever the default is
    rows = values.view(num_rows, num_cols)
    with _opened(tensor) as file:
        file.seek(tensor.offset)
        for start in range(0, num_rows, chunk_rows):
            count = min(chunk_rows, num_rows - start)
            data = np.fromfile(file, np.uint8, count * row_bytes)
            if data.size != count * row_bytes:
                raise GGUFError(
                    f"{tensor.path!r} ended inside tensor {shown(tensor.name)} though it was long enough when it was "
                    "opened: something is writing to it; wait for that and start again"
                )
            decoded = dequantize(data.reshape(count, row_bytes), type_)
            rows[start : start + count].copy_(torch.from_numpy(decoded.reshape(count, num_cols)))
    return values


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
