"""The --kt-* flags: added to vLLM's parser as their own group, then folded into additional_config["kt"].

additional_config is what vLLM itself carries to every worker. Folding happens when the engine arguments are made,
not while parsing, so a JSON --additional-config before or after our flags loses nothing.
"""

import argparse
from typing import Any, NoReturn

from kt_vllm.config import CONFIG_KEY, flag_fields
from kt_vllm.errors import ConfigError

_PREFIX = "kt_"
_UNSET = None


class Parser(argparse.ArgumentParser):
    """Of our own commands: what argparse would end the process for is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group "KTConfig" (vLLM's --help=KTConfig shows it alone)."""
    group = parser.add_argument_group(
        title="KTConfig", description="Routed experts on the CPU from a GGUF file (kt_vllm)."
    )
    for field in flag_fields():
        group.add_argument(
            f"--kt-{field.name.replace('_', '-')}",
            dest=_PREFIX + field.name,
            default=_UNSET,
            help=field.metadata["help"],
            **field.metadata["argparse"],
        )


def fold_flags(args: argparse.Namespace) -> None:
    """Moves kt_* attributes of a parsed namespace into its additional_config["kt"]; a second call finds nothing to do.

    Raises ConfigError when a flag and additional_config disagree.
    """
    flags: dict[str, Any] = {}
    for field in flag_fields():
        if hasattr(args, _PREFIX + field.name):
            value = getattr(args, _PREFIX + field.name)
            delattr(args, _PREFIX + field.name)
            if value is not _UNSET:
                flags[field.name] = value
    if flags:
        args.additional_config = merge_flags(getattr(args, "additional_config", None), flags)


def merge_flags(additional_config: dict[str, Any] | None, flags: dict[str, Any]) -> dict[str, Any]:
    """additional_config with `flags` under "kt". Raises ConfigError when both name a key with different values."""
    merged = dict(additional_config or {})
    given = merged.get(CONFIG_KEY, {})
    if not isinstance(given, dict):
        raise ConfigError(f'additional_config["kt"] is {given!r}; give a mapping, or only the --kt-* flags.')
    for key, value in flags.items():
        if key in given and given[key] != value:
            raise ConfigError(
                f"--kt-{key.replace('_', '-')} is {value!r} but additional_config says {given[key]!r}; give it once."
            )
    merged[CONFIG_KEY] = {**given, **flags}
    return merged
