"""The card of a heatmap on the hub: what it is of, the answer in words, its numbers, every warning, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.results.verdict_facts import CHANGE

from .findings import significance
from .logged import Found
from .table import Cell, Table, as_plain_markdown
from .tables import blocks_table

if TYPE_CHECKING:
    from huggingface_hub import CardData

TAGS = ("qkov", "interpretability", "attention-heads", "task-interference")
COLUMNS = ("block", "heads", "score_mean", "overlap_median", "change_adam", "conflict_adam", "synergy_adam")
LOADING = """\
```python
from huggingface_hub import hf_hub_download
from qkov_dist import {load}

heatmap = {load}(hf_hub_download({repo_id!r}, {file!r}, repo_type={repo_type!r}{revision}))
print(heatmap)
```
"""


def make_card(run: Found, repo_id: str, repo_type: str, revision: str | None = None, *, has_texts: bool = False) -> str:
    """The text of README.md, its metadata first.

    Args:
        run: What is uploaded.
        repo_id: Where to.
        repo_type: ``dataset`` or ``model``.
        revision: The branch, where it is not the main one.
        has_texts: Whether the samples' texts are in the uploaded files.
    """
    parts = [
        f"# {_plain(run.title)}",
        "Which attention heads tasks fight over inside a language model, head by head, with effects of training steps "
        "and tests. Made with qkov-dist.",
        *(_of_many(run) if isinstance(run, TaskMatrix) else _of_two(run)),
        "## Warnings",
        "\n".join(f"- {_plain(warning)}" for warning in run.attributes.get("warnings", [])) or "None.",
        "## Load it",
        LOADING.format(
            repo_id=repo_id,
            file=HEATMAP_FILE,
            load="load_matrix" if isinstance(run, TaskMatrix) else "load_heatmap",
            repo_type=repo_type,
            revision="" if revision is None else f", revision={revision!r}",
        ),
        "`report.html` is a page that needs no network; `config.yaml` is what `qkov run` was given.",
        "The samples' texts are in these files."
        if has_texts
        else "The samples' texts were left out; their ids, lengths, losses and hashes are there.",
        *_versions(run),
    ]
    return _metadata(run, repo_type) + "\n\n".join(part.strip() for part in parts) + "\n"


def _plain(text: object) -> str:
    return as_plain_markdown(str(text))


def _metadata(run: Found, repo_type: str) -> str:
    from huggingface_hub import DatasetCardData, ModelCardData

    tags = [*TAGS]
    data: CardData = DatasetCardData(pretty_name=run.title, tags=tags, viewer=False)
    if repo_type == "model":
        data = ModelCardData(library_name="qkov-dist", tags=tags)
    return f"---\n{data.to_yaml()}\n---\n\n"


def _answer(run: Found) -> Iterator[str]:
    verdict = run.verdict
    if verdict is not None:
        yield "## The answer"
        yield _plain(" ".join(verdict.sentences))
        yield "\n".join(f"- {_plain(detail)}" for detail in verdict.details)


def _of_two(heatmap: Heatmap) -> Iterator[str]:
    """The answer, and numbers of blocks."""
    yield f"A is {_plain(heatmap.task_a)}, B is {_plain(heatmap.task_b)}."
    yield from _answer(heatmap)
    yield "## Numbers"
    yield Table("blocks", *_numbers(heatmap)).to_markdown()
    yield f"Significant by the test of scores: {_plain(significance(heatmap))}"


def _of_many(matrix: TaskMatrix) -> Iterator[str]:
    """The answer, and tasks by tasks: what a step does where that is known, else mean scores."""
    yield from _answer(matrix)
    known = {name for arrays in matrix.values.values() for name in arrays}
    name = CHANGE if CHANGE in known else "mean"
    values = matrix.total(name) if name == CHANGE else matrix.average(name)
    words = "first-order change of a row's loss by a unit step on a column" if name == CHANGE else "mean score"
    yield f"## Numbers\n\nOver all heads: {words}."
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (task, *map(float, row)) for task, row in zip(matrix.tasks, values, strict=True)
    )
    yield Table("tasks", ("task", *matrix.tasks), rows).to_markdown()


def _numbers(heatmap: Heatmap) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """Columns and rows: what is known of each block, of those numbers that say most."""
    table = blocks_table(heatmap)
    places = [table.columns.index(name) for name in COLUMNS if name in table.columns]
    return tuple(table.columns[place] for place in places), tuple(
        tuple(row[place] for place in places) for row in table.rows
    )


def _versions(run: Found) -> Iterator[str]:
    found = run.attributes.get("versions")
    if isinstance(found, Mapping):
        yield f"Run {_plain(run.run_id)}; " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in found.items()) + "."
