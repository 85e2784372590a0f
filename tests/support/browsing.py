"""What tests of a page in a real browser share: what it needs, and reading what is drawn."""

from __future__ import annotations

import shutil

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1360,1000",
)
IN_A_BROWSER = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
    ),
]


def set_screen(browser, width: int, height: int, *, scheme: str = "light", is_phone: bool = False) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def errors(browser) -> list[str]:
    """What the browser's console complained about since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def middle(page, block: int, layer: int, head: int) -> list[float]:
    """Where a cell's middle lies on its canvas."""
    script = "const [x, y, w, h] = boxOf(MAPS[arguments[0]], arguments[1], arguments[2]); return [x + w / 2, y + h / 2]"
    return page.execute_script(script, block, layer, head)


def pixel(page, block: int, layer: int, head: int, at: float = 0.15) -> list[int]:
    """A cell's colour at a share of its width and height; marks lie in the middle."""
    script = """
      const [x, y, w, h] = boxOf(MAPS[arguments[0]], arguments[1], arguments[2]);
      const context = MAPS[arguments[0]].canvas.getContext("2d");
      return [...context.getImageData(x + w * arguments[3], y + h * arguments[3], 1, 1).data].slice(0, 3)"""
    return page.execute_script(script, block, layer, head, at)


def text_of(page, selector: str) -> str:
    return page.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def number(text: str) -> float:
    return float(text.replace("−", "-"))
