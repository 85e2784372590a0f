"""A rank as torchrun starts it, and starts it again: the first time, one of them dies at a step of a phase.

torchrun --nproc-per-node 2 --max-restarts 1 restarted.py NOTES VICTIM PHASE STEP run CONFIG.yaml ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moments import Aim, take_notes
from processes import wait_shortly


def notes_of(folder: Path, start: int, rank: int) -> Path:
    """Where a rank notes what it does."""
    return folder / f"start{start}-rank{rank}.txt"


def main() -> int:
    folder, victim, phase, step, *arguments = sys.argv[1:]
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
    from qkov_dist.cli import main as qkov

    wait_shortly()
    dies = start == 0 and rank == victim
    take_notes(notes_of(Path(folder), start, int(rank)), Aim(phase, int(step)) if dies else None)
    return qkov(arguments)


if __name__ == "__main__":
    sys.exit(main())
