"""Text from a GGUF without a server: kt_vllm.LLM is vllm.LLM with the --kt-* flags as arguments."""

from pathlib import Path

from vllm import SamplingParams

from kt_vllm import LLM

MODEL = Path(__file__).resolve().parent / "models" / "tiny-deepseek-v3"
PROMPTS = ["The function returns the number of", "To install the package, run", "An error is raised if the"]


def main() -> None:
    # The same without this package's LLM: vllm.LLM(model, additional_config={"kt": {"gguf": "..."}}).
    llm = LLM(
        str(MODEL),
        kt_gguf=str(MODEL / "tiny-deepseek-v3-Q4_K_M.gguf"),
        max_model_len=1024,
        max_num_seqs=4,
        kv_cache_memory_bytes=256 << 20,  # vLLM's default is most of the machine
    )
    for request in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(f"{request.prompt!r} -> {request.outputs[0].text!r}")


# vLLM starts worker processes that import this file again.
if __name__ == "__main__":
    main()
