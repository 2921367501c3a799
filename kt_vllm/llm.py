"""vllm.LLM with our settings as keyword arguments."""

from typing import Any

import vllm

from kt_vllm.args import merge_flags


class LLM(vllm.LLM):
    """`LLM("deepseek-ai/DeepSeek-R1", kt_gguf="/models/DeepSeek-R1-Q4_K_M")`; everything else as in vllm.LLM.

    kt_gguf, kt_cpu_infer, kt_isa, kt_numa, kt_rules, kt_num_experts_per_tok: as the flags --kt-gguf and so on.
    Raises kt_vllm.errors.KTError for what cannot work, before the engine starts.
    """

    def __init__(
        self,
        model: str,
        *args: Any,
        kt_gguf: str | None = None,
        kt_cpu_infer: int | None = None,
        kt_isa: str | None = None,
        kt_numa: str | None = None,
        kt_rules: str | None = None,
        kt_num_experts_per_tok: int | None = None,
        additional_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {
            "gguf": kt_gguf,
            "cpu_infer": kt_cpu_infer,
            "isa": kt_isa,
            "numa": kt_numa,
            "rules": kt_rules,
            "num_experts_per_tok": kt_num_experts_per_tok,
        }
        flags = {key: value for key, value in given.items() if value is not None}
        if flags:
            additional_config = merge_flags(additional_config, flags)
        super().__init__(model, *args, additional_config=additional_config or {}, **kwargs)
