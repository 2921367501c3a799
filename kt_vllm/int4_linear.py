"""The product with an int4 weight on a GPU as one op: our kernel for a few tokens, vLLM's Marlin for more.

torch.compile makes one graph for all numbers of tokens and would keep one of the two. Inside an op the number is known,
and a CUDA graph that is captured for few tokens holds the kernel for few.
"""

import torch
from torch.library import Library
from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from kt_vllm.int4_few_tokens import MAX_TOKENS, TILE_OUTPUTS, multiply_few_tokens, parts_for
from kt_vllm.log import init_logger

logger = init_logger(__name__)

# Of our kernel to Marlin's result, which rounds weights to bfloat16 (0.2 %): a wrong one is off by all.
_MAX_DIFFERENCE = 0.02


def few_tokens_parts(
    num_outputs: int, num_inputs: int, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> int | None:
    """What int4_linear() is to be given for this weight; None where Marlin computes all of it."""
    parts = parts_for(num_outputs, num_inputs, packed, scale)
    if parts is None or not _is_right(parts, packed, scale, zero):
        return None
    return parts


def counters(num_outputs: int, device: torch.device) -> torch.Tensor:
    """`arrived` of int4_linear()."""
    return torch.zeros(num_outputs // TILE_OUTPUTS, dtype=torch.int32, device=device)


_checked: dict[int, bool] = {}


def _is_right(parts: int, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> bool:
    """Compares with Marlin, once for each way to cut a weight: the kernel counts on how Triton lays elements out.

    This compiles it too, which must not happen while a graph is captured.
    """
    if parts not in _checked:
        differences = [_difference(n, parts, packed, scale, zero) for n in (1, MAX_TOKENS)]
        _checked[parts] = all(difference < _MAX_DIFFERENCE for difference in differences)  # NaN is not
        if not _checked[parts]:
            logger.warning(
                "kt_vllm: Marlin computes int4 products of few tokens too: our kernel's differ from its by %s of their "
                "size, expected at most %s; please report this, with the versions of Triton and of the GPU's driver.",
                differences,
                _MAX_DIFFERENCE,
            )
    return _checked[parts]


def _difference(num_tokens: int, parts: int, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> float:
    x = torch.randn(num_tokens, packed.shape[0] * 16, dtype=scale.dtype, device=scale.device)
    arrived = counters(scale.shape[1], scale.device)
    ours = multiply_few_tokens(x, packed, scale, zero, arrived, parts).float()
    marlins = _marlin(x, packed, scale, zero).float()
    return float((ours - marlins).norm() / marlins.norm().clamp_min(1e-30))


def _marlin(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return apply_gptq_marlin_linear(
        input=x,
        weight=packed,
        weight_scale=scale,
        weight_zp=zero,
        workspace=None,
        wtype=scalar_types.uint4,
        output_size_per_partition=scale.shape[1],
        input_size_per_partition=x.shape[-1],
    )


def _int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, arrived: torch.Tensor, parts: int
) -> torch.Tensor:
    """x: [..., num_inputs] -> [..., num_outputs]."""
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= MAX_TOKENS:
        return multiply_few_tokens(rows, packed, scale, zero, arrived, parts).reshape(*x.shape[:-1], -1)
    return _marlin(x, packed, scale, zero)


def _int4_linear_fake(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, arrived: torch.Tensor, parts: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[1])


_library = Library("kt_vllm", "FRAGMENT")  # lives as long as the process, and its ops with it
direct_register_custom_op(
    op_name="int4_linear",
    op_func=_int4_linear,
    mutates_args=[],  # `arrived` is zeros before and after
    fake_impl=_int4_linear_fake,
    target_lib=_library,
    dispatch_key=current_platform.dispatch_key,
)
