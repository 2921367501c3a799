"""Random bytes that are valid blocks of a GGML type and decode to weights of a sensible size."""

import gguf
import numpy as np
from numpy.typing import NDArray

# Where a block's float16 scales and offsets stand (counted in halves), and how large they must be for weights of unit
# size and a mean of about 0: measured with gguf.quants.dequantize on blocks whose other bytes are random, as here.
_HALVES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 1 / 4.61},
    "Q4_1": {0: 1 / 4.61, 1: -7.5 / 4.61},
    "Q5_0": {0: 1 / 9.24},
    "Q5_1": {0: 1 / 9.23, 1: -15.5 / 9.23},
    "Q8_0": {0: 1 / 74.0},
    "Q2_K": {40: 1 / 13.9, 41: 1.5 / 13.9},
    "Q3_K": {54: 1 / 43.3},
    "Q4_K": {0: 1 / 259, 1: 7.5 / 259},
    "Q5_K": {0: 1 / 527, 1: 15.5 / 527},
    "Q6_K": {104: 1 / 1364},
    "IQ4_NL": {0: 1 / 67.3},
    "IQ4_XS": {0: 1 / 1249},
    "IQ2_XXS": {0: 1 / 53.1},
    "IQ2_XS": {0: 1 / 55.9},
    "IQ2_S": {0: 1 / 56.2},
    "IQ3_XXS": {0: 1 / 143},
    "IQ3_S": {0: 1 / 140},
    "IQ1_S": {0: 1 / 7.22},
}
_IQ1_M_SIZE = 7.21  # its float16 is spread over the upper nibbles of four halves
_MXFP4_SIZE = 5.86  # its scale is a power of two: byte 0 is the exponent, 128 for these values times 1
_FLOATS = ("F32", "F16", "BF16")

TYPES = (*_FLOATS, *_HALVES, "IQ1_M", "MXFP4")


def random_weights(type: str, num_weights: int, rng: np.random.Generator, size: float = 1) -> NDArray[np.uint8]:
    """num_weights weights (whole blocks) with a standard deviation of about `size` and a mean of about 0, as bytes."""
    if type in _FLOATS:
        values = rng.standard_normal(num_weights, np.float32) * np.float32(size)
        return _float_bytes(type, values)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    blocks = rng.integers(0, 256, (num_weights // block_size, block_bytes), dtype=np.uint8)
    # Either sign: the levels of some types are not symmetric. The spread tells one block's scale from another's.
    spread = rng.uniform(0.5, 1.5, len(blocks)) * rng.choice((-1, 1), len(blocks)) * size / 1.04
    if type == "MXFP4":
        blocks[:, 0] = np.rint(128 + np.log2(np.abs(spread) / _MXFP4_SIZE))
    elif type == "IQ1_M":
        bits = (spread / _IQ1_M_SIZE).astype("<f2").view("<u2")
        scales = blocks[:, 48:56].view("<u2")
        scales &= 0x0FFF
        for nibble in range(4):
            scales[:, nibble] |= (bits >> (4 * nibble) & 15) << 12
    else:
        halves = blocks.view("<f2")
        for column, scale in _HALVES[type].items():
            halves[:, column] = scale * spread
    return blocks.ravel()


def _float_bytes(type: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    if type == "BF16":
        return float_bits(values, "bfloat16").view(np.uint8)
    return values.astype("<f4" if type == "F32" else "<f2").view(np.uint8)


def float_bits(values: NDArray[np.float32], float_type: str) -> NDArray:
    """float32 values as memory of a float type; bfloat16, which NumPy lacks, as uint16 rounded to nearest even."""
    if float_type != "bfloat16":
        return np.ascontiguousarray(values, np.dtype(float_type))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def float_values(bits: NDArray, float_type: str) -> NDArray[np.float32]:
    """The inverse of float_bits()."""
    if float_type != "bfloat16":
        return bits.astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)
