"""`kt-vllm bench layer`: end to end on a tiny layer, what it refuses, and that it needs neither vLLM nor torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("kt_vllm._native", reason="the extension is not built")

from kt_vllm import _native, reference
from kt_vllm.bench import cli, layer
from kt_vllm.bench.machine import Limits
from kt_vllm.bench.random_weights import TYPES, float_bits, float_values, random_weights
from kt_vllm.bench.settings import LayerBench
from tests.tolerances import max_layer_error

ROOT = Path(__file__).resolve().parents[2]
CPU = min(os.sched_getaffinity(0))
TINY = ["--hidden", "256", "--intermediate", "256", "--experts", "6", "--top-k", "2", "--threads", "1"]
SHORT = ["--seconds", "0.02", "--limit-seconds", "0.02", "--dram-mib", "8"]

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"vllm", "torch", "transformers"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = ["kt-vllm", "bench", "layer", *sys.argv[1:]]
runpy.run_module("kt_vllm.cli", run_name="__main__")
"""


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BLOCKED, *TINY, *SHORT, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a run with vLLM and torch out of reach."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    size = ("--hidden", "512", "--intermediate", "512", "--type", "Q4_K/Q4_K/Q6_K")
    result = _run(*size, "--tokens", "1,40", "--json", str(path), "--neighbour", str(CPU), "--numa", "off")
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    report["output"] = result.stdout
    return report


def test_the_table_names_what_was_measured(report: dict) -> None:
    output = report["output"]
    for text in (
        "Q4_K/Q4_K/Q6_K",
        report["isa_reason"],
        report["placement"],
        report["memory"],
        report["prefetch"],
        "DRAM read",
        "x roof",
        "huge pages",
    ):
        assert text in output
    for row in report["tokens"]:
        assert any(line.split()[:2] == [str(row["tokens"]), str(row["calls"])] for line in output.splitlines())


def test_the_json_has_everything(report: dict) -> None:
    assert report["version"] == 1
    assert report["layer"]["types"] == ["Q4_K", "Q4_K", "Q6_K"]
    assert report["layer"]["expert_bytes"] == 4 * 256 * (144 + 144 + 210)
    assert report["load"]["bytes"] == 6 * report["layer"]["expert_bytes"]
    assert report["threads"] == 1 and report["neighbour"] == CPU and report["numa"] == "off"
    limits = report["limits"]
    before, after = limits["before"], limits["after"]
    assert limits["dram"] == max(before["dram"], after["dram"]) > 0
    assert list(limits["peaks"]) == _native.peak_kinds() and min(limits["peaks"].values()) > 0
    assert all(peak == max(before["peaks"][kind], after["peaks"][kind]) for kind, peak in limits["peaks"].items())
    assert [row["tokens"] for row in report["tokens"]] == [1, 40]
    for row in report["tokens"]:
        assert len(row["seconds"]) == row["calls"] >= 5
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["min_ms"] == pytest.approx(min(row["seconds"]) * 1e3)
        assert row["ratio"] > 0 and row["roof_ms"] > 0 and row["gb_per_s"] > 0 and row["tflops"] > 0
    assert report["tokens"][0]["experts"] == 2
    assert 2 < report["tokens"][1]["experts"] <= 6


def test_the_error_is_the_kernels_own(report: dict) -> None:
    limit = max_layer_error(report["isa"], tuple(report["layer"]["types"]), "bfloat16")
    for row in report["tokens"]:
        assert 0 < row["error"] < limit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kt_vllm.cli", "bench", "layer", *TINY, *SHORT, "--tokens", "1", "--seconds", "60"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def folders() -> set[Path]:
        return {path for place in (Path("/dev/shm"), tmp_path) for path in place.glob("kt-bench-*")}

    before = folders()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not (made := folders() - before):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 130
    assert process.stderr.read() == ""
    assert not any(path.exists() for path in made)


