"""Imported where all that stays to the end has been imported: it is looked at for garbage no more."""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
