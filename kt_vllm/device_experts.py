"""Routed experts on vLLM's own device, in vLLM's own fused kernels: some of a layer's, and the loading of any."""

import copy
from collections.abc import Callable, Sequence

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from kt_vllm.checkpoint import LayerExperts
from kt_vllm.errors import ConfigError
from kt_vllm.expert_spans import read_expert, select_experts

# Kernels that leave out an expert whose entry in the map is -1. The others get it as one of weight 0.
_BACKENDS_WITH_A_MAP = (UnquantizedMoeBackend.TRITON,)


class DeviceExperts:
    """Those experts of one layer that stay on the device while the executor has the others.

    vLLM's method for unquantised experts holds and computes them, numbered from 0 in the order of their ids.
    """

    def __init__(self, layer_name: str, method: FusedMoEMethodBase, ids: Sequence[int], num_experts: int) -> None:
        if not isinstance(method, UnquantizedFusedMoEMethod) or method.is_monolithic:
            raise ConfigError(
                f"{layer_name} has some of its experts on the gpu, and vLLM's {type(method).__name__} cannot share a "
                "layer with the executor; put all or none of its experts there, or leave --quantization and "
                "--moe-backend out."
            )
        self.layer_name = layer_name
        self.ids = tuple(ids)
        self._method = method
        # Global id -> number here or in the executor, -1: not there. The last entry stands for ids that do not exist.
        self._device_map = torch.full((num_experts + 1,), -1, dtype=torch.int32)
        self._device_map[list(self.ids)] = torch.arange(len(self.ids), dtype=torch.int32)
        self._host_map = torch.full((num_experts + 1,), -1, dtype=torch.int32)
        on_host = [i for i in range(num_experts) if i not in self.ids]
        self._host_map[on_host] = torch.arange(len(on_host), dtype=torch.int32)

    @staticmethod
    def local_config(moe: FusedMoEConfig, ids: Sequence[int]) -> FusedMoEConfig:
        """The configuration by which vLLM chooses and builds the kernel for these experts alone."""
        local = copy.copy(moe)
        local.num_local_experts = len(ids)
        return local

    def create_weights(
        self,
        layer: RoutedExperts,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """w13_weight and w2_weight of these experts alone, on the device."""
        sizes = (hidden_size, intermediate_size_per_partition)
        parallel = self._method.moe.moe_parallel_config
        if self._method.maybe_roundup_sizes(*sizes, params_dtype, parallel) != sizes:
            raise ConfigError(
                f"{self.layer_name} has experts of {sizes[1]} x {sizes[0]}, which vLLM's kernel pads and the executor "
                "does not; put all or none of its experts on the gpu."
            )
        self._method.create_weights(layer, len(self.ids), *sizes, params_dtype, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self._method.process_weights_after_loading(layer)
        self._device_map = self._device_map.to(layer.w13_weight.device)
        self._host_map = self._host_map.to(layer.w13_weight.device)

    def host_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """topk_ids [num_tokens, top_k] as the executor numbers its experts; -1, which it skips, for those of others."""
        return self._mapped(self._host_map, topk_ids)

    def forward(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """What these experts contribute: [num_tokens, hidden_size]. Arguments as of KTMoEMethod.apply()."""
        expert_map = None
        num_experts = len(self.ids)
        if self._method.unquantized_backend in _BACKENDS_WITH_A_MAP:
            expert_map, num_experts = self._device_map[:-1], layer.global_num_experts
        else:
            topk_ids = self._mapped(self._device_map, topk_ids)
            topk_weights = topk_weights.masked_fill(topk_ids < 0, 0)
            topk_ids = topk_ids.clamp(min=0)
        assert self._method.moe_kernel is not None
        return self._method.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=num_experts,
            expert_map=expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )

    @staticmethod
    def _mapped(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        none = table.shape[0] - 1
        # A NaN before the router gives ids that do not exist.
        return table[ids.masked_fill((ids < 0) | (ids >= none), none).long()]


def load_device_experts(
    layer: RoutedExperts, experts: LayerExperts, ids: Sequence[int] | None, on_bytes: Callable[[int], object]
) -> set[str]:
    """Gives vLLM's parameters the experts `ids`, numbered from 0, or all (None); returns the parameters' names.

    One matrix at a time is dequantised, to the parameter's own type. on_bytes: called with bytes read from the files.
    """
    chosen = experts if ids is None else select_experts(experts, ids)
    parameters = dict(layer.named_parameters())
    for shard, source, name in (
        ("w1", chosen.gate, "w13_weight"),
        ("w3", chosen.up, "w13_weight"),
        ("w2", chosen.down, "w2_weight"),
    ):
        parameter = parameters[name]
        for expert in range(source.shape[0]):
            values = torch.from_numpy(read_expert(source, expert)).to(parameter.dtype)
            parameter.weight_loader(parameter, values, name, shard_id=shard, expert_id=expert)
            on_bytes(source.nbytes // source.shape[0])
    return {"w13_weight", "w2_weight"}