def test_a_wrong_result_shows_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = LayerBench(256, 256, 6, 2, tokens=(3,), threads=1, isa="reference", seconds=0.01, float_type="float32")
    with layer.make_weights(bench) as weights:
        loaded = layer.LoadedLayer(weights)
        try:
            assert layer.measure_tokens(loaded, 3).error < max_layer_error("reference", bench.types)
            weights.data.reverse()  # what the reference sees from now on
            del weights.__dict__["dequantized"]
            assert layer.measure_tokens(loaded, 3).error > 0.5
        finally:
            loaded.close()
    assert not weights.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--type", "Q9_Z"], "--type Q9_Z is none that"),
        (["--type", "Q4_K/Q4_K"], "--type has 2 parts"),
        (["--hidden", "100"], "--hidden is 100, but rows of Q4_K for gate come in blocks of 256"),
        (["--intermediate", "32"], "--intermediate is 32, but rows of Q4_K for down come in blocks of 256"),
        (["--top-k", "7"], "--top-k is 7, expected at most --experts 6"),
        (["--experts", "0"], "--experts is 0"),
        (["--experts", "100000000"], "give fewer --experts"),
        (["--threads", "0"], "--threads is 0"),
        (["--tokens", "1,x"], "--tokens is '1,x'"),
        (["--tokens", "0"], "--tokens has 0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--dram-mib", "-1"], "--dram-mib is -1"),
        (["--numa", "all"], "--numa is 'all'; give auto, off, or a list"),
        (["--numa", "4000"], "no CPU of NUMA node 4000"),
        (["--isa", "z80"], "kernels 'z80' do not exist"),
        (["--dtype", "int3"], "invalid choice"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at does not exist"),
        (["--neighbour", "99999"], "--neighbour is CPU 99999"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*TINY, *SHORT, *arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kt-vllm bench layer: ") and captured.err.count("\n") == 1
    assert text in captured.err


@pytest.mark.parametrize("type", TYPES)
def test_random_weights_have_the_size_asked_for(type: str) -> None:
    rng = np.random.default_rng()
    num_weights, size = 1 << 17, 7168**-0.5
    data = random_weights(type, num_weights, rng, size)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    assert data.dtype == np.uint8 and data.shape == (num_weights // block_size * block_bytes,)
    weights = reference.dequantize(type, data, (num_weights // 256, 256))
    assert np.isfinite(weights).all()
    # The spread of the blocks' scales leaves 1 % or so; scales that are powers of two, 10 %.
    assert weights.std() == pytest.approx(size, rel=0.15 if type == "MXFP4" else 0.05)
    assert abs(weights.mean()) < 0.03 * size


@pytest.mark.parametrize("float_type", ["float32", "float16", "bfloat16"])
def test_float_bits_there_and_back(float_type: str) -> None:
    values = np.random.default_rng().standard_normal(1000).astype(np.float32)
    back = float_values(float_bits(values, float_type), float_type)
    assert np.abs(back - values).max() <= {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[float_type] * 4
    assert (float_values(float_bits(back, float_type), float_type) == back).all()


def test_routing_is_distinct_and_within_range() -> None:
    bench = LayerBench(256, 256, 12, 5, tokens=(30,))
    routings = layer.make_routings(bench, 30)
    for routing in routings:
        assert routing.ids.dtype == np.int32 and routing.ids.shape == (30, 5) and routing.ids.flags.c_contiguous
        assert (routing.ids >= 0).all() and (routing.ids < 12).all()
        assert all(len(set(row)) == 5 for row in routing.ids.tolist())
        assert routing.experts == len(set(routing.ids.ravel().tolist()))
        assert routing.weights.sum(axis=1) == pytest.approx(1)
    assert len({routing.ids.tobytes() for routing in routings}) == len(routings)
    everyone = layer.make_routings(LayerBench(256, 256, 4, 4), 2)[0]
    assert (np.sort(everyone.ids, axis=1) == np.arange(4)).all()


def test_the_roof_is_the_larger_of_bytes_and_arithmetic() -> None:
    limits = Limits(dram=100, dram_bytes=0, peaks={"avx2_int8": 1e12, "amx_int8": 4e12, "amx_bf16": 2e12})
    assert limits.int8_kind == "amx_int8"
    assert limits.roof_seconds(1e9, 1e9) == pytest.approx(0.01)
    assert limits.roof_seconds(1e6, 4e12) == pytest.approx(1)
    better = limits.better(Limits(dram=90, dram_bytes=0, peaks={"avx2_int8": 2e12, "amx_int8": 3e12, "amx_bf16": 0}))
    assert better == Limits(100, 0, {"avx2_int8": 2e12, "amx_int8": 4e12, "amx_bf16": 2e12})
    assert Limits(100, 0, {}).roof_seconds(1e9, 1e15) == pytest.approx(0.01)


def test_limits_are_plausible() -> None:
    # The best of three, since other tests and machines may be busy meanwhile.
    peaks = {kind: max(_native.measure_peak(kind, [CPU], 0.05) for _ in range(3)) for kind in _native.peak_kinds()}
    for kind, peak in peaks.items():
        assert 1e9 < peak < 1e14, kind
    # Twice the width cannot be slower by much; what is wrong by a factor would be.
    if {"avx512_fp32", "avx2_fp32"} <= peaks.keys():
        assert 0.7 < peaks["avx512_fp32"] / peaks["avx2_fp32"] < 3
    assert 0.1 < _native.measure_dram_read([CPU], 64 << 20, 0.05) < 1e4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: _native.measure_peak("mmx", [CPU], 0.1), 'kind is "mmx"'),
        (lambda: _native.measure_peak("avx2_int8", [CPU], 0), "seconds is 0"),
        (lambda: _native.measure_peak("avx2_int8", [], 0.1), "cpus is empty"),
        (lambda: _native.measure_dram_read([CPU], 1000, 0.1), "bytes is 1000"),
        (lambda: _native.measure_dram_read([], 1 << 20, 0.1), "cpus is empty"),
    ],
)
def test_limits_refuse(call, text: str) -> None:
    with pytest.raises(_native.NativeError, match=text):
        call()
