"""One MoE layer here and in kt-kernel: the same weights, the same inputs and routing, in turn in the same run.

    python -m venv /tmp/kt && /tmp/kt/bin/pip install --no-deps kt-kernel numpy
    python benchmarks/compare_kt_kernel.py --kt-python /tmp/kt/bin/python [--tokens 1,8,64] [--threads N]

kt-kernel is no dependency of ours: it runs in a child process of the Python that has it. LLAMAFILE gets the very blocks
of the GGML type; AMXINT4 gets them dequantised to bfloat16 and makes its own int4 of them, with an error that the table
shows. Only one engine works at a time: our threads sleep when they have nothing to do, kt-kernel's process is stopped.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kt_vllm import _native, reference
from kt_vllm.bench.layer import LayerWeights, LoadedLayer, Routing, make_routings, make_weights, relative_error
from kt_vllm.bench.machine import available_bytes, cpu_model, dram_buffer_bytes, measure_limits
from kt_vllm.bench.random_weights import float_bits, float_values
from kt_vllm.bench.settings import LayerBench
from kt_vllm.errors import KTError

CHILD = Path(__file__).with_name("kt_kernel_child.py")
SETTLE_SECONDS = 0.2  # after which our threads are asleep, and a machine's clocks are those of no engine's
NUM_CHECKED = 2  # tokens whose result is compared with float64


class EngineError(RuntimeError):
    """An engine that cannot do this; the others go on."""


class Ours:
    """This package's executor."""

    name = "kt_vllm"

    def __init__(self, weights: LayerWeights) -> None:
        self._layer = LoadedLayer(weights)
        self.about = f"{self._layer.executor.isa_reason}; {self._layer.executor.placement_report}"

    def prepare(self, hidden: NDArray, routings: list[Routing], path: Path) -> None:
        self._hidden, self._routings, self._output = hidden, routings, np.zeros_like(hidden)

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def call(self, index: int) -> float:
        return self._layer.call(self._hidden, self._routings[index], self._output)

    def output(self) -> NDArray:
        return self._output

    def close(self) -> None:
        self._layer.close()


