"""KTConfig and the folding of flags: nothing is dropped, nothing is guessed."""

import argparse
import json

import pytest

from kt_vllm.args import add_flags, fold_flags, merge_flags
from kt_vllm.config import KTConfig, flag_fields
from kt_vllm.errors import ConfigError


def parse(*flags: str, additional_config: dict | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(flags)
    args.additional_config = additional_config
    return args


def test_flags_fold_into_additional_config() -> None:
    args = parse("--kt-gguf", "/m.gguf", "--kt-cpu-infer", "65", "--kt-isa", "avx2", "--kt-numa", "0-1")
    fold_flags(args)
    assert args.additional_config == {"kt": {"gguf": "/m.gguf", "cpu_infer": 65, "isa": "avx2", "numa": "0-1"}}
    assert not [name for name in vars(args) if name.startswith("kt_")]
    fold_flags(args)
    assert args.additional_config["kt"]["cpu_infer"] == 65


def test_flags_join_a_json_additional_config() -> None:
    args = parse("--kt-gguf", "/m.gguf", additional_config={"x": 1, "kt": {"cpu_infer": 3}})
    fold_flags(args)
    assert args.additional_config == {"x": 1, "kt": {"cpu_infer": 3, "gguf": "/m.gguf"}}


def test_no_flag_changes_nothing() -> None:
    args = parse(additional_config={"x": 1})
    fold_flags(args)
    assert args.additional_config == {"x": 1}


def test_contradiction_is_refused() -> None:
    args = parse("--kt-gguf", "/a.gguf", additional_config={"kt": {"gguf": "/b.gguf"}})
    with pytest.raises(ConfigError, match=r"--kt-gguf is '/a.gguf' but additional_config says '/b.gguf'"):
        fold_flags(args)


def test_merge_leaves_its_input_alone() -> None:
    given = {"kt": {"gguf": "/a"}}
    merge_flags(given, {"isa": "avx2"})
    assert given == {"kt": {"gguf": "/a"}}


def test_every_flag_is_a_field_with_help() -> None:
    assert [field.name for field in flag_fields()] == [
        "gguf",
        "cpu_infer",
        "isa",
        "numa",
        "gpu_quant",
        "rules",
        "num_experts_per_tok",
        "handover",
        "no_experts",
    ]
    assert all(field.metadata["help"] for field in flag_fields())


def test_round_trip_is_json() -> None:
    config = KTConfig(gguf="/m.gguf", cpu_infer=2, cpus=(1, 2), numa="0,2-3", nodes=(0, 3))
    assert KTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gguf": "/m", "cpu_infre": 1}, "unknown key 'cpu_infre'; did you mean 'cpu_infer'?"),
        ({"gguf": "/m", "zzz": 1}, "unknown key 'zzz'; known keys: gguf"),
        ({"cpu_infer": 2}, "no weights: add --kt-gguf"),
        ({"gguf": ""}, "give the path of a GGUF"),
        ({"gguf": 3}, "give the path of a GGUF"),
        ({"gguf": "/m", "cpu_infer": 0}, "--kt-cpu-infer is 0; give 1 or more threads"),
        ({"gguf": "/m", "cpu_infer": -4}, "--kt-cpu-infer is -4; give 1 or more threads"),
        ({"gguf": "/m", "cpu_infer": "x"}, "give a whole number of threads"),
        ({"gguf": "/m", "cpu_infer": True}, "give a whole number of threads"),
        ({"gguf": "/m", "isa": 2}, "give auto or the name of an instruction set"),
        ({"gguf": "/m", "numa": "all"}, "--kt-numa is 'all'; give auto, off, or a list of NUMA nodes such as 0 or"),
        ({"gguf": "/m", "numa": 0}, "--kt-numa is 0; give auto"),
        ({"gguf": "/m", "cpus": [1, 2], "nodes": [0]}, "nodes has 1 entries and cpus 2; give a node for each CPU"),
        ("/m.gguf", "give a mapping"),
    ],
)
def test_refusals(values: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        KTConfig.from_dict(values)
    assert sentence in str(refusal.value)
