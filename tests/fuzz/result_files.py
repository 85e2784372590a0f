"""Small valid files of every kind of result: a tested heatmap, the partial files of two ranks, and their metadata.

Each is also there as older tools would have written it: HDF5's first format has no checksums on its own structure.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from qkov_dist.commands.merge import merge_folder
from qkov_dist.config import to_dict
from qkov_dist.config_file import from_dict
from qkov_dist.distributed.world import Alone
from qkov_dist.results.heatmap_data import SampleTable
from qkov_dist.results.metadata import HeatmapMetadata, LayerAxes, to_json
from qkov_dist.results.partial_schema import BlockPartial, PartialHeader
from qkov_dist.results.partials import PartialWriter, partial_path
from qkov_dist.scoring.fisher_sums import FISHER_COLUMNS
from qkov_dist.scoring.influence_records import no_influences
from qkov_dist.scoring.own_share_records import no_shares

LAYERS = (1, 4)
HEADS = {"Q": (0, 1), "K": (0,), "V": (0,), "O": (0, 1)}
NUM_A, NUM_B = 3, 2
PARTIALS = ("partial_rank00000.h5", "partial_rank00001.h5")
HEATMAP = "heatmap.h5"
LAYER_FILE = "partial_rank00000.layers/layer_0001.h5"  # of a run that goes on


def _config() -> dict[str, Any]:
    tasks = [{"name": name, "path": f"{name}.jsonl"} for name in ("math", "code")]
    statistics = {"permutations": 9}
    output = {"pairs": "all"}
    return to_dict(from_dict({"model": {"path": "m"}, "tasks": tasks, "statistics": statistics, "output": output}))


def metadata() -> HeatmapMetadata:
    """Two layers with all blocks, five samples."""
    tables = tuple(
        SampleTable(
            tuple(f"{task}/é-{n}" for n in range(count)),
            np.arange(3, 3 + count),
            np.linspace(0.5, 2.5, count),
            tuple(f"λ <b> {n}" for n in range(count)),
        )
        for task, count in (("a", NUM_A), ("b", NUM_B))
    )
    attributes = {
        "run_id": "run-1",
        "config": _config(),
        "versions": {"torch": "2.6"},
        "seeds": {"statistics": 0},
        "score": "interference",
        "estimator": "ema",
        "scope": "pooled",
        "notes": ["layer 3 (mamba) is not scored"],
    }
    layers = tuple(LayerAxes(layer, 2, (0, 1), HEADS) for layer in LAYERS)
    return HeatmapMetadata(("math", "code"), layers, tables, True, attributes)  # type: ignore[arg-type]


@functools.cache
def results() -> dict[str, bytes]:
    """File name -> content: a heatmap as merged, the partial files that it is the sum of, and a finished layer."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(2):
            with PartialWriter(partial_path(folder, rank), header(rank)) as writer:
                for layer in LAYERS:
                    writer.write_layer(layer, *_layer(layer, rank))
                    if (folder / LAYER_FILE).exists():
                        found[LAYER_FILE] = (folder / LAYER_FILE).read_bytes()
        merge_folder(folder, world=Alone())
        return found | {name: (folder / name).read_bytes() for name in (HEATMAP, *PARTIALS)}


def header(rank: int, world_size: int = 2) -> PartialHeader:
    """Whose scores a partial file has."""
    num = NUM_A + NUM_B
    return PartialHeader("run-1", rank, world_size, num, num, LAYERS, True, to_json(metadata()))


def _layer(layer: int, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng, num = np.random.default_rng((layer, rank)), NUM_A + NUM_B
    blocks = {
        block: BlockPartial(
            np.array(heads),
            rng.gamma(1.0, size=(len(heads), num, num)).astype(np.float32),
            rng.uniform(1, 2, (len(heads), len(FISHER_COLUMNS))),
            rng.normal(size=no_influences(len(heads), num).shape),
            rng.uniform(1, 2, size=no_shares(len(heads), num).shape),
        )
        for block, heads in HEADS.items()
    }
    return blocks, {"O_bias": rng.gamma(1.0, size=(num, num)).astype(np.float32)}


@functools.cache
def old_results() -> dict[str, bytes]:
    """The same in HDF5's first format."""
    return {name: rewritten(content, "earliest") for name, content in results().items()}


def rewritten(content: bytes, version: str) -> bytes:
    """A file with the same objects in another version of the format."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source.h5", Path(name) / "target.h5"
        source.write_bytes(content)
        with h5py.File(source) as old, h5py.File(target, "w", libver=(version, "latest")) as new:
            for key in old:
                old.copy(key, new)
            for key, value in old.attrs.items():
                new.attrs[key] = value
        return target.read_bytes()
