"""Dense weights on vLLM's device in fp8 or int4, each quantised as soon as it is complete.

vLLM builds linear layers and the head through its quantisation config, so ours, DenseQuantConfig, hands out a method
for each. Both methods are vLLM's online ones: the weight stands on "meta" until all its parts have come from the GGUF,
in the model's type and in host memory; then it goes to the device, is quantised, and only the result stays there.

Weights alone are quantised, never activations: Marlin multiplies both kinds with activations in the model's type.
"""

from math import ceil
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm import MarlinFP8ScaledMMLinearKernel
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerBlockOnlineLinearMethod, OnlineLinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from kt_vllm import int4
from kt_vllm.config import KTConfig
from kt_vllm.dense_quant import FP8_BLOCK, INT4_GROUP, QUANTS, fitting
from kt_vllm.errors import ConfigError
from kt_vllm.log import init_logger

logger = init_logger(__name__)

DENSE_QUANTIZATION = "kt_dense"
# vLLM looks for the first where it wants to know a weight's device.
_INT4_NAMES = ("weight_packed", "weight_scale", "weight_zero_point")
# What Marlin's fp8 kernel takes the scales of blocks from.
_FP8_SCALE = "weight_scale_inv"
# Weights that vLLM casts to fp8 at once, with 10 bytes each beside them: 160 MiB.
_FP8_CHUNK = 16 << 20


def served_quants() -> tuple[str, ...]:
    """What this platform has kernels for, the most exact first."""
    if current_platform.is_cuda():
        return QUANTS
    return ("bf16", "int4") if current_platform.is_cpu() else ("bf16",)


class DenseQuantConfig(QuantizationConfig):
    """vLLM's `quantization` where KTConfig.dense names modules; all others stay in the model's type."""

    def __init__(self) -> None:
        super().__init__()
        self._quants: dict[str, str] | None = None
        self._built: dict[str, int] = {}
        self._head: str | None = None
        self._int4: list[Int4OnlineLinearMethod] = []
        self._not_as_asked: dict[tuple[str, str], list[str]] = {}

    @classmethod
    def get_name(cls) -> str:
        return DENSE_QUANTIZATION

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DenseQuantConfig":
        raise ConfigError(f"quantization {DENSE_QUANTIZATION!r} is chosen by --kt-gpu-quant; give that instead.")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """None (vLLM's own, in the model's type) for all but linear layers and a head that is in fewer bits."""
        is_head = isinstance(layer, ParallelLMHead)
        if not is_head and not isinstance(layer, LinearBase):
            return None
        wanted = self._wanted(prefix)
        # Whatever its class: with tensor parallelism a device has a part of the columns, or of the rows.
        cols = vars(layer).get("input_size_per_partition", layer.input_size)
        quant, reason = fitting(wanted, sum(layer.output_partition_sizes), cols, served_quants())
        if reason is not None:
            self._not_as_asked.setdefault((quant, reason), []).append(prefix)
        if is_head:
            self._head = quant
            if quant == QUANTS[0]:  # one that may be tied to the embedding, as no linear method's is
                return None
        else:
            self._built[quant] = self._built.get(quant, 0) + 1
        methods: dict[str, type[LinearMethodBase]] = {
            "bf16": UnquantizedLinearMethod,
            "fp8": Fp8OnlineLinearMethod,
            "int4": Int4OnlineLinearMethod,
        }
        method = methods[quant]()
        if isinstance(method, Int4OnlineLinearMethod):
            self._int4.append(method)
        return method

    def _wanted(self, prefix: str) -> str:
        """Of a layer by its name in vLLM's model; the most exact of its parts where it is several of the checkpoint."""
        if self._quants is None:
            config = KTConfig.from_vllm_config(get_current_vllm_config())
            entries = () if config is None else config.dense
            self._quants = {name: entry.quant for entry in entries for name in entry.names}
        last = prefix.rpartition(".")[2]
        parent = prefix.removesuffix(last)
        parts = [parent + part for part in self.packed_modules_mapping.get(last, [last])]
        quants = {part: self._quants.get(part, QUANTS[0]) for part in parts}
        best = min(quants.values(), key=QUANTS.index)
        for part, quant in quants.items():
            if quant != best:
                reason = f"it is one weight with another that is, and {part.rpartition('.')[2]} was to be in {quant}"
                self._not_as_asked.setdefault((best, reason), []).append(prefix)
        return best

    def report(self) -> list[str]:
        """Lines for the log: what was built, and what is not as it was asked for."""
        counts = ", ".join(f"{count} in {quant}" for quant, count in sorted(self._built.items())) or "none"
        head = "" if self._head is None else f"; the head in {self._head}"
        lines = [f"dense linear layers on the device: {counts}{head}."]
        if self._int4 and current_platform.is_cuda():
            few = sum(method.few_tokens_parts is not None for method in self._int4)
            lines.append(f"{few} of {len(self._int4)} in int4 have a kernel of their own for few tokens; else Marlin.")
        for (quant, reason), names in self._not_as_asked.items():
            lines.append(f"{len(names)} of them are in {quant}, as {reason}: {', '.join(names[:4])}.")
        return lines