class KTKernel:
    """A child process with one method of kt-kernel."""

    def __init__(self, method: str, args: argparse.Namespace, weights: LayerWeights, paths: list[Path]) -> None:
        self.name = method
        self._folder = weights.folder
        self._log = open(weights.folder / f"{method}.log", "w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            [args.kt_python, CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        bench = weights.bench
        sizes = bench.projection_bytes() if method == "LLAMAFILE" else [2 * r * c for r, c in bench.shapes()]
        try:
            loaded = self._ask(
                op="load",
                method=method,
                type=bench.types[0],
                variant=args.kt_variant,
                threads=args.kt_threads,
                subpools=args.kt_subpools,
                hidden=bench.hidden_size,
                intermediate=bench.intermediate_size,
                experts=bench.num_experts,
                top_k=bench.top_k,
                max_tokens=max(*bench.tokens, 64),
                paths=[str(path) for path in paths],
                expert_bytes=list(sizes),
            )
        except BaseException:
            self.close()
            raise
        if loaded["anonymous_bytes"] < 0.45 * bench.num_experts * sum(r * c for r, c in bench.shapes()):
            self.close()
            raise EngineError(
                f"{method} holds {loaded['anonymous_bytes'] / 1e9:.2f} GB after loading, under half a byte a weight: "
                "its experts share memory, and caches would serve what must come from DRAM"
            )
        self.pause()
        self.about = (
            f"kt-kernel {loaded['variant']}, {args.kt_threads} threads, loaded in {loaded['load_seconds']:.1f} s, "
            f"{loaded['anonymous_bytes'] / 1e9:.2f} GB of its own"
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            tail = " | ".join(self._log.read().strip().splitlines()[-3:])
            raise EngineError(f"{self.name} ended with status {self._child.wait()} in '{request['op']}': {tail}")
        return json.loads(line)

    def pause(self) -> None:
        """Its idle threads would look for work for a while, on cores that another engine needs."""
        self._child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._child.send_signal(signal.SIGCONT)

    def prepare(self, hidden: NDArray, routings: list[Routing], path: Path) -> None:
        self._ask(op="inputs", path=str(path))

    def call(self, index: int) -> float:
        return self._ask(op="call", routing=index)["seconds"]

    def output(self) -> NDArray:
        path = self._folder / "output.npy"
        self._ask(op="output", path=str(path))
        return np.load(path)

    def close(self) -> None:
        self.resume()
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()


def bfloat16_files(weights: LayerWeights) -> list[Path]:
    paths = []
    for projection, values in enumerate(weights.dequantized):
        paths.append(weights.folder / f"bfloat16-{projection}.bin")
        with open(paths[-1], "wb") as file:
            for expert in values:
                file.write(float_bits(expert, "bfloat16").data)
    return paths


@contextmanager
def awake(engine: Any) -> Iterator[None]:
    engine.resume()
    try:
        yield
    finally:
        engine.pause()


def take_turn(engine: Any, routings: list[Routing], result: dict, least: int, seconds: float) -> None:
    for _ in range(3 if len(routings[0].ids) <= 64 else 1):  # wakes the threads and brings the clocks up
        engine.call(0)
    done, deadline = 0, time.perf_counter() + seconds
    while done < least or time.perf_counter() < deadline:
        index = len(result["seconds"]) % len(routings)
        result["seconds"].append(engine.call(index))
        result["experts"].append(routings[index].experts)
        done += 1


def compare(weights: LayerWeights, engines: list[Any], tokens: int, args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of every call and the error, by engine, the engines taking turns."""
    bench = weights.bench
    rng = np.random.default_rng((bench.seed, tokens))
    hidden = float_bits(rng.standard_normal((tokens, bench.hidden_size), np.float32), "bfloat16")
    routings = make_routings(bench, tokens)
    path = weights.folder / "inputs.npz"
    np.savez(path, hidden=hidden, ids=[r.ids for r in routings], weights=[r.weights for r in routings])
    results: dict[str, dict] = {}
    for engine in engines:
        with awake(engine):
            engine.prepare(hidden, routings, path)
        results[engine.name] = {"seconds": [], "experts": []}
    least = -(-args.repeats // args.rounds)
    for turn in range(args.rounds):
        for engine in engines if turn % 2 == 0 else reversed(engines):
            time.sleep(SETTLE_SECONDS)
            with awake(engine):
                take_turn(engine, routings, results[engine.name], least, args.seconds / args.rounds)
    some = np.unique(np.linspace(0, tokens - 1, NUM_CHECKED).astype(int))
    gate, up, down = weights.dequantized
    ids = (routings[0].ids[some] % len(weights.data)).astype(np.int32)
    expected = reference.moe_layer(
        float_values(hidden[some], "bfloat16"), ids, routings[0].weights[some], gate, up, down
    )
    for engine in engines:
        with awake(engine):
            engine.call(0)
            output = engine.output()
        results[engine.name]["error"] = relative_error(float_values(output[some], "bfloat16"), expected)
    return results


def measure(weights: LayerWeights, args: argparse.Namespace, console: Console) -> dict[int, dict[str, dict]]:
    """By token count and engine."""
    bench, methods = weights.bench, args.methods.split(",")
    paths = {method: [weights.path(i) for i in range(3)] for method in methods}
    if set(methods) - {"LLAMAFILE"}:
        bfloat16 = bfloat16_files(weights)
        paths |= {method: bfloat16 for method in methods if method != "LLAMAFILE"}
    makers: list[Any] = [lambda: Ours(weights)]
    makers += [lambda method=method: KTKernel(method, args, weights, paths[method]) for method in methods]
    # AMXINT8 is the largest but for AMXBF16: 1 byte a weight.
    weight_bytes = {"AMXBF16": 2.0, "AMXINT8": 1.0}
    count = 3 * bench.hidden_size * bench.intermediate_size * bench.num_experts
    needed = 1.2 * sum(count * weight_bytes.get(method, 0.6) for method in ["kt_vllm", *methods])
    together = needed < 0.8 * available_bytes() and not args.one_by_one
    console.print("engines: all loaded, taking turns" if together else "engines: loaded one after another")
    results: dict[int, dict[str, dict]] = {tokens: {} for tokens in bench.tokens}
    for group in [makers] if together else [[maker] for maker in makers]:
        engines: list[Any] = []
        try:
            for maker in group:
                try:
                    engines.append(maker())
                    console.print(f"{engines[-1].name:10} {engines[-1].about}", soft_wrap=True)
                except EngineError as error:
                    console.print(f"[bold]left out:[/bold] {error}", soft_wrap=True)
            for tokens in bench.tokens:
                while engines:
                    try:
                        results[tokens] |= compare(weights, engines, tokens, args)
                        break
                    except EngineError as error:
                        console.print(f"[bold]left out:[/bold] {error}", soft_wrap=True)
                        engines = [engine for engine in engines if not str(error).startswith(engine.name)]
        finally:
            for engine in engines:
                engine.close()
    return results


def print_table(console: Console, results: dict[int, dict[str, dict]], methods: list[str]) -> None:
    table = Table()
    headings = ["tokens", "kt_vllm ms", "x roof", "error"]
    for method in methods:
        headings += [f"{method} ms", "ratio", "error"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for tokens, engines in results.items():
        ours = engines["kt_vllm"]
        cells = [str(tokens), f"{ours['median_ms']:.3f}", f"{ours['ratio']:.2f}", f"{ours['error']:.1e}"]
        for method in methods:
            if method not in engines:
                cells += ["-"] * 3
                continue
            theirs = engines[method]
            ratio = theirs["median_ms"] / ours["median_ms"]
            cells += [f"{theirs['median_ms']:.3f}", f"{ratio:.2f}", f"{theirs['error']:.1e}"]
        table.add_row(*cells)
    console.print(table)
    console.print("medians; ratio: to kt_vllm's median, above 1: kt_vllm is faster; error: relative L2 against float64")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kt-python", required=True, help="Python of an environment that has kt-kernel and numpy")
    add("--methods", default="AMXINT4,LLAMAFILE", help="of kt-kernel; also AMXINT8, AMXBF16")
    add("--threads", type=int, help="of kt_vllm; default: physical cores minus one")
    add("--kt-threads", type=int, help="of kt-kernel, which wants a core for its caller; default: as kt_vllm")
    add("--kt-subpools", type=int, default=1, help="NUMA nodes kt-kernel splits the layer over")
    add("--kt-variant", default="auto", help="amx, avx512_vnni, avx2, ...")
    add("--hidden", type=int, default=7168)
    add("--intermediate", type=int, default=2048)
    add("--experts", type=int, default=256)
    add("--top-k", type=int, default=8)
    add("--type", default="Q4_K", help="GGML type of all weights")
    add("--tokens", default="1,8,32,64,128,512,1024,2048,4096")
    add("--isa", default="auto", help="of kt_vllm")
    add("--seconds", type=float, default=2.0, help="of calls for each engine and token count")
    add("--repeats", type=int, default=5, help="calls for each engine and token count, at least")
    add("--rounds", type=int, default=3, help="turns of each engine")
    add("--one-by-one", action="store_true", help="never two engines in memory; so too where memory is short")
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(highlight=False, width=130)
    bench = LayerBench(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_experts=args.experts,
        top_k=args.top_k,
        types=(args.type,) * 3,
        tokens=tuple(int(part) for part in args.tokens.split(",")),
        threads=args.threads,
        isa=args.isa,
    )
    bench.check()
    cpus = bench.cpus()
    args.kt_threads = args.kt_threads or len(cpus)
    with make_weights(bench) as weights:
        nbytes = dram_buffer_bytes(0, len(cpus))
        limits = measure_limits(cpus, nbytes, bench.limit_seconds)
        results = measure(weights, args, console)
        limits = limits.better(measure_limits(cpus, nbytes, bench.limit_seconds))
    for tokens, engines in results.items():
        for result in engines.values():
            pairs = zip(result["seconds"], result["experts"], strict=True)
            operations = bench.operations(tokens)
            result["ratio"] = statistics.median(
                seconds / limits.roof_seconds(experts * bench.expert_bytes(), operations) for seconds, experts in pairs
            )
            result["median_ms"] = statistics.median(result["seconds"]) * 1e3
    peak = limits.peaks[limits.int8_kind] / 1e12 if limits.int8_kind else 0
    machine = f"DRAM read {limits.dram:.1f} GB/s, {limits.int8_kind} peak {peak:.2f} TOPS with {len(cpus)} threads"
    console.print(f"\n{cpu_model()}; {machine}")
    print_table(console, results, args.methods.split(","))
    if args.json:
        args.json.write_text(json.dumps({"limits": limits.to_json(), "results": results}, indent=1))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its files in memory go away
    try:
        main()
    except (KTError, _native.NativeError, OSError) as error:
        sys.exit(f"compare_kt_kernel.py: {error}")
