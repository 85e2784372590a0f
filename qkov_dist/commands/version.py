"""What ``qkov --version`` prints: which releases are installed. None of them is loaded."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

STANDS_ON = ("torch", "transformers")


def version() -> str:
    """One line: ours, and in brackets what decides how models compute."""
    known = ", ".join(f"{name} {_installed(name)}" for name in STANDS_ON)
    return f"qkov-dist {_installed('qkov-dist')} (Python {platform.python_version()}, {known})"


def _installed(name: str) -> str:
    try:
        return installed(name)
    except PackageNotFoundError:
        return "not installed"
