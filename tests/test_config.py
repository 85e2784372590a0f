"""The configuration: defaults, strictness, overrides, identity."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from qkov_dist.config import (
    KEYS,
    SECTIONS,
    FisherConfig,
    MetricConfig,
    ModelConfig,
    ParallelConfig,
    RidgeConfig,
    RunConfig,
    TaskConfig,
    canonical_json,
    describe,
    identity,
    to_dict,
)
from qkov_dist.config_file import from_dict, load_config
from qkov_dist.errors import QkovError

MINIMAL = """\
model: {path: some/model}
tasks:
  - {name: math, path: math.jsonl}
  - {name: code, path: code.jsonl}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> QkovError:
    with pytest.raises(QkovError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_defaults_are_those_of_the_specification(minimal: Path) -> None:
    plain = to_dict(load_config(minimal))
    limits = {"columns": None, "max_samples": None, "sample": "first", "sample_seed": 0, "max_tokens": None}
    assert plain == {
        "model": {
            "path": "some/model",
            "revision": None,
            "dtype": "auto",
            "attn_implementation": None,
            "trust_remote_code": False,
        },
        "parallel": {"tp": 1, "shard": "auto", "replicate": 1, "ep": 1, "cp": 1},
        "tasks": [
            {"name": "math", "path": "math.jsonl", **limits},
            {"name": "code", "path": "code.jsonl", **limits},
        ],
        "metric": {
            "score": "interference",
            "sample_scale": "none",
            "loss_reduction": "mean",
            "include_bias": False,
            "layers": None,
            "heads": None,
        },
        "fisher": {"estimator": "mean", "decay": 0.99, "scope": "pooled", "batch_size": 8},
        "ridge": {"epsilon": 0.0, "absolute": 0.0, "relative": 0.001},
        "statistics": {
            "enabled": True,
            "permutations": 1000,
            "confidence": 0.95,
            "fdr_alpha": 0.05,
            "family": "pair",
            "seed": 0,
            "allow_shared_samples": False,
        },
        "compute": {
            "batch_tokens": None,
            "factor_gpu_mb": None,
            "factor_memory_mb": 1024,
            "factor_disk_mb": None,
            "factor_dtype": "auto",
            "score_dtype": "float32",
            "matmul_precision": "highest",
            "compile": "auto",
        },
        "output": {"dir": "runs/qkov", "pairs": "cross", "partials": True, "resume": True, "report_to": None},
    }


def test_configuration_is_frozen(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.fisher.decay = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("name", ["laptop", "demo"])
def test_shipped_configurations_load(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert {task.path for task in config.tasks} == {"builtin:arithmetic", "builtin:python"}


@pytest.mark.parametrize("number", ["1e-8", "1E-8", "1.0e-8", "+1e-8", ".1e-7", "1.e-8", "0.00000001"])
def test_floats_that_yaml_1_1_reads_as_text(tmp_path: Path, number: str) -> None:
    path = written(tmp_path, f"{MINIMAL}ridge: {{absolute: {number}, relative: 0}}\n")
    assert load_config(path).ridge == RidgeConfig(epsilon=0.0, absolute=1e-8, relative=0.0)
    assert load_config(path, [f"ridge.relative={number}"]).ridge.relative == 1e-8


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("null", None),
        ("[3, 1, 3]", (1, 3)),
        ('"0-3,7"', (0, 1, 2, 3, 7)),
        ("0-3,7", (0, 1, 2, 3, 7)),
        ("5", (5,)),
        ("' 2 - 4 , 2 '", (2, 3, 4)),
    ],
)
def test_layer_and_head_selections(minimal: Path, text: str, numbers: tuple[int, ...] | None) -> None:
    config = load_config(minimal, [f"metric.layers={text}", f"metric.heads={text}"])
    assert config.metric.layers == numbers
    assert config.metric.heads == numbers


@pytest.mark.parametrize("text", ["5-2", "[]", "1-", "-1", "[1, true]", "[1.0]", "a", "''", "0-999999999", "[100000]"])
def test_bad_selections(minimal: Path, text: str) -> None:
    error = refused(minimal, f"metric.layers={text}")
    assert error.where == f"{minimal}: metric.layers (command line)"
    assert "0-3,7" in error.expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.path", "3", "text"),
        ("model.path", "''", "text"),
        ("model.path", '"a\\0b"', "text"),
        ("model.path", '"\\ud800"', "text"),
        ("model.revision", "1234567", "text, or null"),
        ("model.dtype", "float8", "one of auto, float32, float64, bfloat16, float16"),
        ("model.dtype", "null", "one of auto, float32, float64, bfloat16, float16"),
        ("model.trust_remote_code", "1", "true or false"),
        ("model.trust_remote_code", "maybe", "true or false"),
        ("parallel.tp", "0", "a whole number of at least 1"),
        ("parallel.tp", "true", "a whole number of at least 1"),
        ("parallel.tp", "2.0", "a whole number of at least 1"),
        ("parallel.shard", "zero4", "one of auto, none, ddp, fsdp, zero1, zero2, zero3, device_map"),
        ("tasks.0.name", "[math]", "text"),
        ("tasks.0.name", "no", "text"),
        ("tasks.1.max_samples", "0", "a whole number of at least 1, or null"),
        ("tasks.1.max_tokens", "-5", "a whole number of at least 1, or null"),
        ("metric.score", "Interference", "one of interference, signed, symmetric, curvature"),
        ("metric.loss_reduction", "none", "one of mean, sum"),
        ("metric.include_bias", "0", "true or false"),
        ("fisher.estimator", "moving", "one of ema, mean"),
        ("fisher.decay", "0", "a number above 0 and below 1"),
        ("fisher.decay", "1", "a number above 0 and below 1"),
        ("fisher.decay", ".nan", "a number above 0 and below 1"),
        ("fisher.decay", "true", "a number above 0 and below 1"),
        ("fisher.decay", "'0.9'", "a number above 0 and below 1"),
        ("fisher.scope", "c", "one of pooled, a, b"),
        ("fisher.batch_size", "0", "a whole number of at least 1"),
        ("fisher.batch_size", "10000000000000000000000", "a whole number of at least 1"),
        ("ridge.epsilon", "-1e-10", "a finite number of at least 0"),
        ("ridge.absolute", ".inf", "a finite number of at least 0"),
        ("ridge.relative", "-0.1", "a finite number of at least 0"),
        ("statistics.enabled", "null", "true or false"),
        ("statistics.permutations", "1", "a whole number of at least 2"),
        ("statistics.confidence", "1", "a number above 0 and below 1"),
        ("statistics.allow_shared_samples", "some", "true or false"),
        ("statistics.fdr_alpha", "1", "a number above 0 and below 1"),
        ("statistics.seed", "-1", "a whole number of at least 0"),
        ("compute.batch_tokens", "0", "a whole number of at least 1, or null"),
        ("compute.factor_memory_mb", "0", "a whole number of at least 1"),
        ("compute.score_dtype", "float16", "one of float32, float64"),
        ("compute.compile", "1", "one of auto, true, false"),
        ("output.dir", "{a: b}", "text"),
        ("output.pairs", "null", "one of none, cross, all"),
        ("output.partials", "2026-01-01", "true or false"),
        ("output.resume", "[]", "true or false"),
        ("output.report_to", "tensorbord", "a list of some of tensorboard, wandb, mlflow, or null"),
        ("output.report_to", "[wandb, 1]", "a list of some of tensorboard, wandb, mlflow, or null"),
    ],
)
def test_wrong_types_and_ranges(minimal: Path, tmp_path: Path, key: str, value: str, expected: str) -> None:
    error = refused(minimal, f"{key}={value}")
    assert error.where == f"{minimal}: {key} (command line)"
    assert error.expected == expected
    raw = yaml.safe_load(MINIMAL)
    section, *rest = key.split(".")
    target = raw["tasks"][int(rest[0])] if section == "tasks" else raw.setdefault(section, {})
    target[rest[-1]] = "VALUE"
    error = refused(written(tmp_path, yaml.safe_dump(raw).replace("VALUE", value)))
    assert error.where == f"{minimal}: {key}"
    assert error.expected == expected


