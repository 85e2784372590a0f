"""A finished run handed to experiment trackers: TensorBoard, Weights & Biases, MLflow, through accelerate's classes.

They are started when everything is written, by rank 0 alone, and one that fails costs a warning: a run of hours does
not hang on a network. Whether each is installed is asked before the first batch.

No text of a sample goes along (``shareable``). Where results go is for the trackers' own environment variables to say
(``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``); TensorBoard's files lie in the
run's folder.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.values import readable

from .logged import Found, pictures, scalars, settings, words
from .shareable import pages_of, without_texts
from .write import PAGE_FILE

PROJECT = "qkov"
PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "mlflow-skinny")}
LOGIN_S = 60  # that wandb waits at a terminal for an answer
MOST_AT_ONCE = 500  # numbers; mlflow's server takes no more than a thousand


def check_installed(names: Collection[str], where: str = "output.report_to") -> None:
    """Refuse a tracker whose library is not there; nothing is loaded.

    Raises:
        QkovError: naming the package to install.
    """
    for name in names:
        if not any(map(_is_installed, PACKAGES[name])):
            raise QkovError(
                where,
                expected=f"{name} to be installed",
                got="no such package",
                remedy=f"Run `pip install {name}`, or leave {name} out.",
            )


def _is_installed(package: str) -> bool:
    """By its metadata: a folder ``wandb`` of earlier runs can be imported, too."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Handed:
    """All that a tracker is given, in forms that every tracker takes.

    Attributes:
        folder: The run's.
        page: Its page, without samples' texts, as a file that is gone afterwards.
        title: Model, tasks and numbers of samples.
        words: The answer and the warnings.
        settings: The configuration, flat.
        numbers: By name.
        pictures: PNGs by name.
    """

    folder: Path
    page: Path
    title: str
    words: str
    settings: Mapping[str, str | int | float | bool]
    numbers: Mapping[str, float]
    pictures: Mapping[str, bytes]


def report_to(
    names: Sequence[str],
    run: Found,
    folder: Path,
    say: Callable[[str], object],
    measured: Mapping[str, float] | None = None,
) -> None:
    """Hand a finished run to trackers; one that fails is a warning.

    Args:
        names: Of the trackers.
        run: What was found.
        folder: Where it lies.
        say: Takes a line about each tracker.
        measured: What the run took, by name.
    """
    try:
        drawn = pictures(run)
    except ModuleNotFoundError as error:
        say(f"no figures: {error.name} is not installed. Run: pip install 'qkov-dist[report]'")
        drawn = {}
    bare, numbers = without_texts(run), {**scalars(run), **(measured or {})}
    with TemporaryDirectory() as place:
        page = Path(place) / PAGE_FILE
        page.write_bytes(pages_of(bare, alone=True)[PAGE_FILE])
        _hand(names, Handed(folder, page, run.title, words(bare), settings(bare), numbers, drawn), say)


def _hand(names: Sequence[str], handed: Handed, say: Callable[[str], object]) -> None:
    for name in names:
        try:
            with _process_alone():
                place = _TRACKERS[name](handed)
        except Exception as error:  # whatever a library or a network has
            got = readable(" ".join(str(error).split())) or "nothing more is said"
            say(
                f"warning: {name}: the run was not reported ({type(error).__name__}: {got}). Its results are written; "
                f"to try again: qkov report {handed.folder} --report-to {name}"
            )
        else:
            say(f"reported to {name}: {place}")


@contextmanager
def _process_alone() -> Iterator[None]:
    """Have accelerate, which asks for its state before it logs, see one process, whatever launcher started it.

    A state that is there already is used; one that is made here is gone afterwards.
    """
    from accelerate.state import PartialState
    from accelerate.utils import clear_environment

    if PartialState._shared_state:
        yield
        return
    with clear_environment():  # else it would wait for ranks that have ended
        PartialState(cpu=True)
    try:
        yield
    finally:
        PartialState._reset_state()


@contextmanager
def _started(tracker: Any, handed: Handed) -> Iterator[Any]:
    """Start a tracker, give it settings and numbers; it is finished after the block."""
    tracker.main_process_only = False  # this is rank 0
    tracker.start()
    try:
        tracker.store_init_configuration(dict(handed.settings))
        numbers = [*handed.numbers.items()]
        for start in range(0, len(numbers), MOST_AT_ONCE):
            tracker.log(dict(numbers[start : start + MOST_AT_ONCE]), step=0)
        yield tracker
    finally:
        tracker.finish()


def _to_tensorboard(handed: Handed) -> str:
    from accelerate.tracking import TensorBoardTracker

    with _started(TensorBoardTracker("tensorboard", handed.folder), handed) as tracker:
        tracker.log({"answer": handed.words, "folder": str(handed.folder)}, step=0)
        tracker.log_images(_as_arrays(handed.pictures), step=0, dataformats="NHWC")
    return f"tensorboard --logdir {handed.folder / 'tensorboard'}"


def _to_wandb(handed: Handed) -> str:
    import wandb
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    options = {"name": handed.title, "dir": str(handed.folder), "notes": handed.words}
    begun = WandBTracker(project, settings=wandb.Settings(login_timeout=LOGIN_S), **options)
    with _started(begun, handed) as tracker:
        tracker.log_images(_as_arrays(handed.pictures), step=0)
        artifact = wandb.Artifact(f"report-{handed.settings['run_id'] or 'of-a-run'}", type="report")
        artifact.add_file(str(handed.page))
        tracker.run.log_artifact(artifact)
        return str(tracker.run.url or tracker.run.dir)


def _to_mlflow(handed: Handed) -> str:
    import mlflow
    from accelerate.tracking import MLflowTracker

    begun = MLflowTracker(PROJECT, run_name=handed.title, description=handed.words)
    with _started(begun, handed) as tracker:
        with TemporaryDirectory() as folder:
            for name, content in handed.pictures.items():
                (Path(folder) / f"{name}.png").write_bytes(content)
            tracker.log_artifacts(folder, "figures")
        tracker.log_artifact(str(handed.page))
        return f"run {tracker.active_run.info.run_id} at {mlflow.get_tracking_uri()}"


_TRACKERS: Mapping[str, Callable[[Handed], str]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}


def _as_arrays(drawn: Mapping[str, bytes]) -> dict[str, Any]:
    """Name -> uint8 [1, height, width, 3]."""
    if not drawn:
        return {}
    from matplotlib.image import imread

    images = {name: imread(io.BytesIO(content), format="png") for name, content in drawn.items()}
    return {name: (image[None, ..., :3] * 255).round().astype("uint8") for name, image in images.items()}
