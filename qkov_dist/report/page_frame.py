"""What every page of a report is: one file that asks nobody for anything.

Template, style and script lie in ``assets``; numbers travel as base64 of little-endian numbers, text as JSON in a data
block. A page's Content-Security-Policy allows its own style and script by their hashes and nothing else: no network, no
other script, whatever a sample's text says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

import numpy as np

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_MARKER = '<meta name="qkov-run" content="{}">'


def run_marker(run_id: str) -> str:
    """The tag by which a page tells which run it shows."""
    return _MARKER.format(html.escape(run_id))


def page_of(
    template: str, run_id: str, style: Iterable[str], script: Iterable[str], data: Any, parts: Mapping[str, str]
) -> str:
    """A page.

    Args:
        template: The name of its asset.
        run_id: The run that it shows.
        style: Names of assets, in their order.
        script: The same.
        data: What the script draws: JSON values.
        parts: Markup by the names of places in the template.
    """
    looks, code = _assets(style), _assets(script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(code)}'",
            f"style-src '{_hash(looks)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    shown = {
        **parts,
        "policy": policy,
        "marker": run_marker(run_id),
        "style": looks,
        "data": _data_block(data),
        "script": code,
    }
    return _PLACE.sub(lambda place: shown[place[1]], _assets((template,)))


def base64_of(values: Any, dtype: str) -> str:
    """Numbers as they travel."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def round_to_float32(number: float) -> float:
    """The shortest decimal number that float32 tells from its neighbours; one beyond float32 stays as it is."""
    with np.errstate(over="ignore"):
        rounded = float(str(np.float32(number)))
    return rounded if np.isfinite(rounded) else number


def _data_block(data: Any) -> str:
    """JSON that no HTML parser takes for a tag or a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _assets(names: Iterable[str]) -> str:
    folder = files(__package__) / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
