"""register(): the entry point vLLM calls in every one of its processes; starts no thread, touches no device or file."""

_registered = False


def register() -> None:
    """Puts our classes into vLLM's registries. Idempotent. They stay passive until additional_config["kt"] is set.

    Where the plugin cannot work it says so and leaves vLLM alone: other models are served from the same environment.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from kt_vllm import compat
    from kt_vllm.log import init_logger

    reason = compat.why_unusable()
    if reason is not None:
        init_logger(__name__).warning("kt_vllm is installed but off, and knows no --kt-* flag: it %s", reason)
        return

    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.transformers_utils.config import register_config_parser

    from kt_vllm.dense_methods import DENSE_QUANTIZATION, DenseQuantConfig
    from kt_vllm.hf_config import CONFIG_FORMAT, KTConfigParser
    from kt_vllm.layer import KTRoutedExperts
    from kt_vllm.loader import LOAD_FORMAT, KTModelLoader

    register_config_parser(CONFIG_FORMAT)(KTConfigParser)
    register_model_loader(LOAD_FORMAT)(KTModelLoader)
    register_quantization_config(DENSE_QUANTIZATION)(DenseQuantConfig)
    PluggableLayer.register_oot(name="RoutedExperts")(KTRoutedExperts)
    compat.patch_engine_args()
