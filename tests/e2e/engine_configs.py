"""Command lines of `vllm serve` up to the engine configuration, many in one process; a program for test_refusals.py.

Reads a JSON list of {"name", "arguments", "isa_error"} from stdin and prints a JSON line for each: how it ended. All
that `vllm serve` does besides is to hold its port, and that has tests of its own: a process costs eight seconds.
"""

import argparse
import json
import logging
import sys
from typing import Any


class _Warnings(logging.Handler):
    """Keeps kt_vllm's own warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "kt_vllm" in record.name:
            self.messages.append(record.getMessage())


def _end(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """exit: what SystemExit carried, a sentence or a number; error: another exception; config: additional_config."""
    from vllm import AsyncEngineArgs

    try:
        args = parser.parse_args(["serve", *arguments])
        args.model = args.model_tag
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except SystemExit as end:
        return {"exit": end.code}
    except Exception as error:
        return {"error": repr(error)}
    return {"config": config.additional_config}


def main() -> None:
    from kt_vllm.compat import name_vllm_distribution

    name_vllm_distribution()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kt_vllm import _native

    load_general_plugins()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    choose_isa = _native.choose_isa
    for case in json.load(sys.stdin):
        warnings = _Warnings()
        logging.getLogger("vllm").addHandler(warnings)

        def refuse(isa: str, message: str | None = case.get("isa_error")) -> tuple[str, str]:
            if message is None:
                return choose_isa(isa)
            raise _native.NativeError(message)

        _native.choose_isa = refuse
        ended = _end(parser, case["arguments"])
        logging.getLogger("vllm").removeHandler(warnings)
        print("ENDED " + json.dumps({"name": case["name"], "warnings": warnings.messages, **ended}), flush=True)


if __name__ == "__main__":
    main()
