"""The head in fewer bits as vLLM builds, loads and computes it: ParallelLMHead with methods of dense_methods.py.

Imports vLLM, so test_dense_quant.py runs it in a process of its own.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.kernels.linear.scaled_mm import MarlinFP8ScaledMMLinearKernel
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from kt_vllm import dense_methods, int4
from kt_vllm.config import CONFIG_KEY, DensePlacement, KTConfig
from kt_vllm.dense_methods import DenseQuantConfig, Fp8OnlineLinearMethod, Int4OnlineLinearMethod
from kt_vllm.dense_quant import INT4_GROUP
from tests.tolerances import MAX_ROUNDING_ERROR

VOCABULARY, PADDED, COLS = 1000, 1024, 512


@pytest.fixture(scope="module", autouse=True)
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """And the groups of one process, which vLLM's embedding asks for its rank."""
    config = VllmConfig()
    with set_current_vllm_config(config):
        store = tmp_path_factory.mktemp("store") / "store"
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{store}", backend="gloo"
        )
        parallel_state.initialize_model_parallel(1, 1)
        config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # type: ignore[assignment]
        yield config
    parallel_state.cleanup_dist_env_and_memory()


def build(
    vllm_config: VllmConfig, quant: str, cls: type[VocabParallelEmbedding] = ParallelLMHead
) -> tuple[Any, DenseQuantConfig]:
    """As a model does; a head in `quant` is what the workers are told."""
    dense = () if quant == "bf16" else (DensePlacement("lm_head", (), quant),)
    vllm_config.additional_config = {CONFIG_KEY: KTConfig(gguf="g", dense=dense).to_dict()}
    config = DenseQuantConfig()
    name = "lm_head" if cls is ParallelLMHead else "model.embed_tokens"
    return cls(VOCABULARY, COLS, params_dtype=torch.bfloat16, quant_config=config, prefix=name), config


def load(head: ParallelLMHead) -> torch.Tensor:
    """The weight as it was loaded, [VOCABULARY, COLS]."""
    values = torch.randn(VOCABULARY, COLS, dtype=torch.bfloat16) / COLS**0.5
    assert head.weight.is_meta and tuple(head.weight.shape) == (PADDED, COLS)
    head.weight.weight_loader(head.weight, values.clone())
    return values


def test_int4(vllm_config: VllmConfig) -> None:
    """Complete with the last row that a file has; what fills the vocabulary up is 0."""
    head, config = build(vllm_config, "int4")
    assert isinstance(head.quant_method, Int4OnlineLinearMethod)
    values = load(head)
    assert not hasattr(head, "weight") and not any(parameter.is_meta for parameter in head.parameters())
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in head.parameters())
    assert nbytes == PADDED * COLS * 69 // 128
    for _ in range(2):  # vLLM does so for all layers at the end
        head.quant_method.process_weights_after_loading(head)
        x = torch.randn(5, COLS, dtype=torch.bfloat16)
        logits = head.quant_method.apply(head, x, bias=None)
        assert logits.shape == (5, PADDED) and not logits[:, VOCABULARY:].any()
        padded = torch.nn.functional.pad(values, (0, 0, 0, PADDED - VOCABULARY))
        weight = int4.dequantize(int4.quantize(padded, INT4_GROUP)).to(torch.bfloat16)
        expected = x.double() @ weight.double().T
        error = float((logits.double() - expected).norm() / expected.norm())
        assert error < 1.5 * MAX_ROUNDING_ERROR["bfloat16"]
    assert config.report() == ["dense linear layers on the device: none; the head in int4."]


def test_fp8(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Marlin is given: the numbers of vLLM's own cast of the whole weight, made some rows at a time."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    loaded: list[torch.Tensor] = []

    class Kernel(MarlinFP8ScaledMMLinearKernel):
        def __init__(self) -> None:
            pass

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            given.append((layer.weight.data, layer.weight_scale_inv.data))
            assert [weight.numel() for weight in loaded] == [0]

    def cast(weight: torch.Tensor, *arguments: Any) -> Any:
        assert weight.numel() <= 2 * 128 * COLS
        return per_block_cast_to_fp8(weight, *arguments)

    class Method(Fp8OnlineLinearMethod):
        def get_weight_for_quantization(self, layer: torch.nn.Module) -> torch.Tensor:
            loaded.append(super().get_weight_for_quantization(layer))
            return loaded[-1]

    monkeypatch.setattr(dense_methods, "served_quants", lambda: ("bf16", "fp8", "int4"))
    monkeypatch.setattr(dense_methods, "init_fp8_linear_kernel", lambda **_: Kernel())
    monkeypatch.setattr(dense_methods, "per_block_cast_to_fp8", cast)
    monkeypatch.setattr(dense_methods, "Fp8OnlineLinearMethod", Method)
    monkeypatch.setattr(dense_methods, "_FP8_CHUNK", 3 * 128 * COLS - 1)
    head, _ = build(vllm_config, "fp8")
    values = load(head)
    head.quant_method.process_weights_after_loading(head)
    ((codes, scale),) = given
    expected = per_block_cast_to_fp8(torch.nn.functional.pad(values, (0, 0, 0, PADDED - VOCABULARY)))
    assert codes.dtype == torch.float8_e4m3fn and torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("quant", ["bf16", "int4"])
def test_what_stays_in_the_models_type(quant: str, vllm_config: VllmConfig) -> None:
    """vLLM's own method: it can be tied."""
    embedding, config = build(vllm_config, quant, VocabParallelEmbedding)
    assert isinstance(embedding.quant_method, UnquantizedEmbeddingMethod)
    assert config.report() == ["dense linear layers on the device: none."]
    if quant == "bf16":
        head, config = build(vllm_config, quant)
        assert head.tie_weights(embedding).weight is embedding.weight
        assert config.report() == ["dense linear layers on the device: none; the head in bf16."]


def test_rows_that_do_not_fit(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_vllm.dense_quant._ROWS", 96)
    head, config = build(vllm_config, "int4")
    assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)
    counts, reason = config.report()
    assert counts.endswith("the head in bf16.") and "int4 needs rows in groups of 96 and there are 1024" in reason
