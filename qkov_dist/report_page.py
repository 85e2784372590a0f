"""``report.html``: one page that asks nobody for anything.

The template, its style and its script lie in ``report_assets``; this module puts numbers and text into them. Numbers
travel as base64 of little-endian float32, text as JSON in a data block. The page's Content-Security-Policy allows its
own style and script by their hashes and nothing else: no network, no other script, whatever a sample's text says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from .report_tables import Cell, alpha, blocks_table, test_arrays, top_conflicts
from .results import Heatmap
from .views import HEAD_DIM

STYLE = ("page.css",)
SCRIPT = ("core.js", "heatmaps.js", "charts.js", "conflicts.js", "page.js")

TEXT_BYTES = 1_500_000  # of all samples together, so that a page stays small
LONGEST_TEXT, SHORTEST_TEXT = 4000, 60
TESTS = {"p": "p_value", "q": "q_value", "p_max": "p_max", "effect": "effect_size"}

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_MARKER = '<meta name="qkov-run" content="{}">'


def run_marker(run_id: str) -> str:
    """The tag by which a page tells which run it shows."""
    return _MARKER.format(html.escape(run_id))


def make_page(heatmap: Heatmap) -> str:
    """The whole page."""
    style, script = _assets(STYLE), _assets(SCRIPT)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {
        "policy": policy,
        "marker": run_marker(heatmap.run_id),
        "title": html.escape(f"{heatmap.task_a} × {heatmap.task_b}"),
        "style": style,
        "facts": "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in _facts(heatmap)),
        "count": _warning_count(heatmap),
        "warnings": _warnings(heatmap),
        "blocks": _block_table(heatmap),
        "provenance": _provenance(heatmap),
        "data": _data_block(page_data(heatmap)),
        "script": script,
    }
    return _PLACE.sub(lambda place: parts[place[1]], _assets(("page.html",)))


def page_data(heatmap: Heatmap) -> dict[str, Any]:
    """What the page's script draws."""
    conflicts = [
        [
            heatmap.blocks.index(block),
            heatmap.layers.index(found["layer"]),
            heatmap.natives(block).index(found["head"]),
            found["sample_i"],
            found["sample_j"],
            round_to_float32(found["score"]),
        ]
        for block, found in top_conflicts(heatmap)
    ]
    settings = (heatmap.statistics or {}).get("settings", {})
    return {
        "score": str(heatmap.attributes.get("score", "score")),
        "statistic": heatmap.deciding if heatmap.tests else None,
        "alpha": alpha(heatmap),
        "confidence": settings.get("confidence", 0.95),
        "layers": heatmap.layers,
        "groups": np.asarray(heatmap.groups).tolist(),
        "blocks": [_block(heatmap, block) for block in heatmap.blocks],
        "tasks": [heatmap.task_a, heatmap.task_b],
        "samples": _samples(heatmap),
        "conflicts": conflicts,
    }


def round_to_float32(number: float) -> float:
    """The shortest decimal number that float32 tells from its neighbours."""
    return float(str(np.float32(number)))


def _block(heatmap: Heatmap, block: str) -> dict[str, Any]:
    means, overlap = (test_arrays(heatmap, name, block) for name in ("cross_mean", "overlap"))
    tests = test_arrays(heatmap, heatmap.deciding, block)
    arrays = {
        "score": heatmap.mean[block],
        "score_low": means.get("ci_low"),
        "score_high": means.get("ci_high"),
        "stat": overlap.get("statistic"),
        "stat_low": overlap.get("ci_low"),
        "stat_high": overlap.get("ci_high"),
        "ridge": heatmap.fisher[block].get("ridge_share"),
        **{name: tests.get(key) for name, key in TESTS.items()},
    }
    packed = {name: _base64(values, "<f4") for name, values in arrays.items() if values is not None}
    scores = None if heatmap.cross is None else heatmap.cross[block]
    return {
        "name": block,
        "axis": HEAD_DIM[block].replace("_", " "),
        "heads": heatmap.natives(block),
        "values": packed,
        "pairs": None if scores is None else _base64(_strongest_pairs(heatmap, scores), "<i4"),
    }


def _strongest_pairs(heatmap: Heatmap, scores: Any) -> Any:
    """For each head the place of its strongest pair in [n_a, n_b], flat; 0 where the head is absent."""
    sign = -1 if heatmap.attributes.get("score") == "signed" else 1
    rows = ((sign * layer).reshape(len(layer), -1) for layer in scores)
    return np.stack([np.argmax(np.where(np.isnan(row), -np.inf, row), axis=-1) for row in rows])


