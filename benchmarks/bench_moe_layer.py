"""Time of one MoE layer in the executor, alone: no vLLM, no model file.

    python benchmarks/bench_moe_layer.py [--threads N] [--tokens 1,8,64,512] [--types Q4_K,Q4_K,Q6_K] [--isa avx2]

Default shape: DeepSeek-R1. Weights are random; every expert has memory of its own (so that no cache serves what a real
model would read from memory), though all are read from one small file. Routing is uniform, fresh for each
call. Prints the median time, the bytes of the experts that were touched over that time, and the arithmetic rate.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from kt_vllm import _native
from kt_vllm.cpus import allowed_cpus, choose_cpus

SCALE_COLUMNS = {"Q8_0": (0,), "Q4_K": (0, 1), "Q5_K": (0, 1), "Q6_K": (104,)}  # float16 scales of a block


def expert_bytes(type: str, rows: int, cols: int, rng: np.random.Generator) -> bytes:
    """Random valid blocks of one expert's projection."""
    if type in ("F32", "F16", "BF16"):
        values = rng.standard_normal(rows * cols).astype(np.float32) * cols**-0.5
        if type == "F16":
            return values.astype(np.float16).tobytes()
        return values.tobytes() if type == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    block_size, block_bytes = _native.type_sizes()[type]
    blocks = rng.integers(0, 256, (rows * cols // block_size, block_bytes), dtype=np.uint8)
    for column in SCALE_COLUMNS[type]:
        blocks.view(np.float16)[:, column] = 1e-4
    return blocks.tobytes()


def make_executor(args: argparse.Namespace, folder: Path) -> tuple[_native.Executor, int]:
    """The executor with one loaded layer, and the bytes of one expert."""
    rng = np.random.default_rng(0)
    tensors, one_expert = [], 0
    for index, type in enumerate(args.types.split(",")):
        rows, cols = (args.hidden, args.intermediate) if index == 2 else (args.intermediate, args.hidden)
        data = expert_bytes(type, rows, cols, rng)
        path = folder / f"{index}.bin"
        path.write_bytes(data)
        one_expert += len(data)
        spans = [(str(path), 0, len(data))] * args.experts
        tensors.append(_native.ExpertTensor(type, (args.experts, rows, cols), spans))
    cpus = choose_cpus(args.threads, allowed_cpus()).cpus
    executor = _native.Executor(isa=args.isa, cpus=list(cpus), max_num_tokens=4096)
    executor.add_layer(*tensors)
    start = time.perf_counter()
    executor.start_loading()
    while not executor.load_progress()[2]:
        time.sleep(0.01)
    total = one_expert * args.experts
    print(f"{executor.isa_reason}; {executor.placement_report}")
    print(f"loaded {total / 1e9:.2f} GB at {total / 1e9 / (time.perf_counter() - start):.2f} GB/s\n")
    return executor, one_expert


def measure(executor: _native.Executor, args: argparse.Namespace, num_tokens: int) -> tuple[float, float]:
    """(median seconds, mean number of experts touched) of a call."""
    rng = np.random.default_rng(num_tokens)
    hidden = rng.standard_normal((num_tokens, args.hidden)).astype(np.float16)
    weights = np.full((num_tokens, args.top_k), 1 / args.top_k, np.float32)
    output = np.empty_like(hidden)
    seconds, touched = [], []
    deadline = time.perf_counter() + args.seconds
    while len(seconds) < 4 or (time.perf_counter() < deadline and len(seconds) < 200):
        ids = rng.random((num_tokens, args.experts)).argpartition(args.top_k, axis=1)[:, : args.top_k].astype(np.int32)
        ids = np.ascontiguousarray(ids)
        start = time.perf_counter()
        executor.submit(
            *(0, hidden.ctypes.data, ids.ctypes.data, weights.ctypes.data, output.ctypes.data),
            *("float16", num_tokens, args.top_k),
        )
        executor.wait()
        seconds.append(time.perf_counter() - start)
        touched.append(len(np.unique(ids)))
    return statistics.median(seconds[1:]), statistics.mean(touched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--types", default="Q4_K,Q4_K,Q4_K", help="of gate, up and down")
    parser.add_argument("--tokens", default="1,8,32,64,128,512")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--seconds", type=float, default=3, help="for each token count, at least 4 calls")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        executor, one_expert = make_executor(args, Path(folder))
    flops_per_token = 2 * 3 * args.hidden * args.intermediate * args.top_k
    print("| tokens | experts touched | ms | GB/s of weights | TFLOP/s |\n| --- | --- | --- | --- | --- |")
    for num_tokens in map(int, args.tokens.split(",")):
        seconds, touched = measure(executor, args, num_tokens)
        rate, tflops = touched * one_expert / seconds / 1e9, num_tokens * flops_per_token / seconds / 1e12
        print(f"| {num_tokens} | {touched:.0f} | {seconds * 1e3:.2f} | {rate:.1f} | {tflops:.3f} |", flush=True)


if __name__ == "__main__":
    main()
