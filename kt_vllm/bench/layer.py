"""One MoE layer in the executor: made, loaded, called, compared with float32."""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kt_vllm import _native, reference
from kt_vllm.bench.machine import huge_page_bytes
from kt_vllm.bench.random_weights import float_bits, float_values, random_weights
from kt_vllm.bench.settings import LayerBench

# Experts in the file. Each expert of the layer has memory of its own, filled from one of these.
NUM_DISTINCT = 4
_ROUTINGS_FEW = 64  # up to 64 tokens
_ROUTINGS_MANY = 8  # above, where nearly every expert is touched anyway
_CHECKED_TOKENS = 16  # at least, for the error: that of a single token is spread by a fifth
_READ_SECONDS = 0.3


@dataclass
class Routing:
    """ids [num_tokens, top_k] int32, distinct within a token; weights float32 [num_tokens, top_k]; experts: touched."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    experts: int


@dataclass
class LayerWeights:
    """Bytes of the distinct experts, gate, up and down each, and the folder of the files that hold them."""

    bench: LayerBench
    folder: Path
    data: list[list[NDArray[np.uint8]]]

    def path(self, projection: int) -> Path:
        return self.folder / f"{('gate', 'up', 'down')[projection]}.bin"

    def tensors(self) -> list[_native.ExpertTensor]:
        tensors = []
        sizes = self.bench.projection_bytes()
        for projection, (type, shape) in enumerate(zip(self.bench.types, self.bench.shapes(), strict=True)):
            size, path = sizes[projection], str(self.path(projection))
            spans = [(path, expert % len(self.data) * size, size) for expert in range(self.bench.num_experts)]
            tensors.append(_native.ExpertTensor(type, (self.bench.num_experts, *shape), spans))
        return tensors

    @cached_property
    def dequantized(self) -> list[NDArray[np.float32]]:
        """gate, up and down of the distinct experts [distinct experts, rows, cols], by the gguf package."""
        return [
            np.stack([reference.dequantize(type, data[projection], shape) for data in self.data])
            for projection, (type, shape) in enumerate(zip(self.bench.types, self.bench.shapes(), strict=True))
        ]

    def read_rate(self) -> float:
        """GB/s of one thread reading the files from page cache into memory it has already."""
        buffer = memoryview(bytearray(8 << 20))
        done, start = 0, time.perf_counter()
        for projection in itertools.cycle(range(3)):
            with open(self.path(projection), "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    done += count
            if time.perf_counter() - start > _READ_SECONDS:
                break
        return done / (time.perf_counter() - start) / 1e9


@contextmanager
def make_weights(bench: LayerBench) -> Iterator[LayerWeights]:
    """Random weights of standard deviation 1/sqrt(K), in a folder that is gone afterwards."""
    rng = np.random.default_rng(bench.seed)
    count = min(NUM_DISTINCT, bench.num_experts)
    with tempfile.TemporaryDirectory(prefix="kt-bench-", dir=_folder(count * bench.expert_bytes())) as folder:
        data: list[list[NDArray[np.uint8]]] = [[] for _ in range(count)]
        weights = LayerWeights(bench, Path(folder), data)
        for projection, (type, (rows, cols)) in enumerate(zip(bench.types, bench.shapes(), strict=True)):
            with open(weights.path(projection), "wb") as file:
                for expert in data:
                    expert.append(random_weights(type, rows * cols, rng, cols**-0.5))
                    file.write(expert[projection].data)
        yield weights


def _folder(nbytes: int) -> str | None:
    """Memory rather than a disk where there is room; None: the system's choice."""
    try:
        room = os.statvfs("/dev/shm")
        if os.access("/dev/shm", os.W_OK) and room.f_bavail * room.f_frsize > 2 * nbytes:
            return "/dev/shm"
    except OSError:
        pass
    return None


@dataclass
class LoadResult:
    nbytes: int
    seconds: float
    huge_page_bytes: int

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.nbytes / self.seconds / 1e9


