"""`kt-vllm serve|bench|...`: the `vllm` command, also where the CPU wheel's own one does not start.

`kt-vllm bench layer` is ours alone, and needs no vLLM.
"""

import signal
import sys


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        from kt_vllm import __version__

        print(__version__)
        return
    if sys.argv[1:3] == ["bench", "layer"]:
        from kt_vllm.bench.cli import main as bench_layer

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its files in memory go away
        bench_layer(sys.argv[3:])
        return
    from kt_vllm.compat import name_vllm_distribution

    name_vllm_distribution()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
