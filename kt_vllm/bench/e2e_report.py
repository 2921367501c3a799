"""What was measured beside what the machine can do: as JSON, and as tables for people."""

import time
from typing import TYPE_CHECKING, Any

import rich.box
import torch
from rich.console import Console
from rich.table import Table
from vllm.platforms import current_platform

import kt_vllm
from kt_vllm import _native
from kt_vllm.bench.machine import cpu_model, dram_buffer_bytes
from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.config import KTConfig
from kt_vllm.expert_spans import host_experts
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.hf_config import config_fields

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.llm_engine import LLMEngine

_LIMIT_SECONDS = 0.5  # for the DRAM bandwidth


def machine_json(llm: "LLMEngine") -> dict[str, Any]:
    """Model, device, memory, and the least time that a token's experts take this machine; after the measurements, since
    it keeps the executor's CPUs busy."""
    config = llm.vllm_config
    report: dict[str, Any] = {
        "kt_vllm": kt_vllm.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": cpu_model(),
        "device": current_platform.get_device_name() if not current_platform.is_cpu() else "cpu",
        "model": {
            "name": str(config.model_config.model),
            "layers": config.model_config.get_total_num_hidden_layers(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
        },
        "engine": {
            "max_model_len": config.model_config.max_model_len,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel": config.parallel_config.pipeline_parallel_size,
        },
        "memory": _memory(llm),
    }
    kt = KTConfig.from_vllm_config(config)
    if kt is not None:
        report["kt"] = kt.to_dict()
        if not kt.no_experts and kt.cpus:
            cpus = sorted(set(kt.cpus))
            dram = _native.measure_dram_read(cpus, dram_buffer_bytes(0, len(cpus)), _LIMIT_SECONDS)
            nbytes = expert_bytes_per_token(config, kt)
            report["experts"] = {
                "bytes_per_token": nbytes,
                "dram_gb_per_s": dram,
                "bound_ms": nbytes / dram * 1e-6,
            }
    return report


def _memory(llm: "LLMEngine") -> dict[str, Any]:
    """Bytes of this process's device, where it is in this process; weights: as vLLM counts them after loading."""
    cache = llm.vllm_config.cache_config
    memory: dict[str, Any] = {"kv_cache_tokens": cache.kv_cache_size_tokens}
    if not current_platform.is_cpu():
        if llm.vllm_config.parallel_config.world_size == 1:
            memory["weights"] = int(llm.model_executor.driver_worker.model_runner.model_memory_usage)
        free, total = torch.cuda.mem_get_info()
        memory |= {"used": total - free, "total": total}
    return memory


def expert_bytes_per_token(config: "VllmConfig", kt: KTConfig) -> int:
    """Of the executor's weights that a single token needs, all layers."""
    hf_config = config.model_config.hf_text_config
    plan = CheckpointPlan.build(GGUFModel.open(kt.gguf), config_fields(hf_config))
    nbytes = 0
    for layer, experts in plan.experts.items():
        placement = kt.placement(layer)
        here = host_experts(experts, placement)
        if here is not None:
            # By share of the experts that are here, for a token that chooses evenly.
            top_k = placement.top_k or hf_config.num_experts_per_tok
            nbytes += here.nbytes * top_k // experts.gate.shape[0]
    return nbytes


def make_console() -> Console:
    """As wide as the tables also where the output is a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def print_report(console: Console, report: dict[str, Any]) -> None:
    model, engine, memory = report["model"], report["engine"], report["memory"]
    lines = [
        ("model", f"{model['name']}: {model['layers']} layers, {report['moe_layers']} of them call the executor"),
        ("device", f"{report['device']}; CPU {report['cpu']}"),
        ("engine", f"started in {report['start_seconds']:.1f} s; {', '.join(f'{k} {v}' for k, v in engine.items())}"),
        (
            "memory",
            ", ".join(f"{k} {v / 1e9:.2f} GB" if "tokens" not in k else f"{k} {v}" for k, v in memory.items() if v),
        ),
        ("executor", f"timed by {', '.join(report['clock'])}"),
    ]
    if experts := report.get("experts"):
        nbytes, dram = experts["bytes_per_token"] / 1e6, experts["dram_gb_per_s"]
        text = f"{nbytes:.1f} MB of experts a token / {dram:.1f} GB/s DRAM read = {experts['bound_ms']:.3f} ms"
        lines.append(("bound", text))
    for name, text in lines:
        console.print(f"[bold]{name:10}[/bold] {text}", soft_wrap=True)
    _print_prefill(console, report["prefill"])
    _print_decode(console, report["decode"])


def _table(console: Console, headings: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_prefill(console: Console, rows: list[dict[str, Any]]) -> None:
    _table(
        console,
        ("prompt", "seconds", "tokens/s", "experts s", "between s", "experts' share"),
        [
            [
                str(r["prompt_tokens"]),
                f"{r['seconds']:.3f}",
                f"{r['tokens_per_s']:.1f}",
                *((f"{r['executor_s']:.3f}", f"{r['between_s']:.3f}") if r["calls"] else ("-", "-")),
                f"{r['executor_s'] / r['seconds']:.0%}" if r["calls"] else "-",
            ]
            for r in rows
        ],
    )


def _print_decode(console: Console, rows: list[dict[str, Any]]) -> None:
    _table(
        console,
        ("batch", "context", "ms/step", "tokens/s", "experts ms", "between ms", "rest ms", "graphs"),
        [
            [
                str(r["batch"]),
                str(r["context"]),
                f"{r['step_ms']:.3f}",
                f"{r['tokens_per_s']:.1f}",
                *(f"{r[key]:.3f}" if key in r else "-" for key in ("executor_ms", "between_ms", "rest_ms")),
                ", ".join(f"{count} {mode}" for mode, count in r["graphs"].items()) or "none",
            ]
            for r in rows
        ],
    )
    console.print(
        "experts: from request to reply; between: from a reply to the request of the next MoE layer, the GPU's work\n"
        "and the hand-over; rest: what is ahead of the first MoE layer and behind the last, and scheduling.",
        soft_wrap=True,
    )


def print_trace(console: Console, trace: dict[str, Any], num_layers: int) -> None:
    """A step on the device, by the profiler (which makes it a little slower)."""
    console.print(
        f"\n[bold]One decode step on the device[/bold], batch {trace['batch']}, mean of {trace['steps']}: "
        f"{trace['step_us']:.0f} us, {trace['kernels']:.0f} kernels, {trace['graph_launches']:.2f} graph launches",
        soft_wrap=True,
    )
    rows = [
        ("serial", trace["serial_us"], "kernels outside the executor's calls"),
        ("calls", trace["calls_us"], f"from request to reply, {num_layers} layers; of these:"),
        ("  experts", trace["executor_us"], "by the executor's clock"),
        ("  overlapped", trace["overlapped_us"], "kernels meanwhile (shared experts)"),
        (
            "  hand-over",
            trace["handover_us_per_layer"] * num_layers,
            f"{trace['handover_us_per_layer']:.1f} us a layer",
        ),
        ("idle", trace["idle_us"], "between kernels and between steps"),
    ]
    table = Table(box=rich.box.SIMPLE_HEAD)
    for heading, justify in (("part", "left"), ("us", "right"), ("what", "left")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, us, what in rows:
        table.add_row(name, f"{us:.0f}", what)
    console.print(table)
    _table(
        console,
        ("us a step", "times", "kernel"),
        [[f"{k['us']:.0f}", f"{k['count']:.1f}", k["name"][:80]] for k in trace["longest"]],
    )
