"""What installing the plugin does to vLLM: nothing until --kt-gguf is given. Each check has its own process."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MODEL = "examples/models/tiny-deepseek-v3"


def run(code: str, **env: str) -> str:
    import os

    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, **env},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_import_needs_neither_vllm_nor_torch() -> None:
    run(
        """
        import sys
        import kt_vllm, kt_vllm._native, kt_vllm.config, kt_vllm.args, kt_vllm.families, kt_vllm.checkpoint
        import kt_vllm.gguf.reader, kt_vllm.plugin, kt_vllm.compat, kt_vllm.cpus, kt_vllm.memory
        heavy = {"torch", "vllm", "transformers"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


@pytest.mark.e2e
def test_registration_is_idempotent_and_starts_nothing() -> None:
    run(
        """
        import threading
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.custom_op import op_registry_oot
        before = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__, EngineArgs.create_model_config
        threads = threading.active_count()
        from kt_vllm.plugin import register
        register()
        register()
        assert op_registry_oot["RoutedExperts"].__name__ == "KTRoutedExperts"
        assert before == (EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__, EngineArgs.create_model_config)
        assert threading.active_count() == threads
        """
    )


@pytest.mark.e2e
def test_flags_have_their_own_group_in_help() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "kt_vllm.cli", "serve", "--help=KTConfig"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    for flag in ("--kt-gguf", "--kt-cpu-infer", "--kt-isa"):
        assert flag in out


_CONFIG = f"""
    import json
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = FlexibleArgumentParser()
    parser = EngineArgs.add_cli_args(parser)
    args = parser.parse_args(["--model", "{MODEL}", "--max-model-len", "512"])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    for key in ("kt_gguf", "kt_cpu_infer", "kt_isa"):
        assert not hasattr(args, key)
    print("CONFIG", config.load_config.load_format, config.model_config.config_format, config.additional_config,
          sorted(config.compilation_config.custom_ops))
"""


@pytest.mark.e2e
def test_inactive_without_flags() -> None:
    """The same engine configuration as with the plugin disabled by VLLM_PLUGINS."""

    def config_line(**env: str) -> str:
        return next(line for line in run(_CONFIG, **env).splitlines() if line.startswith("CONFIG"))

    assert config_line() == config_line(VLLM_PLUGINS="none")


@pytest.mark.e2e
def test_layers_are_stock_without_flags_and_ours_with_them() -> None:
    """RoutedExperts of every mixture-of-experts family, built by vLLM's own model code (see build_models.py)."""
    out = run("import runpy; runpy.run_module('tests.unit.build_models', run_name='__main__')")
    assert out.count("OK ") == 10, out


@pytest.mark.e2e
def test_routers_are_computed_in_float32_unless_config_json_says_otherwise(tmp_path: Path) -> None:
    run(
        f"""
        import json, pathlib
        from kt_vllm.hf_config import KTConfigParser

        fields, config = KTConfigParser().parse("{MODEL}", trust_remote_code=False)
        assert fields["moe_router_dtype"] == config.moe_router_dtype == "float32"
        stated = json.loads(pathlib.Path("{MODEL}", "config.json").read_text()) | {{"moe_router_dtype": None}}
        pathlib.Path("{tmp_path}", "config.json").write_text(json.dumps(stated))
        fields, config = KTConfigParser().parse("{tmp_path}", trust_remote_code=False)
        assert fields["moe_router_dtype"] is config.moe_router_dtype is None
        """
    )


@pytest.mark.e2e
def test_an_environment_it_cannot_work_in_turns_it_off() -> None:
    """With a sentence, and without harm to vLLM."""
    run(
        """
        import vllm
        from kt_vllm import compat
        cases = {"0.31.9": False, "0.32.0": True, "0.33.1": True, "0.34.0": False, "dev": True}
        for version, accepted in cases.items():
            vllm.__version__ = version
            reason = compat.why_unusable()
            assert accepted == (reason is None) and (accepted or version in reason), (version, reason)
        """
    )
    out = run(
        """
        import sys
        sys.modules["kt_vllm._native"] = None
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.custom_op import op_registry_oot
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        assert "RoutedExperts" not in op_registry_oot
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        assert "--kt-gguf" not in parser.format_help()
        """
    )
    assert "kt_vllm is installed but off" in out and "C++ extension does not load" in out
