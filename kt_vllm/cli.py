"""`kt-vllm serve|bench|...`: the `vllm` command, also where the CPU wheel's own one does not start."""

import sys


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        from kt_vllm import __version__

        print(__version__)
        return
    from kt_vllm.compat import name_vllm_distribution

    name_vllm_distribution()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