def test_python_construction_is_checked_too() -> None:
    with pytest.raises(QkovError, match=r"fisher\.decay: expected a number above 0 and below 1, got 2"):
        FisherConfig(decay=2)
    with pytest.raises(QkovError, match=r"parallel\.shard"):
        ParallelConfig(shard="zero9")
    assert MetricConfig(layers="0-2").layers == (0, 1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "where", "nearest"),
    [
        ("fisher: {decya: 0.9}", "fisher.decya", "fisher.decay"),
        ("fishr: {decay: 0.9}", "fishr", "fisher"),
        ("metric: {layer: 3}", "metric.layer", "metric.layers"),
        ("fisher: {seed: 1}", "fisher.seed", "statistics.seed"),
        ("decay: 0.9", "decay", "fisher.decay"),
        ("compute: {compile_: true}", "compute.compile_", "compute.compile"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, text: str, where: str, nearest: str) -> None:
    path = written(tmp_path, f"{MINIMAL}{text}\n")
    error = refused(path)
    assert error.where == f"{path}: {where}"
    assert error.remedy == f"The nearest valid key is {nearest!r}."


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("ridge: {1: 2}", "Valid keys are ridge.epsilon, ridge.absolute, ridge.relative."),
        (
            "parallel: {learning_rate: 2}",
            "Valid keys are parallel.tp, parallel.shard, parallel.replicate, ",
        ),
        ("optimizer: {lr: 2}", "Valid sections are model, parallel, tasks, metric, fisher, "),
    ],
)
def test_unknown_keys_near_none_are_told_all_that_there_are(tmp_path: Path, text: str, remedy: str) -> None:
    assert refused(written(tmp_path, f"{MINIMAL}{text}\n")).remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("fisher.decya=1", "fisher.decay"),
        ("fishr.decay=1", "fisher.decay"),
        ("tasks.2.paht=x", "tasks.2.path"),
        ("tasks.a.paht=x", "tasks.0.path"),
        ("seed=1", "statistics.seed"),
    ],
)
def test_unknown_overrides_name_the_nearest(minimal: Path, override: str, nearest: str) -> None:
    assert refused(minimal, override).remedy == f"The nearest valid key is {nearest!r}."


