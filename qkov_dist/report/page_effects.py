"""What the page says of effects: the answer, which needs no script, and the numbers that its script lists and draws.

Every text that comes from a run is escaped here, on its way into markup. A file that knows no effects gives nothing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from qkov_dist.results.advice import Action
from qkov_dist.results.effects import Total
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import TASKS, Floats, curvatures_along
from qkov_dist.results.verdict_facts import BY
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .effect_findings import (
    EFFECTS,
    effect_counts,
    effects_of,
    found_by_change,
    how_effects_were_tested,
    is_family_wise_change,
)
from .findings import counts, significance

_MINUS = re.compile(r"(?<![\w-])-(?=\d)")
_RATE = re.compile(r"\blearning rate x number of steps")
SEEN = 2  # details that are seen at once
_SCALE = 100.0  # of the drawn interval, in its own units


def answer(heatmap: Heatmap) -> str:
    """The verdict, its interval as a line, what to do next, and what else is to be known."""
    verdict = heatmap.verdict
    if verdict is None:
        return ""
    whole, scope, heads = verdict.sentences
    return (
        f'<section id="answer" class="{verdict.direction}" aria-labelledby="answer-title">'
        f'<div class="said"><h2 id="answer-title">Does training on {_escape(heatmap.task_b)} hurt '
        f"{_escape(heatmap.task_a)}?</h2>"
        f'<p class="verdict">{prose(whole)} <span class="scope">{prose(scope)}</span></p>'
        f'{_line(heatmap)}<p class="heads">{_linked(heads)}</p></div>'
        f'<div class="next"><h3>What to do next</h3><ol>{"".join(map(action_item, verdict.actions))}</ol></div>'
        f'<div class="more-said"><ul>{_items(verdict.details[:SEEN])}</ul>'
        "<details><summary>The other way round, by the other optimizer, at a unit step; words of this page</summary>"
        f"<ul>{_items(verdict.details[SEEN:])}</ul>{_WORDS}</details></div></section>"
    )


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{prose(text)}</li>" for text in texts)


def _linked(text: str) -> str:
    """The sentence on heads, which holds no text of a run; each head named in it leads to its place in the heatmaps."""
    return re.sub(r"([QKVO]) (\d+)\.(\d+)", r'<a href="#\1.\2.\3">\1 \2.\3</a>', prose(text))


def action_item(action: Action) -> str:
    """What to do next, with its command, as a list's item."""
    command = re.sub(r"(--step )(\S+)$", r'\1<span class="step-of-command">\2</span>', _escape(action.command))
    command = f"<pre>{command}</pre>" if command else ""
    return f"<li>{prose(action.why)}{command}</li>"


def _line(heatmap: Heatmap) -> str:
    """The total's interval against 0, drawn."""
    total = heatmap.total_effect(BY)
    low, high = total.interval
    most = max(abs(low), abs(high)) * 1.1
    if not (np.isfinite(most) and most > 0):
        return ""
    x_low, x, x_high = (_SCALE * (1 + value / most) for value in (low, total.change, high))
    a = _escape(heatmap.task_a)
    return (
        f'<svg class="interval-line" viewBox="0 0 {2 * _SCALE:g} 16" role="img" preserveAspectRatio="none" '
        'aria-label="The interval against 0">'
        f'<line class="axis" x1="0" x2="{2 * _SCALE:g}" y1="8" y2="8"/>'
        f'<line class="axis" x1="{_SCALE:g}" x2="{_SCALE:g}" y1="0" y2="16"/>'
        f'<line class="band" x1="{x_low:.2f}" x2="{x_high:.2f}" y1="8" y2="8"/>'
        f'<line class="point" x1="{x:.2f}" x2="{x:.2f}" y1="2" y2="14"/></svg>'
        f'<p class="ends"><span>← lowers {a}’s loss</span><span>0</span><span>raises it →</span></p>'
    )


