"""examples/make_synthetic_gguf.py: models of real shape with random weights."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.gguf.dense import read_dense
from kt_vllm.gguf.reader import GGUFModel

SCRIPT = Path(__file__).parents[2] / "examples" / "make_synthetic_gguf.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_synthetic_gguf", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("like", "layers", "experts", "gigabytes"),
    # DeepSeek-R1's Q4_K_M on the hub is 404 GB, Kimi-K2's 621.
    [("deepseek-r1", None, None, 404.5), ("kimi-k2", None, None, 620.6), ("deepseek-r1", 10, 12, None)],
)
def test_all_of_a_giant(
    script: ModuleType, tmp_path: Path, like: str, layers: int | None, experts: int | None, gigabytes: float | None
) -> None:
    config = script.make_config(like, layers, experts)
    tensors = list(script.tensors_of(config, "Q4_K_M"))
    if gigabytes is not None:
        assert sum(t.nbytes for t in tensors) / 1e9 == pytest.approx(gigabytes, rel=1e-3)
    writer = script.make_writer(config, tensors, tmp_path / "m.gguf", like, 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    plan = CheckpointPlan.build(GGUFModel.open(tmp_path / "m.gguf", require_data=False), config)
    assert not plan.ignored and len(plan.experts) == config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert config["n_routed_experts"] % config["n_group"] == 0
    types = {layer.down.type for layer in plan.experts.values()}
    assert types == {"Q4_K", "Q6_K"} and {layer.up.type for layer in plan.experts.values()} == {"Q4_K"}


@pytest.mark.parametrize(("recipe", "shard_bytes"), [("Q4_K_M", 0), ("IQ2_XXS", 0), ("Q8_0", 12_000_000)])
def test_weights_of_one_size(script: ModuleType, tmp_path: Path, recipe: str, shard_bytes: int) -> None:
    config = script.make_config("tiny-deepseek-v3")
    script.write(tmp_path / "m", config, recipe, "tiny", shard_bytes)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == config
    assert len(list((tmp_path / "m").glob("*.gguf"))) == (3 if shard_bytes else 1)
    model = GGUFModel.open(tmp_path / "m")
    CheckpointPlan.build(model, config)
    for name in ("token_embd.weight", "blk.2.ffn_down_exps.weight", "blk.1.attn_k_b.weight", "blk.3.attn_q_b.weight"):
        values = np.asarray(read_dense(model.tensors[name])) * model.tensors[name].shape[-1] ** 0.5
        assert values.std() == pytest.approx(1, rel=0.1) and abs(values.mean()) < 0.05, name
    assert np.asarray(read_dense(model.tensors["blk.0.attn_norm.weight"])).min() == 1


def test_dense_weights_alone(script: ModuleType, tmp_path: Path) -> None:
    config = script.make_config("deepseek-r1")
    tensors = {t.name: t for t in script.tensors_of(config, "Q4_K_M", routed_experts=False)}
    everything = {t.name: t for t in script.tensors_of(config, "Q4_K_M")}
    assert everything.keys() - tensors.keys() == {
        f"blk.{i}.ffn_{part}_exps.weight" for i in range(3, 61) for part in ("gate", "up", "down")
    }
    assert all(everything[name] == tensor for name, tensor in tensors.items())
    assert sum(t.nbytes for t in tensors.values()) / 1e9 == pytest.approx(10.3, rel=0.05)
    script.write(tmp_path / "m", script.make_config("tiny-deepseek-v3"), "Q4_K_M", "tiny", routed_experts=False)
    model = GGUFModel.open(tmp_path / "m")
    assert "blk.1.ffn_gate_shexp.weight" in model.tensors and "blk.1.ffn_gate_exps.weight" not in model.tensors


def test_refusals(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--layers is 3, and the first 3 have no experts: give more"):
        script.make_config("deepseek-r1", 3)
    with pytest.raises(SystemExit, match=r"--experts is 7, and each token takes 8"):
        script.make_config("deepseek-r1", None, 7)
    (tmp_path / "there").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        script.write(tmp_path, script.make_config("tiny-deepseek-v3"), "Q4_K_M", "tiny")
    with pytest.raises(SystemExit, match=r"the model has 404\.\d GB and .* left: give fewer --layers"):
        script.write(tmp_path / "r1", script.make_config("deepseek-r1"), "Q4_K_M", "r1")
