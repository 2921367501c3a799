"""`kt-vllm explain`: on the shipped model, on DeepSeek-R1's headers, and its refusals."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kt_vllm.explain import main
from tests import gguf_files as files

ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 5.0

R1 = files.Shape(
    vocab=129280,
    hidden=7168,
    dense_intermediate=18432,
    intermediate=2048,
    layers=61,
    first_dense=3,
    experts=256,
    top_k=8,
    heads=128,
    q_lora=1536,
    kv_lora=512,
    nope=128,
    rope=64,
    v=128,
)


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kt_vllm.cli", "explain", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert process.returncode == code, process.stderr
    return process


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, GGUF): all of DeepSeek-R1's header, and none of its data."""
    folder = tmp_path_factory.mktemp("r1")
    (folder / "config.json").write_text(json.dumps(files.hf_config(R1)))
    header, _, _ = files.header_of(R1, lambda name: "Q4_K" if "_exps" in name else "F32")
    gguf = folder / "r1.gguf"
    gguf.write_bytes(header)
    return folder, gguf


def explain_json(*arguments: object) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json").stdout)


def test_deepseek_r1_in_five_seconds(r1: tuple[Path, Path], tmp_path: Path) -> None:
    rules = tmp_path / "r1.yaml"
    rules.write_text(
        "rules:\n  - layers: 3-4\n    experts: gpu\n  - layers: 5\n    gpu_experts: 16\n"
        "  - match: experts$\n    num_experts_per_tok: 6\n"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = run(r1[0], "--kt-gguf", r1[1], "--kt-rules", rules).stdout
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not the clock's: other tests may have the cores.
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    assert seconds < MAX_SECONDS, seconds
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip().startswith("model.")}
    expert = 3 * 7168 * 2048  # weights
    host = (55 * 256 + 240) * expert * 144 / 256
    assert rows["model.layers.{3-4}.mlp.experts"][1:] == ["gpu", "-", "42.00", "GiB", f"{rules}:3"]
    assert rows["model.layers.5.mlp.experts"][1:5] == ["cpu", "240,", "gpu", "16"]
    last = rows["model.layers.{6-60}.mlp.experts"]
    assert last[1:4] == ["cpu", f"{55 * 256 * expert * 144 / 256 / 2**30:,.2f}", "GiB"]
    assert last[-3:] == [f"{rules}:6,", "num_experts_per_tok:", f"{rules}:7"]
    assert f"{host / 2**30:,.2f} GiB" in out
    assert "model.layers.{0-60}.self_attn.kv_b_proj" in rows and len(out.splitlines()) < 50


def test_every_module_once_with_all(r1: tuple[Path, Path]) -> None:
    report = explain_json(r1[0], "--kt-gguf", r1[1])
    names = [module["name"] for module in report["modules"]]
    assert len(set(names)) == len(names) > 800
    listed = [line.split()[0] for line in run(r1[0], "--kt-gguf", r1[1], "--all").stdout.splitlines() if line.strip()]
    assert [name for name in listed if name in set(names)] == names
    assert (
        report["cpu_bytes"] == sum(m["cpu_bytes"] for m in report["modules"]) == 58 * 256 * 3 * 7168 * 2048 * 144 // 256
    )
    assert report["gpu_bytes"] == sum(m["gpu_bytes"] for m in report["modules"])
    # 17.1 G dense weights, of which routers, 0.1 G, in float32.
    assert report["gpu_bytes"] / 2e9 == pytest.approx(17.2, abs=0.05)
    assert {module["decided_by"]["place"].split(":")[0] for module in report["modules"]} == {"rules/deepseek2.yaml"}