def sections(heatmap: Heatmap) -> dict[str, str]:
    """Parts of the template that are there where effects are known; else empty."""
    if not heatmap.has_tested_effects:
        return dict.fromkeys(("answer", "effect_links", "ranked", "sums", "weights", "effect_legend"), "")
    return {
        "answer": answer(heatmap),
        "effect_links": '<a href="#ranked">Heads</a> ',
        "ranked": _RANKED,
        "sums": _SUMS,
        "weights": _weights(heatmap),
        "effect_legend": _legend(heatmap),
    }


_TERMS = {
    "V 13.2": "block V, layer 13, head 2; of K and V, kv head 2: one that several query heads share",
    "first order": "the change as the slope at the present weights says: it grows with the step",
    "second order": "what the slope's own change adds: it always raises the loss, and grows with the step's square",
    "curvature": "the second order for a unit step in one head, by the whole Fisher along it (no sum over heads)",
    "q": "of the heads of a block at or below this q, the expected share that is no find (Benjamini-Hochberg)",
    "family-wise p": "the probability that any of all heads shows as much where none does anything (p_max in files)",
    "share of harm": "a head's part of the sum of all changes above 0, be they significant or not",
    "Fisher I, λ": "I: mean squared gradient of a weight over both tasks; λ: the ridge added to it",
    "ridge share": "λ's part of I + λ: near 1 the Fisher says nothing there",
    "overlap": "whether both tasks' gradients are large in the same weights, their scale apart",
    "labellings": "ways to call the samples A and B, by which the null is drawn",
    "× scale": "how many times a pair of samples scores what the two samples' own scales explain",
}
_WORDS = f"<dl class='pairs terms'>{''.join(f'<div><dt>{k}</dt><dd>{v}</dd></div>' for k, v in _TERMS.items())}</dl>"
_RANKED = """<section id="ranked" aria-labelledby="ranked-title">
<h2 id="ranked-title">Heads by what a step does</h2>
<p class="hint" id="ranked-hint"></p>
<div class="toolbar" id="ranked-tools"></div>
<div class="scroll tall" tabindex="0" role="region" aria-label="Table of heads">
<table id="heads" class="cards" role="table"></table></div>
<div class="more" id="ranked-more"></div>
</section>"""
_SUMS = """<section id="sums" aria-labelledby="sums-title">
<h2 id="sums-title">What blocks and layers add up to</h2>
<p class="hint" id="sums-hint"></p>
<div class="sums" id="sums-charts"></div>
</section>"""


def _weights(heatmap: Heatmap) -> str:
    score = _escape(str(heatmap.attributes.get("score", "score")))
    return (
        '<section id="same-weights" aria-labelledby="weights-title">'
        '<h2 id="weights-title">Where both tasks use the same weights</h2>'
        '<p class="hint">A second question: not what a step does, but where the two tasks work. '
        f"Mean {score} says where both tasks' gradients are large, overlap whether that is in the same weights, their "
        "scale apart. Near a task's optimum the second order of a step decides, and interference resembles it. Its "
        f"findings have words and signs of their own. {_escape(significance(heatmap).replace('<=', '≤'))}.</p>"
        f'<ul class="legend-marks">{_weights_findings(heatmap)}</ul>'
        '<div class="toolbar" id="weights-tools"></div></section>'
    )


def _weights_findings(heatmap: Heatmap) -> str:
    """What each finding of the tests of scores says."""
    return "".join(
        f'<li><i class="mark-{finding.side or "null"}" aria-hidden="true">{finding.glyph}</i> <b>{finding.name}</b>: '
        f"{_escape(finding.meaning)}</li>"
        for finding in counts(heatmap)
    )


