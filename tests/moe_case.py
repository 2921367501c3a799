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

# The float16 scales of a block: the half they stand at (ggml-common.h), and their size for weights of about unit size
# with a mean of about 0 (quants of Q4_K have a mean of 7.5, of Q5_K 15.5; mins take it away). Other bytes may be any.
_SCALES = {
    "Q8_0": {0: 1 / 74},
    "Q4_K": {0: 1 / 200, 1: 7.5 / 200},
    "Q5_K": {0: 1 / 400, 1: 15.5 / 400},
    "Q6_K": {104: 1 / 1370},
}


def random_weights(type: str, num_weights: int, rng: np.random.Generator, size: float = 1) -> NDArray[np.uint8]:
    """Random bytes that decode to weights with a standard deviation of about size."""
    if type in ("F32", "F16", "BF16"):
        values = (size * rng.standard_normal(num_weights)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type]).view(np.uint8).ravel()
    block_size, block_bytes = _native.type_sizes()[type]
    blocks = rng.integers(0, 256, (num_weights // block_size, block_bytes), dtype=np.uint8)
    halves = blocks.view(np.float16)
    spread = rng.uniform(0.5, 1.5, len(blocks))
    for column, scale in _SCALES[type].items():
        halves[:, column] = size * scale * spread
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
