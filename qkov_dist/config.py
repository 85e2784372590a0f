"""The run's configuration: frozen dataclasses, read from strict YAML.

One field is one key, ``section.key``. Its default, what it accepts, its one-line meaning and whether it is part of a
run's identity are declared with the field and nowhere else; reading, `describe` and `identity` follow from there.

Relative paths are taken from the current directory, as a shell takes them, not from the folder of the YAML file.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import QkovError


@dataclass(frozen=True)
class Kind:
    """What a key accepts, in words, and the reader that returns the value or raises ValueError."""

    expected: str
    read: Callable[[object], Any]


def _require(ok: bool) -> None:
    if not ok:
        raise ValueError


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    _require(bool(value.strip()) and "\0" not in value)
    value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _whole(minimum: int) -> Kind:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        _require(minimum <= value < 2**63)
        return value

    return Kind(f"a whole number of at least {minimum}", read)


def _real(expected: str, accepts: Callable[[float], bool]) -> Kind:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError
        _require(math.isfinite(value) and accepts(value))
        return float(value)

    return Kind(expected, read)


def _one_of(*options: str | bool) -> Kind:
    def read(value: object) -> str | bool:
        for option in options:
            if type(option) is type(value) and option == value:  # 1 == True
                return option
        raise ValueError

    return Kind("one of " + ", ".join(str(option).lower() for option in options), read)


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda value: None if value is None else kind.read(value))


def _selection(value: object) -> tuple[int, ...]:
    """Sorted unique numbers from a list of numbers, one number, or text such as ``0-3,7``."""
    if isinstance(value, str):
        parts = [re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part) for part in value.split(",")]
        spans = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
        _require(len(spans) == len(parts) and all(low <= high for low, high in spans))
        return tuple(sorted({number for low, high in spans for number in range(low, high + 1)}))
    items = value if isinstance(value, list | tuple) else [value]
    numbers = {item for item in items if type(item) is int and 0 <= item < 100_000}
    _require(bool(numbers) and all(type(item) is int and item in numbers for item in items))
    return tuple(sorted(numbers))


TEXT = Kind("text", _text)
FLAG = Kind("true or false", _flag)
COUNT = _whole(1)
NON_NEGATIVE = _real("a finite number of at least 0", lambda x: x >= 0)
FRACTION = _real("a number above 0 and below 1", lambda x: 0 < x < 1)
SELECTION = _optional(Kind("a list of numbers from 0, or text such as '0-3,7'", _selection))


def _key(kind: Kind, meaning: str, default: Any = MISSING, *, identity: bool = True) -> Any:
    metadata = {"kind": kind, "meaning": meaning, "identity": identity}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class _Section:
    """Checks and normalizes every field on construction, from YAML and from Python alike."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for entry in fields(self):
            object.__setattr__(self, entry.name, _read(entry, getattr(self, entry.name), f"{section}.{entry.name}"))


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Which model, and how it is loaded."""

    path: str = _key(TEXT, "Hugging Face hub id, model directory, or .gguf file")
    revision: str | None = _key(_optional(TEXT), "branch, tag or commit of a hub id", None)
    dtype: str = _key(
        _one_of("auto", "float32", "float64", "bfloat16", "float16"),
        "dtype of the weights in memory; auto keeps the checkpoint's",
        "auto",
    )
    attn_implementation: str | None = _key(
        _optional(TEXT), "attention kernel: eager, sdpa, flash_attention_2, ...; null lets transformers choose", None
    )
    trust_remote_code: bool = _key(FLAG, "run Python code that comes with the model", False)


@dataclass(frozen=True)
class ParallelConfig(_Section):
    """How the model is spread over ranks. Never changes a score."""

    tp: int = _key(COUNT, "number of tensor-parallel ranks", 1, identity=False)
    shard: str = _key(
        _one_of("auto", "none", "ddp", "fsdp", "zero1", "zero2", "zero3", "device_map"),
        "how weights are spread over the other ranks; auto follows the launcher",
        "auto",
        identity=False,
    )


@dataclass(frozen=True)
class TaskConfig(_Section):
    """One task: a named file of samples."""

    name: str = _key(TEXT, "name of the task, in reports and default sample ids")
    path: str = _key(
        TEXT, "JSONL file (also .gz), hf:HUB_ID[:CONFIG][:SPLIT]#COLUMN, builtin:arithmetic or builtin:python"
    )
    max_samples: int | None = _key(_optional(COUNT), "take the first so many samples; null takes all", None)
    max_tokens: int | None = _key(_optional(COUNT), "cut samples after so many tokens; null refuses to cut", None)


@dataclass(frozen=True)
class MetricConfig(_Section):
    """What is scored."""

    score: str = _key(_one_of("interference", "signed", "symmetric"), "member of the score family", "interference")
    loss_reduction: str = _key(_one_of("mean", "sum"), "loss of a sample, over its labelled tokens", "mean")
    include_bias: bool = _key(FLAG, "add the biases of Q, K and V to their heads", False)
    layers: tuple[int, ...] | None = _key(SELECTION, "layers to score, counted from 0; null scores all", None)
    heads: tuple[int, ...] | None = _key(SELECTION, "query heads to score, counted from 0; null scores all", None)


@dataclass(frozen=True)
class FisherConfig(_Section):
    """The diagonal empirical Fisher I."""

    estimator: str = _key(_one_of("ema", "mean"), "bias-corrected moving average over batches, or plain mean", "ema")
    decay: float = _key(FRACTION, "decay beta of the moving average, per Fisher batch", 0.99)
    scope: str = _key(_one_of("pooled", "a", "b"), "samples it is estimated from: both tasks, or one", "pooled")
    batch_size: int = _key(COUNT, "samples in one Fisher batch (one step of the average)", 8)


@dataclass(frozen=True)
class RidgeConfig(_Section):
    """What keeps 1 / I finite: max(I, epsilon) + absolute + relative * mean(I)."""

    epsilon: float = _key(NON_NEGATIVE, "floor of I, in units of I (squared gradients)", 1e-10)
    absolute: float = _key(NON_NEGATIVE, "added to I, in units of I", 1e-8)
    relative: float = _key(NON_NEGATIVE, "added to I, as a multiple of its mean over the layer's block", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon + self.absolute + self.relative == 0:
            raise QkovError(
                "ridge.absolute",
                expected="one of epsilon, absolute and relative above 0",
                got="0 for all three",
                remedy="An element with I = 0 would divide by zero; set one of them, for example ridge.absolute=1e-8.",
            )


@dataclass(frozen=True)
class StatisticsConfig(_Section):
    """Permutation test, bootstrap and multiple testing."""

    enabled: bool = _key(FLAG, "test the heatmap; needs scores among all pooled samples", True)
    permutations: int = _key(COUNT, "relabellings K of the samples; the smallest p-value is 1 / (1 + K)", 1000)
    bootstrap: int = _key(_whole(0), "resamplings of the samples for intervals; 0 leaves intervals out", 1000)
    fdr_alpha: float = _key(FRACTION, "level of the false discovery rate", 0.05)
    seed: int = _key(_whole(0), "seed of permutations and bootstrap", 0)


@dataclass(frozen=True)
class ComputeConfig(_Section):
    """Memory and speed."""

    batch_tokens: int = _key(COUNT, "tokens in one compute batch, padding included", 2048, identity=False)
    factor_memory_mb: int = _key(
        COUNT, "MiB of captured factors in memory; beyond it they go to disk", 1024, identity=False
    )
    score_dtype: str = _key(_one_of("float32", "float64"), "dtype in which scores are accumulated", "float32")
    compile: str | bool = _key(_one_of("auto", True, False), "compile the score kernels", "auto", identity=False)


@dataclass(frozen=True)
class OutputConfig(_Section):
    """What is written, and where."""

    dir: str = _key(TEXT, "folder of the results", "runs/qkov", identity=False)
    pairs: str = _key(
        _one_of("none", "cross", "all"), "sample pairs kept in the file: none, A x B, or all pooled", "cross"
    )
    partials: bool = _key(FLAG, "keep each rank's partial file", True, identity=False)
    resume: bool = _key(FLAG, "go on from complete layers of the same run", True, identity=False)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration. The first task is A, the second B."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tasks: tuple[TaskConfig, TaskConfig]
    metric: MetricConfig = field(default_factory=MetricConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.tasks[0].name == self.tasks[1].name:
            raise QkovError(
                "tasks.1.name",
                expected="two different names",
                got=f"{self.tasks[0].name!r} twice",
                remedy="Rename one of the tasks; the same samples may be given under two names.",
            )


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "tasks.0": TaskConfig,
    "tasks.1": TaskConfig,
    "metric": MetricConfig,
    "fisher": FisherConfig,
    "ridge": RidgeConfig,
    "statistics": StatisticsConfig,
    "compute": ComputeConfig,
    "output": OutputConfig,
}
KEYS: dict[str, Field[Any]] = {f"{name}.{entry.name}": entry for name, cls in SECTIONS.items() for entry in fields(cls)}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides in order, and check every key.

    Args:
        path: The YAML file.
        overrides: Values are parsed as YAML; ``tasks.0`` or ``tasks.a`` is the first task, ``tasks.1`` or ``tasks.b``
            the second.

    Raises:
        QkovError: at ``FILE: section.key`` for a setting, at ``FILE:LINE`` for broken YAML.
    """
    raw = _parse(_read_text(Path(path)), lambda line: f"{path}:{line}")
    changed: set[str] = set()
    try:
        values = _flatten(raw)
        for override in overrides:
            key, value = _parse_override(override)
            values[key] = value
            changed.add(key)
        return _build(values)
    except QkovError as error:
        place = f"{error.where} (command line)" if error.where in changed else error.where
        raise QkovError(f"{path}: {place}", expected=error.expected, got=error.got, remedy=error.remedy) from error


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """Build the configuration from nested plain values, as `to_dict` returns them; the same checks as `load_config`."""
    return _build(_flatten(raw))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (JSON types only) from which `from_dict` builds an equal configuration."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of `to_dict` that decides what a run computes; equal identities, equal results.

    Left out: where and how it is computed (``parallel``, batch and memory sizes, ``compile``) and the ``output`` keys
    that change no content, so that a run can be resumed elsewhere.
    """
    tasks = [_identity(task) for task in config.tasks]
    sections = {name: _identity(getattr(config, name)) for name in SECTIONS if "." not in name}
    return {name: kept for name, kept in {**sections, "tasks": tasks}.items() if kept}


def canonical_json(config: RunConfig) -> str:
    """`identity` as one line of ASCII JSON with sorted keys, for hashing."""
    return json.dumps(identity(config), sort_keys=True, separators=(",", ":"), allow_nan=False)


def describe() -> str:
    """Every key with its default, its meaning and what it accepts, one block a section."""
    lines = []
    for name, cls in SECTIONS.items():
        if name == "tasks.1":
            continue
        lines.append(f"{name.replace('tasks.0', 'tasks.0, tasks.1')}: {cls.__doc__}")
        for entry in fields(cls):
            default = "required" if entry.default is MISSING else _shown(entry.default)
            lines.append(f"  {entry.name:<20} {default:<14} {entry.metadata['meaning']}")
            lines.append(f"  {'':<35} ({entry.metadata['kind'].expected})")
    return "\n".join(lines)


def _identity(section: _Section) -> dict[str, Any]:
    kept = {entry.name: getattr(section, entry.name) for entry in fields(section) if entry.metadata["identity"]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def _flatten(raw: object) -> dict[str, object]:
    """Nested sections -> ``{"section.key": value}``, refusing shapes that are not those of `RunConfig`."""
    values: dict[str, object] = {}
    for name, body in _mapping(raw, "configuration").items():
        if name == "tasks":
            if not isinstance(body, list | tuple) or len(body) != 2:
                got = f"{len(body)} tasks" if isinstance(body, list | tuple) else _shown(body)
                remedy = "Give task A first, then B, each with a name and a path."
                raise QkovError("tasks", expected="a list of exactly two tasks", got=got, remedy=remedy)
            parts = [("tasks.0", body[0]), ("tasks.1", body[1])]
        elif name not in SECTIONS:
            raise _unknown(str(name))
        else:
            parts = [(name, body)]
        for place, part in parts:
            values |= {f"{place}.{key}": value for key, value in _mapping(part, place).items()}
    return values


def _mapping(raw: object, place: str) -> Mapping[Any, Any]:
    if raw is None and place in SECTIONS:
        return {}
    if not isinstance(raw, Mapping):
        remedy = "Write it as 'key: value' lines; see configs/ for examples."
        raise QkovError(place, expected="a mapping", got="nothing" if raw is None else _shown(raw), remedy=remedy)
    return raw


def _build(values: Mapping[str, object]) -> RunConfig:
    for key in values:
        if key not in KEYS:
            raise _unknown(key)
    for key, entry in KEYS.items():
        if entry.default is MISSING and key not in values:
            remedy = f"Set {key}: {entry.metadata['meaning']}."
            raise QkovError(key, expected=entry.metadata["kind"].expected, got="nothing", remedy=remedy)
    read = {key: _read(KEYS[key], value, key) for key, value in values.items()}
    built: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        built[name] = cls(
            **{key.rpartition(".")[2]: value for key, value in read.items() if key.startswith(f"{name}.")}
        )
    return RunConfig(tasks=(built.pop("tasks.0"), built.pop("tasks.1")), **built)


def _read(entry: Field[Any], value: object, place: str) -> Any:
    kind: Kind = entry.metadata["kind"]
    try:
        return kind.read(value)
    except (ValueError, OverflowError):
        quotes = kind.expected.startswith("text") and isinstance(value, bool | int | float)
        remedy = "Put quotes around it." if quotes else f"The key means: {entry.metadata['meaning']}."
        raise QkovError(place, expected=kind.expected, got=_shown(value), remedy=remedy) from None


def _unknown(key: str) -> QkovError:
    """The error for an unknown key, naming the nearest: of a misspelt section, the same key elsewhere, or a typo."""
    section, _, last = key.rpartition(".")
    elsewhere = {known.rpartition(".")[2]: known for known in reversed(KEYS)}.get(last)
    sections = [*dict.fromkeys(name.partition(".")[0] for name in SECTIONS)]
    if section and section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0)[0]
        nearest = f"{near}.{last}" if f"{near}.{last}" in KEYS else near
    else:
        nearest = elsewhere or difflib.get_close_matches(key, KEYS if section else sections, n=1, cutoff=0)[0]
    return QkovError(key, expected="a known key", got=repr(last), remedy=f"The nearest valid key is {nearest!r}.")


def _parse_override(override: str) -> tuple[str, object]:
    """``tasks.a.path=x`` -> ``("tasks.0.path", "x")``."""
    key, equals, text = override.partition("=")
    if not equals or key.strip() in ("", "tasks", *SECTIONS):
        remedy = "Write for example fisher.decay=0.9 or tasks.0.path=math.jsonl, without spaces around '='."
        raise QkovError("command line", expected="section.key=value", got=repr(override), remedy=remedy)
    key = re.sub(r"^tasks\.([ab])\.", lambda match: f"tasks.{'ab'.index(match[1])}.", key.strip())
    return key, _parse(text, lambda _: f"{key} (command line)")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        remedy = "Give the path of a YAML configuration; configs/ holds examples."
        raise QkovError(
            str(path), expected="a readable file", got=error.strerror or str(error), remedy=remedy
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        remedy = "Save the file as UTF-8."
        raise QkovError(
            f"{path}:{line}", expected="UTF-8 text", got=f"byte {data[error.start]:#04x}", remedy=remedy
        ) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-8 as a number, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as written, before aliases are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, place: Callable[[int], str]) -> object:
    """One YAML document; ``place`` turns a line number into the error's place."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        got = " ".join(part for part in (error.context, error.problem) if part)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line, got = 1, str(error).splitlines()[0]
    raise QkovError(place(line), expected="valid YAML", got=got, remedy="Correct this line; keys are 'key: value'.")


def _shown(value: object) -> str:
    """A value as the YAML would show it, cut to one short piece."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
