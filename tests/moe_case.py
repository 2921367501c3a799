"""A small MoE layer with random weights in a file, its expected results, and how to run it."""

import itertools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from kt_vllm import _native, reference

# The float16 scales of a block: the half they stand at (csrc/gguf/block_layouts.h), and their size for weights of about
# unit size: 1 / the standard deviation that the gguf package decodes random bytes to with a scale of 1. A second scale
# takes the mean away: of quants of Q4_1 and Q4_K it is 7.5, of Q5_1 and Q5_K 15.5, of Q2_K 1.5. Other bytes may be any.
_SCALES = {
    "Q4_0": {0: 1 / 4.6},
    "Q4_1": {0: 1 / 4.6, 1: -7.5 / 4.6},
    "Q5_0": {0: 1 / 9.2},
    "Q5_1": {0: 1 / 9.2, 1: -15.5 / 9.2},
    "Q8_0": {0: 1 / 74},
    "Q2_K": {40: 1 / 13.9, 41: 1.5 / 13.9},
    "Q3_K": {54: 1 / 43.3},
    "Q4_K": {0: 1 / 258, 1: 7.5 / 258},
    "Q5_K": {0: 1 / 528, 1: 15.5 / 528},
    "Q6_K": {104: 1 / 1370},
    "IQ1_S": {0: 1 / 7.2},
    "IQ2_XXS": {0: 1 / 53.3},
    "IQ2_XS": {0: 1 / 55.9},
    "IQ2_S": {0: 1 / 56.1},
    "IQ3_XXS": {0: 1 / 142},
    "IQ3_S": {0: 1 / 140},
    "IQ4_NL": {0: 1 / 67},
    "IQ4_XS": {0: 1 / 1250},
}
_IQ1_M_SCALE = 1 / 7.2  # float16, four bits each at the top of the last four halves
_MXFP4_SCALE = 1 / 5.85  # a power of two: byte 0 is its exponent plus 128


def write_first_scale(type: str, blocks: NDArray[np.uint8], bits: NDArray[np.uint16]) -> None:
    """bits [n]: of float16, or of the E8M0 byte. blocks [n, block_bytes], changed."""
    if type == "MXFP4":
        blocks[:, 0] = bits
    elif type == "IQ1_M":
        parts = blocks.view(np.uint16)[:, -4:]
        parts[:] = (parts & 0x0FFF) | (bits[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) << 12)
    else:
        blocks.view(np.uint16)[:, next(iter(_SCALES.get(type, {0: 1})))] = bits


