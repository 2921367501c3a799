"""Everything that cannot work ends before the port opens, non-zero, with one sentence and no traceback."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kt_vllm import _native
from kt_vllm.memory import available_host_memory
from tests import gguf_files as files
from tests import hub_server
from tests.e2e.score import GGUF, MODEL_DIR
from tests.e2e.server import free_port
from tests.zoo.models import MODELS

pytestmark = pytest.mark.e2e

HELPER = Path(__file__).with_name("engine_configs.py")
PREFIX = "kt_vllm: error: "
MODEL, WEIGHTS = str(MODEL_DIR), ("--kt-gguf", str(GGUF))
NONE = ("--kt-gguf", "@/none.gguf")
NONE_ENDS = ("none.gguf' does not exist", "give a GGUF file, its first shard, or the folder of its shards")
MTP = json.dumps({"method": "mtp", "num_speculative_tokens": 1})
# As csrc/kernels/dispatch.cpp says it; tests/cpp/test_dispatch.cpp makes it from features that lack something.
NO_AVX2 = "kernels 'avx2' need avx2 fma f16c, but this CPU or its operating system lacks avx2; choose 'auto'"

# name -> (model, flags, what the sentence has). "@/" is the folder that made_files() fills.
REFUSED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "missing path": (MODEL, NONE, NONE_ENDS),
    "empty path": (MODEL, ("--kt-gguf", ""), ("--kt-gguf is ''", "give the path of a GGUF")),
    "empty folder": (MODEL, ("--kt-gguf", "@/empty"), ("has no .gguf file", "give one that has")),
    "not a GGUF": (MODEL, ("--kt-gguf", "@/config_32_experts/config.json"), ("is not a GGUF file", "b'GGUF'")),
    "truncated": (MODEL, ("--kt-gguf", "@/cut.gguf"), ("cut.gguf' is truncated", "again")),
    "missing shard": (
        MODEL,
        ("--kt-gguf", "@/set-00001-of-00002.gguf"),
        ("1 of 2 shards missing", "set-00002-of-00002.gguf", "download"),
    ),
    "dense model": (MODEL, ("--kt-gguf", "@/dense.gguf"), ("is a dense model", "without --kt-gguf")),
    "experts": (
        "@/config_32_experts",
        WEIGHTS,
        ("expert_count = 16", "config.json has 32", "n_routed_experts", "of one model"),
    ),
    "hidden size": (
        "@/config_hidden_1024",
        WEIGHTS,
        ("embedding_length = 512", "config.json has 1024", "hidden_size", "of one model"),
    ),
    "expert type": (
        MODEL,
        ("--kt-gguf", "@/tq2_0.gguf"),
        ("blk.1.ffn_gate_exps.weight", "TQ2_0", "no kernels", "use a file with experts in", "Q4_K"),
    ),
    "memory": (
        "@/config_huge",
        ("--kt-gguf", "@/huge.gguf"),
        ("loading needs", "GiB of host memory", "executor workspace", "are available", "smaller quantisation"),
    ),
    "cpu_infer 0": (MODEL, (*WEIGHTS, "--kt-cpu-infer", "0"), ("--kt-cpu-infer is 0", "give 1 or more")),
    "cpu_infer negative": (MODEL, (*WEIGHTS, "--kt-cpu-infer", "-3"), ("--kt-cpu-infer is -3", "give 1 or more")),
    "cpu_infer text": (MODEL, (*WEIGHTS, "--kt-cpu-infer", "many"), ("--kt-cpu-infer is 'many'", "a whole number")),
    "cpu_infer fraction": (MODEL, (*WEIGHTS, "--kt-cpu-infer", "2.5"), ("--kt-cpu-infer is '2.5'", "a whole number")),
    "isa unknown": (
        MODEL,
        (*WEIGHTS, "--kt-isa", "sse9"),
        ("--kt-isa is 'sse9'", "expected one of auto, amx, avx512, avx2"),
    ),
    "isa lacking": (MODEL, (*WEIGHTS, "--kt-isa", "avx2"), ("--kt-isa is 'avx2'", "lacks avx2", "choose 'auto'")),
    "numa unknown": (
        MODEL,
        (*WEIGHTS, "--kt-numa", "4000"),
        ("--kt-numa is '4000'", "no CPU of NUMA node 4000", "give"),
    ),
    "numa junk": (MODEL, (*WEIGHTS, "--kt-numa", "all"), ("--kt-numa is 'all'", "give auto, off, or a list")),
    "flags without weights": (MODEL, ("--kt-cpu-infer", "2"), ("no weights", "add --kt-gguf PATH")),
    "load_format": (
        MODEL,
        (*WEIGHTS, "--load-format", "dummy"),
        ("--load-format dummy contradicts --kt-gguf", "leave --load-format out"),
    ),
    "data parallel": (MODEL, (*WEIGHTS, "--data-parallel-size", "2"), ("--data-parallel-size", "leave it out")),
    "eplb": (MODEL, (*WEIGHTS, "--enable-eplb"), ("--enable-eplb does not work with --kt-gguf", "leave it out")),
    "lora": (MODEL, (*WEIGHTS, "--enable-lora"), ("--enable-lora does not work with --kt-gguf", "leave it out")),
    "mtp": (MODEL, (*WEIGHTS, "--speculative-config", MTP), ("speculative decoding with 'mtp'", "use one of ngram")),
    "contradiction": (
        MODEL,
        (*WEIGHTS, "--additional-config", '{"kt": {"gguf": "/other.gguf"}}'),
        ("--kt-gguf is", "additional_config says '/other.gguf'", "give it once"),
    ),
    "unknown key": (MODEL, ("--additional-config", '{"kt": {"guff": "/m"}}'), ("'guff'", "did you mean 'gguf'?")),
    "kt is no mapping": (MODEL, (*WEIGHTS, "--additional-config", '{"kt": 3}'), ('additional_config["kt"] is 3',)),
    # That the flag is still there shows in its refusal.
    "JSON after the flag": (MODEL, (*NONE, "--additional-config", '{"x": 1}'), NONE_ENDS),
    "JSON before the flag": (MODEL, ("--additional-config", '{"x": 1}', *NONE), NONE_ENDS),
    "dotted JSON after the flag": (MODEL, (*NONE, "--additional-config.x", "1"), NONE_ENDS),
    "no such repository": (
        MODEL,
        ("--kt-gguf", "acme/nothing:Q4_K_M"),
        ("'acme/nothing' is neither a path here nor a repository of http://127.0.0.1", "check the name"),
    ),
    "no such quantisation": (
        MODEL,
        ("--kt-gguf", "acme/tiny-GGUF:Q8_0"),
        ("'acme/tiny-GGUF' has no quantisation 'Q8_0'", "give acme/tiny-GGUF:NAME with one of Q4_K_M"),
    ),
    "gated": (MODEL, ("--kt-gguf", "acme/gated"), ("'acme/gated' is gated: accept its terms", "HF_TOKEN")),
    "hub file that does not fit": (
        "@/config_hidden_1024",
        ("--kt-gguf", "acme/tiny-GGUF"),
        ("snapshots", "Q4_K_M.gguf' has deepseek2.embedding_length = 512", "config.json has 1024"),
    ),
    "no such model on the hub": (
        "acme/nobody",
        WEIGHTS,
        ("'acme/nobody' is neither a path here nor", "check the name"),
    ),
    "model on the hub without config.json": (
        "acme/tiny-GGUF",
        WEIGHTS,
        ("'acme/tiny-GGUF' has no config.json", "give one that has"),
    ),
    "no rules file": (
        MODEL,
        (*WEIGHTS, "--kt-rules", "@/none.yaml"),
        ("none.yaml cannot be read", "give a file as in"),
    ),
    "bad rules": (MODEL, (*WEIGHTS, "--kt-rules", "@/bad.yaml"), ("bad.yaml:3: a rule has an unknown key 'expert'",)),
    "fp8 dense": (
        MODEL,
        (*WEIGHTS, "--kt-rules", "@/fp8.yaml"),
        ("fp8.yaml:3: gpu_quant is fp8, for which there are no",),
    ),
    "fp8 by flag": (
        MODEL,
        (*WEIGHTS, "--kt-gpu-quant", "fp8"),
        ("--kt-gpu-quant is fp8, for which there are no kernels on this platform", "give bf16, int4 or auto"),
    ),
    "no such dense type": (
        MODEL,
        (*WEIGHTS, "--kt-gpu-quant", "int8"),
        ("--kt-gpu-quant is 'int8'; give one of auto",),
    ),
    "int4 twice": (
        MODEL,
        (*WEIGHTS, "--kt-gpu-quant", "int4", "--quantization", "fp8_per_tensor"),
        ("--kt-gpu-quant: int4 for dense weights and --quantization fp8_per_tensor", "leave one of the two out"),
    ),
    "int4 in float32": (
        MODEL,
        (*WEIGHTS, "--kt-gpu-quant", "int4", "--attention-backend", "CPU_MLA", "--dtype", "float32"),
        ("--kt-gpu-quant is int4 and the model runs in float32", "give --dtype bfloat16"),
    ),
    "int4 head that vLLM computes in float32": (
        MODEL,
        (*WEIGHTS, "--kt-rules", "@/head.yaml", "--hf-overrides", '{"head_dtype": "float32"}'),
        ("head.yaml:3: gpu_quant is int4 for lm_head", "as head_dtype has vLLM compute it in float32; match other"),
    ),
    "tied head in int4": (
        "@/config_tied",
        (*WEIGHTS, "--kt-rules", "@/head.yaml"),
        ("head.yaml:3: gpu_quant is int4 for lm_head", "as it is the embedding as well (tie_word_embeddings"),
    ),
    "expert parallel": (
        MODEL,
        (*WEIGHTS, "--kt-rules", "@/gpu.yaml", "--enable-expert-parallel"),
        ("gpu.yaml:3: experts on the gpu do not work with --enable-expert-parallel", "leave one of the two out"),
    ),
    "split and quantised": (
        MODEL,
        (*WEIGHTS, "--kt-rules", "@/split.yaml", "--quantization", "fp8_per_tensor"),
        ("split.yaml:3: single experts on the gpu do not work with --quantization fp8_per_tensor", "leave"),
    ),
    "too many experts": (
        MODEL,
        (*WEIGHTS, "--kt-num-experts-per-tok", "5"),
        ("--kt-num-experts-per-tok is 5", "made for 4 experts a token", "give 1 to 4"),
    ),
    "no experts": (MODEL, (*WEIGHTS, "--kt-num-experts-per-tok", "0"), ("--kt-num-experts-per-tok is 0", "give 1 or")),
    "no model folder": ("@/nowhere", WEIGHTS, ("nowhere' does not exist", "config.json", "give the folder")),
    "no config.json": ("@/empty", WEIGHTS, ("empty' has no config.json", "give the folder")),
    "model is a file": (str(GGUF), WEIGHTS, ("Q4_K_M.gguf' is a file", "give the folder")),
}
REFUSED |= {
    "float16 and a scale": (
        "@/config_glm",
        (*WEIGHTS, "--dtype", "float16"),
        ("--dtype is float16 and", "routed_scaling_factor 2.5", "glm4_moe applies wrongly", "give --dtype bfloat16"),
    ),
    # Not for their type.
    "bfloat16 and a scale": ("@/config_glm", WEIGHTS, ("architecture 'deepseek2'", "model_type 'glm4_moe'")),
    "float16 and no scale": (
        "@/config_glm_air",
        (*WEIGHTS, "--dtype", "float16"),
        ("architecture 'deepseek2'", "model_type 'glm4_moe'"),
    ),
}
# Where vLLM takes its attention for AMX.
OF_AMX: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "float16": (
        MODEL,
        (*WEIGHTS, "--dtype", "float16"),
        ("--dtype is float16 and", "AMX_MLA", "computes in bfloat16", "give --dtype bfloat16, or --attention-backend"),
    ),
    "float16 in config.json": (
        "@/config_float16",
        WEIGHTS,
        ("--dtype is float16 (from config.json)", "computes in bfloat16"),
    ),
    "float32": (MODEL, (*WEIGHTS, "--dtype", "float32"), ("--dtype is float32 and", "give --dtype bfloat16")),
}
REFUSED |= OF_AMX
OTHER_ATTENTION = (*WEIGHTS, "--attention-backend", "CPU_MLA", "--dtype")
ISA_ERRORS = {"isa lacking": NO_AVX2}
# Through the whole program as well: before and after config.json is read, and where vLLM starts several servers.
WHOLE = ("missing path", "hidden size", "memory", "data parallel", "no model folder")
MANY_THREADS = 4096


@pytest.fixture(scope="module")
def made_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "empty").mkdir()
    (folder / "cut.gguf").write_bytes(GGUF.read_bytes()[: GGUF.stat().st_size // 2])
    (folder / "set-00001-of-00002.gguf").symlink_to(GGUF)
    files.write(
        folder / "dense.gguf",
        {"token_embd.weight": np.zeros((64, 32), np.float32)},
        {"block_count": 1},
        architecture="llama",
    )
    files.model_folder(folder / "config_32_experts", n_routed_experts=32)
    files.model_folder(folder / "config_hidden_1024", hidden_size=1024)
    files.model_folder(folder / "config_tied", tie_word_embeddings=True)
    files.model_folder(folder / "config_float16", torch_dtype="float16", dtype="float16")
    files.write_sparse(folder / "tq2_0.gguf", files.TINY_SHAPE, lambda name: "TQ2_0" if "_exps." in name else "F32")
    for name, model in (("config_glm", "glm-4.5"), ("config_glm_air", "glm-4.5-air")):
        files.model_folder(folder / name)
        (folder / name / "config.json").write_text(json.dumps(MODELS[model].config))
    (folder / "bad.yaml").write_text("rules:\n  - match: 'experts$'\n    expert: gpu\n")
    (folder / "fp8.yaml").write_text("rules:\n  - match: o_proj\n    gpu_quant: fp8\n")
    (folder / "head.yaml").write_text("rules:\n  - match: ^lm_head$\n    gpu_quant: int4\n")
    (folder / "gpu.yaml").write_text("rules:\n  - layers: 1\n    experts: gpu\n")
    (folder / "split.yaml").write_text("rules:\n  - layers: 1\n    gpu_experts: 2\n")
    shape = files.TINY_SHAPE
    bytes_of_one = 3 * (shape.layers - shape.first_dense) * shape.experts * shape.hidden * 144 // 256
    intermediate = 256 * (2 * available_host_memory() // bytes_of_one // 256 + 1)
    files.model_folder(folder / "config_huge", moe_intermediate_size=intermediate)
    files.write_sparse(
        folder / "huge.gguf",
        dataclasses.replace(shape, intermediate=intermediate),
        lambda name: "Q4_K" if "_exps." in name else "F16",
    )
    return folder


def _command(folder: Path, model: str, flags: tuple[str, ...]) -> list[str]:
    return [part.replace("@/", f"{folder}/") for part in (model, *flags)]


@pytest.fixture(scope="module")
def ended(made_files: Path) -> dict[str, dict[str, Any]]:
    """How each case ended in engine_configs.py."""
    cases = {name: (model, flags) for name, (model, flags, _) in REFUSED.items()}
    cases["many threads"] = (MODEL, (*WEIGHTS, "--kt-cpu-infer", str(MANY_THREADS)))
    cases |= {f"CPU_MLA {dtype}": (MODEL, (*OTHER_ATTENTION, dtype)) for dtype in ("float16", "float32")}
    cases |= {isa: (MODEL, (*WEIGHTS, "--kt-isa", isa)) for isa in _native.available_isas()}
    wanted = [
        {"name": name, "arguments": _command(made_files, *case), "isa_error": ISA_ERRORS.get(name)}
        for name, case in cases.items()
    ]
    (made_files / "repository").mkdir()
    (made_files / "repository" / GGUF.name).symlink_to(GGUF)
    with hub_server.serving({name: made_files / "repository" for name in ("acme/tiny-GGUF", "acme/gated")}) as hub:
        hub.gated.add("acme/gated")
        process = subprocess.run(
            [sys.executable, str(HELPER)],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(made_files / "home")},
        )
    lines = [line for line in process.stdout.splitlines() if line.startswith("ENDED ")]
    assert process.returncode == 0 and len(lines) == len(cases), process.stdout[-3000:] + process.stderr[-3000:]
    return {result["name"]: result for result in (json.loads(line.removeprefix("ENDED ")) for line in lines)}


def check_sentence(sentence: object, parts: tuple[str, ...]) -> None:
    assert isinstance(sentence, str) and sentence.startswith(PREFIX), sentence
    assert "\n" not in sentence and len(sentence) < 600
    for part in parts:
        assert part in sentence, sentence


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.amx if n in OF_AMX else ()) for n in REFUSED])
def test_refused_before_an_engine_starts(name: str, ended: dict[str, dict[str, Any]]) -> None:
    # A string in SystemExit is printed as the last line, and the exit code is 1.
    assert "exit" in ended[name], ended[name]
    check_sentence(ended[name]["exit"], REFUSED[name][2])


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_isa_of_this_cpu_is_taken(isa: str, ended: dict[str, dict[str, Any]]) -> None:
    assert ended[isa].get("config", {}).get("kt", {}).get("isa") == isa, ended[isa]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_type_is_taken_with_the_attention_that_has_it(dtype: str, ended: dict[str, dict[str, Any]]) -> None:
    assert "config" in ended[f"CPU_MLA {dtype}"], ended[f"CPU_MLA {dtype}"]


def test_more_threads_than_cpus_is_a_warning(ended: dict[str, dict[str, Any]]) -> None:
    result = ended["many threads"]
    assert len(result["config"]["kt"]["cpus"]) == MANY_THREADS
    assert len(result["warnings"]) == 1, result["warnings"]
    for part in (f"--kt-cpu-infer is {MANY_THREADS}", f"{len(os.sched_getaffinity(0))} logical CPUs", "give at most"):
        assert part in result["warnings"][0]


def _listens(port: int) -> bool:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:  # no IPv6
            continue
        if any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows):
            return True
    return False


@pytest.mark.parametrize("name", WHOLE)
def test_refused_by_the_whole_program(name: str, made_files: Path, tmp_path: Path) -> None:
    model, flags, parts = REFUSED[name]
    port = free_port()
    command = [sys.executable, "-m", "kt_vllm.cli", "serve", *_command(made_files, model, flags), "--port", str(port)]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(command, stdout=out_file, stderr=err_file, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        try:
            while process.poll() is None:
                assert not _listens(port), "the port was opened"
                assert time.monotonic() < deadline, err.read_text()[-3000:]
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 1
    assert "Traceback" not in out.read_text() + err.read_text()
    check_sentence(err.read_text().splitlines()[-1], parts)