class Fp8OnlineLinearMethod(Fp8PerBlockOnlineLinearMethod):
    """vLLM's quantisation in blocks of 128 x 128, and Marlin for the product.

    Marlin, and not what vLLM would choose on Hopper: DeepGEMM rounds activations to fp8 as well, and compiles its
    kernels where the engine starts. A step of few tokens reads as many bytes either way.
    vLLM warns that Marlin is for GPUs without fp8; it runs on those too.
    """

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        # Not the parent's own, which would choose the kernel.
        OnlineLinearBase.create_weights(
            self,
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        _leave_padding_out(layer)
        layer.weight_block_size = self.weight_block_size
        self.fp8_linear = init_fp8_linear_kernel(
            activation_quant_key=self.activation_quant_key,
            weight_quant_key=self.weight_quant_key,
            weight_shape=(sum(output_partition_sizes), input_size_per_partition),
            input_dtype=self.input_dtype,
            out_dtype=self.out_dtype,
            force_kernel=MarlinFP8ScaledMMLinearKernel,
        )
        if not isinstance(self.fp8_linear, MarlinFP8ScaledMMLinearKernel):
            raise ConfigError("vLLM's Marlin cannot compute fp8 weights on this GPU; give --kt-gpu-quant bf16 or int4.")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The parent's numbers, some rows at a time: all of DeepSeek-R1's head would take 9 GB for the moment."""
        # vLLM calls this when the weight is complete, and again for all layers at the end.
        if _FP8_SCALE in layer._parameters:
            return
        weight = self.get_weight_for_quantization(layer)
        rows, cols = weight.shape
        codes = torch.empty_like(weight, dtype=current_platform.fp8_dtype())
        scale = weight.new_empty(ceil(rows / FP8_BLOCK), ceil(cols / FP8_BLOCK), dtype=torch.float32)
        blocks = max(1, _FP8_CHUNK // (cols * FP8_BLOCK))
        for first in range(0, len(scale), blocks):
            part = slice(first * FP8_BLOCK, (first + blocks) * FP8_BLOCK)
            codes[part], scale[first : first + blocks] = per_block_cast_to_fp8(weight[part], self.weight_block_size)
        replace_parameter(layer, "weight", codes)
        replace_parameter(layer, _FP8_SCALE, scale)
        del codes, scale
        _release(weight)
        self.fp8_linear.process_weights_after_loading(layer)


class Int4OnlineLinearMethod(OnlineLinearBase):
    """int4.quantize() on the way in; for the product int4_linear on CUDA and vLLM's WNA16 kernel on the CPU platform.

    int4_linear is our kernel for a few tokens and Marlin for more.
    Marlin, and not what vLLM would choose: Machete keeps zero points as wide as scales, 4.5 bits a weight in place of
    4.31, is for Hopper alone, and takes 1.3 to 1.5 times as long for few tokens (benchmarks/RESULTS.md).
    """

    activation_quant_key = None

    def __init__(self) -> None:
        super().__init__()
        # Where it is set, vLLM prepares attention twice, and with AMX the first time throws kv_b_proj's weight away.
        self.uses_meta_device = not current_platform.is_cpu()
        self.few_tokens_parts: int | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        _leave_padding_out(layer)
        config = MPLinearLayerConfig(
            full_weight_shape=(input_size, output_size),
            partition_weight_shape=(input_size_per_partition, sum(output_partition_sizes)),
            weight_type=scalar_types.uint4,
            # On the CPU platform anything but bfloat16 keeps vLLM 0.32 from its W4A8 kernel, which rounds activations
            # to int8, and compiled with tensor parallelism gives NaN.
            act_type=torch.float32 if current_platform.is_cpu() else params_dtype,
            group_size=INT4_GROUP,
            zero_points=True,
        )
        kernel: type[MPLinearKernel] = CPUWNA16LinearKernel if current_platform.is_cpu() else MarlinLinearKernel
        can, reason = kernel.can_implement(config)
        if not can:
            raise ConfigError(
                f"vLLM's {kernel.__name__} cannot compute int4 weights here ({reason}); give --kt-gpu-quant bf16."
            )
        self.kernel = kernel(config, *_INT4_NAMES)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        # vLLM calls this when the weight is complete, and again for all layers at the end.
        if _INT4_NAMES[0] in layer._parameters:
            return
        weight = self.get_weight_for_quantization(layer)
        stored = int4.quantize(weight, INT4_GROUP)
        del layer.weight
        _release(weight)
        register_int4(layer, stored)
        self.kernel.process_weights_after_loading(layer)
        if current_platform.is_cuda():
            from kt_vllm import int4_linear  # its Triton is there on GPUs alone

            num_inputs, num_outputs = self.kernel.config.partition_weight_shape
            weight = (layer.weight_packed, layer.weight_scale, layer.weight_zero_point)
            self.few_tokens_parts = int4_linear.few_tokens_parts(num_outputs, num_inputs, *weight)
            if self.few_tokens_parts is not None:
                layer.register_buffer("few_tokens_arrived", int4_linear.counters(num_outputs, weight[0].device), False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., input_size] -> [..., output_size]."""
        if self.few_tokens_parts is None or bias is not None:
            return self.kernel.apply_weights(layer, x, bias)
        return torch.ops.kt_vllm.int4_linear(
            x,
            layer.weight_packed,
            layer.weight_scale,
            layer.weight_zero_point,
            layer.few_tokens_arrived,
            self.few_tokens_parts,
        )


def _leave_padding_out(layer: torch.nn.Module) -> None:
    """Of a head: vLLM waits for as many numbers as the weight has, and none come for what fills the vocabulary up."""
    if isinstance(layer, ParallelLMHead):
        layer.weight.weight_loader_numel = layer.num_org_embeddings_per_partition * layer.embedding_dim


def _release(weight: torch.Tensor) -> None:
    """Gives the memory of a weight in the model's type back: vLLM holds the parameter until its layer is done."""
    weight.data = weight.new_empty(0)
    if weight.is_cuda:
        # torch hands a freed block over whole although some MiB of it are left: of DeepSeek-R1's 61 output
        # projections 59 took 72 MiB of an earlier weight where they need 56, 1 GB in all.
        torch.cuda.empty_cache()


def register_int4(layer: torch.nn.Module, stored: int4.Int4Weight) -> tuple[str, str, str]:
    """Makes the numbers parameters of `layer` as vLLM's kernels expect them, and returns their names."""
    along = {"input_dim": 1, "output_dim": 0, "weight_loader": _no_checkpoint_has_this}
    factor = {"packed_factor": int4.CODES_PER_INT32}
    parameters = (
        PackedvLLMParameter(data=stored.packed, packed_dim=1, **factor, **along),
        GroupQuantScaleParameter(data=stored.scale, **along),
        PackedvLLMParameter(data=stored.zero, packed_dim=0, **factor, **along),
    )
    for name, parameter in zip(_INT4_NAMES, parameters, strict=True):
        layer.register_parameter(name, parameter)
    return _INT4_NAMES


def _no_checkpoint_has_this(*_: object) -> None:
    raise RuntimeError("int4 weights are made from the model's own and never loaded.")
