"""What the dense products of DeepSeek-R1's decode step take, by every kernel that could compute them.

    python benchmarks/linear.py [--tokens 1,4,16] [--shapes o_proj,q_b] [--kernels marlin-int4,few] [--json FILE]

Each is timed in a CUDA graph that goes over so many copies of the weight that 220 MB pass before one is read again: an
L2 has 50. Weights are random numbers in the kernel's own format; the first and last outputs are compared with float64
of the dequantised weight. `few` is kt_vllm's kernel for up to four tokens. Needs a Hopper GPU and vLLM for
CUDA.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
import torch
from rich.console import Console
from rich.table import Table

SHAPES = {  # outputs, inputs
    "qkv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "o_proj": (7168, 16384),
    "shared_gate_up": (4096, 7168),
    "shared_down": (7168, 2048),
    "dense_gate_up": (36864, 7168),
    "dense_down": (7168, 18432),
    "head": (129280, 7168),
}
KERNELS = (
    "bf16",
    "marlin-fp8",
    "machete-int4",
    "marlin-int4",
    "few",
)
GROUP = 64
BEYOND_L2 = 220e6
REPLAYS = 20
# Outputs compared at either end: a multiple of the eight whose zero points share an int32.
CHECKED = 256
# The outputs are bfloat16, and Marlin rounds weights to it: 2^-9 each at most, relative.
MAX_ERROR = 0.005
DTYPE = torch.bfloat16


class Product(NamedTuple):
    """A weight in its kernel's format.

    apply: (layer, x [num_tokens, inputs]) -> [num_tokens, outputs]; first, last: rows of the dequantised weight.
    """

    layer: torch.nn.Module
    apply: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    first: torch.Tensor
    last: torch.Tensor


def make_bf16(outputs: int, inputs: int) -> Product:
    layer = torch.nn.Module()
    weight = torch.randn(outputs, inputs, dtype=DTYPE, device="cuda") / inputs**0.5
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return Product(
        layer,
        lambda layer, x: torch.nn.functional.linear(x, layer.weight),
        weight[:CHECKED].float(),
        weight[-CHECKED:].float(),
    )


def random_int4(outputs: int, inputs: int) -> Any:
    """Codes and zero points spread evenly; products of about 1."""
    from kt_vllm import int4

    def words(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")

    scale = 0.5 + torch.rand(outputs, inputs // GROUP, device="cuda")
    scale *= math.sqrt(12 / inputs) / 16
    return int4.Int4Weight(words(outputs, inputs // 8), scale.to(DTYPE), words(outputs // 8, inputs // GROUP))


def make_int4(name: str, outputs: int, inputs: int) -> Product:
    """In vLLM's Marlin or Machete, as kt_vllm's Int4OnlineLinearMethod registers it."""
    from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from kt_vllm import int4
    from kt_vllm.dense_methods import register_int4

    kernel_type = {"marlin": MarlinLinearKernel, "machete": MacheteLinearKernel}[name]
    config = MPLinearLayerConfig((inputs, outputs), (inputs, outputs), scalar_types.uint4, DTYPE, GROUP, True)
    can, reason = kernel_type.can_implement(config)
    if not can:
        raise ValueError(reason)
    stored = random_int4(outputs, inputs)
    first, last = (
        int4.dequantize(int4.Int4Weight(stored.packed[rows], stored.scale[rows], stored.zero[eighths]))
        for rows, eighths in (
            (slice(CHECKED), slice(CHECKED // 8)),
            (slice(outputs - CHECKED, None), slice((outputs - CHECKED) // 8, None)),
        )
    )
    layer = torch.nn.Module()
    kernel = kernel_type(config, *register_int4(layer, stored))
    kernel.process_weights_after_loading(layer)
    return Product(layer, kernel.apply_weights, first, last)


def make_few_tokens(outputs: int, inputs: int) -> Product:
    """int4_few_tokens on the weight as Marlin has it."""
    from kt_vllm import int4_linear
    from kt_vllm.int4_few_tokens import multiply_few_tokens

    marlin = make_int4("marlin", outputs, inputs)
    weight = marlin.layer.weight_packed, marlin.layer.weight_scale, marlin.layer.weight_zero_point
    parts = int4_linear.few_tokens_parts(outputs, inputs, *weight)
    if parts is None:
        raise ValueError("not a weight for this kernel")
    marlin.layer.register_buffer("arrived", int4_linear.counters(outputs, weight[0].device))

    def apply(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight_packed, layer.weight_scale, layer.weight_zero_point
        return multiply_few_tokens(x, *weight, layer.arrived, parts)

    return Product(marlin.layer, apply, marlin.first, marlin.last)


def make_fp8(outputs: int, inputs: int) -> Product:
    """As kt_vllm's Fp8OnlineLinearMethod."""
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.kernels.linear.scaled_mm import MarlinFP8ScaledMMLinearKernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        GroupShape,
        create_fp8_quant_key,
        kFp8Dynamic128Sym,
    )

    block = 128
    kernel = init_fp8_linear_kernel(
        activation_quant_key=kFp8Dynamic128Sym,
        weight_quant_key=create_fp8_quant_key(static=True, group_shape=GroupShape(block, block)),
        weight_shape=(outputs, inputs),
        input_dtype=DTYPE,
        out_dtype=DTYPE,
        force_kernel=MarlinFP8ScaledMMLinearKernel,
    )
    weight = (torch.randn(outputs, inputs, dtype=DTYPE, device="cuda") * 60).clamp_(-440, 440).to(torch.float8_e4m3fn)
    scale = (0.5 + torch.rand(math.ceil(outputs / block), inputs // block, device="cuda")) / (60 * math.sqrt(inputs))
    # Marlin rounds the scales of blocks to bfloat16.
    wide = scale.to(DTYPE).float().repeat_interleave(block, 0)[:outputs]
    first, last = (
        weight[rows].float() * wide[rows].repeat_interleave(block, 1)
        for rows in (slice(CHECKED), slice(outputs - CHECKED, None))
    )
    layer = torch.nn.Module()
    layer.input_size_per_partition, layer.output_size_per_partition = inputs, outputs
    layer.logical_widths, layer.orig_dtype, layer.weight_block_size = [outputs], DTYPE, [block, block]
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    kernel.process_weights_after_loading(layer)
    return Product(layer, kernel.apply_weights, first, last)


def make(kernel: str, outputs: int, inputs: int) -> Product:
    if kernel.endswith("-int4"):
        return make_int4(kernel.removesuffix("-int4"), outputs, inputs)
    return {"bf16": make_bf16, "marlin-fp8": make_fp8, "few": make_few_tokens}[kernel](outputs, inputs)


def error(product: Product, x: torch.Tensor) -> float:
    """The larger relative L2 error of the first and the last outputs."""
    got = product.apply(product.layer, x).double()
    found = []
    for part, weight in ((got[:, :CHECKED], product.first), (got[:, -CHECKED:], product.last)):
        expected = x.double() @ weight.double().T
        found.append(float((part - expected).norm() / expected.norm()))
    return max(found) if all(map(math.isfinite, found)) else math.inf


def microseconds(product: Product, layers: list[torch.nn.Module], x: torch.Tensor, stream: torch.cuda.Stream) -> float:
    """Of one product; median of REPLAYS graphs, each over all layers."""
    calls = layers * math.ceil(40 / len(layers))
    with torch.cuda.stream(stream):
        product.apply(layers[0], x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(), which collects garbage and empties the cache each time.
        graph.capture_begin()
        try:
            kept = [product.apply(layer, x) for layer in calls]
        finally:
            graph.capture_end()
        times = []
        for _ in range(REPLAYS + 2):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            times.append((begin, end))
    stream.synchronize()
    del kept
    return statistics.median(begin.elapsed_time(end) for begin, end in times[2:]) * 1000 / len(calls)


def measure(kernel: str, shape: str, tokens: list[int], stream: torch.cuda.Stream) -> list[dict[str, Any]]:
    outputs, inputs = SHAPES[shape]
    most = 4 if kernel == "few" else max(tokens)
    with torch.cuda.stream(stream):
        product = make(kernel, outputs, inputs)
        nbytes = sum(p.numel() * p.element_size() for p in product.layer.parameters())
        copies = math.ceil(BEYOND_L2 / nbytes)
        layers = [product.layer, *(copy.deepcopy(product.layer) for _ in range(max(1, copies - 1)))]
    stream.synchronize()
    found = []
    for num_tokens in (n for n in tokens if n <= most):
        x = torch.randn(num_tokens, inputs, dtype=DTYPE, device="cuda")
        took = microseconds(product, layers, x, stream)
        result = {"us": took, "gb_per_s": nbytes / took / 1e3, "error": error(product, x)}
        found.append({"shape": shape, "kernel": kernel, "tokens": num_tokens, **result})
        print(" ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in found[-1].values()), flush=True)
    return found


def cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    return f"{result['us']:.1f} ({result['gb_per_s']:.0f})" + ("!" if result["error"] > MAX_ERROR else "")


def print_table(results: list[dict[str, Any]], kernels: list[str]) -> bool:
    """Returns whether all of them were right."""
    table = Table(title="us of a product (GB/s of its weight); ! is a wrong one", box=rich.box.SIMPLE_HEAD)
    for i, column in enumerate(("shape", "tokens", *kernels)):
        table.add_column(column, justify="left" if i == 0 else "right")
    cells = {(r["shape"], r["tokens"], r["kernel"]): r for r in results}
    for shape, num_tokens in dict.fromkeys((r["shape"], r["tokens"]) for r in results):
        table.add_row(shape, str(num_tokens), *(cell(cells.get((shape, num_tokens, kernel))) for kernel in kernels))
    Console(width=max(120, 18 * len(kernels))).print(table)
    return all(r["error"] <= MAX_ERROR for r in results)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=list(KERNELS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/linear.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.utils.torch_utils import current_stream
    from vllm.v1.worker.workspace import init_workspace_manager

    torch.set_default_dtype(DTYPE)
    device = torch.device("cuda", torch.cuda.current_device())
    # Marlin's locks are then made once, as in an engine, and not by a memset before each product.
    init_workspace_manager(device)
    results: list[dict[str, Any]] = []
    failed = False
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        # Of one process: vLLM's parameters ask for their rank.
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method="tcp://127.0.0.1:29578", backend="nccl"
        )
        parallel_state.initialize_model_parallel(1, 1)
        stream = current_stream()
        print(torch.cuda.get_device_name(device), "torch", torch.__version__)
        for shape in options.shapes:
            for kernel in options.kernels:
                try:
                    results += measure(kernel, shape, options.tokens, stream)
                except Exception as problem:
                    failed = True
                    print(f"{shape} {kernel}: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
            torch.cuda.empty_cache()
            if options.json is not None:
                options.json.write_text(json.dumps(results))
    right = print_table(results, options.kernels)
    return 0 if right and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
