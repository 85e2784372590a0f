"""The parts of ``report.html`` that need no script: facts, how heads were tested, legend, tables, warnings, provenance.

Every text that comes from a run is escaped here, on its way into markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qkov_dist.results.heatmap import Heatmap

from .findings import about_intervals, counts, how_tested, is_family_wise, significance
from .table import Cell
from .tables import EXTREMES, blocks_table, shared_table

MARK_CLASSES = {"above": "mark-above", "below": "mark-below", None: "mark-null"}


def facts(heatmap: Heatmap) -> str:
    """What was scored and found, in a few words each."""
    return "".join(f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in _facts(heatmap))


def _facts(heatmap: Heatmap) -> Iterator[tuple[str, str]]:
    present = sum(int(mask.sum()) for mask in heatmap.present.values())
    yield "Model", heatmap.model_name or "not said"
    yield "Samples", f"{len(heatmap.samples_a)} {heatmap.task_a}, {len(heatmap.samples_b)} {heatmap.task_b}"
    layers, heads, kv_heads = len(heatmap.layers), len(heatmap.heads), len(heatmap.kv_heads)
    yield "Scored", f"{layers} layers × {heads} heads ({kv_heads} kv heads); {present:,} heads in {len(heatmap)} blocks"
    if not heatmap.has_tested_effects:
        yield "Score", str(heatmap.attributes.get("score", "not said"))
        yield "Significant", significance(heatmap).replace("<=", "≤")


def tested(heatmap: Heatmap) -> str:
    """The line on how heads were tested; nothing before a test."""
    if not heatmap.tests:
        return ""
    return f'<p class="hint" id="tested"><b>How heads were tested.</b> {_escape(" ".join(how_tested(heatmap)))}</p>'


def legend(heatmap: Heatmap) -> str:
    """What the marks in the heatmaps say, and how many heads bear each."""
    items = [
        f'<li><i class="{MARK_CLASSES[finding.side]}" aria-hidden="true">{finding.glyph}</i> <b>{finding.name}</b> '
        f"{_heads(number)}: {finding.meaning}</li>"
        for finding, number in counts(heatmap).items()
    ]
    if items:
        held, level = sum(int(is_family_wise(heatmap, block).sum()) for block in heatmap.blocks), heatmap.fdr_alpha
        items.append(
            f"<li>Marked: q ≤ {level:g}. Coloured: also family-wise p ≤ {level:g} over all heads of "
            f"all blocks ({_heads(held)}); white: q alone.</li>"
        )
    else:
        items.append("<li>Heads were not tested.</li>")
    items.append(
        "<li>Grey: the layer has no such head. K and V have one column for each kv head; dashed boxes show the heads "
        "that share it.</li>"
    )
    return "".join(items)


def _heads(number: int) -> str:
    return f"{number:,} head{'' if number == 1 else 's'}"


def block_table(heatmap: Heatmap) -> str:
    """The table of blocks for reading: a number and where it lies in one cell."""
    blocks, name = blocks_table(heatmap), heatmap.deciding
    rows = [dict(zip(blocks.columns, row, strict=True)) for row in blocks.rows]
    has_share = any(row["share_a_median"] is not None for row in rows)
    found = tuple(counts(heatmap))
    titles = ["Block", "Heads", f"Mean {heatmap.attributes.get('score', 'score')}", "Highest mean"]
    if heatmap.tests:
        titles += [f"Median {name}", *(f"{title} {name} [interval]" for title in ("Highest", "Lowest")), "Smallest q"]
        titles += [f"{finding.glyph}\N{NO-BREAK SPACE}{finding.name}" for finding in found]
    titles += [f"Median Fisher share of {heatmap.task_a}"] if has_share else []
    names = [finding.name for finding in found]
    return table("blocks", titles, [_block_cells(row, name, names, has_share=has_share) for row in rows])


def beside_intervals(heatmap: Heatmap) -> str:
    """What is to be known of the table's intervals, where they are read."""
    said = about_intervals(heatmap)
    return f'<p class="hint">{_escape(said)}</p>' if said else ""


