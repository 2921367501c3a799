"""Dense weights in bf16, fp8 and int4 on a GPU: log-probabilities of the tiny model, and int4's own kernel.

What all of DeepSeek-R1's dense weights take there is measured by dense_memory.py beside this file.
"""

import pytest
import torch

from tests.e2e.test_accuracy import score
from tests.tolerances import (
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
    built = "dense linear layers on the device: 4 in bf16, 20 in " + quant  # kv_b_proj is kept
    assert (built in log) != exact, log[-4000:]


def test_auto_takes_bf16_where_all_fits() -> None:
    result, log = score({**LLM, "enforce_eager": True})
    assert "--kt-gpu-quant auto takes bf16 for the dense weights: bf16 0.0 GB" in log
    assert result["kl"] < MAX_MEAN_KL, result


@pytest.fixture(scope="module")
def parallel_groups(tmp_path_factory: pytest.TempPathFactory):
    """Of one process, which vLLM's parameters ask for their rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{tmp_path_factory.mktemp('store')}/store",
        )
        parallel_state.initialize_model_parallel(1, 1)
        yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("parallel_groups")
@pytest.mark.parametrize(("rows", "cols"), [(832, 512), (576, 7168), (2112, 7168), (512, 192)])
@pytest.mark.parametrize("num_tokens", [1, 17, 300])
def test_marlin_multiplies_with_what_was_stored(rows: int, cols: int, num_tokens: int) -> None:
    """The kernel on int4.quantize()'s numbers against int4.dequantize() in float64."""
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from kt_vllm import int4
    from kt_vllm.dense_methods import register_int4
    from kt_vllm.dense_quant import INT4_GROUP

    weight = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) / cols**0.5
    x = torch.randn(num_tokens, cols, device="cuda", dtype=torch.bfloat16)
    stored = int4.quantize(weight, INT4_GROUP)
    expected = x.double() @ int4.dequantize(stored).to(torch.bfloat16).double().T
    layer = torch.nn.Module()
    config = MPLinearLayerConfig((cols, rows), (cols, rows), scalar_types.uint4, torch.bfloat16, INT4_GROUP, True)
    kernel = MarlinLinearKernel(config, *register_int4(layer, stored))
    kernel.process_weights_after_loading(layer)
    got = kernel.apply_weights(layer, x).double()
    error = float((got - expected).norm() / expected.norm())
    print(rows, cols, num_tokens, error)
    assert error < 1.5 * MAX_ROUNDING_ERROR["bfloat16"]
