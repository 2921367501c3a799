"""Dense weights in bf16, fp8 and int4 on a GPU: log-probabilities of the tiny model, the head, int4's own kernel.

What all of DeepSeek-R1's dense weights take there is measured by dense_memory.py beside this file.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_vllm.dense_quant import INT4_GROUP, for_head, weight_bytes
from tests.e2e.test_accuracy import score
from tests.tolerances import (
    KL_OF_FP8_HEAD,
    KL_OF_INT4_HEAD,
    MAX_MEAN_KL,
    MAX_MEAN_KL_QUANTISED,
    MAX_MEAN_NLL_DIFFERENCE,
    MAX_MEAN_NLL_DIFFERENCE_QUANTISED,
    MAX_MISSING_MASS,
    MAX_ROUNDING_ERROR,
)

pytestmark = [pytest.mark.gpu, pytest.mark.e2e]

# Enough for a model of 30 MB: the rest of the GPU may be another's, who changes what is left meanwhile.
LLM = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 1 << 30}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("quant", ["bf16", "fp8", "int4"])
def test_log_probabilities(quant: str, eager: bool) -> None:
    result, log = score({**LLM, "enforce_eager": eager}, {"gpu_quant": quant})
    print(quant, "eager" if eager else "graphs", result)  # for pytest -rP
    assert result["missing_mass"] < MAX_MISSING_MASS, result
    exact = quant == "bf16"
    assert result["nll_difference"] < (MAX_MEAN_NLL_DIFFERENCE if exact else MAX_MEAN_NLL_DIFFERENCE_QUANTISED), result
    assert result["kl"] < (MAX_MEAN_KL if exact else MAX_MEAN_KL_QUANTISED), result
    # kv_b_proj is kept
    built = f"dense linear layers on the device: 4 in bf16, 20 in {quant}; the head in {for_head(quant)}."
    assert (built in log) != exact, log[-4000:]
    assert ("20 of 20 in int4 have a kernel of their own for few tokens; else Marlin." in log) == (quant == "int4")


@pytest.mark.parametrize(("quant", "kl"), [("fp8", KL_OF_FP8_HEAD), ("int4", KL_OF_INT4_HEAD)])
def test_log_probabilities_with_only_the_head_by_a_rule(quant: str, kl: float, tmp_path: Path) -> None:
    rules = tmp_path / "r.yaml"
    rules.write_text(f"rules:\n  - match: ^lm_head$\n    gpu_quant: {quant}\n")
    result, log = score(LLM, {"rules": str(rules)})
    print(quant, result)  # for pytest -rP
    assert result["missing_mass"] < MAX_MISSING_MASS, result
    assert abs(result["kl"] - kl) < MAX_MEAN_KL, result
    assert f"dense linear layers on the device: 24 in bf16; the head in {quant}." in log, log[-4000:]


def test_auto_takes_bf16_where_all_fits() -> None:
    result, log = score({**LLM, "enforce_eager": True})
    assert "--kt-gpu-quant auto takes bf16 for the dense weights: bf16 0.0 GB" in log
    assert result["kl"] < MAX_MEAN_KL, result


@pytest.fixture(scope="module")
def parallel_groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of one process, which vLLM's parameters ask for their rank; yields vLLM's configuration."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    config = VllmConfig()
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{tmp_path_factory.mktemp('store')}/store",
        )
        parallel_state.initialize_model_parallel(1, 1)
        config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # type: ignore[assignment]
        yield config
    parallel_state.cleanup_dist_env_and_memory()


def in_marlin(rows: int, cols: int) -> tuple[torch.nn.Module, Any, torch.Tensor]:
    """A layer with random numbers quantised to int4, vLLM's kernel for it, and the dequantised weight in float32."""
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from kt_vllm import int4
    from kt_vllm.dense_methods import register_int4

    weight = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) / cols**0.5
    stored = int4.quantize(weight, INT4_GROUP)
    exact = int4.dequantize(stored)
    layer = torch.nn.Module()
    config = MPLinearLayerConfig((cols, rows), (cols, rows), scalar_types.uint4, torch.bfloat16, INT4_GROUP, True)
    kernel = MarlinLinearKernel(config, *register_int4(layer, stored))
    kernel.process_weights_after_loading(layer)
    return layer, kernel, exact


