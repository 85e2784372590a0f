"""`qkov merge` of ever more partial files: time grows with their number, memory and open files do not.

A tiny model's samples are captured once, and their scores divided among ranks that are not there: each leaves the
partial file that a rank leaves, with an equal share of every weight's elements. They are then merged by a process of
its own that may have no more than --open files open. The sum must be bit for bit that of a plain loop over the files,
and as near to the scores of one process as another order of a sum allows.

    PYTHONPATH=.:tests/support python tests/studies/many_files.py [--files 64 256 1024 --samples 24 --open 64]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from owners import flat_owner
from rounding import SCORES
from samples import mixed_samples, write_task
from tabulate import tabulate
from zoo import TINY, VOCAB

from qkov_dist import load_heatmap
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.config_file import from_dict
from qkov_dist.distributed.world import Alone
from qkov_dist.job import Job, prepare
from qkov_dist.results.heatmap_file import HEATMAP_FILE
from qkov_dist.results.partials import PartialWriter, list_partials, partial_path, read_partial
from qkov_dist.results.reduce import layer_partial
from qkov_dist.run import run
from qkov_dist.scoring.engine import score_layer


class Files:
    """One run of one process, and the partial files that any number of ranks would leave of it.

    Args:
        folder: Where all of it is.
        num_samples: Of each task.
    """

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.folder = folder
        TINY["llama"].build().save_pretrained(folder / "model")
        for task, seed in (("a", 1), ("b", 2)):
            write_task(folder / f"{task}.jsonl", mixed_samples(num_samples, VOCAB, seed=seed))
        raw = {
            "model": {"path": str(folder / "model")},
            "tasks": [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in "ab"],
            "statistics": {"permutations": 20},
            "output": {"dir": str(folder / "one"), "pairs": "all"},
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(from_dict(raw))
            self._job = prepare(from_dict(raw), Alone())
        self._header = read_partial(partial_path(folder / "one", 0)).header

    def write(self, num_ranks: int) -> Path:
        """The folder with the files of so many ranks."""
        job, folder = self._job, self.folder / f"of-{num_ranks}"
        with closing(_captured(job)) as store:
            for rank in range(num_ranks):
                header = replace(self._header, rank=rank, world_size=num_ranks)
                mine = job.scoring.tile_plan(job.layout, flat_owner(rank, num_ranks))
                with PartialWriter(partial_path(folder, rank), header) as writer:
                    for layer in mine.layers:
                        part = layer_partial(score_layer(layer, store, job.roles(), job.settings()))
                        writer.write_layer(layer.layer, part.blocks, part.shared)
        return folder

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with the heatmap in a folder."""
        merged, one = load_heatmap(folder / HEATMAP_FILE), load_heatmap(self.folder / "one" / HEATMAP_FILE)
        added = {block: np.zeros_like(merged.pooled[block]) for block in one.blocks}
        for partial in map(read_partial, list_partials(folder)):
            for place, layer in enumerate(merged.layers):
                for block, found in partial.read_layer(layer).blocks.items():
                    for head, scores in zip(found.heads, found.scores, strict=True):
                        added[block][place, head] += scores
        faults = []
        for block in one.blocks:
            if not np.array_equal(merged.pooled[block], added[block]):
                faults.append(f"{block}: the heatmap is not the sum of the files")
            off = np.abs(merged.pooled[block] - one.pooled[block]).max() / np.abs(one.pooled[block]).max()
            if not off < SCORES:
                faults.append(f"{block}: off one process's scores by {off:.1e} of the largest")
        return faults


def _captured(job: Job) -> FactorStore:
    """The factors of all samples."""
    store = FactorStore(2**30, lengths=job.lengths_here, gradients_above=job.gradients_above())
    collection = Collection(store, job.tile_plan.sites, job.objective, batch_tokens=job.batch_tokens)
    for task in job.tasks:
        collection.run(job.loaded.model, task.name, task.samples)
    return store


def merged(folder: Path, most_open: int) -> tuple[int, float, float]:
    """Merge the files of a folder; returns the exit code, seconds and MiB that it took."""
    start = time.monotonic()
    command = [sys.executable, "-m", "qkov_dist", "merge", str(folder), "--quiet"]
    limited = ["bash", "-c", 'ulimit -n "$0" && exec "$@"', str(most_open), *command]
    process = subprocess.Popen(limited, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - start, usage.ru_maxrss / 2**10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--samples", type=int, default=24, help="of each task (24)")
    parser.add_argument("--open", type=int, default=64, help="files that may be open at a time (64)")
    options = parser.parse_args(arguments)
    rows, faults = [], []
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), options.samples)
        for num in options.files:
            place = files.write(num)
            code, seconds, mib = merged(place, options.open)
            found = files.faults(place) if code == 0 else [f"qkov merge ended with {code}"]
            faults += [f"{num} files: {fault}" for fault in found]
            rows.append([num, sum(path.stat().st_size for path in list_partials(place)) / 2**20, seconds, mib])
            print(rows[-1], file=sys.stderr, flush=True)
    print(tabulate(rows, ["files", "MiB", "seconds", "peak, MiB"], tablefmt="github", floatfmt=".1f"))
    print("\n".join(f"FAULT: {fault}" for fault in faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