class LoadedLayer:
    """The executor with the one layer; close() it."""

    def __init__(self, weights: LayerWeights, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        bench = weights.bench
        self.bench, self.weights = bench, weights
        placement = bench.placement()
        self.executor = _native.Executor(
            isa=bench.isa, cpus=list(placement.cpus), nodes=list(placement.nodes), max_num_tokens=max(bench.tokens)
        )
        try:
            self.executor.add_layer(*weights.tensors())
            huge_before, start = huge_page_bytes(), time.perf_counter()
            self.executor.start_loading()
            finished = False
            while not finished:
                time.sleep(0.005)
                done, total, finished = self.executor.load_progress()
                progress(done, total)
            seconds = time.perf_counter() - start
            self.load = LoadResult(total, seconds, huge_page_bytes() - huge_before)
            self.prefetch = self.executor.choose_prefetch(bench.top_k)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.executor.close()

    def inputs(self, num_tokens: int, draw: int = 0) -> NDArray:
        """Normal hidden states [num_tokens, hidden_size] as bits of the float type; others for each draw."""
        rng = np.random.default_rng((self.bench.seed, num_tokens, draw))
        values = rng.standard_normal((num_tokens, self.bench.hidden_size), np.float32)
        return float_bits(values, self.bench.float_type)

    def call(self, hidden_states: NDArray, routing: Routing, output: NDArray) -> float:
        """Seconds from submit to the complete output; hidden_states, output: [num_tokens, hidden_size] of bits."""
        x, ids, weights, y = (a.ctypes.data for a in (hidden_states, routing.ids, routing.weights, output))
        num_tokens, top_k = routing.ids.shape
        start = time.perf_counter()
        self.executor.submit(0, x, ids, weights, y, self.bench.float_type, num_tokens, top_k)
        self.executor.wait()
        return time.perf_counter() - start


def make_routings(bench: LayerBench, num_tokens: int) -> list[Routing]:
    """Uniformly random sets of distinct experts, one a call in turn."""
    rng = np.random.default_rng((bench.seed, num_tokens, 1))
    routings = []
    for _ in range(_ROUTINGS_FEW if num_tokens <= 64 else _ROUTINGS_MANY):
        keys = rng.random((num_tokens, bench.num_experts), np.float32)
        ids = np.ascontiguousarray(keys.argpartition(bench.top_k - 1, axis=1)[:, : bench.top_k].astype(np.int32))
        weights = rng.random((num_tokens, bench.top_k), np.float32) + np.float32(0.5)
        weights /= weights.sum(axis=1, keepdims=True)
        routings.append(Routing(ids, weights, len(np.unique(ids))))
    return routings


@dataclass
class TokensResult:
    """seconds, experts: of each timed call; error: relative L2 against float32."""

    num_tokens: int
    seconds: list[float]
    experts: list[int]
    error: float


def measure_tokens(layer: LoadedLayer, num_tokens: int) -> TokensResult:
    """Calls for as long as the settings say, a new routing each, after a warm-up."""
    bench = layer.bench
    hidden_states, routings = layer.inputs(num_tokens), make_routings(bench, num_tokens)
    output = np.zeros_like(hidden_states)
    sequence = itertools.cycle(routings)
    for _ in range(3 if num_tokens <= 64 else 1):
        layer.call(hidden_states, next(sequence), output)
    result = TokensResult(num_tokens, [], [], 0.0)
    deadline = time.perf_counter() + bench.seconds
    while len(result.seconds) < bench.repeats or time.perf_counter() < deadline:
        routing = next(sequence)
        result.seconds.append(layer.call(hidden_states, routing, output))
        result.experts.append(routing.experts)
    checks = []
    for draw in range(-(-_CHECKED_TOKENS // num_tokens)):
        hidden_states, routing = layer.inputs(num_tokens, draw), next(sequence)
        layer.call(hidden_states, routing, output)
        checks.append(_actual_expected(layer, hidden_states, routing, output))
    actual, expected = map(np.concatenate, zip(*checks, strict=True))
    result.error = relative_error(actual, expected)
    return result


def _actual_expected(
    layer: LoadedLayer, hidden_states: NDArray, routing: Routing, output: NDArray
) -> tuple[NDArray, NDArray]:
    """Some tokens of one call, and the same with the dequantised weights in float64."""
    num_tokens, float_type = len(hidden_states), layer.bench.float_type
    some = np.unique(np.linspace(0, num_tokens - 1, _CHECKED_TOKENS).astype(int))
    # Experts with the same weights count as one expert: the sum of a token is the same.
    ids = (routing.ids[some] % len(layer.weights.data)).astype(np.int32)
    x = float_values(hidden_states[some], float_type)
    gate, up, down = layer.weights.dequantized
    expected = reference.moe_layer(x, ids, routing.weights[some], gate, up, down)
    return float_values(output[some], float_type), expected


def relative_error(actual: NDArray, expected: NDArray) -> float:
    """|actual - expected| / |expected|; infinite when actual is not finite."""
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else float("inf")


@contextmanager
def busy_neighbour(cpu: int | None) -> Iterator[None]:
    """A process that is busy on `cpu` all the while, and ends with this one however that ends."""
    if cpu is None:
        yield
        return
    code = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile os.getppid() == {os.getpid()}: pass"
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def median_ratio(result: TokensResult, roofs: list[float]) -> float:
    """Of the calls' times to their own roofs."""
    return statistics.median(seconds / roof for seconds, roof in zip(result.seconds, roofs, strict=True))