@pytest.mark.usefixtures("parallel_groups")
@pytest.mark.parametrize(("rows", "cols"), [(832, 512), (576, 7168), (2112, 7168), (512, 192)])
@pytest.mark.parametrize("num_tokens", [1, 17, 300])
def test_marlin_multiplies_with_what_was_stored(rows: int, cols: int, num_tokens: int) -> None:
    """The kernel on int4.quantize()'s numbers against int4.dequantize() in float64."""
    layer, kernel, exact = in_marlin(rows, cols)
    x = torch.randn(num_tokens, cols, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ exact.to(torch.bfloat16).double().T
    got = kernel.apply_weights(layer, x).double()
    error = float((got - expected).norm() / expected.norm())
    print(rows, cols, num_tokens, error)
    assert error < 1.5 * MAX_ROUNDING_ERROR["bfloat16"]


@pytest.mark.usefixtures("parallel_groups")
@pytest.mark.parametrize(("rows", "cols"), [(2112, 7168), (7168, 16384), (24576, 1536), (832, 512)])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
def test_one_op_for_few_and_many_tokens(rows: int, cols: int, num_tokens: int) -> None:
    """In a graph that is replayed, as the counters of one call are those of the next; against float64."""
    from kt_vllm import int4_linear

    layer, _, exact = in_marlin(rows, cols)
    weights = layer.weight_packed, layer.weight_scale, layer.weight_zero_point
    parts = int4_linear.few_tokens_parts(rows, cols, *weights)
    assert parts is not None
    arrived = int4_linear.counters(rows, exact.device)
    x = torch.empty(num_tokens, cols, device="cuda", dtype=torch.bfloat16)

    def multiply() -> torch.Tensor:
        return torch.ops.kt_vllm.int4_linear(x, *weights, arrived, parts)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        multiply()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            got = multiply()
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            got.fill_(torch.nan)
            graph.replay()
            expected = x.double() @ exact.double().T
            error = float((got.double() - expected).norm() / expected.norm())
            # Marlin, from five tokens on, rounds weights to bfloat16 as well.
            assert error < (1 if num_tokens <= 4 else 1.5) * MAX_ROUNDING_ERROR["bfloat16"], error
    assert not arrived.any()


@pytest.mark.parametrize("quant", ["fp8", "int4"])
@pytest.mark.parametrize(("vocabulary", "padded"), [(1000, 1024), (131_000, 131_008)])
def test_the_head(quant: str, vocabulary: int, padded: int, parallel_groups: Any) -> None:
    """As vLLM builds and loads it: complete with the last row of the file, its logits, its memory and that on the way.

    The larger one has 256 MiB in bf16; cast to fp8 at once it would take five times as much.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.utils.deep_gemm import per_block_cast_to_fp8
    from vllm.utils.torch_utils import set_default_torch_dtype

    from kt_vllm import int4
    from kt_vllm.config import CONFIG_KEY, DensePlacement, KTConfig
    from kt_vllm.dense_methods import DenseQuantConfig

    cols = 1024
    config = KTConfig(gguf="g", dense=(DensePlacement("lm_head", (), quant),))
    parallel_groups.additional_config = {CONFIG_KEY: config.to_dict()}
    values = torch.randn(vocabulary, cols, dtype=torch.bfloat16) / cols**0.5
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with set_default_torch_dtype(torch.bfloat16), torch.device("cuda"):
        head = ParallelLMHead(
            vocabulary, cols, params_dtype=torch.bfloat16, quant_config=DenseQuantConfig(), prefix="lm_head"
        )
        assert head.weight.is_meta and tuple(head.weight.shape) == (padded, cols)
        head.weight.weight_loader(head.weight, values.clone())
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    nbytes = weight_bytes(quant, padded, cols, 2)
    assert sum(p.numel() * p.element_size() for p in head.parameters() if p.is_cuda) == nbytes
    assert nbytes <= kept < 1.02 * nbytes + (1 << 20)
    if vocabulary > 1000:
        assert peak < 2.5 * padded * cols * 2, peak
    padded_values = torch.nn.functional.pad(values.cuda(), (0, 0, 0, padded - vocabulary))
    if quant == "int4":
        weight = int4.dequantize(int4.quantize(padded_values, INT4_GROUP))
    else:
        codes, scale = per_block_cast_to_fp8(padded_values)
        # Marlin keeps scales in the model's type.
        wide = scale.to(torch.bfloat16).float().repeat_interleave(128, 0)[:padded].repeat_interleave(128, 1)
        weight = codes.float() * wide
    weight = weight.to(torch.bfloat16)
    for num_tokens in (1, 4, 300):
        x = torch.randn(num_tokens, cols, device="cuda", dtype=torch.bfloat16)
        logits = head.quant_method.apply(head, x, bias=None)
        assert logits.shape == (num_tokens, padded) and not logits[:, vocabulary:].any()
        expected = x.float() @ weight.float().T
        error = float((logits.float() - expected).norm() / expected.norm())
        print(quant, vocabulary, num_tokens, error)
        assert error < 1.5 * MAX_ROUNDING_ERROR["bfloat16"]
