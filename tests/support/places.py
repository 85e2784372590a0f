"""Where things lie: the checkout, and the helpers that processes of their own must find, too."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