def test_unknown_key_inside_a_task(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("path: code", "max_token: 3, path: code"))
    error = refused(path)
    assert error.where == f"{path}: tasks.1.max_token"
    assert "'tasks.1.max_tokens'" in error.remedy


THREE = "{name: a, path: b}, {name: b, path: b}, {name: c, path: b}"


@pytest.mark.parametrize(
    ("text", "where", "got"),
    [
        ("", "configuration", "nothing"),
        ("[1, 2]", "configuration", "[1, 2]"),
        ("model: some/model", "model", "'some/model'"),
        ("model: {path: m}\ntasks: {a: 1}", "tasks", "{'a': 1}"),
        ("model: {path: m}\ntasks: null", "tasks", "null"),
        ("model: {path: m}\ntasks: [{name: a, path: b}]", "tasks", "1 tasks"),
        (f"model: {{path: m}}\ntasks: [{', '.join(['{}'] * 65)}]", "tasks", "65 tasks"),
        ("model: {path: m}\ntasks: [{name: a, path: b}, {name: b, path: b}, {name: c}]", "tasks.2.path", "nothing"),
        (f"model: {{path: m}}\ntasks: [{THREE}, {{name: a/b, path: c}}]", "tasks.3.name", "'a/b'"),
        (f"model: {{path: m}}\ntasks: [{THREE}]\nfisher: {{scope: a}}", "fisher.scope", "a"),
        ("model: {path: m}\ntasks: [a, b]", "tasks.0", "'a'"),
        ("model: {path: m}", "tasks.0.name", "nothing"),
        ("tasks: [{name: a, path: b}, {name: b, path: b}]", "model.path", "nothing"),
        ("model:\ntasks: [{name: a, path: b}, {name: b, path: b}]", "model.path", "nothing"),
        ("model: {path: m}\ntasks: [{name: a, path: b}, {name: b}]", "tasks.1.path", "nothing"),
        ("model: {path: m}\ntasks: [{name: a, path: b}, {name: a, path: c}]", "tasks.1.name", "'a' twice"),
        (f"{MINIMAL}ridge: {{relative: 0}}", "ridge.relative", "0 for all three"),
    ],
)
def test_wrong_shapes(tmp_path: Path, text: str, where: str, got: str) -> None:
    path = written(tmp_path, text)
    error = refused(path)
    assert (error.where, error.got) == (f"{path}: {where}", got)


