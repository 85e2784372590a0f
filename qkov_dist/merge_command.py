"""`qkov merge`: the partial files of a folder -> heatmap.h5, after the fact, without the model or a process group.

Partial scores add up, so any number of processes may share the files: each adds its own, and where ``mpirun`` started
several, their sums are added layer by layer. What the result says of samples and settings is in every partial file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from .combine import Read
from .config import RunConfig
from .config_file import from_dict
from .errors import QkovError
from .finish import HEATMAP_FILE, finish, statistics_of
from .frame import Frame, FrameLayer, from_json
from .hdf5_write import refuse_other_run
from .job import Say
from .kinds import written
from .merge import add_layers
from .partial_schema import LayerPartial, PartialHeader
from .partials import Partial, list_partials, read_partial
from .progress import Voice
from .results import Heatmap
from .stored_tests import tests_to_keep
from .world import Alone, World, same_on_all, together

NUM_LISTED = 8
SAME = ("run_id", "world_size", "cut", "layers", "pooled", "n_left", "n_right")


@dataclass(frozen=True)
class Source:
    """What one partial file says of itself: whose scores it has, and which layers are there."""

    path: str
    header: PartialHeader
    complete: tuple[int, ...]

    @property
    def missing(self) -> list[int]:
        """Layers that its rank did not finish."""
        return [layer for layer in self.header.layers if layer not in self.complete]


@dataclass(frozen=True)
class Gathered:
    """All partial files of one run.

    Attributes:
        sources: All of them, by rank.
        mine: Those that this process adds.
        frame: Axes, samples and provenance.
    """

    sources: tuple[Source, ...]
    mine: tuple[Partial, ...]
    frame: Frame

    @property
    def run_id(self) -> str:
        """The run that wrote them."""
        return self.sources[0].header.run_id

    def reader(self, world: World) -> Read:
        """Reads one layer's sum over this process's files, one file in memory at a time; an error reaches all."""

        def read(layer: FrameLayer) -> LayerPartial:
            parts = (partial.read_layer(layer.layer) for partial in self.mine)
            return reduce(lambda total, part: add_layers([total, part]), parts, LayerPartial({}, {}))

        return lambda layer: together(world, lambda: read(layer))


def merge_folder(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    world: World | None = None,
    say: Say = print,
    show_progress: bool = True,
    keep_tests: bool | None = None,
) -> Heatmap | None:
    """Add up the partial files of a folder, test the sum as its run would have, and write it.

    Args:
        folder: Where the partial files are.
        output: The file to write; ``heatmap.h5`` in ``folder`` by default.
        world: The processes that share the files; all of them call this alike.
        say: Takes one line about each stage, on rank 0.
        show_progress: Show a progress bar on stderr, on rank 0.
        keep_tests: Where the file holds tests with other settings than the run's, test with these (True), with the
            run's (False), or refuse (None).

    Returns:
        On rank 0 the heatmap as written; None elsewhere.

    Raises:
        QkovError: as :func:`gather_partials` does; for a damaged layer, and an output that cannot be or is another's.
    """
    world, folder = world or Alone(), Path(folder)
    output = Path(output) if output else folder / HEATMAP_FILE
    gathered = gather_partials(folder, world)
    together(world, lambda: _check_output(output, gathered.run_id))
    num_files, num_layers = len(gathered.sources), len(gathered.frame.layers)
    voice = Voice.of_rank(world.rank, world.size, say, show_progress=show_progress)
    voice.say(f"adding {num_files} partial file{'s' * (num_files > 1)} of run {gathered.run_id}, {num_layers} layers")
    config = together(world, lambda: _config_of(gathered.frame))
    asked, score = statistics_of(config), str(gathered.frame.attributes["score"])
    tests = together(world, lambda: tests_to_keep(output, asked, score, keep_tests))
    return finish(gathered.frame, gathered.reader(world), config, output, world, voice, tests)


def gather_partials(folder: Path, world: World) -> Gathered:
    """Find the partial files of a folder and share them among the processes. No scores are read.

    Raises:
        QkovError: on every rank, for files that are missing, damaged, unfinished or of different runs.
    """
    paths = together(world, lambda: list_partials(folder))
    same_on_all(world, str(folder), {"partial files": [path.name for path in paths]})
    mine = together(world, lambda: tuple(read_partial(path) for path in paths[world.rank :: world.size]))
    sources = _sources(world, mine)
    together(world, lambda: check_sources(folder, sources))
    frame = world.gather(mine[0].header.extra if world.rank == 0 else None)[0]
    return Gathered(sources, mine, together(world, lambda: _frame(frame, sources[0])))


def _frame(raw: Mapping[str, Any], source: Source) -> Frame:
    """The frame in a partial file, proved to be that of its scores."""
    frame, header = from_json(raw, source.path), source.header
    num_a, num_b = map(len, frame.samples)
    told = (num_a + num_b, num_a + num_b) if frame.pooled else (num_a, num_b)
    if (*told, frame.pooled) != (header.n_left, header.n_right, header.pooled):
        raise QkovError(
            source.path,
            expected=f"a description of the samples of {header.n_left} x {header.n_right} scores",
            got=f"one of {told[0]} x {told[1]}",
            remedy="Use a partial file that `qkov run` wrote.",
        )
    return frame


def check_sources(folder: Path, sources: Sequence[Source]) -> None:
    """Prove that partial files are all those of one run, every rank and layer once.

    Raises:
        QkovError: for no file at all, another run among them, a rank that is missing or there twice, or missing layers.
    """
    if not sources:
        raise QkovError(
            str(folder),
            expected="partial files partial_rankNNNNN.h5 with finished layers",
            got="none",
            remedy="Give the output.dir of a `qkov run` with output.partials=true.",
        )
    first = sources[0]
    for source in sources:
        for name in SAME:
            wanted, found = getattr(first.header, name), getattr(source.header, name)
            if wanted != found:
                raise QkovError(
                    f"{source.path}: {name}",
                    expected=f"{wanted!r}, as in {Path(first.path).name}",
                    got=repr(found),
                    remedy="Keep the partial files of one run, started with one number of ranks, in a folder.",
                )
    _check_ranks(folder, [source.header.rank for source in sources], first.header.world_size)
    if unfinished := [source for source in sources if source.missing]:
        listed = [f"layers {source.missing} of rank {source.header.rank}" for source in unfinished[:NUM_LISTED]]
        more = f", and of {len(unfinished) - NUM_LISTED} more ranks" if len(unfinished) > NUM_LISTED else ""
        raise QkovError(
            str(folder),
            expected=f"all {len(first.header.layers)} layers from each of {len(sources)} ranks",
            got=f"no {', '.join(listed)}{more}",
            remedy="`qkov run` with the same configuration and output.resume=true goes on from what is there.",
        )


def _check_ranks(folder: Path, ranks: Sequence[int], world_size: int) -> None:
    missing = sorted(set(range(world_size)) - set(ranks))
    twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
    if missing or twice:
        raise QkovError(
            str(folder),
            expected=f"one partial file of each of {world_size} ranks",
            got=f"none of ranks {written(missing)}" if missing else f"two of ranks {twice}",
            remedy="Collect them from the nodes' own disks, or run `qkov run` with the same configuration and as many "
            "ranks: it goes on from what is there."
            if missing
            else "Remove the copies: each would count twice.",
        )


def _sources(world: World, mine: Sequence[Partial]) -> tuple[Source, ...]:
    """All processes' files, by the rank that wrote them."""
    described: list[list[Any]] = [[str(p.path), asdict(replace(p.header, extra={})), list(p.complete)] for p in mine]
    sources = [
        Source(path, PartialHeader(**{**header, "layers": tuple(header["layers"])}), tuple(complete))
        for part in world.gather(described)
        for path, header, complete in part
    ]
    return tuple(sorted(sources, key=lambda source: (source.header.rank, source.path)))


def _check_output(output: Path, run_id: str) -> None:
    """Refuse before anything is added what could not be written after."""
    refuse_other_run(output, run_id)
    if not output.parent.is_dir():
        remedy = "Make the folder, or choose another --output."
        raise QkovError(str(output), expected="a file in an existing folder", got="none", remedy=remedy)


def _config_of(frame: Frame) -> RunConfig:
    try:
        return from_dict(frame.attributes["config"], stored=True)
    except KeyError:
        remedy = "Use partial files that `qkov run` wrote."
        raise QkovError("partial files", expected="the run's configuration", got="none", remedy=remedy) from None
    except QkovError as error:
        raise error.within("configuration in the partial files") from error