def random_weights(type: str, num_weights: int, rng: np.random.Generator, size: float = 1) -> NDArray[np.uint8]:
    """Random bytes that decode to weights with a mean of about 0 and a standard deviation of about size."""
    if type in ("F32", "F16", "BF16"):
        values = (size * rng.standard_normal(num_weights)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type]).view(np.uint8).ravel()
    block_size, block_bytes = _native.type_sizes()[type]
    blocks = rng.integers(0, 256, (num_weights // block_size, block_bytes), dtype=np.uint8)
    spread = size * rng.uniform(0.5, 1.5, len(blocks))
    if type == "MXFP4":
        write_first_scale(type, blocks, np.rint(np.log2(_MXFP4_SCALE * spread) + 128).astype(np.uint16))
        return blocks.ravel()
    # The quants of some types have a small mean; scales of either sign take it away.
    spread *= rng.choice((-1, 1), len(blocks))
    if type == "IQ1_M":
        write_first_scale(type, blocks, (_IQ1_M_SCALE * spread).astype(np.float16).view(np.uint16))
        return blocks.ravel()
    halves = blocks.view(np.float16)
    for column, scale in _SCALES[type].items():
        halves[:, column] = scale * spread
    return blocks.ravel()


def to_bits(values: NDArray, float_type: str) -> NDArray:
    """float32 values in the memory format of float_type."""
    if float_type == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return np.ascontiguousarray(values, np.dtype(float_type))


def from_bits(bits: NDArray, float_type: str) -> NDArray[np.float32]:
    if float_type == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


@dataclass
class MoECase:
    """types: of gate, up and down. The file holds each tensor after some bytes that belong to nothing."""

    path: Path
    types: tuple[str, str, str] = ("F32", "F32", "F32")
    num_experts: int = 6
    hidden_size: int = 256
    intermediate_size: int = 256
    per_expert: bool = False
    seed: int = 0
    weights: list[NDArray[np.float32]] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows_cols = [(self.intermediate_size, self.hidden_size)] * 2 + [(self.hidden_size, self.intermediate_size)]
        self.shapes = [(self.num_experts, *shape) for shape in rows_cols]
        self.weights, self.spans, contents = [], [], bytearray()
        for type, shape in zip(self.types, self.shapes, strict=True):
            data = random_weights(type, int(np.prod(shape)), rng, shape[-1] ** -0.5)
            self.weights.append(reference.dequantize(type, data, shape))
            contents += bytes(37)
            count = self.num_experts if self.per_expert else 1
            self.spans.append(
                [(str(self.path), len(contents) + i * (data.size // count), data.size // count) for i in range(count)]
            )
            contents += data.tobytes()
        self.path.write_bytes(contents)
        self.num_bytes = sum(span[2] for spans in self.spans for span in spans)

    def tensors(self) -> list[_native.ExpertTensor]:
        return [_native.ExpertTensor(*tensor) for tensor in zip(self.types, self.shapes, self.spans, strict=True)]

    def inputs(self, num_tokens: int, top_k: int = 2, seed: int = 1) -> tuple[NDArray, NDArray, NDArray]:
        """hidden_states, topk_ids (skewed, repeated within a token, some -1), topk_weights."""
        rng = np.random.default_rng(seed)
        hidden_states = rng.standard_normal((num_tokens, self.hidden_size)).astype(np.float32)
        skewed = np.minimum(rng.geometric(0.4, (num_tokens, top_k)) - 1, self.num_experts - 1)
        topk_ids = np.where(rng.random((num_tokens, top_k)) < 0.1, -1, skewed).astype(np.int32)
        return hidden_states, topk_ids, rng.random((num_tokens, top_k)).astype(np.float32)

    def expected(self, hidden_states: NDArray, topk_ids: NDArray, topk_weights: NDArray, **options) -> NDArray:
        return reference.moe_layer(hidden_states, topk_ids, topk_weights, *self.weights, **options)


def worker_cpus(count: int) -> list[int]:
    """Logical CPUs this process may use, again from the first when there are not that many."""
    return list(itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), count))


def load(executor: _native.Executor, timeout: float = 60) -> None:
    executor.start_loading()
    deadline = time.monotonic() + timeout
    while not executor.load_progress()[2]:
        assert time.monotonic() < deadline, f"loading stands at {executor.load_progress()}"
        time.sleep(0.001)


def make_executor(
    *cases: MoECase, isa: str = "reference", num_workers: int = 2, max_num_tokens: int = 512
) -> _native.Executor:
    """An executor with the cases loaded as layers 0, 1, ..."""
    executor = _native.Executor(isa=isa, cpus=worker_cpus(num_workers), max_num_tokens=max_num_tokens)
    for case in cases:
        executor.add_layer(*case.tensors())
    load(executor)
    return executor


def run(
    executor: _native.Executor,
    hidden_states: NDArray,
    topk_ids: NDArray,
    topk_weights: NDArray,
    *,
    layer: int = 0,
    float_type: str = "float32",
) -> NDArray[np.float32]:
    """One call. Guard bytes around the output must stay as they are."""
    x = to_bits(hidden_states, float_type)
    ids, weights = np.ascontiguousarray(topk_ids, np.int32), np.ascontiguousarray(topk_weights, np.float32)
    guard = 64
    memory = np.full(x.nbytes + 2 * guard, 0xA5, np.uint8)
    executor.submit(
        layer, x.ctypes.data, ids.ctypes.data, weights.ctypes.data, memory.ctypes.data + guard, float_type, *ids.shape
    )
    executor.wait()
    assert (memory[:guard] == 0xA5).all() and (memory[-guard:] == 0xA5).all(), "written outside of the output"
    return from_bits(memory[guard:-guard].copy().view(x.dtype).reshape(x.shape), float_type)