def test_the_shipped_model_needs_no_vllm(tiny_model: Path, tiny_gguf: Path) -> None:
    script = (
        "import sys; sys.modules.update(vllm=None, torch=None)\n"
        f"from kt_vllm.explain import main; main([{str(tiny_model)!r}, '--kt-gguf', {str(tiny_gguf)!r}, '--json'])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    report = json.loads(out)
    experts = {m["name"]: m for m in report["modules"] if m["name"].endswith(".experts")}
    assert [m["on"] for m in experts.values()] == ["cpu"] * 3
    assert report["executor"]["isa"] == {"value": "auto", "decided_by": "default"}
    assert report["refused"] == []


@pytest.mark.parametrize("name", ["num_local_experts", "num_experts"])
def test_the_number_of_experts_under_another_name(name: str, tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """As newer releases of transformers save it."""
    config = json.loads((tiny_model / "config.json").read_text())
    config[name] = config.pop("n_routed_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert explain_json(tmp_path, "--kt-gguf", tiny_gguf)["cpu_bytes"] > 0


def test_what_the_engine_would_refuse_is_shown(tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    rules = tmp_path / "r.yaml"
    rules.write_text("rules:\n  - match: embed_tokens\n    gpu_quant: fp8\n")
    shown = run(tiny_model, "--kt-gguf", tiny_gguf, "--kt-rules", rules).stdout
    assert (
        f"refused at start: {rules}:3: gpu_quant is fp8 for model.embed_tokens, and embedding, norms and routers stay "
        "in the model's type; match linear layers or the head." in shown
    )


HEAD = (4096, 512)


def test_the_head(tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """Of the tiny model; it is one step more exact than the flag, and just what a rule says."""
    rules = tmp_path / "r.yaml"
    rules.write_text("rules:\n  - match: ^lm_head$\n    gpu_quant: int4\n")
    arguments: tuple[object, ...] = (tiny_model, "--kt-gguf", tiny_gguf)

    def head(*more: object) -> dict[str, Any]:
        return next(m for m in explain_json(*arguments, *more)["modules"] if m["name"] == "lm_head")

    rows, cols = HEAD
    assert head()["gpu_bytes"] == 2 * rows * cols and "gpu_quant" not in head()
    by_rule = head("--kt-rules", rules)
    assert (by_rule["gpu_quant"], by_rule["gpu_bytes"]) == ("int4", rows * cols * 69 // 128)
    assert by_rule["decided_by"]["gpu_quant"] == f"{rules}:3"
    by_flag = head("--kt-gpu-quant", "int4")
    assert (by_flag["gpu_quant"], by_flag["gpu_bytes"]) == ("fp8", rows * cols + 2 * rows * cols // 128)
    assert by_flag["decided_by"]["gpu_quant"] == "--kt-gpu-quant"
    by_flag = head("--kt-gpu-quant", "fp8")
    assert (by_flag["gpu_quant"], by_flag["gpu_bytes"]) == ("bf16", 2 * rows * cols)


def test_a_tied_head(tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """The embedding is never quantised, and so is a head that is one."""
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    rules = tmp_path / "r.yaml"
    rules.write_text("rules:\n  - match: ^lm_head$\n    gpu_quant: int4\n")
    report = explain_json(tmp_path, "--kt-gguf", tiny_gguf, "--kt-rules", rules)
    modules = {m["name"]: m for m in report["modules"]}
    assert modules["lm_head"]["gpu_bytes"] == 0 and modules["model.embed_tokens"]["gpu_bytes"] == 2 * 4096 * 512
    (sentence,) = report["refused"]
    assert sentence == (
        f"{rules}:3: gpu_quant is int4 for lm_head, which stays in the model's type, as it is the embedding as well "
        "(tie_word_embeddings in config.json); match other linear layers, or give auto."
    )
    untied = explain_json(tiny_model, "--kt-gguf", tiny_gguf, "--kt-gpu-quant", "int4")
    tied = explain_json(tmp_path, "--kt-gguf", tiny_gguf, "--kt-gpu-quant", "int4")
    assert untied["gpu_bytes"] - tied["gpu_bytes"] == 4096 * 512 + 2 * 4096 * 512 // 128
    assert tied["refused"] == []


def test_dense_weights_by_rules_and_by_the_flag(tiny_model: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    rules = tmp_path / "r.yaml"
    rules.write_text("rules:\n  - match: o_proj\n    gpu_quant: fp8\n")
    arguments = (tiny_model, "--kt-gguf", tiny_gguf, "--kt-rules", rules)
    plain = explain_json(tiny_model, "--kt-gguf", tiny_gguf)
    report = explain_json(*arguments)
    modules = {m["name"]: m for m in report["modules"]}
    o_proj = modules["model.layers.1.self_attn.o_proj"]
    assert (o_proj["gpu_quant"], o_proj["gpu_bytes"]) == ("fp8", 512 * 512 + 2 * 512 * 4)
    assert "gpu_quant" not in modules["lm_head"] and "gpu_quant" not in modules["model.layers.1.self_attn.q_b_proj"]
    assert report["gpu_bytes"] == plain["gpu_bytes"] - 4 * (512 * 512 - 2 * 512 * 4)
    assert plain["dense_gpu_bytes"]["bf16"] == plain["gpu_bytes"]
    assert list(plain["dense_gpu_bytes"]) == ["bf16", "fp8", "int4"]
    report = explain_json(*arguments, "--kt-gpu-quant", "int4")
    modules = {m["name"]: m for m in report["modules"]}
    o_proj = modules["model.layers.1.self_attn.o_proj"]
    assert (o_proj["gpu_quant"], o_proj["gpu_bytes"]) == ("int4", 512 * 512 * 69 // 128)
    assert o_proj["decided_by"]["gpu_quant"] == "--kt-gpu-quant"
    assert "gpu_quant" not in modules["model.layers.1.mlp.gate"]
    assert list(report["dense_gpu_bytes"]) == ["int4"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("@m",), ("no weights: add --kt-gguf PATH",)),
        (("--kt-gguf", "@g"), ("required: model", "kt-vllm explain --help")),
        (("/none", "--kt-gguf", "@g"), ("the model '/none' does not exist",)),
        (("@g", "--kt-gguf", "@g"), ("is a file; give a folder with config.json",)),
        (("@t", "--kt-gguf", "@g"), ("has no config.json",)),
        (("nowhere", "--kt-gguf", "@g"), ("'nowhere' is neither a path here nor a Hugging Face name", "give a folder")),
        (("a/b:Q8_0", "--kt-gguf", "@g"), ("'a/b:Q8_0' is neither a path here nor a Hugging Face name",)),
        (("@m", "--kt-gguf", "/none.gguf"), ("does not exist",)),
        (("@m", "--kt-gguf", "acme/R1:Q4_K_M"), ("acme/R1:Q4_K_M is no path here", "give its path")),
        (("@m", "--kt-gguf", "@g", "--kt-rules", "/none.yaml"), ("--kt-rules /none.yaml cannot be read",)),
        (("@m", "--kt-gguf", "@g", "--kt-num-experts-per-tok", "5"), ("is 5 and the model was made for 4",)),
        (("@m", "--kt-gguf", "@g", "--kt-num-experts-per-tok", "0"), ("is 0; give 1 or more experts",)),
        (("@m", "--kt-gguf", "@g", "--kt-num-experts-per-tok", "x"), ("is 'x'; give a whole number of experts",)),
    ],
)
def test_refused_in_one_sentence(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    tiny_model: Path,
    tiny_gguf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {"@m": tiny_model, "@g": tiny_gguf, "@t": tmp_path}
    with pytest.raises(SystemExit) as raised:
        main([str(known.get(a, a)) for a in arguments])
    captured = capsys.readouterr()
    assert raised.value.code == 2 and captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("kt-vllm explain: ")
    for part in parts:
        assert part in captured.err


def test_the_wheel_has_the_rules(tmp_path: Path) -> None:
    """What `pip install .` puts beside the modules; an editable install reads the checkout's."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "build_py", "-d", str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    built = sorted(path.name for path in (tmp_path / "kt_vllm" / "shipped_rules").iterdir())
    assert built == sorted(path.name for path in (ROOT / "rules").glob("*.yaml")) and "deepseek2.yaml" in built
    script = (
        "import sys, kt_vllm; assert kt_vllm.__file__.startswith(sys.argv[1]); kt_vllm.__path__.append(sys.argv[2])\n"
        "from kt_vllm.placement import load_rules; print(load_rules(None, 'deepseek2').name)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(ROOT / "kt_vllm")]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=environment).stdout
    assert out == "rules/deepseek2.yaml\n"
