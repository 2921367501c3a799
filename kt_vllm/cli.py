"""`kt-vllm serve|bench|...`: the `vllm` command, also where the CPU wheel's own one does not start.

`kt-vllm bench layer` and `kt-vllm explain` are ours alone and need no vLLM; `kt-vllm bench e2e` is ours and runs it.
"""

import importlib
import os
import signal
import sys

# The words of a command -> the module whose main(arguments) is the command.
OURS = {
    ("bench", "layer"): "kt_vllm.bench.cli",
    ("explain",): "kt_vllm.explain",
}
OURS_WITH_VLLM = {("bench", "e2e"): "kt_vllm.bench.e2e"}


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        from kt_vllm import __version__

        print(__version__)
        return
    for words, module in OURS.items():
        if tuple(sys.argv[1 : 1 + len(words)]) == words:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files in memory go away
            importlib.import_module(module).main(sys.argv[1 + len(words) :])
            return
    from kt_vllm.compat import name_vllm_distribution

    name_vllm_distribution()
    for words, module in OURS_WITH_VLLM.items():
        if tuple(sys.argv[1 : 1 + len(words)]) == words:
            # The engine in this process, where its executor's clock can be read.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            importlib.import_module(module).main(sys.argv[1 + len(words) :])
            return
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
