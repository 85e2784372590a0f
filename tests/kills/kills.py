"""Random kills: runs of one process and of several ranks are killed again and again, resumed, and must end right.

Kills are of one rank or of the whole job, by SIGKILL or SIGTERM, at moments drawn uniformly over the time of a run, or
over the steps of one of its phases. After each, what is on disk must be readable, whole or absent, and no less than
before; no finished layer may be scored again; the ranks that are left must end and name the dead one. In the end the
heatmap must be bit for bit that of an undisturbed run on one process, but for rounding (``rounding.passes``) under
ranks, with nothing left over.

    bash launch/kills.sh                                       # at least 120 kills, as many with each cut
    bash launch/kills.sh --kills 1000 --seed 7 --cuts fsdp     # longer, elsewhere
    bash launch/kills.sh --seed 7 --story fsdp-12              # one story again
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from forks import forking
from moments import BETWEEN, PHASES
from scene import CUTS, Scene
from stories import Story, Tally
from tabulate import tabulate

Say = Callable[[str], object]


def play_campaign(scene: Scene, seed: int, cuts: Sequence[str], num_kills: int, say: Say) -> dict[str, Tally]:
    """Play stories of each cut until it has had its share of the kills."""
    tallies = {}
    for place, cut in enumerate(cuts):
        share = num_kills * (place + 1) // len(cuts) - num_kills * place // len(cuts)
        tallies[cut], number = Tally(), 0
        while tallies[cut].num_kills < share:
            play_story(scene, seed, cut, number, tallies[cut], say)
            number += 1
    return tallies


def play_story(scene: Scene, seed: int, cut: str, number: int, tally: Tally, say: Say) -> None:
    """Play one story and add it to a tally; faults come with what plays it again."""
    story = Story(scene, seed, cut, number)
    tally.add(story.play())
    say(f"{story.name}: {tally.num_kills} kills with {cut} so far")
    for line in story.told:
        say(f"    {line}")
    if story.tally.faults:
        again = f"--seed {seed} --story {story.name}; kept in {story.out}"
        tally.faults[-len(story.tally.faults) :] = [f"{fault} ({again})" for fault in story.tally.faults]


def page(tallies: Mapping[str, Tally]) -> str:
    """The counts as two tables."""
    columns = {
        "kills": lambda tally: tally.num_kills,
        "of one rank": lambda tally: _count(tally, 2, "one rank"),
        "SIGTERM": lambda tally: _count(tally, 1, "SIGTERM"),
        "missed": lambda tally: tally.missed,
        "stories": lambda tally: tally.stories,
        "attempts": lambda tally: tally.attempts,
        "resumes": lambda tally: tally.resumes,
        "on other ranks": lambda tally: tally.elsewhere,
        "layers scored": lambda tally: tally.scored,
        "again after a kill": lambda tally: tally.again,
        "largest deviation": lambda tally: f"{tally.worst:.1e}",
        "faults": lambda tally: len(tally.faults),
    }
    rows = [[cut, *(column(tally) for column in columns.values())] for cut, tally in tallies.items()]
    phases = [*PHASES, BETWEEN]
    by_phase = [[phase, *(_count(tally, 0, phase) for tally in tallies.values())] for phase in phases]
    totals = [[*row, sum(row[1:])] for row in by_phase]
    first = tabulate(rows, ["cut", *columns], tablefmt="github", disable_numparse=True)
    second = tabulate(totals, ["killed in", *tallies, "all"], tablefmt="github")
    return f"{first}\n\n{second}"


def _count(tally: Tally, place: int, value: str) -> int:
    return sum(count for kind, count in tally.kills.items() if kind[place] == value)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=120, help="how many at least (120)")
    made.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    made.add_argument("--cuts", type=_cuts, default=tuple(CUTS), help=f"any of {','.join(CUTS)}, with commas (all)")
    made.add_argument("--story", help="play this one alone, such as ddp-3, and say what happens")
    made.add_argument("--folder", type=Path, help="where runs are; a temporary folder, kept where something failed")
    return made


def _cuts(text: str) -> tuple[str, ...]:
    cuts = tuple(text.split(","))
    if unknown := set(cuts) - set(CUTS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(CUTS)}, got {','.join(sorted(unknown))}")
    return cuts


def main() -> int:
    options = parser().parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="qkov-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    scene = Scene(forking(), folder)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if options.story:
        cut, _, number = options.story.rpartition("-")
        tallies = {cut: Tally()}
        play_story(scene, options.seed, cut, int(number), tallies[cut], say)
    else:
        tallies = play_campaign(scene, options.seed, options.cuts, options.kills, say)
    print(page(tallies))
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print("".join(f"\nFAULT: {fault}" for fault in faults), end="\n" if faults else "")
    if not faults and options.folder is None:
        shutil.rmtree(folder)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
