"""RoutedExperts of every model, computed by the executor while the device runs the shared experts.

vLLM builds its RoutedExperts through PluggableLayer, so one replacement class serves every model. Routing (top-k,
groups, correction bias, renormalisation) has been done by vLLM's router before us; scaling and the tensor-parallel
all-reduce are done by vLLM's MoERunner after us. A layer whose experts the rules put on the device is vLLM's own; where
they put some of them there, both compute and the results are added.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.library import Library
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from kt_vllm.compat import set_shared_experts_output
from kt_vllm.config import KTConfig
from kt_vllm.device_experts import DeviceExperts
from kt_vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from kt_vllm.executor import LayerHandle, ZeroHandle
    from kt_vllm.handover.device_layer import DeviceLayerHandle


class KTRoutedExperts(RoutedExperts):
    """vLLM's RoutedExperts with our method, when the user gave a GGUF; vLLM's own otherwise and on the device."""

    def _get_quant_method(
        self, prefix: str, quant_config: "QuantizationConfig | None", moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        config = KTConfig.from_vllm_config(get_current_vllm_config())
        on_device = None if config is None else config.placement(extract_layer_index(prefix)).device_experts
        if on_device is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        if not on_device:
            return KTMoEMethod(prefix, moe_config)
        local = DeviceExperts.local_config(moe_config, on_device)
        stock = super()._get_quant_method(prefix, quant_config, local)
        return KTMoEMethod(prefix, moe_config, DeviceExperts(prefix, stock, on_device, moe_config.num_experts))


class KTMoEMethod(FusedMoEMethodBase):
    """Routed experts in host memory, and where the rules say so some on the device.

    The loader attaches the weights as `handle`. Tensor-parallel rank 0 computes all of it; the others contribute zeros
    to the all-reduce and keep no experts. Those on the device are cut over the ranks, as vLLM does.
    """

    def __init__(self, layer_name: str, moe: FusedMoEConfig, on_device: DeviceExperts | None = None) -> None:
        super().__init__(moe)
        self.on_device = on_device
        self.layer_name = layer_name
        self.computes = get_tensor_model_parallel_rank() == 0
        self.handle: LayerHandle | DeviceLayerHandle | ZeroHandle | None = None
        self._in_flight = False
        self._pending: torch.Tensor | None = None
        self._host_ids: torch.Tensor | None = None
        refused = {
            f"activation {moe.activation.value!r}": moe.activation != MoEActivation.SILU,
            "expert biases": moe.has_bias,
            "a clamped SwiGLU": moe.swiglu_limit is not None,
            "data parallelism": moe.dp_size > 1,
            "sequence-parallel experts": moe.is_sequence_parallel,
            "LoRA": moe.is_lora_enabled,
        }
        for what, is_set in refused.items():
            if is_set:
                raise ConfigError(
                    f"{layer_name} needs {what}, which the executor does not compute; serve this without --kt-gguf."
                )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Allocates nothing but for experts on the device: the others live in the executor."""
        if layer.apply_router_weight_on_input:
            raise ConfigError(
                f"{self.layer_name} applies router weights to its input, which the executor does not; "
                f"serve this model without --kt-gguf."
            )
        if self.on_device is not None:
            self.on_device.create_weights(
                layer, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
            )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.on_device is not None:
            self.on_device.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: object
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        return True

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; topk_weights, topk_ids: [num_tokens, top_k]. Returns a fresh tensor like x."""
        if not current_platform.is_cpu():  # vLLM's own op around this layer is opaque there
            meanwhile = None
            if shared_experts is not None:
                meanwhile = functools.partial(
                    shared_experts, shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
                )
            return _run(layer, x, topk_weights, topk_ids, meanwhile)
        layer_name = _encode_layer_name(layer.layer_name)
        if shared_experts is None:
            return torch.ops.kt_vllm.moe_forward(x, topk_weights, topk_ids, layer_name)
        output, shared_output = torch.ops.kt_vllm.moe_forward_shared(
            x, topk_weights, topk_ids, shared_experts_input, layer_name
        )
        set_shared_experts_output(shared_experts, shared_output)
        return output

    def submit(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """Starts the executor on x; the output belongs to nobody else until wait() hands it out."""
        if self.computes and self.handle is None:
            raise RuntimeError(f"{self.layer_name} was called before its experts were loaded.")
        context = get_forward_context()
        # A profile or warm-up run wants shapes, not answers; minutes of CPU work at start would buy nothing. A graph's
        # capture may look like one.
        is_dummy_run = context.attn_metadata is None
        self._in_flight = self.handle is not None and (not is_dummy_run or self.handle.is_capturing())
        if self.handle is not None and self._in_flight:
            self._pending = torch.empty_like(x)
            # Kept until wait(): the executor reads it.
            self._host_ids = topk_ids if self.on_device is None else self.on_device.host_ids(topk_ids)
            padding = None if context.is_padding is None else context.is_padding[: x.shape[0]]
            self.handle.submit(x, topk_weights, self._host_ids, self._pending, padding)
        else:
            self._pending = torch.zeros_like(x)

    def wait(self) -> torch.Tensor:
        """The output of the last submit()."""
        if self.handle is not None and self._in_flight:
            self._in_flight = False
            self.handle.wait()
        self._host_ids = None
        output, self._pending = self._pending, None
        assert output is not None, "wait() without submit()"
        return output


# On the CPU platform, one opaque op from submit to wait: in between, the executor reads and writes these tensors behind
# torch's back, and a compiler that saw two ops would move the shared experts out of the gap and reuse the memory of the
# inputs.


def _runner(layer_name: LayerNameType) -> "MoERunner":
    return get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]


def _run(
    experts: RoutedExperts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    meanwhile: Callable[[], object] | None = None,
) -> torch.Tensor:
    """The routed experts' output; in between, the device does `meanwhile` and the experts that are its own."""
    method = experts.quant_method
    method.submit(x, topk_weights, topk_ids)
    on_device = None
    try:
        if meanwhile is not None:
            meanwhile()
        if method.on_device is not None:
            on_device = method.on_device.forward(experts, x, topk_weights, topk_ids)
    finally:
        output = method.wait()  # after an exception too: until then the executor reads and writes these tensors
    return output if on_device is None else output.add_(on_device)


def _moe_forward(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return _run(_runner(layer_name).routed_experts, x, topk_weights, topk_ids)


def _moe_forward_shared(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_experts_input: torch.Tensor,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    runner = _runner(layer_name)

    def shared_experts() -> None:
        runner.shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)

    output = _run(runner.routed_experts, x, topk_weights, topk_ids, meanwhile=shared_experts)
    return output, runner.shared_experts.output


def _moe_forward_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return torch.empty_like(x)


def _moe_forward_shared_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_experts_input: torch.Tensor,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(shared_experts_input)


_library = Library("kt_vllm", "FRAGMENT")  # lives as long as the process, and its ops with it
for _name, _function, _fake in (
    ("moe_forward", _moe_forward, _moe_forward_fake),
    ("moe_forward_shared", _moe_forward_shared, _moe_forward_shared_fake),
):
    direct_register_custom_op(
        op_name=_name,
        op_func=_function,
        fake_impl=_fake,
        target_lib=_library,
        dispatch_key=current_platform.dispatch_key,
    )
