"""`kt-vllm serve|bench|...`: the `vllm` command, also where the CPU wheel's own one does not start.

`kt-vllm bench layer` and `kt-vllm explain` are ours alone, and need no vLLM.
"""

import importlib
import signal
import sys

# The words of a command -> the module whose main(arguments) is the command.
OURS = {
    ("bench", "layer"): "kt_vllm.bench.cli",
    ("explain",): "kt_vllm.explain",
}


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
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
