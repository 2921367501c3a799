"""`kt-vllm bench e2e`: real vLLM with a model, in this process; where the time of a step goes."""

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

from kt_vllm import _native
from kt_vllm.bench.e2e_clock import Clock, read_clock, start_clock
from kt_vllm.bench.e2e_report import machine_json, make_console, print_report, print_trace
from kt_vllm.bench.trace import summarise_trace
from kt_vllm.errors import ConfigError, KTError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PROGRAM = "kt-vllm bench e2e"
JSON_VERSION = 1
# Decode steps of a trace: enough for a mean, few enough for a file that a browser opens.
_TRACED_STEPS = 8


@dataclass(frozen=True)
class E2EBench:
    """prompts: a measurement of prefill each, one request of so many tokens. batches: a measurement of decoding each,
    so many requests of prompts[0] tokens that generate decode_tokens each. runs: of each, after one to warm up.
    """

    prompts: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    decode_tokens: int = 64
    runs: int = 3
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for what cannot be measured."""
        for flag, values in (("--prompt-tokens", self.prompts), ("--batch", self.batches), ("--runs", (self.runs,))):
            if not values or min(values) < 1:
                raise ConfigError(f"{flag} is {','.join(map(str, values))}, expected numbers of at least 1")
        if self.decode_tokens < 3:
            raise ConfigError(f"--decode-tokens is {self.decode_tokens}, expected at least 3")

    def check_model(self, max_model_len: int, max_num_seqs: int) -> None:
        """The same, once vLLM knows the model."""
        longest = max(*self.prompts, self.prompts[0] + self.decode_tokens)
        if longest > max_model_len:
            raise ConfigError(f"{longest} tokens of prompt and answer do not fit --max-model-len {max_model_len}")
        if max(self.batches) > max_num_seqs:
            raise ConfigError(f"--batch {max(self.batches)} does not fit --max-num-seqs {max_num_seqs}")


@dataclass
class Run:
    """prefill_seconds: until every request had its first token; decode_seconds: from there until the first request was
    complete, in which decode_steps steps gave decode_tokens tokens. graphs: of the decode steps, by kind.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    prefill: Clock = field(default_factory=Clock)
    decode: Clock = field(default_factory=Clock)
    graphs: dict[str, int] = field(default_factory=dict)


class _GraphModes(StatLoggerBase):
    """Keeps which CUDA graph, if any, each step ran as; vLLM makes it."""

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        self.seen: Counter[str] = Counter()

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        stat = None if scheduler_stats is None else scheduler_stats.cudagraph_stats
        if stat is not None:
            self.seen[stat.runtime_mode] += 1

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Engine:
    """vLLM's engine in this process, stepped by hand."""

    def __init__(self, engine_args: EngineArgs, seed: int) -> None:
        loggers: list[_GraphModes] = []

        def make_logger(vllm_config: "VllmConfig", engine_index: int) -> _GraphModes:
            loggers.append(_GraphModes(vllm_config, engine_index))
            return loggers[-1]

        begin = time.perf_counter()
        # With the defaults of `vllm serve`.
        self.llm = LLMEngine.from_engine_args(engine_args, UsageContext.OPENAI_API_SERVER, stat_loggers=[make_logger])
        self.start_seconds = time.perf_counter() - begin
        self.config = self.llm.vllm_config
        self.graphs = loggers[0].seen if loggers else Counter()
        self.clock_by = sorted(set(self.llm.apply_model(start_clock)))
        self._rng = np.random.default_rng(seed)
        self._numbers = itertools.count()

    def read_clock(self) -> Clock:
        return sum(self.llm.apply_model(read_clock), Clock())

    def add_requests(self, batch: int, prompt_tokens: int, max_tokens: int) -> None:
        """Random prompts, so that no prefix is known already."""
        vocabulary = self.config.model_config.get_vocab_size()
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompts = self._rng.integers(0, vocabulary, (batch, prompt_tokens)).tolist()
        for prompt in prompts:
            self.llm.add_request(f"bench-{next(self._numbers)}", {"prompt_token_ids": prompt}, params)

    def run(self, batch: int, prompt_tokens: int, max_tokens: int, trace: Path | None = None) -> Run:
        """trace: where to write a profile of some decode steps."""
        run, profile = Run(), None
        clock_before = self.read_clock()
        begin = time.perf_counter()
        self.add_requests(batch, prompt_tokens, max_tokens)
        started: set[str] = set()
        is_complete = False
        clock_first, graphs_first, first = clock_before, self.graphs.copy(), begin
        while self.llm.has_unfinished_requests():
            outputs = self.llm.step()
            now = time.perf_counter()
            if len(started) < batch:
                started.update(output.request_id for output in outputs)
                if len(started) == batch:
                    run.prefill_seconds = now - begin
                    clock_first, graphs_first = self.read_clock(), self.graphs.copy()
                    run.prefill = clock_first.since(clock_before)
                    first = time.perf_counter()
                    if trace is not None:
                        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                        profile.start()
                continue
            if outputs and not is_complete:
                run.decode_steps += 1
                run.decode_tokens += sum(len(o.outputs[0].token_ids) for o in outputs)
                if any(o.finished for o in outputs):
                    is_complete = True
                    run.decode_seconds = now - first
                    run.decode = self.read_clock().since(clock_first)
                    run.graphs = dict(self.graphs - graphs_first)
        if profile is not None:
            profile.stop()
            profile.export_chrome_trace(str(trace))
        return run

    def close(self) -> None:
        self.llm.engine_core.shutdown()


