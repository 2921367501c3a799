"""The whole way of a token with the experts on the CPU and everything else on a GPU, against exact log-probabilities.

Each configuration is one engine, asked everything at once by engine_checks.py; the most important come first. The first
word of a test's name is the engine it asks: -k test_graphs starts one.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_accuracy import assert_exact_enough
from tests.tolerances import MAX_BATCHED_LOGPROB_DIFFERENCE, MAX_MEAN_BATCHED_LOGPROB_DIFFERENCE

pytestmark = [pytest.mark.gpu, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
# An engine with graphs starts in 70 s, and its checks take about as long.
ENGINE_SECONDS = 280
# Enough for batches of 1 to 16: graphs of more would only take time.
SIZES = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}}
# Several may run at once: none measures what the GPU has left, which the others change meanwhile.
FEW = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 1 << 30}
# The tiny model has experts in layers 1 to 3.
TWO_OF_THREE = "rules:\n  - layers: 1-2\n    experts: gpu\n"
# Two ranks that share a GPU. NCCL refuses that on one host, so each names a host of its own; they talk by sockets.
TWO_RANKS = [
    {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577",
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    for rank in range(2)
]
WATCHDOG_SECONDS = 10.0
WATCHDOG_SLACK_SECONDS = 5.0


@functools.cache
def results(name: str) -> dict[str, Any]:
    """What each check of an engine printed, its log, and its exit status. One engine, whoever asks first."""
    rules = Path(tempfile.mkdtemp(), "rules.yaml")
    rules.write_text(TWO_OF_THREE)
    graphs = {**FEW, **SIZES}
    # No step has more tokens than the largest piecewise graph, so that prefill is made of those.
    piecewise = {**FEW, "max_num_batched_tokens": 256}
    piecewise["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
    checks, llm, kt = {
        "graphs": ("score,decode,steps,prefix,trace,watchdog", piecewise, {"watchdog_seconds": WATCHDOG_SECONDS}),
        "eager": ("score,decode", {**FEW, "enforce_eager": True}, {}),
        # Chunks of 64 tokens, a cache of 768, no scheduling ahead, and memory that can go away.
        "small": (
            "score,preemption,sleep,prefix",
            {
                **graphs,
                "max_num_batched_tokens": 64,
                "block_size": 64,
                "num_gpu_blocks_override": 12,
                "async_scheduling": False,
                "enable_sleep_mode": True,
            },
            {},
        ),
        "hostfunc": ("score,decode", graphs, {"handover": "hostfunc"}),
        "int4": ("score,decode", graphs, {"gpu_quant": "int4"}),
        "rules": ("score,decode,steps", graphs, {"rules": str(rules)}),
        "tensor_parallel": ("score,decode", {**graphs, "tensor_parallel_size": 2}, {}),
        "pipeline_parallel": ("score,decode", {**graphs, "pipeline_parallel_size": 2}, {}),
        "ranks": (
            "score,decode",
            {
                **graphs,
                "tensor_parallel_size": 2,
                "distributed_executor_backend": "external_launcher",
                "disable_custom_all_reduce": True,
            },
            {},
        ),
    }[name]
    found: dict[str, Any] = {}
    environments = TWO_RANKS if name == "ranks" else [{}]
    with contextlib.ExitStack() as files:
        logs = [
            files.enter_context(tempfile.NamedTemporaryFile("w+", suffix=f"-{name}.log", delete=False))
            for _ in environments
        ]
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.gpu.engine_checks", checks),
                    *("--llm", json.dumps(llm), "--kt", json.dumps(kt)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **environment},
                start_new_session=True,
            )
            for log, environment in zip(logs, environments, strict=True)
        ]
        try:
            found["status"] = processes[0].wait(ENGINE_SECONDS)
        except subprocess.TimeoutExpired:
            found["status"] = f"still running after {ENGINE_SECONDS} s"
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    texts = [Path(log.name).read_text(errors="replace") for log in logs]
    found["log"] = "".join(texts)
    for line in texts[0].splitlines():
        if line.startswith("CHECK "):
            found |= json.loads(line.removeprefix("CHECK "))
    figures = {key: value for key, value in found.items() if key != "log"}
    print(figures)  # for pytest -rP
    if folder := os.environ.get("KT_RESULTS"):
        Path(folder, f"accuracy-{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        Path(folder, f"accuracy-{name}.log").write_text(found["log"])
    return found


def result(name: str, check: str) -> dict[str, Any]:
    found = results(name)
    assert check in found, f"{found['status']}\n{found['log'][-6000:]}"
    assert "error" not in found[check], f"{found[check]['error']}\n{found['log'][-6000:]}"
    return found[check]


def assert_same(seen: dict[str, float]) -> None:
    """Decode steps against a prefill of the same tokens: another batch, as in the server's test."""
    assert seen["tokens"] > 0
    assert seen["mean"] < MAX_MEAN_BATCHED_LOGPROB_DIFFERENCE, seen
    assert seen["most"] < MAX_BATCHED_LOGPROB_DIFFERENCE, seen


