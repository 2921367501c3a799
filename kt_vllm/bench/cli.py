"""`kt-vllm bench layer`: the command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kt_vllm import _native
from kt_vllm.args import Parser
from kt_vllm.bench.layer import LoadedLayer, busy_neighbour, make_weights, measure_tokens
from kt_vllm.bench.machine import available_bytes, dram_buffer_bytes, measure_limits
from kt_vllm.bench.report import machine_json, make_console, print_header, print_table, tokens_json
from kt_vllm.bench.settings import FLOAT_TYPES, LayerBench
from kt_vllm.errors import ConfigError, KTError, ResourceError

_PROGRAM = "kt-vllm bench layer"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROGRAM,
        description="Times one MoE layer in the CPU executor, with random weights and uniformly random routing, beside "
        "what this machine can do at best. Needs no model and no vLLM. The default shape is DeepSeek-R1's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--hidden", type=int, default=7168)
    add("--intermediate", type=int, default=2048, help="of one expert")
    add("--experts", type=int, default=256)
    add("--top-k", type=int, default=8)
    add("--type", default="Q4_K", help="GGML type of the weights, or three: gate/up/down")
    add("--tokens", default="1,8,64,512,4096", help="calls of so many tokens, a row of the table each")
    add("--threads", type=int, default=argparse.SUPPRESS, help="(default: physical cores minus one)")
    add("--isa", default="auto")
    add("--numa", metavar="auto|off|LIST", default="auto", help="NUMA nodes to use, as --kt-numa")
    add("--dtype", default="bfloat16", choices=FLOAT_TYPES, help="of the hidden states")
    add("--seconds", type=float, default=2.0, help="of calls for each row")
    add("--repeats", type=int, default=5, help="calls for each row, at least")
    add("--seed", type=int, default=0)
    add("--neighbour", type=int, metavar="CPU", default=argparse.SUPPRESS, help="keep this CPU busy during the calls")
    add("--limit-seconds", type=float, default=0.5, help="for measuring each limit of the machine")
    add("--dram-mib", type=int, default=0, help="to read for the DRAM bandwidth; 0: four times the last-level cache")
    add("--json", metavar="FILE", default=argparse.SUPPRESS, help="write everything measured to this file")
    return parser


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} is '{text}', expected numbers such as 1,8,64") from None


def parse(arguments: Sequence[str]) -> tuple[LayerBench, Path | None]:
    """The checked settings, and where the JSON goes. Raises KTError or NativeError."""
    args = _parser().parse_args(arguments)
    types = args.type.split("/")
    if args.dram_mib < 0:
        raise ConfigError(f"--dram-mib is {args.dram_mib} and must be at least 0")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed} and must be at least 0")
    bench = LayerBench(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_experts=args.experts,
        top_k=args.top_k,
        types=tuple(types * 3 if len(types) == 1 else types),
        tokens=_numbers(args.tokens, "--tokens"),
        threads=getattr(args, "threads", None),
        isa=args.isa,
        numa=args.numa,
        float_type=args.dtype,
        seconds=args.seconds,
        repeats=args.repeats,
        seed=args.seed,
        limit_seconds=args.limit_seconds,
        dram_bytes=args.dram_mib << 20,
        neighbour=getattr(args, "neighbour", None),
    )
    bench.check()
    path = Path(args.json) if hasattr(args, "json") else None
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: the folder {path.absolute().parent} does not exist")
    needed = bench.expert_bytes() * bench.num_experts
    if needed > 0.9 * available_bytes():
        raise ResourceError(
            f"the layer needs {needed / 1e9:.1f} GB and {available_bytes() / 1e9:.1f} GB of memory are free: "
            "give fewer --experts"
        )
    return bench, path


def run(bench: LayerBench) -> dict[str, Any]:
    """Measures and prints; returns what --json writes."""
    console = make_console()
    cpus = bench.cpus()
    with make_weights(bench) as weights:
        nbytes = dram_buffer_bytes(bench.dram_bytes, len(cpus))
        before = measure_limits(cpus, nbytes, bench.limit_seconds)
        # disable=None: no bar where the output is not a terminal.
        with tqdm(unit="B", unit_scale=True, desc="loading", leave=False, disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            layer = LoadedLayer(weights, progress)
        try:
            report = machine_json(bench, layer, weights.read_rate())
            with busy_neighbour(bench.neighbour):
                counts = tqdm(bench.tokens, desc="token counts", leave=False, disable=None)
                results = [measure_tokens(layer, count) for count in counts]
            after = measure_limits(cpus, nbytes, bench.limit_seconds)
        finally:
            layer.close()
    limits = before.better(after)
    report["limits"] = {**limits.to_json(), "before": before.to_json(), "after": after.to_json()}
    report["tokens"] = [tokens_json(bench, result, limits) for result in results]
    print_header(console, report)
    print_table(console, report["tokens"], limits.int8_kind)
    return report


def main(arguments: Sequence[str]) -> None:
    """Ends the process with status 2 and one sentence for everything a user can mend."""
    try:
        bench, path = parse(arguments)
        report = run(bench)
        if path is not None:
            path.write_text(json.dumps(report, indent=1) + "\n")
    except (KTError, _native.NativeError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