def _samples(heatmap: Heatmap) -> list[dict[str, Any]]:
    tables = (heatmap.samples_a, heatmap.samples_b)
    budget = TEXT_BYTES // max(1, sum(map(len, tables)))
    most = min(max(budget, SHORTEST_TEXT), LONGEST_TEXT)
    return [
        {
            "ids": [_cut(text, 200) for text in table.ids],
            "tokens": np.asarray(table.num_tokens).tolist(),
            "losses": [round_to_float32(loss) if np.isfinite(loss) else None for loss in table.losses],
            "texts": [_cut(text, most) for text in table.texts],
        }
        for table in tables
    ]


def _cut(text: str, most: int) -> str:
    """The first ``most`` bytes of a text as UTF-8, with how much is missing."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= most:
        return encoded.decode()
    kept = encoded[:most].decode("utf-8", "ignore")
    return f"{kept}… [{len(text):,} characters in all]"


def _facts(heatmap: Heatmap) -> Iterator[tuple[str, str]]:
    attributes = heatmap.attributes
    present = sum(int(mask.sum()) for mask in heatmap.present.values())
    config = attributes.get("config", {})
    model = config.get("model", {}).get("path", "") if isinstance(config, Mapping) else ""
    yield "Model", str(model).rstrip("/").rpartition("/")[2] or str(attributes.get("model_type", "not said"))
    yield "Samples", f"{len(heatmap.samples_a)} {heatmap.task_a}, {len(heatmap.samples_b)} {heatmap.task_b}"
    layers, heads, kv_heads = len(heatmap.layers), len(heatmap.heads), len(heatmap.kv_heads)
    yield "Scored", f"{layers} layers × {heads} heads ({kv_heads} kv); {present:,} heads in {len(heatmap)} blocks"
    yield "Score", str(attributes.get("score", "not said"))
    if heatmap.tests:
        found = sum(int((tests["q_value"] <= alpha(heatmap)).sum()) for tests in heatmap.tests.values())
        yield "Significant", f"{found:,} of {present:,} heads ({heatmap.deciding}, q ≤ {alpha(heatmap):g})"
    else:
        yield "Significant", "not tested"


def _warning_count(heatmap: Heatmap) -> str:
    count = len(heatmap.attributes.get("warnings", ()))
    return f" <span class='count'>{count}</span>" if count else ""


def _warnings(heatmap: Heatmap) -> str:
    statistics = heatmap.statistics or {}
    kinds = (
        ("warning", heatmap.attributes.get("warnings", ())),
        ("note", heatmap.attributes.get("notes", ())),
        ("statistics", statistics.get("notes", ())),
    )
    items = [(kind, str(text)) for kind, texts in kinds for text in texts]
    if not items:
        return "<p>None.</p>"
    rows = (f'<li class="{kind}"><b>{kind}</b> {html.escape(text)}</li>' for kind, text in items)
    return f'<ul id="warnings">{"".join(rows)}</ul>'


def _provenance(heatmap: Heatmap) -> str:
    attributes = {k: v for k, v in heatmap.attributes.items() if k not in ("warnings", "notes")}
    settings = (heatmap.statistics or {}).get("settings", {})
    shown = {"run_id": heatmap.run_id, **attributes, **({"statistics": settings} if settings else {})}
    rows = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _flat(shown))
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


def _block_table(heatmap: Heatmap) -> str:
    """The table of blocks for reading: a number and where it lies in one cell."""
    table, name = blocks_table(heatmap), heatmap.deciding
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    titles = ["Block", "Heads", "Layers", f"Mean {heatmap.attributes.get('score', 'score')}", "Highest mean, its head"]
    if heatmap.tests:
        titles += [f"Median {name}", f"Highest {name} [interval], its head", "Smallest q", f"q ≤ {alpha(heatmap):g}"]
    head = "".join(f"<th scope='col'>{html.escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _block_cells(row, name))}</tr>" for row in rows
    )
    return f"<table id='blocks'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _block_cells(row: Mapping[str, Cell], name: str) -> Iterator[str]:
    yield from (_text(row[key]) for key in ("block", "heads", "layers", "score_mean"))
    yield f"{_text(row['score_largest'])} (layer {_text(row['score_layer'])}, head {_text(row['score_head'])})"
    if "q_smallest" in row:
        low, high = _text(row[f"{name}_ci_low"]), _text(row[f"{name}_ci_high"])
        place = f"(layer {_text(row[f'{name}_layer'])}, head {_text(row[f'{name}_head'])})"
        yield _text(row[f"{name}_median"])
        yield f"{_text(row[f'{name}_largest'])} [{low}, {high}] {place}"
        yield from (_text(row[key]) for key in ("q_smallest", "significant"))


def _text(cell: Cell) -> str:
    return f"{cell:.4g}".replace("-", "−") if isinstance(cell, float) else "–" if cell is None else str(cell)


def _data_block(data: Any) -> str:
    """JSON that no HTML parser takes for a tag or a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _base64(values: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _assets(names: Iterable[str]) -> str:
    folder = files(__package__) / "report_assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