def _median_run(runs: list[Run], seconds: str) -> Run:
    """The run whose time is the median (the lower of two)."""
    return sorted(runs, key=lambda run: getattr(run, seconds))[(len(runs) - 1) // 2]


def measure_prefill(engine: Engine, bench: E2EBench, prompt_tokens: int) -> dict[str, Any]:
    """One request at a time."""
    runs = [engine.run(1, prompt_tokens, 1) for _ in range(bench.runs + 1)][1:]
    run = _median_run(runs, "prefill_seconds")
    return {
        "prompt_tokens": prompt_tokens,
        "seconds": run.prefill_seconds,
        "tokens_per_s": prompt_tokens / run.prefill_seconds,
        "executor_s": run.prefill.executor_ns * 1e-9,
        "between_s": run.prefill.between_ns * 1e-9,
        "calls": run.prefill.num_calls,
        "runs": [r.prefill_seconds for r in runs],
    }


def measure_decode(engine: Engine, bench: E2EBench, batch: int) -> dict[str, Any]:
    """Requests side by side, all decoding. The executor's times are means of its own steps: vLLM may have queued one
    more than it has answered."""
    runs = [engine.run(batch, bench.prompts[0], bench.decode_tokens) for _ in range(bench.runs + 1)][1:]
    for run in runs:
        if run.decode_steps < 1:
            raise ConfigError(
                f"no step decoded all {batch} requests: some end before the last one begins; raise --decode-tokens"
            )
    run = sorted(runs, key=lambda r: r.decode_seconds / r.decode_steps)[(len(runs) - 1) // 2]
    step_ms = run.decode_seconds / run.decode_steps * 1e3
    steps = run.decode.num_steps
    row: dict[str, Any] = {
        "batch": batch,
        "context": bench.prompts[0],
        "steps": run.decode_steps,
        "step_ms": step_ms,
        "tokens_per_s": run.decode_tokens / run.decode_seconds,
        "graphs": run.graphs,
        "runs_ms": [r.decode_seconds / r.decode_steps * 1e3 for r in runs],
    }
    if steps:
        executor, between = (ns * 1e-6 / steps for ns in (run.decode.executor_ns, run.decode.between_ns))
        row |= {"executor_ms": executor, "between_ms": between, "rest_ms": step_ms - executor - between}
    return row


def measure_trace(engine: Engine, bench: E2EBench, path: Path) -> dict[str, Any] | None:
    """Of decoding at the first batch size; the executor's part by its own clock."""
    run = engine.run(bench.batches[0], bench.prompts[0], _TRACED_STEPS + 3, trace=path)
    summary = summarise_trace(path, run.decode.num_layers)
    if summary is not None:
        layers = run.decode.num_layers
        executor = run.decode.executor_ns * 1e-3 / run.decode.num_steps
        # Of a layer's call, what neither the executor nor the device's own work in the meantime accounts for.
        handover = (summary["calls_us"] - max(executor, summary["overlapped_us"])) / layers
        summary |= {"batch": bench.batches[0], "executor_us": executor, "handover_us_per_layer": handover}
    return summary


def run(engine_args: EngineArgs, bench: E2EBench, save: Callable[[dict[str, Any]], None], trace: Path | None) -> None:
    """Measures, and saves what --json writes; again with the trace: a profiler may fail where the rest did not."""
    engine = Engine(engine_args, bench.seed)
    try:
        bench.check_model(engine.config.model_config.max_model_len, engine.config.scheduler_config.max_num_seqs)
        report: dict[str, Any] = {
            "version": JSON_VERSION,
            "settings": asdict(bench),
            "clock": engine.clock_by,
            "start_seconds": engine.start_seconds,
            "moe_layers": engine.read_clock().num_layers,
            "prefill": [measure_prefill(engine, bench, tokens) for tokens in bench.prompts],
            "decode": [measure_decode(engine, bench, batch) for batch in bench.batches],
        }
        report |= machine_json(engine.llm)
        save(report)
        console = make_console()
        print_report(console, report)
        if trace is not None:
            report["trace"] = measure_trace(engine, bench, trace)
            save(report)
            if report["trace"] is not None:
                print_trace(console, report["trace"], report["moe_layers"])
    finally:
        engine.close()


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} is '{text}', expected numbers such as 1,8,64") from None


def _parser() -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog=_PROGRAM,
        description="Runs vLLM with a model and random prompts in this process, and says where the time goes. Takes "
        "every engine flag of vllm serve beside these.",
    )
    add = parser.add_argument_group("measurement").add_argument
    add("model_tag", metavar="MODEL", help="the model's folder or name")
    add("--prompt-tokens", default="512", help="lengths such as 512,2048: a measurement of prefill each, one request")
    add("--decode-tokens", type=int, default=64, help="that each request generates")
    add(
        "--batch",
        default="1",
        help="requests at once, such as 1,4,16: a measurement of decoding each, with the first length",
    )
    add("--runs", type=int, default=3, help="of each measurement, after one to warm up; the median counts")
    add("--trace", metavar="FILE", help="profile some decode steps of the first batch: where each microsecond goes")
    add("--json", metavar="FILE", help="write everything measured to this file")
    parser = EngineArgs.add_cli_args(parser)
    # As `vllm bench latency`: nothing may be known already. The prompts are numbers, so no tokenizer is needed.
    parser.set_defaults(enable_prefix_caching=False, skip_tokenizer_init=True, cudagraph_metrics=True)
    return parser