def _block_cells(
    row: Mapping[str, Cell], name: str, names: Sequence[str], *, has_share: bool
) -> Iterator[Sequence[str]]:
    """Cells of one block: a number, and below it where it lies."""
    yield (_text(row["block"]),)
    yield _text(row["heads"]), f"in {_text(row['layers'])} layers"
    yield (_text(row["score_mean"]),)
    yield _text(row["score_largest"]), _place(row, "score_largest")
    if "q_smallest" in row:
        yield (_text(row[f"{name}_median"]),)
        for key in (f"{name}_{which}" for which in EXTREMES):
            interval = f"[{_text(row[f'{key}_ci_low'])}, {_text(row[f'{key}_ci_high'])}]"
            mean, low, high = (_text(row[f"{key}_null_{end}"]) for end in ("mean", "low", "high"))
            yield _text(row[key]), interval, f"its null {mean} [{low}, {high}]", _place(row, key)
        yield (_text(row["q_smallest"]),)
        yield from ((_text(row[finding]),) for finding in names)
    if has_share:
        yield _text(row["share_a_median"]), f"{_text(row['share_a_lowest'])} to {_text(row['share_a_highest'])}"


def _place(row: Mapping[str, Cell], key: str) -> str:
    return f"layer {_text(row[f'{key}_layer'])}, head {_text(row[f'{key}_head'])}"


def shared(heatmap: Heatmap) -> str:
    """What belongs to no head, by layer: a chart's place and the numbers; nothing where nothing was scored."""
    by_layer = shared_table(heatmap)
    if not by_layer.rows:
        return ""
    score = heatmap.attributes.get("score", "score")
    rows = [[(_text(cell),) for cell in row] for row in by_layer.rows]
    return (
        '<div id="shared"><h3>Shared by all heads</h3><p class="hint">The bias of O belongs to no head: it is in no '
        "heatmap and no sum over heads, and was not tested.</p>"
        '<div class="charts" id="shared-charts"></div><details><summary>Numbers by layer</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Bias of O by layer">'
        f"{table('shared-table', ['Parameter', 'Layer', f'Mean {score}'], rows)}</div></details></div>"
    )


def warning_count(heatmap: Heatmap) -> str:
    """The number of warnings, for the page's navigation."""
    return count_of(len(heatmap.attributes.get("warnings", ())))


def count_of(number: int) -> str:
    """A number of warnings beside their link; nothing for 0."""
    return f" <span class='count'>{number}</span>" if number else ""


def warnings(heatmap: Heatmap) -> str:
    """Every warning and note of the run and its tests."""
    statistics = heatmap.statistics or {}
    kinds = (
        ("warning", heatmap.attributes.get("warnings", ())),
        ("note", heatmap.attributes.get("notes", ())),
        ("statistics", statistics.get("notes", ())),
    )
    return warning_list([(kind, str(text)) for kind, texts in kinds for text in texts])


def warning_list(items: Sequence[tuple[str, str]]) -> str:
    """Kinds and texts of warnings and notes, as a list."""
    if not items:
        return "<p>None.</p>"
    rows = (f'<li class="{kind}"><b>{kind}</b> {_escape(text)}</li>' for kind, text in items)
    return f'<ul id="warnings">{"".join(rows)}</ul>'


def provenance(heatmap: Heatmap) -> str:
    """Settings, versions and seeds of a run and its tests."""
    return provenance_of(heatmap.attributes, (heatmap.statistics or {}).get("settings", {}))


def provenance_of(attributes: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The same of a run's attributes: not what is shown elsewhere, nor where every head lies."""
    kept = {k: v for k, v in attributes.items() if k not in ("warnings", "notes", "slices")}
    shown = {"run_id": str(attributes.get("run_id", "")), **kept, **({"statistics": settings} if settings else {})}
    rows = (f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in _flat(shown))
    return f"<dl class='pairs'>{''.join(rows)}</dl>"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(x, Mapping) for x in value):
            for place, x in enumerate(value):
                yield from _flat(x, f"{prefix}{name}.{place}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def table(name: str, titles: Sequence[str], rows: Sequence[Any]) -> str:
    """Rows of cells of lines, as an HTML table."""
    head = "".join(f"<th scope='col'>{_escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table id='{name}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(lines: Sequence[str]) -> str:
    first, *others = map(_escape, lines)
    return f"<td>{first}{''.join(f'<small>{line}</small>' for line in others)}</td>"


def _text(cell: Cell) -> str:
    return f"{cell:.4g}".replace("-", "−") if isinstance(cell, float) else "–" if cell is None else str(cell)


def _escape(text: str) -> str:
    return html.escape(text)