@pytest.mark.parametrize(
    ("text", "line", "got"),
    [
        ("model: {path: a\ntasks: [", 2, "flow mapping"),
        (f"{MINIMAL}fisher:\n  decay: 0.5\n  scope: a\n  decay: 0.6\n", 8, "the key 'decay' twice"),
        (f"{MINIMAL}model: {{path: b}}\n", 5, "the key 'model' twice"),
        ("model:\n\tpath: a\n", 2, "cannot start any token"),
        ("model: {path: !!python/object/apply:os.getcwd []}", 1, "could not determine a constructor"),
        ("model: a\n---\nmodel: b\n", 2, "single document"),
        ("model: {revision: 2024-13-45}", 1, "month"),
        ("model: \x01", 1, "special characters"),
        ("[" * 3000, 1, "recursion"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, text: str, line: int, got: str) -> None:
    path = written(tmp_path, text)
    error = refused(path)
    assert error.where == f"{path}:{line}"
    assert error.expected == "valid YAML"
    assert got in error.got


def test_unreadable_files(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml").got == "No such file or directory"
    assert refused(tmp_path).got == "Is a directory"
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# fine\nmodel: {path: caf\xe9}\n")
    error = refused(path)
    assert (error.where, error.got) == (f"{path}:2", "byte 0xe9")


def test_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).model.path == "some/model"


@pytest.mark.parametrize("override", ["fisher.decay", "=3", "model=3", "tasks=[]", "tasks.0=x", "  =1"])
def test_malformed_overrides(minimal: Path, override: str) -> None:
    error = refused(minimal, override)
    assert error.where == f"{minimal}: command line"
    assert error.got == repr(override)


def test_broken_yaml_in_an_override(minimal: Path) -> None:
    assert refused(minimal, "fisher.decay=[1").where == f"{minimal}: fisher.decay (command line)"


def test_overrides_apply_in_order_and_reach_the_tasks(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "fisher.decay=0.5",
            "fisher.decay = 0.25",
            "tasks.a.path=x=y.jsonl",
            "tasks.1.max_samples=7",
            "tasks.b.path=hf:org/set:main:train[:10]#text",
            "model.revision=",
            "compute.compile=true",
            "parallel.shard=none",
        ],
    )
    assert config.fisher.decay == 0.25
    assert config.tasks[0] == TaskConfig("math", "x=y.jsonl")
    assert config.tasks[1] == TaskConfig("code", "hf:org/set:main:train[:10]#text", max_samples=7)
    assert config.model == ModelConfig("some/model")
    assert config.compute.compile is True
    assert config.parallel.shard == "none"


def test_overrides_can_supply_what_the_file_lacks(tmp_path: Path) -> None:
    path = written(tmp_path, "model:\n")
    tasks = ["tasks.a.name=x", "tasks.a.path=x.jsonl", "tasks.b.name=y", "tasks.b.path=y.jsonl"]
    assert load_config(path, ["model.path=m", *tasks]).tasks[1].name == "y"


def test_identity_leaves_out_where_and_how(minimal: Path) -> None:
    base = load_config(minimal)
    neutral = [
        "output.dir=elsewhere",
        "output.resume=false",
        "output.partials=false",
        "output.report_to=[wandb, mlflow]",
        "compute.batch_tokens=7",
        "compute.factor_gpu_mb=7",
        "compute.factor_memory_mb=7",
        "compute.factor_disk_mb=7",
        "compute.compile=false",
        "parallel.tp=4",
        "parallel.shard=fsdp",
        "parallel.replicate=2",
        "parallel.ep=2",
        "parallel.cp=2",
        "statistics.allow_shared_samples=true",
    ]
    assert canonical_json(load_config(minimal, neutral)) == canonical_json(base)
    assert {override.split("=")[0] for override in neutral} == {
        key for key, entry in KEYS.items() if not entry.metadata["identity"]
    }
    assert set(identity(base)) == set(to_dict(base)) - {"parallel"}


@pytest.mark.parametrize(
    "override",
    [
        *("model.path=n", "tasks.a.name=z", "metric.heads=0", "fisher.decay=0.5", "ridge.relative=1"),
        *("output.pairs=all", "statistics.seed=1", "compute.score_dtype=float64", "tasks.b.max_tokens=5"),
    ],
)
def test_identity_sees_everything_else(minimal: Path, override: str) -> None:
    assert canonical_json(load_config(minimal, [override])) != canonical_json(load_config(minimal))


def test_equal_spellings_have_one_identity(minimal: Path) -> None:
    first = load_config(minimal, ["metric.layers=0-2", "ridge.relative=1"])
    second = load_config(minimal, ["metric.layers=[2, 1, 0]", "ridge.relative=1.0"])
    assert canonical_json(first) == canonical_json(second)


@pytest.mark.parametrize("value", [0, 1000])
def test_a_key_that_was_given_up_is_refused_by_what_took_its_place(tmp_path: Path, value: int) -> None:
    path = written(tmp_path, f"{MINIMAL}statistics: {{bootstrap: {value}}}\n")
    with pytest.raises(QkovError, match=r"statistics\.bootstrap: .*jackknife.*statistics\.confidence"):
        load_config(path)


def test_a_configuration_stored_with_results_may_hold_keys_that_were_given_up(minimal: Path) -> None:
    config = load_config(minimal)
    stored = to_dict(config)
    stored["statistics"]["bootstrap"] = 1000
    assert from_dict(stored, stored=True) == config
    with pytest.raises(QkovError, match="jackknife"):
        from_dict(stored)


def test_describe_lists_every_key_with_its_default() -> None:
    lines = [line.strip() for line in describe().splitlines()]
    for cls in SECTIONS.values():
        assert any(line.endswith(str(cls.__doc__)) for line in lines)
        for entry in dataclasses.fields(cls):
            (line,) = {line for line in lines if line.endswith(entry.metadata["meaning"])}
            assert line.split()[0] == entry.name
            assert (line.split()[1] == "required") == (entry.default is dataclasses.MISSING)
    assert any(line.split()[:2] == ["relative", "0.001"] for line in lines)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
COUNTS = st.integers(1, 2**40)
SELECTIONS = st.none() | st.lists(st.integers(0, 500), min_size=1, max_size=8)
NUMBERS = st.floats(0, 1e30)


def plain_configurations() -> st.SearchStrategy[dict[str, Any]]:
    def task(name: str) -> st.SearchStrategy[dict[str, Any]]:
        limits = {"max_samples": st.none() | COUNTS, "max_tokens": st.none() | COUNTS}
        return st.fixed_dictionaries({"name": st.just(name), "path": WORDS}, optional=limits)

    fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
    optional = {
        "parallel": st.fixed_dictionaries({}, optional={"tp": COUNTS, "shard": st.sampled_from(["none", "zero3"])}),
        "metric": st.fixed_dictionaries({}, optional={"layers": SELECTIONS, "heads": SELECTIONS}),
        "fisher": st.fixed_dictionaries({}, optional={"decay": fractions, "batch_size": COUNTS}),
        "ridge": st.fixed_dictionaries({"absolute": st.floats(1e-12, 1.0)}, optional={"relative": NUMBERS}),
        "statistics": st.fixed_dictionaries({}, optional={"enabled": st.booleans(), "fdr_alpha": fractions}),
        "compute": st.fixed_dictionaries({}, optional={"compile": st.sampled_from(["auto", True, False])}),
        "output": st.none() | st.fixed_dictionaries({}, optional={"dir": WORDS}),
    }
    required = {"model": st.fixed_dictionaries({"path": WORDS}), "tasks": st.tuples(task("a"), task("b"))}
    return st.fixed_dictionaries(required, optional=optional)


@given(plain_configurations())
def test_round_trip_through_plain_values_json_and_yaml(tmp_path_factory: Any, raw: dict[str, Any]) -> None:
    config = from_dict(raw)
    plain = to_dict(config)
    assert isinstance(config, RunConfig)
    assert from_dict(plain) == config
    assert from_dict(json.loads(json.dumps(plain))) == config
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    text = yaml.safe_dump(plain, allow_unicode=False, default_style='"')  # quoted: 0E0 alone is a number in YAML 1.2
    path.write_text(re.sub(r'!!\w+ "(.*?)"', r"\1", text), encoding="utf-8")
    assert load_config(path) == config
    assert canonical_json(load_config(path)) == canonical_json(config)
