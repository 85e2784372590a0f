"""The run's configuration: frozen dataclasses, checked on construction.

One field is one key, ``section.key``. Its default, what it accepts (``kinds``), its one-line meaning and whether it is
part of a run's identity are declared with the field and nowhere else; reading (``config_file``), `describe` and
`identity` follow from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from .errors import QkovError
from .values import (
    COLUMNS,
    COUNT,
    FLAG,
    FRACTION,
    NON_NEGATIVE,
    SELECTION,
    TEXT,
    Kind,
    check_columns,
    one_of,
    optional,
    shown,
    some_of,
    whole,
)

TRACKERS = ("tensorboard", "wandb", "mlflow")  # that a finished run can be handed to


def _key(kind: Kind, meaning: str, default: Any = MISSING, *, identity: bool = True) -> Any:
    metadata = {"kind": kind, "meaning": meaning, "identity": identity}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class _Section:
    """Checks and normalizes every field on construction, from YAML and from Python alike."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for entry in fields(self):
            value = read_value(entry, getattr(self, entry.name), f"{section}.{entry.name}")
            object.__setattr__(self, entry.name, value)


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Which model, and how it is loaded."""

    path: str = _key(TEXT, "Hugging Face hub id, model directory, or .gguf file")
    revision: str | None = _key(optional(TEXT), "branch, tag or commit of a hub id", None)
    dtype: str = _key(
        one_of("auto", "float32", "float64", "bfloat16", "float16"),
        "dtype of the weights in memory; auto keeps the checkpoint's",
        "auto",
    )
    attn_implementation: str | None = _key(
        optional(TEXT), "attention kernel: eager, sdpa, flash_attention_2, ...; null lets transformers choose", None
    )
    trust_remote_code: bool = _key(FLAG, "run Python code that comes with the model", False)


@dataclass(frozen=True)
class ParallelConfig(_Section):
    """How the model is spread over ranks. Never changes a score."""

    tp: int = _key(COUNT, "number of tensor-parallel ranks", 1, identity=False)
    shard: str = _key(
        one_of("auto", "none", "ddp", "fsdp", "zero1", "zero2", "zero3", "device_map"),
        "how weights are spread over the other ranks; auto follows the launcher",
        "auto",
        identity=False,
    )
    replicate: int = _key(
        COUNT, "copies of the weights that fsdp shards, each over its part of the ranks", 1, identity=False
    )
    ep: int = _key(COUNT, "number of ranks that the experts of a mixture are spread over", 1, identity=False)
    cp: int = _key(
        COUNT, "number of ranks that share each sample's tokens, where one has no memory for them", 1, identity=False
    )


@dataclass(frozen=True)
class TaskConfig(_Section):
    """One task: a name, and where its samples are."""

    name: str = _key(TEXT, "name of the task, in reports and default sample ids")
    path: str = _key(
        TEXT,
        "JSONL, JSON, CSV, TSV (each also .gz), Parquet or Arrow file, or a pattern of several; "
        "hf:HUB_ID[:CONFIG][:SPLIT][#COLUMN]; builtin:arithmetic or builtin:python",
    )
    columns: Mapping[str, str] | None = _key(
        COLUMNS,
        "what text, prompt, completion, messages, tools, input_ids, labels or id is called there; with {braces} a "
        "template of several columns; null reads them by these names",
        None,
    )
    max_samples: int | None = _key(optional(COUNT), "take so many samples; null takes all", None)
    sample: str = _key(
        one_of("first", "random"), "which of them: the first, or rows drawn from all without replacement", "first"
    )
    sample_seed: int = _key(whole(0), "seed of sample: random", 0)
    max_tokens: int | None = _key(optional(COUNT), "cut samples after so many tokens; null refuses to cut", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        place = f"task {self.name!r}"
        if self.columns is not None:
            check_columns(self.columns, f"{place}: columns")
        if self.sample == "random" and self.max_samples is None:
            remedy = "Set max_samples of this task, or leave sample out to take all."
            raise QkovError(f"{place}: sample", expected="how many to draw", got="no max_samples", remedy=remedy)


@dataclass(frozen=True)
class MetricConfig(_Section):
    """What is scored."""

    score: str = _key(one_of("interference", "signed", "symmetric", "curvature"), "which score", "interference")
    sample_scale: str = _key(
        one_of("none", "unit"), "unit divides each sample's gradient by its norm over all scored weights", "none"
    )
    loss_reduction: str = _key(one_of("mean", "sum"), "loss of a sample, over its labelled tokens", "mean")
    include_bias: bool = _key(FLAG, "add the biases of Q, K and V to their heads", False)
    layers: tuple[int, ...] | None = _key(SELECTION, "layers to score, counted from 0; null scores all", None)
    heads: tuple[int, ...] | None = _key(SELECTION, "query heads to score, counted from 0; null scores all", None)


@dataclass(frozen=True)
class FisherConfig(_Section):
    """The diagonal empirical Fisher I."""

    estimator: str = _key(one_of("ema", "mean"), "bias-corrected moving average over batches, or plain mean", "mean")
    decay: float = _key(FRACTION, "decay beta of the moving average, per Fisher batch", 0.99)
    scope: str = _key(one_of("pooled", "a", "b"), "samples it is estimated from: both tasks, or one", "pooled")
    batch_size: int = _key(COUNT, "samples in one Fisher batch (one step of the average)", 8)


@dataclass(frozen=True)
class RidgeConfig(_Section):
    """What keeps 1 / I finite: max(I, epsilon) + absolute + relative * mean(I)."""

    epsilon: float = _key(NON_NEGATIVE, "floor of I, in units of I (squared gradients)", 0.0)
    absolute: float = _key(NON_NEGATIVE, "added to I, in units of I", 0.0)
    relative: float = _key(NON_NEGATIVE, "added to I, as a multiple of its mean over the layer's block", 1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon + self.absolute + self.relative == 0:
            raise QkovError(
                "ridge.relative",
                expected="one of epsilon, absolute and relative above 0",
                got="0 for all three",
                remedy="An element with I = 0 would divide by zero; set one of them, for example ridge.relative=0.001.",
            )


@dataclass(frozen=True)
class StatisticsConfig(_Section):
    """Permutation test, intervals and multiple testing."""

    enabled: bool = _key(FLAG, "test the heatmap; needs scores among all pooled samples", True)
    permutations: int = _key(whole(2), "relabellings K of the samples; the smallest p-value is 1 / (1 + K)", 1000)
    confidence: float = _key(FRACTION, "of jackknife intervals, and the share of each null that its band holds", 0.95)
    fdr_alpha: float = _key(FRACTION, "level of the false discovery rate", 0.05)
    family: str = _key(
        one_of("pair", "all"),
        "of more than two tasks: tests that are corrected together, within each pair or over all pairs",
        "pair",
    )
    seed: int = _key(whole(0), "seed of permutations", 0)
    allow_shared_samples: bool = _key(
        FLAG,
        "go on where more than a tenth of a task's samples occur in the other task too; their pairs are left out",
        False,
        identity=False,
    )


@dataclass(frozen=True)
class ComputeConfig(_Section):
    """Memory and speed."""

    batch_tokens: int | None = _key(
        optional(COUNT),
        "tokens in one compute batch, padding included; null takes 512 on a CPU that holds all weights, 8192 on a GPU "
        "that holds all of a model of less than a billion parameters, else 2048",
        None,
        identity=False,
    )
    factor_gpu_mb: int | None = _key(
        optional(whole(0)),
        "MiB of captured factors that stay on each GPU, where no other rank needs them; beyond it they go to memory; "
        "at most nine tenths of what the plan leaves free, which null takes",
        None,
        identity=False,
    )
    factor_memory_mb: int = _key(
        COUNT, "MiB of captured factors in the host's memory; beyond it they go to disk", 1024, identity=False
    )
    factor_disk_mb: int | None = _key(
        optional(whole(0)),
        "MiB of captured factors on disk; beyond it the samples are run once for each part of the layers; "
        "null takes nine tenths of what is free",
        None,
        identity=False,
    )
    factor_dtype: str = _key(
        one_of("auto", "float32", "bfloat16"), "dtype in which captured factors wait; auto keeps the model's", "auto"
    )
    score_dtype: str = _key(one_of("float32", "float64"), "dtype in which scores are accumulated", "float32")
    matmul_precision: str = _key(
        one_of("highest", "high", "medium"),
        "float32 products of scoring, whatever the process has set: high allows TF32, medium bfloat16, where there is "
        "hardware for them",
        "highest",
    )
    compile: str | bool = _key(
        one_of("auto", True, False),
        "compile scoring: on GPUs its elementwise part, or maps and pairs where that is faster, on CPUs all of it, by "
        "the system's C compiler; auto does so where that saves more time than it takes",
        "auto",
        identity=False,
    )


@dataclass(frozen=True)
class OutputConfig(_Section):
    """What is written, and where."""

    dir: str = _key(TEXT, "folder of the results", "runs/qkov", identity=False)
    pairs: str = _key(
        one_of("none", "cross", "all"), "sample pairs kept in the file: none, A x B, or all pooled", "cross"
    )
    partials: bool = _key(FLAG, "keep each rank's partial file", True, identity=False)
    resume: bool = _key(FLAG, "go on from complete layers of the same run", True, identity=False)
    report_to: tuple[str, ...] | None = _key(
        optional(some_of(*TRACKERS)),
        "trackers that are given numbers, figures and a page without samples' texts, once a run is finished",
        None,
        identity=False,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration. Of two tasks the first is A, the second B."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tasks: tuple[TaskConfig, ...]
    metric: MetricConfig = field(default_factory=MetricConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        """Raise where keys do not fit each other."""
        if not FEWEST_TASKS <= len(self.tasks) <= MOST_TASKS:
            remedy = "Give each task a name and a path; of two the first is A."
            expected, got = f"a list of {FEWEST_TASKS} to {MOST_TASKS} tasks", f"{len(self.tasks)} tasks"
            raise QkovError("tasks", expected=expected, got=got, remedy=remedy)
        names = [task.name for task in self.tasks]
        for number, name in enumerate(names):
            if name in names[:number]:
                place, remedy = f"tasks.{number}.name", "Rename one of the tasks."
                raise QkovError(place, expected="different names", got=f"{name!r} twice", remedy=remedy)
            if self.has_many_tasks and any(part in name for part in NOT_IN_NAMES):
                remedy = "Rename it: pairs are stored as /pairs/NAME__NAME."
                expected = f"a name without {' and '.join(map(repr, NOT_IN_NAMES))}, as there are more than two tasks"
                raise QkovError(f"tasks.{number}.name", expected=expected, got=repr(name), remedy=remedy)
        if self.has_many_tasks and self.fisher.scope != "pooled":
            remedy = "Set fisher.scope=pooled: all pairs of more than two tasks are scored under the Fisher of all."
            raise QkovError("fisher.scope", expected="pooled", got=self.fisher.scope, remedy=remedy)

    @property
    def has_many_tasks(self) -> bool:
        """Whether there are more than two, whose results are a matrix of tasks."""
        return len(self.tasks) > FEWEST_TASKS

    @property
    def pooled(self) -> bool:
        """Whether scores among all pooled samples are needed."""
        return self.statistics.enabled or self.output.pairs == "all" or self.has_many_tasks


FEWEST_TASKS, MOST_TASKS = 2, 64
NOT_IN_NAMES = ("/", "__")
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
RETIRED = {
    "statistics.bootstrap": "Intervals are now those of a delete-one jackknife, which draws nothing: leave the key "
    "out; statistics.confidence sets how often intervals are to cover."
}
# tasks.0 and tasks.1 stand for all tasks
KEYS: dict[str, Field[Any]] = {f"{name}.{entry.name}": entry for name, cls in SECTIONS.items() for entry in fields(cls)}


def read_value(entry: Field[Any], value: object, place: str) -> Any:
    """The value as the field's kind reads it.

    Raises:
        QkovError: at ``place``, for a value of another kind.
    """
    kind: Kind = entry.metadata["kind"]
    try:
        return kind.read(value)
    except (ValueError, OverflowError):
        quotes = kind.expected.startswith("text") and isinstance(value, bool | int | float)
        remedy = "Put quotes around it." if quotes else f"The key means: {entry.metadata['meaning']}."
        raise QkovError(place, expected=kind.expected, got=shown(value), remedy=remedy) from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (JSON types only) from which `config_file.from_dict` builds an equal configuration."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of `to_dict` that decides what a run computes; equal identities, equal results.

    Left out: where and how it is computed (``parallel``, batch and memory sizes, ``compile``) and the ``output`` keys
    that change no content, so that a run can go on elsewhere (on as many ranks).
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
        lines.append(f"{name.replace('tasks.0', 'tasks.0, tasks.1, ...')}: {cls.__doc__}")
        for entry in fields(cls):
            default = "required" if entry.default is MISSING else shown(entry.default)
            lines.append(f"  {entry.name:<20} {default:<14} {entry.metadata['meaning']}")
            lines.append(f"  {'':<35} ({entry.metadata['kind'].expected})")
    return "\n".join(lines)


def _identity(section: _Section) -> dict[str, Any]:
    kept = {entry.name: getattr(section, entry.name) for entry in fields(section) if entry.metadata["identity"]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
