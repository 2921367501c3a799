"""What gpu_machine.sh has measured, as one table; and from two depths of a model, what all of its layers would take.

    benchmarks/gpu_table.py FOLDER [--like deepseek-r1] [--type Q4_K_M]

FOLDER has the JSON files and logs of gpu_machine.sh; what is missing is left out.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, str, str]
# What this release is held to.
MAX_FIXED_MS = 8.0
MAX_STEP_RATIO = 1.10


def synthetic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_synthetic_gguf", ROOT / "examples/make_synthetic_gguf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def whole_model(like: str, recipe: str) -> tuple[int, int]:
    """MoE layers of the real model, and bytes of routed experts that a token needs in all of them."""
    script = synthetic()
    config = script.make_config(like)
    nbytes = sum(t.nbytes for t in script.tensors_of(config, recipe) if "_exps." in t.name)
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    return layers, nbytes * config["num_experts_per_tok"] // config["n_routed_experts"]


def line(x: tuple[float, float], y: tuple[float, float]) -> tuple[float, float]:
    """Intercept and slope."""
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return y[0] - slope * x[0], slope


def extrapolate(few: dict[str, Any], many: dict[str, Any], layers: int, nbytes: int) -> Iterator[Row]:
    """few, many: reports of `kt-vllm bench e2e` with different numbers of MoE layers."""
    depths = (few["moe_layers"], many["moe_layers"])
    if depths[0] == depths[1]:
        yield "all layers", "-", "both models have the same number of MoE layers"
        return
    dram = max(r["experts"]["dram_gb_per_s"] for r in (few, many))
    # The executor's time goes with the bytes: layers of a mix differ in them.
    scale = nbytes / many["experts"]["bytes_per_token"]
    decode = {row["batch"]: row for row in few["decode"]}
    for row in many["decode"]:
        other = decode.get(row["batch"])
        if other is None or "executor_ms" not in row or "executor_ms" not in other:
            continue
        fixed, each = line(depths, tuple(r["step_ms"] - r["executor_ms"] for r in (other, row)))
        beyond, experts = fixed + each * layers, row["executor_ms"] * scale
        _, step_each = line(depths, (other["step_ms"], row["step_ms"]))
        what = f"{layers} MoE layers, batch {row['batch']}"
        parts = f"experts {experts:.1f}, all else {beyond:.1f} ({fixed:.2f} + {each * 1e3:.0f} us a layer)"
        text = f"{beyond + experts:.1f} ms a step: {parts}; {step_each:.3f} ms a further layer in all"
        yield f"{what}: tokens/s", f"{row['batch'] * 1e3 / (beyond + experts):.2f}", text
        if row["batch"] == 1:
            bound = nbytes / dram * 1e-6
            yield (
                f"{what}: DRAM bound, tokens/s",
                f"{1e3 / bound:.2f}",
                f"{nbytes / 1e9:.2f} GB a token / {dram:.1f} GB/s = {bound:.1f} ms",
            )
            yield f"{what}: beyond the experts, ms", f"{beyond:.2f}", verdict(beyond <= MAX_FIXED_MS, MAX_FIXED_MS)
    prefill = {row["prompt_tokens"]: row for row in few["prefill"]}
    for row in many["prefill"]:
        if other := prefill.get(row["prompt_tokens"]):
            fixed, each = line(depths, (other["seconds"], row["seconds"]))
            yield (
                f"{layers} MoE layers, prompt of {row['prompt_tokens']}: tokens/s",
                f"{row['prompt_tokens'] / (fixed + each * layers):.1f}",
                f"{each * 1e3:.1f} ms a layer + {fixed * 1e3:.0f} ms",
            )


def verdict(good: bool, limit: float) -> str:
    return f"{'ok' if good else 'MISSED'}: at most {limit}"


def e2e_rows(report: dict[str, Any]) -> Iterator[Row]:
    """Of one model."""
    name = f"{report['moe_layers']} MoE layers" + ("" if "experts" in report else " without experts")
    memory = report["memory"]
    yield f"{name}: engine start, s", f"{report['start_seconds']:.1f}", f"KV cache {memory['kv_cache_tokens']} tokens"
    for row in report["prefill"]:
        share = f"experts {row['executor_s'] / row['seconds']:.0%}" if row["calls"] else ""
        yield f"{name}, prompt of {row['prompt_tokens']}: tokens/s", f"{row['tokens_per_s']:.1f}", share
    for row in report["decode"]:
        parts = ", ".join(
            f"{what} {row[key]:.2f}"
            for what, key in (("experts", "executor_ms"), ("between", "between_ms"), ("rest", "rest_ms"))
            if key in row
        )
        yield (
            f"{name}, batch {row['batch']}: tokens/s",
            f"{row['tokens_per_s']:.2f}",
            f"{row['step_ms']:.2f} ms a step: {parts}; {row['graphs']}",
        )
    if trace := report.get("trace"):
        layers = report["moe_layers"]
        step = next(r["step_ms"] for r in report["decode"] if r["batch"] == trace["batch"]) * 1e3
        # The sum over layers of the larger of both sides, and what the device does by itself.
        parts = trace["serial_us"] + max(trace["executor_us"], trace["overlapped_us"])
        least = parts + layers * trace["handover_us_per_layer"]
        text = (
            f"{verdict(step / least <= MAX_STEP_RATIO, MAX_STEP_RATIO)}; GPU {trace['serial_us']:.0f} us, overlapped "
            f"{trace['overlapped_us']:.0f}, experts {trace['executor_us']:.0f}, hand-over "
            f"{trace['handover_us_per_layer']:.1f} a layer, idle {trace['idle_us']:.0f}; "
            f"{trace['graph_launches']:.2f} graph launches"
        )
        yield f"{name}, batch {trace['batch']}: step / its parts", f"{step / least:.3f}", text


def accuracy_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("accuracy-*.json")):
        found = json.loads(path.read_text())
        name = path.stem.removeprefix("accuracy-")
        if "nll_difference" in (score := found.get("score", {})):
            yield f"{name}: NLL off by, KL", f"{score['nll_difference']:.3%}, {score['kl']:.4f}", "at most 0.5 %, 0.003"
        if "ms" in (steps := found.get("steps", {})):
            yield f"{name}: tiny model, ms a step", f"{steps['ms']:.3f}", ""
        decode = {k: v for k, v in found.get("decode", {}).items() if isinstance(v, dict)}
        if decode:
            worst = max(v["mean"] for v in decode.values())
            graphs = {kind for v in decode.values() for kind in v["graphs"]}
            yield (
                f"{name}: decode against prefill",
                f"{worst:.4f}",
                f"worst mean, batches {', '.join(decode)}; {graphs}",
            )
        errors = [f"{check}: {r['error']}" for check, r in found.items() if isinstance(r, dict) and "error" in r]
        for error in errors:
            yield f"{name}: FAILED", "", error[:200]


def log_rows(folder: Path) -> Iterator[Row]:
    """Lines that other programs print for people."""
    for name, pattern in (
        ("memory", r"DENSE_MEMORY (.*)"),
        ("memory24", r"DENSE_MEMORY (.*)"),
        ("soak", r"soak: (.*)"),
        ("handover-bench", r"(.*\bus\b.*)"),
        ("serve-1", r"((?:Output token throughput|Mean TPOT|Mean TTFT).*)"),
        ("serve-4", r"((?:Output token throughput|Mean TPOT|Mean TTFT).*)"),
        ("serve-16", r"((?:Output token throughput|Mean TPOT|Mean TTFT).*)"),
    ):
        path = folder / f"{name}.log"
        if path.is_file():
            for text in re.findall(pattern, path.read_text(errors="replace")):
                yield name, "", " ".join(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", default="deepseek-r1")
    parser.add_argument("--type", default="Q4_K_M")
    args = parser.parse_args()
    rows = [*accuracy_rows(args.folder), *log_rows(args.folder)]
    reports = [json.loads(path.read_text()) for path in sorted(args.folder.glob("e2e-*.json"))]
    reports.sort(key=lambda report: report["moe_layers"])
    for report in reports:
        rows += e2e_rows(report)
    if (alone := args.folder / "gpuonly.json").is_file():
        rows += e2e_rows(json.loads(alone.read_text()))
    complete = [report for report in reports if "experts" in report]
    if len(complete) > 1:
        rows += extrapolate(complete[0], complete[-1], *whole_model(args.like, args.type))
    table = Table(box=rich.box.SIMPLE_HEAD)
    for heading, justify in (("what", "left"), ("figure", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    main()
