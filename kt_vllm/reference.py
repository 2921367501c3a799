"""What the executor must compute, in NumPy: dequantise, SwiGLU, weighted sum. Slow and obvious; the oracle of the tests."""

import gguf
import numpy as np
from numpy.typing import DTypeLike, NDArray


def dequantize(type: str, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The bytes of a GGUF tensor as float32 [*shape]."""
    ggml_type = gguf.GGMLQuantizationType[type]
    rows = np.ascontiguousarray(data).reshape(-1, data.size // int(np.prod(shape[:-1])))
    if type == "F16":
        rows = rows.view(np.float16)
    elif type == "F32":
        rows = rows.view(np.float32)
    return np.asarray(gguf.quants.dequantize(rows, ggml_type), dtype=np.float32).reshape(shape)


def swiglu(gate: NDArray, up: NDArray) -> NDArray:
    """silu(gate) * up."""
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite; the quotient is then 0, as it should be
        return gate / (1 + np.exp(-gate)) * up


def moe_layer(
    hidden_states: NDArray,
    topk_ids: NDArray[np.int32],
    topk_weights: NDArray[np.float32],
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    down: NDArray[np.float32],
    dtype: DTypeLike = np.float64,
) -> NDArray:
    """The routed experts of one layer, computed in dtype.

    hidden_states [num_tokens, hidden_size]; topk_ids, topk_weights [num_tokens, top_k]; gate, up
    [num_experts, intermediate_size, hidden_size]; down [num_experts, hidden_size, intermediate_size].
    An id outside [0, num_experts) contributes nothing. Returns [num_tokens, hidden_size].
    """
    x = hidden_states.astype(dtype)
    output = np.zeros_like(x)
    for expert in range(gate.shape[0]):
        tokens, ks = np.nonzero(topk_ids == expert)
        if tokens.size == 0:
            continue
        rows = x[tokens]
        hidden = swiglu(rows @ gate[expert].astype(dtype).T, rows @ up[expert].astype(dtype).T)
        weighted = topk_weights[tokens, ks].astype(dtype)[:, None] * (hidden @ down[expert].astype(dtype).T)
        np.add.at(output, tokens, weighted)  # a token may name an expert twice
    return output
