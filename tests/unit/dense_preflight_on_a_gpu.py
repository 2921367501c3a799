"""preflight's choice of how dense weights are kept, on a GPU that is not there.

Imports vLLM, so test_dense_quant.py runs it in a process of its own.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig
from vllm.model_executor.layers.attention.mla_attention import split_kv_b_proj
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE

from kt_vllm import preflight
from kt_vllm.checkpoint import CheckpointPlan
from kt_vllm.config import KTConfig
from kt_vllm.dense_quant import VOCABULARY_PADDING, for_head
from kt_vllm.errors import ConfigError, ResourceError
from kt_vllm.explain import read_config
from kt_vllm.gguf.reader import GGUFModel
from kt_vllm.placement import Placement

MB = 10**6


class GPU:
    """What of vLLM's platform is asked for."""

    def __init__(self, total: int) -> None:
        self.total = total

    def is_cpu(self) -> bool:
        return False

    def get_device_total_memory(self) -> int:
        return self.total


Settle = Callable[..., tuple[Placement, SimpleNamespace, str]]


@pytest.fixture
def settle(tiny_model: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Settle:
    hf_config = read_config(str(tiny_model))
    plan = CheckpointPlan.build(GGUFModel.open(tiny_gguf), hf_config)
    monkeypatch.setattr(preflight, "served_quants", lambda: ("bf16", "fp8", "int4"))
    monkeypatch.setattr(preflight.logger, "info", lambda text, *values: lines.append(text % values))
    # Of the tiny model all is tiny beside a context.
    monkeypatch.setattr("kt_vllm.gpu_memory.CONTEXT_AND_GRAPHS_BYTES", 10 * MB)
    lines: list[str] = []

    def run(total: int, gpu_quant: str = "auto", **arguments: object) -> tuple[Placement, SimpleNamespace, str]:
        lines.clear()
        monkeypatch.setattr(preflight, "current_platform", GPU(total))
        model_config = SimpleNamespace(
            dtype=torch.bfloat16,
            max_model_len=128,
            hf_text_config=PretrainedConfig.from_dict(hf_config),
            quantization=None,
        )
        defaults = {
            "quantization": None,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "max_num_batched_tokens": 128,
            "max_num_seqs": 2,
            "kv_cache_dtype": "auto",
            "gpu_memory_utilization": 1.0,
            "kv_cache_memory_bytes": None,
        }
        config = KTConfig(gguf=str(tiny_gguf), gpu_quant=gpu_quant)
        placement = Placement.resolve(config, plan, hf_config["num_experts_per_tok"])
        engine_args = SimpleNamespace(**{**defaults, **arguments})
        return preflight._settle_dense(engine_args, placement, plan, model_config), model_config, "\n".join(lines)

    return run


# The dense weights take 25.3 MB in bf16, 19.0 in fp8 and 14.0 in int4, and all else 15.2.
@pytest.mark.parametrize(("total", "quant"), [(42, "bf16"), (40, "fp8"), (35, "fp8"), (33, "int4")])
def test_auto(settle: Settle, total: int, quant: str) -> None:
    placement, model_config, log = settle(total * MB)
    told = {name: entry.quant for entry in placement.config.dense for name in entry.names}
    assert told.pop("lm_head", "bf16") == for_head(quant)
    assert set(told.values()) == ({quant} if quant != "bf16" else set())
    assert model_config.quantization == (None if quant == "bf16" else "kt_dense")
    assert f"--kt-gpu-quant auto takes {quant} for the dense weights" in log
    line = f"dense modules on the device: 4 in bf16, 28 in {quant}; the head in {for_head(quant)}, as it is kept one"
    assert (line in log) == (quant != "bf16")


def test_auto_by_what_is_asked_of_the_kv_cache(settle: Settle) -> None:
    assert "takes fp8" in settle(40 * MB)[2]
    assert "takes int4" in settle(40 * MB, kv_cache_memory_bytes=8 * MB)[2]
    assert "takes bf16" in settle(40 * MB, tensor_parallel_size=2)[2]
    with pytest.raises(ResourceError, match=r"the dense weights take bf16 .*, int4 0\.0 GB, and of the GPU's memory"):
        settle(20 * MB)


def test_the_flag_is_not_second_guessed(settle: Settle) -> None:
    placement, _, log = settle(40 * MB, "fp8")
    assert {entry.quant for entry in placement.config.dense} == {"fp8"}
    assert "--kt-gpu-quant fp8: 0.0 GB of dense weights" in log and "auto" not in log
    with pytest.raises(ResourceError, match=r"take 0\.0 GB in bf16 and the GPU has 0\.0 GB; give --kt-gpu-quant auto"):
        settle(20 * MB, "bf16")


def test_the_head_of_tensor_parallel_devices(settle: Settle) -> None:
    """4096 rows in 128 parts of 32."""
    _, _, log = settle(40 * MB, "int4", tensor_parallel_size=128)
    assert "; the head in bf16, as fp8 needs rows in groups of 64 and there are 32; embedding" in log


def test_vllm_fills_a_vocabulary_up_as_we_count() -> None:
    assert VOCABULARY_PADDING == DEFAULT_VOCAB_PADDING_SIZE


def test_beside_quantization_of_vllm(settle: Settle) -> None:
    placement, model_config, _ = settle(MB, quantization="fp8_per_block")
    assert placement.config.dense == () and model_config.quantization is None
    with pytest.raises(ConfigError, match=r"--kt-gpu-quant: int4 for dense weights and --quantization fp8_per_block"):
        settle(MB, "int4", quantization="fp8_per_block")


def test_attention_computes_with_views_of_kv_b() -> None:
    """Why families keep it in the model's type: nothing else is there beside it."""
    heads, latent, nope, value = 4, 32, 16, 24
    weight = torch.randn(heads * (nope + value), latent, dtype=torch.bfloat16)
    layer = SimpleNamespace(weight=weight, quant_method=UnquantizedLinearMethod())
    for half in split_kv_b_proj(layer, torch.bfloat16, latent, heads, nope, value):
        assert half.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
