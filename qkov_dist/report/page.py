"""``report.html`` of two tasks: its numbers, and what its script draws."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkov_dist.report import page_parts as parts
from qkov_dist.results.block_view import HEAD_DIM
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.scoring.score_kinds import may_be_negative

from .findings import Finding, about_intervals, counts, findings, found, is_family_wise, sidedness, sides
from .page_effects import block_effects, effects_data, sections
from .page_frame import base64_of, page_of, round_to_float32
from .tables import test_arrays, top_conflicts

STYLE = ("page.css",)
SCRIPT = (
    "core.js",
    "values.js",
    "effects.js",
    "marks.js",
    "sorting.js",
    "heatmaps.js",
    "numbers.js",
    "charts.js",
    "sums.js",
    "conflicts.js",
    "ranked.js",
    "saving.js",
    "downloads.js",
    "page.js",
)


_BACK = '<p class="back"><a href="{}">← All pairs of tasks</a></p>'
TEXT_BYTES = 1_500_000  # of all samples together, so that a page stays small
CODES = ("found", "family")
LONGEST_TEXT, SHORTEST_TEXT = 4000, 60
TESTS = {"p": "p_value", "q": "q_value", "p_max": "p_max", "effect": "effect_size"}


TESTS |= {"effect_low": "effect_low", "effect_high": "effect_high"}


BESIDE = {"low": "ci_low", "high": "ci_high", "null": "null_mean", "null_low": "null_low", "null_high": "null_high"}


def make_page(heatmap: Heatmap, matrix_page: str = "") -> str:
    """The whole page.

    Args:
        heatmap: Of two tasks.
        matrix_page: Where the page of all tasks lies, of which these are two, relative to this one; "" where none does.
    """
    shown = {
        "title": html.escape(f"{heatmap.task_a} × {heatmap.task_b}"),
        "back": _BACK.format(html.escape(matrix_page)) if matrix_page else "",
        "facts": parts.facts(heatmap),
        **sections(heatmap),
        "legend": parts.legend(heatmap),
        "tested": parts.tested(heatmap),
        "count": parts.warning_count(heatmap),
        "warnings": parts.warnings(heatmap),
        "blocks": parts.block_table(heatmap),
        "beside": parts.beside_intervals(heatmap),
        "shared": parts.shared(heatmap),
        "provenance": parts.provenance(heatmap),
    }
    return page_of("page.html", heatmap.run_id, STYLE, SCRIPT, page_data(heatmap), shown)


def page_data(heatmap: Heatmap) -> dict[str, Any]:
    """What the page's script draws."""
    settings = (heatmap.statistics or {}).get("settings", {})
    return {
        "score": str(heatmap.attributes.get("score", "score")),
        "may_be_negative": may_be_negative(heatmap.attributes.get("score")),
        "statistic": heatmap.deciding if heatmap.tests else None,
        "sided": sidedness(heatmap) if heatmap.tests else None,
        "findings": [_finding(heatmap, finding) for finding in findings(heatmap)],
        "alpha": heatmap.fdr_alpha,
        "confidence": settings.get("confidence", 0.95),
        "layers": heatmap.layers,
        "groups": np.asarray(heatmap.groups).tolist(),
        "title": heatmap.title,
        "effects": effects_data(heatmap),
        "intervals_beside": about_intervals(heatmap),
        "blocks": [_block(heatmap, block) for block in heatmap.blocks],
        "tasks": [heatmap.task_a, heatmap.task_b],
        "samples": _samples(heatmap),
        "conflicts": [_conflict(heatmap, block, record) for block, record in top_conflicts(heatmap)],
        "shared": {name: base64_of(arrays["mean"], "<f4") for name, arrays in heatmap.shared.items()},
    }


def _conflict(heatmap: Heatmap, block: str, record: Mapping[str, Any]) -> list[int | float]:
    """A sample pair as places: block, layer, head, sample of A, sample of B; its score and its excess."""
    layer, head = heatmap.layers.index(record["layer"]), heatmap.natives(block).index(record["head"])
    numbers = [round_to_float32(record[key]) for key in ("score", "excess")]
    return [heatmap.blocks.index(block), layer, head, record["sample_i"], record["sample_j"], *numbers]


def _block(heatmap: Heatmap, block: str) -> dict[str, Any]:
    means, overlap = (test_arrays(heatmap, name, block) for name in ("cross_mean", "overlap"))
    tests = test_arrays(heatmap, heatmap.deciding, block)
    arrays = {
        "score": heatmap.mean[block],
        **{f"score_{name}": means.get(key) for name, key in BESIDE.items()},
        "stat": overlap.get("statistic"),
        **{f"stat_{name}": overlap.get(key) for name, key in BESIDE.items()},
        "ridge": heatmap.fisher[block].get("ridge_share"),
        "share": heatmap.fisher[block].get("share_a"),
        **{name: tests.get(key) for name, key in TESTS.items()},
    }
    packed = {name: base64_of(values, "<f4") for name, values in arrays.items() if name == "score" or _is_there(values)}
    return {
        "name": block,
        "axis": HEAD_DIM[block].replace("_", " "),
        "heads": heatmap.natives(block),
        "values": packed,
        "marks": _marks(heatmap, block) if heatmap.tests else None,
        "effects": {optimizer: _packed(arrays) for optimizer, arrays in block_effects(heatmap, block)},
        "pairs": None if heatmap.cross is None else base64_of(_strongest_pairs(heatmap, block), "<i4"),
    }


def _packed(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: base64_of(values, "i1" if name in CODES else "<f4") for name, values in arrays.items()}


def _is_there(values: Any) -> bool:
    return values is not None and not np.isnan(values).all()


def _marks(heatmap: Heatmap, block: str) -> dict[str, str]:
    """What each head shows, as numbers of ``found``; whether that holds over all heads; on which side it lies."""
    return {
        "found": base64_of(found(heatmap, block), "i1"),
        "family": base64_of(is_family_wise(heatmap, block), "i1"),
        "side": base64_of(sides(heatmap.tests[block]), "i1"),
    }


def _finding(heatmap: Heatmap, finding: Finding) -> dict[str, Any]:
    """A finding for the script; ``number`` is how many heads show it, null where that is not worth a line."""
    number = counts(heatmap).get(finding)
    return {"name": finding.name, "side": finding.side, "mark": finding.mark, "glyph": finding.glyph, "number": number}


def _strongest_pairs(heatmap: Heatmap, block: str) -> Any:
    """For each head the place of its strongest pair in [n_a, n_b], flat; 0 where the head is absent."""
    view = heatmap[block]
    sign = -1 if view.conflict_is_low else 1
    rows = ((sign * view.of_different(layer)).reshape(len(layer), -1) for layer in heatmap.cross[block])  # type: ignore[index]
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
