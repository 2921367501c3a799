"""register(): the entry point vLLM calls in every one of its processes; starts no thread, touches no device or file."""

_registered = False


def register() -> None:
    """Puts our classes into vLLM's registries. Idempotent. They stay passive until additional_config["kt"] is set."""
    global _registered
    if _registered:
        return
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.transformers_utils.config import register_config_parser

    from kt_vllm import compat
    from kt_vllm.hf_config import CONFIG_FORMAT, KTConfigParser
    from kt_vllm.layer import KTRoutedExperts
    from kt_vllm.loader import LOAD_FORMAT, KTModelLoader

    compat.check_vllm_version()
    register_config_parser(CONFIG_FORMAT)(KTConfigParser)
    register_model_loader(LOAD_FORMAT)(KTModelLoader)
    PluggableLayer.register_oot(name="RoutedExperts")(KTRoutedExperts)
    compat.patch_engine_args()
    _registered = True