def _legend(heatmap: Heatmap) -> str:
    """What the marks say where an effect is shown, and how effects were tested."""
    numbers = {optimizer: effect_counts(heatmap, optimizer) for optimizer in reversed(OPTIMIZERS)}
    items = [
        f'<li><i class="mark-{finding.side}" aria-hidden="true">{finding.glyph}</i> <b>{finding.name}</b> '
        f"{', '.join(f'{of[finding]:,} by {optimizer}' for optimizer, of in numbers.items())}: "
        f"{_escape(finding.meaning)}</li>"
        for finding in EFFECTS
    ]
    level = f"{heatmap.fdr_alpha:g}"
    items.append(
        f"<li>Marked: q ≤ {level} in a block. Coloured: also family-wise p ≤ {level} over all heads; white: q alone."
        "</li>"
        "<li>Grey: the layer has no such head.</li>"
    )
    said = " ".join(how_effects_were_tested(heatmap))
    return (
        f'<ul class="legend-marks" id="effect-marks">{"".join(items)}</ul>'
        f'<p class="hint" id="effects-tested"><b>How effects were tested.</b> {prose(said)}</p>'
    )


def effects_data(heatmap: Heatmap) -> dict[str, Any] | None:
    """What the script needs beside the blocks' arrays; None where no effects are known."""
    verdict = heatmap.verdict
    if verdict is None:
        return None
    return {
        "step": verdict.step,
        "samples": heatmap.counted.sizes,
        "level": heatmap.fdr_alpha,
        "practical": verdict.practical,
        "findings": [_finding(heatmap, place) for place in range(len(EFFECTS))],
        "totals": {optimizer: _totals(heatmap, optimizer) for optimizer in OPTIMIZERS},
    }


def _finding(heatmap: Heatmap, place: int) -> dict[str, Any]:
    finding = EFFECTS[place]
    numbers = {optimizer: effect_counts(heatmap, optimizer)[finding] for optimizer in OPTIMIZERS}
    return {"name": finding.name, "side": finding.side, "mark": finding.mark, "glyph": finding.glyph} | {
        "number": numbers
    }


def _totals(heatmap: Heatmap, optimizer: str) -> dict[str, Any]:
    return {
        "all": _ends(heatmap.total_effect(optimizer)),
        "blocks": [_ends(heatmap.total_effect(optimizer, block)) for block in heatmap.blocks],
        "layers": [_ends(heatmap.total_effect(optimizer, layer=layer)) for layer in heatmap.layers],
    }


def _ends(total: Total) -> list[float | None]:
    """Change and both ends of its interval."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in (total.change, *total.interval)]


def block_effects(heatmap: Heatmap, block: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Optimizer and arrays [layer, native head] of one block: numbers, and codes of what heads show."""
    for optimizer in OPTIMIZERS if heatmap.has_tested_effects else ():
        arrays = effects_of(heatmap, block, optimizer)
        yield (
            optimizer,
            {
                "change": arrays["change"],
                "width": arrays["ci_high"] - arrays["change"],
                **{f"curvature_{task}": _curvature(heatmap, block, optimizer, task) for task in TASKS},
                "q": arrays["q_value"],
                "p_max": arrays["p_max"],
                "found": found_by_change(heatmap, block, optimizer),
                "family": is_family_wise_change(heatmap, block, optimizer),
            },
        )


def _curvature(heatmap: Heatmap, block: str, optimizer: str, task: str) -> Floats:
    """The curvature that harm takes; worked out from influences where a file does not hold it yet."""
    arrays, name = effects_of(heatmap, block, optimizer), f"curvature_along_{task}"
    if name in arrays or heatmap.influences is None:
        return arrays[name]
    of_optimizer = heatmap.influences[block][:, :, OPTIMIZERS.index(optimizer)]
    return curvatures_along(of_optimizer, heatmap.counted.a if task == "a" else heatmap.counted.b)


def prose(text: str) -> str:
    """Escaped, with signs and minus as they are printed."""
    return _MINUS.sub("−", _RATE.sub("learning rate × number of steps", _escape(text))).replace("&lt;=", "≤")


def _escape(text: str) -> str:
    return html.escape(text)
