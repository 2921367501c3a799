"""What a hand-over between GPU and executor costs: a chain of layers in one CUDA graph, with and without it.

    python benchmarks/handover.py [--batch 1,4,16,64] [--ways hostfunc,flags] [--json FILE]

A layer is a small kernel, the hand-over, a small kernel. The coordinator answers with the hidden states themselves, so
no expert is computed. Replays of both graphs take turns; what is added is a replay with the hand-over less the median
of those without, over the number of layers: median, p90 and p99 are of whole replays. Needs a GPU and vLLM.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from kt_vllm import _native
from kt_vllm.handover.device_layer import DeviceLayerHandle, Handover

COLUMNS = ("way", "batch", "added us a layer: median", "p90", "p99", "chain us", "without us", "right")
# A replay that hangs ends this process, after what was measured so far has been printed.
WATCHDOG_SECONDS = 20.0


class Chain:
    """The buffers of one batch size. x -> hidden -> (hand-over) -> output -> x: all multiplications are by one."""

    def __init__(self, options: argparse.Namespace, batch: int, device: torch.device) -> None:
        self.num_layers = options.layers
        dtype = getattr(torch, options.dtype)
        self.x = torch.randn(batch, options.hidden, device=device).to(dtype)
        self.start = self.x.clone()
        self.hidden, self.output = torch.empty_like(self.x), torch.empty_like(self.x)
        self.one = torch.ones((), device=device, dtype=dtype)
        self.weights = torch.rand(batch, options.top_k, device=device)
        self.ids = torch.randint(256, (batch, options.top_k), device=device, dtype=torch.int32)
        self.padding = torch.zeros(batch, device=device, dtype=torch.bool)

    def run(self, handle: DeviceLayerHandle | None) -> None:
        """Queues the chain; without a handle, without the hand-over."""
        for _ in range(self.num_layers):
            torch.mul(self.x, self.one, out=self.hidden)
            if handle is None:
                torch.mul(self.hidden, self.one, out=self.x)
                continue
            handle.submit(self.hidden, self.weights, self.ids, self.output, self.padding)
            handle.wait()
            torch.mul(self.output, self.one, out=self.x)

    def is_right(self) -> bool:
        return torch.equal(self.x, self.start)


def capture(run: Callable[[], None]) -> "torch.cuda.CUDAGraph":
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_us(graph: "torch.cuda.CUDAGraph") -> float:
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(handover: Handover, options: argparse.Namespace, batch: int, device: torch.device) -> dict[str, Any]:
    chain = Chain(options, batch, device)
    handle = handover.layer_handle(_native.ECHO_LAYER, options.top_k)
    without, with_it = capture(lambda: chain.run(None)), capture(lambda: chain.run(handle))
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for i in range(options.warmup + options.replays):
        for name, graph in (("without", without), ("with", with_it)):
            took = replay_us(graph)
            if i >= options.warmup:
                seconds[name].append(took)
    base = statistics.median(seconds["without"])
    added = [(took - base) / options.layers for took in seconds["with"]]
    return {
        "way": handover.way.name,
        "batch": batch,
        "added_us_median": statistics.median(added),
        "added_us_p90": percentile(added, 0.9),
        "added_us_p99": percentile(added, 0.99),
        "chain_us_median": statistics.median(seconds["with"]),
        "chain_us_p99": percentile(seconds["with"], 0.99),
        "without_us_median": base,
        "without_us_p99": percentile(seconds["without"], 0.99),
        "right": chain.is_right(),
        "replays_us": seconds,
    }


def measure_way(way: str, options: argparse.Namespace, device: torch.device, found: Callable[[dict], None]) -> None:
    """Tells `found` a result, or an error, as soon as it is there."""
    try:
        handover = Handover(
            None,
            [(0, options.top_k)],
            hidden_size=options.hidden,
            max_num_tokens=max(options.batch),
            dtype=getattr(torch, options.dtype),
            device=device,
            worker_cpus=[],
            way=way,
            watchdog_seconds=WATCHDOG_SECONDS,
        )
    except Exception as error:
        found({"way": way, "error": f"{type(error).__name__}: {error}"})
        return
    for batch in options.batch:
        try:
            found(measure(handover, options, batch, device))
        except Exception as error:
            traceback.print_exc()
            found({"way": way, "batch": batch, "error": f"{type(error).__name__}: {error}"})
    handover.coordinator.close()


def columns(result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return [result["way"], str(result.get("batch", "all")), result["error"]]
    keys = ("added_us_median", "added_us_p90", "added_us_p99", "chain_us_median", "without_us_median")
    return [result["way"], str(result["batch"]), *(f"{result[key]:.2f}" for key in keys), str(result["right"])]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--batch", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["hostfunc", "flags"])
    parser.add_argument("--replays", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all replays too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/handover.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        **{name: value for name, value in vars(options).items() if name != "json"},
        "results": [],
    }

    def found(result: dict[str, Any]) -> None:
        report["results"].append(result)
        print("  ".join(columns(result)), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report))

    for way in options.ways:
        measure_way(way, options, device, found)
    table = Table(
        title=f"{report['gpu']}: {options.layers} layers of {options.hidden} {options.dtype}, top {options.top_k}, "
        f"{options.replays} replays",
        box=rich.box.SIMPLE_HEAD,
    )
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right")
    for result in report["results"]:
        table.add_row(*columns(result))
    Console(width=140).print(table)
    return 0 if all(result.get("right") for result in report["results"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
