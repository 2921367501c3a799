"""Files and model folders that are near a supported family and are not of it, each refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.errors import GGUFError
from kt_vllm.gguf import GGUFModel
from kt_vllm.gguf.dense import TRANSFORMS
from tests import gguf_files as files
from tests.zoo.models import MODELS


def refused(path: Path, config: dict[str, object]) -> str:
    with pytest.raises(GGUFError) as error:
        CheckpointPlan.build(GGUFModel.open(str(path)), config)
    return str(error.value)


def dense(path: Path, architecture: str) -> Path:
    tensors = {name: np.zeros((64, 64), np.float32) for name in ("token_embd.weight", "blk.0.ffn_up.weight")}
    return files.write(path / "dense.gguf", tensors, {"block_count": 1}, architecture=architecture)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral"])
def test_a_dense_llama_is_no_mixtral(tmp_path: Path, model_type: str) -> None:
    message = refused(dense(tmp_path, "llama"), {"model_type": model_type})
    assert "is a dense model ('llama' with no expert_count" in message
    assert message.endswith("serve a dense model without --kt-gguf")


def test_another_architecture_with_experts(tmp_path: Path) -> None:
    path = files.write(tmp_path / "m.gguf", {}, {"expert_count": 8}, architecture="dbrx")
    message = refused(path, {"model_type": "dbrx"})
    assert "architecture 'dbrx', which is not supported" in message
    assert message.endswith("use one of deepseek2, glm4moe, llama, qwen2moe, qwen3moe")


def test_a_mixtral_beside_the_folder_of_a_llama(tmp_path: Path) -> None:
    path = files.write(tmp_path / "m.gguf", {}, {"expert_count": 8}, architecture="llama")
    assert "model_type 'llama', where one of mixtral is expected" in refused(path, {"model_type": "llama"})


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("deepseek-v3", "expert_gating_func", 1, "expert_gating_func = softmax and config.json has sigmoid"),
        ("deepseek-v2", "expert_gating_func", 2, "expert_gating_func = sigmoid and config.json has softmax"),
        ("deepseek-v2", "expert_weights_scale", 1.0, "expert_weights_scale = 1.0 and config.json has 16.0"),
        ("moonlight", "expert_weights_scale", 2.45, "and config.json has 2.446 for routed_scaling_factor"),
        ("glm-4.5", "expert_weights_scale", 1.0, "expert_weights_scale = 1.0 and config.json has 2.5"),
        ("glm-4.5", "block_count", 5, "block_count = 5 and config.json has 3 or 4"),
        ("qwen3-moe", "attention.key_length", 64, "attention.key_length = 64 and config.json has 128 for head_dim"),
        ("qwen2-moe", "expert_shared_feed_forward_length", 256, "has 512 for shared_expert_intermediate_size"),
        ("mixtral", "expert_count", 4, "expert_count = 4 and config.json has 8 for num_local_experts"),
        ("mixtral", "attention.head_count_kv", 4, "head_count_kv = 4 and config.json has 2 for num_key_value_heads"),
    ],
)
def test_numbers_that_differ(tmp_path: Path, name: str, key: str, value: float, expected: str) -> None:
    model = MODELS[name]
    tensors = {"blk.0.ffn_up_exps.weight": np.zeros((1, 32, 32), np.float32)}
    path = files.write(tmp_path / "m.gguf", tensors, {key: value}, architecture=model.architecture)
    assert expected in refused(path, model.config)


def test_a_rounded_scale_is_the_same(tmp_path: Path) -> None:
    """2.446 is another number in the 32 bits of a GGUF."""
    tensors = {"blk.0.ffn_up_exps.weight": np.zeros((1, 32, 32), np.float32)}
    path = files.write(tmp_path / "m.gguf", tensors, {"expert_weights_scale": 2.446}, architecture="deepseek2")
    assert "expert_weights_scale" not in refused(path, MODELS["moonlight"].config)


@pytest.mark.parametrize("head_dim", [2, 8])
def test_llama_rope_rows(head_dim: int) -> None:
    """Row i of a head's first half stands at 2 i in the file, row i of its second half at 2 i + 1."""
    heads, half = 3, head_dim // 2
    weight = torch.randn(heads * head_dim, 5)
    rows = [head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in range(2)]
    in_file = weight[rows]
    assert torch.equal(TRANSFORMS["llama_rope_rows"](in_file, heads), weight)
    assert torch.equal(TRANSFORMS["llama_rope_rows"](in_file[:, 0], heads), weight[:, 0])


@pytest.mark.parametrize("shape", [(7,), (1, 7)])
def test_row(shape: tuple[int, ...]) -> None:
    assert TRANSFORMS["row"](torch.arange(7.0).reshape(shape)).tolist() == [list(range(7))]
