"""Restarts by torchrun: one of two ranks is killed in capture, in scoring or in merging, at a random step.

torchrun (``--max-restarts 1``) then starts both again. They must meet, go on, and end with the heatmap of a run that
nobody disturbed, bit for bit. Prints how many tries did; exits with 1 where one did not.

    PYTHONPATH=.:tests/support python tests/kills/restarts.py [--tries 10 --seed 0 --places capture,merging]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from forks import forking
from moments import read_notes
from processes import started, torchrun
from restarted import notes_of
from scene import CUTS, Scene
from tabulate import tabulate
from verdicts import heatmap_faults

from qkov_dist.results.heatmap_file import HEATMAP_FILE

PLACES = {"capture": "capture", "scoring": "scoring", "merging": "adding up"}  # and what its phase is called
CUT, RANKS, VICTIM = "ddp", 2, 1
RANK = Path(__file__).with_name("restarted.py")


def faults_of(scene: Scene, place: str, name: str, draw: random.Random) -> Iterator[str]:
    """What is wrong with one try: a rank dies in its first start."""
    phase, notes, out = PLACES[place], scene.folder / "restarts" / name, scene.out(name)
    notes.mkdir(parents=True)
    step = draw.randint(1, scene.undisturbed(CUT, RANKS).seen[VICTIM].steps[phase])
    words = [*torchrun(RANKS), "--max-restarts", 1, RANK, notes, VICTIM, phase, step]
    words += ["run", scene.config, "--quiet", f"output.dir={out}", *CUTS[CUT].settings]
    with started(*words) as launcher:
        done = launcher.ended()
    (notes / "stderr.txt").write_text(done.stderr)
    if read_notes(notes_of(notes, 0, VICTIM)).told is None:
        yield f"rank {VICTIM} did not come to step {step} of {phase}: {done.stderr[-2000:]}"
    elif not notes_of(notes, 1, 0).exists():
        yield f"there was no second start: {done.stderr[-2000:]}"
    if done.returncode or not (out / HEATMAP_FILE).exists():
        yield f"killed at step {step} of {phase}, ended with {done.returncode}: {done.stderr[-3000:]}"
        return
    undisturbed = scene.out(f"undisturbed-{CUT}-{RANKS}") / HEATMAP_FILE
    yield from heatmap_faults(out / HEATMAP_FILE, undisturbed, same_bits=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, help="of each place (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps (0)")
    parser.add_argument("--places", default=",".join(PLACES), help=f"some of {','.join(PLACES)} (all)")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="qkov-restarts-"))
    scene, rows, failed = Scene(forking(), folder), [], False
    for place in options.places.split(","):
        right, seconds = 0, 0.0
        for number in range(options.tries):
            start = time.monotonic()
            found = [*faults_of(scene, place, f"{place}-{number}", random.Random(f"{options.seed}/{place}/{number}"))]
            seconds += time.monotonic() - start
            right += not found
            print(f"{place} {number}: {found or 'right'}", file=sys.stderr, flush=True)
        rows.append([place, options.tries, right, seconds / options.tries])
        failed |= right < options.tries
    print(tabulate(rows, ["killed in", "tries", "ended right", "seconds a try"], tablefmt="github", floatfmt=".1f"))
    if failed:
        print(f"what was said is in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