def check_decode(name: str, kind: str | None) -> None:
    """kind: of the graph that every decode step is, None: any."""
    for batch, seen in result(name, "decode").items():
        if batch == "check_seconds":
            continue
        assert_same(seen)
        if kind is not None:
            # The first of 24 tokens comes from the prefill, which may be two chunks and more.
            assert seen["graphs"].get(kind, 0) >= 20, (batch, seen)


def test_graphs_are_exact() -> None:
    assert_exact_enough(result("graphs", "score"))
    engine = result("graphs", "engine")
    assert "FULL_AND_PIECEWISE" in engine["cudagraph_mode"] and engine["clock"][0].startswith("coordinator, "), engine


def test_graphs_are_full_and_right_in_every_batch() -> None:
    check_decode("graphs", "FULL")
    for batch in ("1", "16"):
        assert result("graphs", "decode")[batch]["graphs"].get("PIECEWISE", 0) >= 1, "prefill"


def test_graphs_one_for_a_decode_step() -> None:
    trace = result("graphs", "trace")
    assert set(trace["graphs"]) == {"FULL"}, trace
    assert trace["graph_launches"] == pytest.approx(1, abs=0.2), trace


def test_eager_mode_is_exact() -> None:
    assert_exact_enough(result("eager", "score"))
    check_decode("eager", "NONE")


def test_graphs_with_prefix_caching() -> None:
    prefix = result("graphs", "prefix")
    assert_same(prefix)
    assert min(prefix["cached"]) >= 64, prefix


def test_graphs_without_coordinator_end() -> None:
    watchdog, found = result("graphs", "watchdog"), results("graphs")
    assert watchdog["raised"].startswith("HandoverError: the executor did not answer MoE layer"), watchdog
    assert watchdog["after_seconds"] < WATCHDOG_SECONDS + WATCHDOG_SLACK_SECONDS, watchdog
    assert found["log"].count("kt_vllm: error: the executor did not answer MoE layer") == 1
    assert found["status"] == 0, found["status"]


def test_int4_decodes_as_it_prefills() -> None:
    """Up to four requests by the kernel for few tokens, more and the prefill by Marlin."""
    check_decode("int4", "FULL")
    assert "20 of 20 in int4 have a kernel of their own for few tokens" in results("int4")["log"]


def test_small_chunks_are_exact() -> None:
    assert_exact_enough(result("small", "score"))
    assert not result("small", "engine")["async_scheduling"]


def test_small_cache_preempts() -> None:
    preemption = result("small", "preemption")
    assert preemption["preemptions"] > 0, preemption
    assert_same(preemption)


def test_small_sleep_level_1() -> None:
    sleep = result("small", "sleep")
    assert_same(sleep)
    assert_same(sleep["decode"])


def test_hostfunc_is_exact() -> None:
    assert_exact_enough(result("hostfunc", "score"))
    assert result("hostfunc", "engine")["clock"] == ["coordinator, hostfunc"]
    check_decode("hostfunc", "FULL")


def test_rules_two_of_three_moe_layers_on_the_gpu() -> None:
    """With full graphs, as exact as with all on the CPU."""
    assert_exact_enough(result("rules", "score"))
    check_decode("rules", "FULL")


def test_rules_make_steps_faster() -> None:
    with_rules, without = result("rules", "steps"), result("graphs", "steps")
    assert with_rules["ms"] < without["ms"], (with_rules, without)


def test_ranks_of_a_tensor_parallel_group_that_share_a_gpu() -> None:
    """What two GPUs do, but for their links: NCCL's all-reduces in graphs, and one copy of the experts."""
    assert_exact_enough(result("ranks", "score"))
    check_decode("ranks", None)
    assert results("ranks")["log"].count("experts of 3 layers run here") == 1


@pytest.mark.parametrize("name", ["tensor_parallel", "pipeline_parallel"])
def test_two_gpus(name: str) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    assert_exact_enough(result(name, "score"))
    check_decode(name, None)
    # One copy of the experts on the host: a stage has its own layers, a further rank of a layer none.
    layers = {"tensor_parallel": (3,), "pipeline_parallel": (1, 2)}[name]
    for count in layers:
        assert results(name)["log"].count(f"experts of {count} layers run here") == 1, name
