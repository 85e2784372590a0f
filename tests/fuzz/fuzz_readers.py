"""Everything that qkov_dist reads, by name: a function of a folder in which the input lies."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from result_files import HEATMAP, PARTIALS, header

from qkov_dist.commands.merge import merge_folder
from qkov_dist.commands.stats import retest
from qkov_dist.config import TaskConfig
from qkov_dist.config_file import load_config
from qkov_dist.data.tasks import load_task
from qkov_dist.distributed.world import Alone
from qkov_dist.report.summary import print_summary
from qkov_dist.report.tables import all_tables
from qkov_dist.report.write import write_page, write_report
from qkov_dist.results.gather import gather_partials
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.results.metadata import from_json
from qkov_dist.results.partials import PartialWriter, read_partial
from qkov_dist.results.resume import carry_over


def _config(folder: Path) -> None:
    load_config(folder / "run.yaml", json.loads((folder / "overrides.json").read_bytes()))


@functools.cache
def _tokenizer(name: str) -> Any:
    from toy_tokenizers import CHAT, TAGGED_CHAT, byte_tokenizer, word_tokenizer
    from transformers import ByT5Tokenizer

    make = {
        "bytes": byte_tokenizer,
        "chat": lambda: byte_tokenizer(CHAT),
        "tagged": lambda: byte_tokenizer(TAGGED_CHAT),
        "words": lambda: word_tokenizer(CHAT),
        "pieces": ByT5Tokenizer,
        "none": lambda: None,
    }
    return make[name]()


def _task(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_bytes())
    limits = {key: options.pop(key) for key in ("objective", "max_positions")}
    tokenizer = _tokenizer(options.pop("tokenizer"))
    (path,) = folder.glob("task.*")
    vocab = 300 if tokenizer is None else len(tokenizer)
    load_task(TaskConfig("math", str(path), **options), tokenizer, vocab_size=vocab, **limits)


def _partial(folder: Path) -> None:
    partial = read_partial(folder / PARTIALS[0])
    for layer in partial.complete:
        partial.read_layer(layer)


def _resume(folder: Path) -> None:
    """A rank takes over what it had finished."""
    with PartialWriter(folder / PARTIALS[0], header(0)):
        pass


def _carry(folder: Path) -> None:
    """One rank takes over what two had finished."""
    carry_over(folder, header(0, world_size=1))


def _gather(folder: Path) -> None:
    gather_partials(folder, Alone())


def _merge(folder: Path) -> None:
    heatmap = merge_folder(folder, world=Alone())
    assert heatmap is not None
    print_summary(heatmap, folder)


def _frame(folder: Path) -> None:
    raw = json.loads((folder / "frame.json").read_bytes())
    found = from_json(raw, "frame.json")
    _ = found.blocks, found.query_heads, found.kv_heads


def _heatmap(folder: Path) -> None:
    load_heatmap(folder / HEATMAP)


def _page(folder: Path) -> None:
    """What needs no matplotlib: page, tables, summary, other tools."""
    heatmap = load_heatmap(folder / HEATMAP)
    write_page(heatmap, folder)
    for table in all_tables(heatmap):
        table.to_csv().encode()
        table.to_markdown().encode()
    print_summary(heatmap, folder)
    heatmap.to_pandas()
    heatmap.to_xarray()
    _ = repr(heatmap), heatmap._repr_html_()
    for block in heatmap.values():
        dict(block)


def _report(folder: Path) -> None:
    write_report(folder, lambda _: None)


def _stats(folder: Path) -> None:
    changes: Mapping[str, Any] = {"n_permutations": 9}
    retest(folder, changes, lambda _: None)


READERS: dict[str, Callable[[Path], None]] = {
    "config": _config,
    "task": _task,
    "partial": _partial,
    "resume": _resume,
    "carry": _carry,
    "gather": _gather,
    "merge": _merge,
    "frame": _frame,
    "heatmap": _heatmap,
    "page": _page,
    "report": _report,
    "stats": _stats,
}