def parse(arguments: Sequence[str]) -> tuple[Namespace, E2EBench]:
    """Raises ConfigError for what cannot be measured."""
    args = _parser().parse_args(list(arguments))
    bench = E2EBench(
        prompts=_numbers(args.prompt_tokens, "--prompt-tokens"),
        batches=_numbers(args.batch, "--batch"),
        decode_tokens=args.decode_tokens,
        runs=args.runs,
        seed=args.seed or 0,
    )
    bench.check()
    for flag, path in (("--json", args.json), ("--trace", args.trace)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: the folder {Path(path).absolute().parent} does not exist")
    if args.trace is not None and current_platform.is_cpu():
        raise ConfigError("--trace shows what a GPU does, and vLLM's platform here is the CPU; leave it out")
    args.model = args.model_tag
    return args, bench


def main(arguments: Sequence[str]) -> None:
    """Ends the process with status 2 and one sentence for everything a user can mend."""
    load_general_plugins()
    try:
        args, bench = parse(arguments)

        def save(report: dict[str, Any]) -> None:
            if args.json is not None:
                Path(args.json).write_text(json.dumps(report, indent=1) + "\n")

        run(EngineArgs.from_cli_args(args), bench, save, None if args.trace is None else Path(args.trace))
        sys.stdout.flush()
        # Not through the interpreter's end: vLLM's threads may still free tensors there, and torch then aborts.
        os._exit(0)
    except (KTError, _native.NativeError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        raise SystemExit(2) from None
