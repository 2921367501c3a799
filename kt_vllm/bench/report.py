"""The results: as JSON, and as a table for people."""

import statistics
import time
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

import kt_vllm
from kt_vllm.bench.layer import LoadedLayer, TokensResult, median_ratio
from kt_vllm.bench.machine import Limits, cache_bytes, cpu_model
from kt_vllm.bench.settings import LayerBench

JSON_VERSION = 1
_QUIET = 0.8  # of the better of two measurements; what is below is more than the spread of a quiet virtual machine
_COLUMNS = ("tokens", "calls", "ms", "min ms", "experts", "GB/s", "TFLOP/s", "roof ms", "of", "x roof", "error")


def machine_json(bench: LayerBench, layer: LoadedLayer, read_rate: float) -> dict[str, Any]:
    """What the header says, but for the limits."""
    executor, load = layer.executor, layer.load
    return {
        "version": JSON_VERSION,
        "kt_vllm": kt_vllm.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": cpu_model(),
        "cache_bytes": cache_bytes(),
        "threads": len(bench.cpus()),
        "isa": executor.isa,
        "isa_reason": executor.isa_reason,
        "numa": bench.numa,
        "placement": executor.placement_report,
        "memory": executor.memory_report,
        "prefetch": layer.prefetch,
        "neighbour": bench.neighbour,
        "layer": {
            "hidden": bench.hidden_size,
            "intermediate": bench.intermediate_size,
            "experts": bench.num_experts,
            "top_k": bench.top_k,
            "types": list(bench.types),
            "expert_bytes": bench.expert_bytes(),
            "dtype": bench.float_type,
            "seed": bench.seed,
        },
        "load": {
            "bytes": load.nbytes,
            "seconds": load.seconds,
            "gb_per_s": load.rate,
            "page_cache_gb_per_s": read_rate,
            "huge_page_bytes": load.huge_page_bytes,
        },
    }


def tokens_json(bench: LayerBench, result: TokensResult, limits: Limits) -> dict[str, Any]:
    """One row of the table, and the times it was made of."""
    nbytes = [experts * bench.expert_bytes() for experts in result.experts]
    operations = bench.operations(result.num_tokens)
    roofs = [limits.roof_seconds(call, operations) for call in nbytes]
    rates = [call / seconds for call, seconds in zip(nbytes, result.seconds, strict=True)]
    median = statistics.median(result.seconds)
    return {
        "tokens": result.num_tokens,
        "calls": len(result.seconds),
        "median_ms": median * 1e3,
        "min_ms": min(result.seconds) * 1e3,
        "experts": statistics.mean(result.experts),
        "gb_per_s": statistics.median(rates) / 1e9,
        "tflops": operations / median / 1e12,
        "roof_ms": statistics.median(roofs) * 1e3,
        "roof_of": "bytes" if statistics.median(roofs) > limits.roof_seconds(0, operations) else "int8",
        "ratio": median_ratio(result, roofs),
        "error": result.error,
        "seconds": result.seconds,
    }


def make_console() -> Console:
    """As wide as the table also where the output is a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def print_header(console: Console, report: dict[str, Any]) -> None:
    layer, load, limits = report["layer"], report["load"], report["limits"]
    types = layer["types"][0] if len(set(layer["types"])) == 1 else "/".join(layer["types"])
    gigabytes = layer["expert_bytes"] * layer["experts"] / 1e9
    peaks = ", ".join(f"{kind} {peak / 1e12:.2f}" for kind, peak in limits["peaks"].items())
    before, after = limits["before"], limits["after"]
    dram = f"{before['dram']:.1f} before, {after['dram']:.1f} after the calls"
    shape = f"hidden {layer['hidden']}, intermediate {layer['intermediate']}, {layer['experts']} experts"
    loading = f"{load['gb_per_s']:.1f} GB/s, all threads; one thread reads the file from page cache at"
    lines = [
        ("layer", f"{shape}, top-{layer['top_k']}, {types}, {layer['dtype']}: {gigabytes:.2f} GB"),
        ("CPU", report["cpu"]),
        ("threads", f"{report['threads']}; {report['placement']}"),
        ("kernels", report["isa_reason"]),
        ("DRAM read", f"{limits['dram']:.1f} GB/s with these threads ({dram})"),
        ("peaks, TOPS", f"{peaks} (the better of before and after)" if peaks else "none measured"),
        ("load", f"{loading} {load['page_cache_gb_per_s']:.1f} GB/s"),
        ("memory", report["memory"]),
        ("prefetch", report["prefetch"]),
    ]
    pairs = [(before["dram"], after["dram"])]
    if kind := limits["int8_kind"]:
        pairs.append((before["peaks"][kind], after["peaks"][kind]))
    if any(min(pair) < _QUIET * max(pair) for pair in pairs):
        lines.append(("note", "the limits before and after the calls differ: something else was using this machine"))
    if report["neighbour"] is not None:
        lines.append(("neighbour", f"something else kept CPU {report['neighbour']} busy during the calls"))
    if gigabytes * 1e9 < 2 * report["cache_bytes"]:
        caches = f"{report['cache_bytes'] / 1e6:.0f} MB of last-level cache"
        lines.append(("note", f"the weights are little beside {caches}: reading them can beat the DRAM roof"))
    for name, text in lines:
        console.print(f"[bold]{name:12}[/bold] {text}", soft_wrap=True)


def print_table(console: Console, rows: list[dict[str, Any]], int8_kind: str | None) -> None:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            str(row["calls"]),
            f"{row['median_ms']:.3f}",
            f"{row['min_ms']:.3f}",
            f"{row['experts']:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['tflops']:.3f}",
            f"{row['roof_ms']:.3f}",
            row["roof_of"],
            f"{row['ratio']:.2f}",
            f"{row['error']:.2e}",
        )
    console.print(table)
    arithmetic = f"operations / {int8_kind} peak" if int8_kind else "nothing else"
    console.print(
        "ms: median; GB/s: of the experts a call touched; roof: the larger of these bytes / DRAM read and\n"
        f"{arithmetic}; x roof: median of each call's time over its own roof;\n"
        "error: relative L2 of some tokens against float64 with the same weights.",
        soft_wrap=True,
    )
