"""The card of a heatmap on the hub: what it is of, the answer in words, its numbers, every warning, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE

from .findings import significance
from .table import Cell, Table, as_plain_markdown
from .tables import blocks_table

if TYPE_CHECKING:
    from huggingface_hub import CardData

TAGS = ("qkov", "interpretability", "attention-heads", "task-interference")
COLUMNS = ("block", "heads", "score_mean", "overlap_median", "change_adam", "conflict_adam", "synergy_adam")
LOADING = """\
```python
from huggingface_hub import hf_hub_download
from qkov_dist import load_heatmap

heatmap = load_heatmap(hf_hub_download({repo_id!r}, {file!r}, repo_type={repo_type!r}{revision}))
print(heatmap)
```
"""


def make_card(
    heatmap: Heatmap, repo_id: str, repo_type: str, revision: str | None = None, *, has_texts: bool = False
) -> str:
    """The text of README.md, its metadata first.

    Args:
        heatmap: What is uploaded.
        repo_id: Where to.
        repo_type: ``dataset`` or ``model``.
        revision: The branch, where it is not the main one.
        has_texts: Whether the samples' texts are in the uploaded files.
    """
    parts = [
        f"# {as_plain_markdown(heatmap.title)}",
        f"Which attention heads two tasks fight over: {_plain(heatmap.task_a)} (A) and {_plain(heatmap.task_b)} (B), "
        "head by head, with effects of training steps and tests. Made with qkov-dist.",
        *_answer(heatmap),
        "## Numbers",
        Table("blocks", *_numbers(heatmap)).to_markdown(),
        f"Significant by the test of scores: {_plain(significance(heatmap))}",
        "## Warnings",
        "\n".join(f"- {_plain(warning)}" for warning in heatmap.attributes.get("warnings", [])) or "None.",
        "## Load it",
        LOADING.format(
            repo_id=repo_id,
            file=HEATMAP_FILE,
            repo_type=repo_type,
            revision="" if revision is None else f", revision={revision!r}",
        ),
        "`report.html` is a page that needs no network; `config.yaml` is what `qkov run` was given.",
        "The samples' texts are in these files."
        if has_texts
        else "The samples' texts were left out; their ids, lengths, losses and hashes are there.",
        *_versions(heatmap),
    ]
    return _metadata(heatmap, repo_type) + "\n\n".join(part.strip() for part in parts) + "\n"


def _plain(text: object) -> str:
    return as_plain_markdown(str(text))


def _metadata(heatmap: Heatmap, repo_type: str) -> str:
    from huggingface_hub import DatasetCardData, ModelCardData

    tags = [*TAGS]
    data: CardData = DatasetCardData(pretty_name=heatmap.title, tags=tags, viewer=False)
    if repo_type == "model":
        data = ModelCardData(library_name="qkov-dist", tags=tags)
    return f"---\n{data.to_yaml()}\n---\n\n"


def _answer(heatmap: Heatmap) -> Iterator[str]:
    verdict = heatmap.verdict
    if verdict is not None:
        yield "## The answer"
        yield _plain(" ".join(verdict.sentences))
        yield "\n".join(f"- {_plain(detail)}" for detail in verdict.details)


def _numbers(heatmap: Heatmap) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    """Columns and rows: what is known of each block, of those numbers that say most."""
    table = blocks_table(heatmap)
    places = [table.columns.index(name) for name in COLUMNS if name in table.columns]
    return tuple(table.columns[place] for place in places), tuple(
        tuple(row[place] for place in places) for row in table.rows
    )


def _versions(heatmap: Heatmap) -> Iterator[str]:
    found = heatmap.attributes.get("versions")
    if isinstance(found, Mapping):
        yield f"Run {_plain(heatmap.run_id)}; " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in found.items()) + "."
