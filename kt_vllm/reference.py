"""What the executor must compute, in NumPy: dequantise, SwiGLU, weighted sum. Slow and obvious: the tests' oracle."""

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


def quantize_int8(x: NDArray, block: int) -> NDArray:
    """x with each block along the last axis rounded to 255 levels, as a kernel with int8 activations sees it."""
    blocks = x.reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


def moe_layer(
    hidden_states: NDArray,
    topk_ids: NDArray[np.int32],
    topk_weights: NDArray[np.float32],
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    down: NDArray[np.float32],
    dtype: DTypeLike = np.float64,
    int8_blocks: tuple[int, int, int] = (0, 0, 0),
) -> NDArray:
    """The routed experts of one layer, computed in dtype.

    hidden_states [num_tokens, hidden_size]; topk_ids, topk_weights [num_tokens, top_k]; gate, up
    [num_experts, intermediate_size, hidden_size]; down [num_experts, hidden_size, intermediate_size].
    An id outside [0, num_experts) contributes nothing. int8_blocks: of the activations of gate, up and down; 0 leaves
    them as they are. Returns [num_tokens, hidden_size].
    """

    def quantized(x: NDArray, block: int) -> NDArray:
        return quantize_int8(x, block) if block else x

    x = hidden_states.astype(dtype)
    x_gate, x_up = (quantized(x, block) for block in int8_blocks[:2])
    output = np.zeros_like(x)
    for expert in range(gate.shape[0]):
        tokens, ks = np.nonzero(topk_ids == expert)
        if tokens.size == 0:
            continue
        hidden = swiglu(x_gate[tokens] @ gate[expert].astype(dtype).T, x_up[tokens] @ up[expert].astype(dtype).T)
        result = quantized(hidden, int8_blocks[2]) @ down[expert].astype(dtype).T
        weighted = topk_weights[tokens, ks].astype(dtype)[:, None] * result
        np.add.at(output, tokens, weighted)  # a token may name an expert twice
    return output
