"""The matrix of cuts: every way to cut a model, met by one model of each kind on real ranks (gloo).

Prints a table of how far scores are off dense float64 autograd, of a block's largest score, the worst of all numbers of
ranks; or `refused`, with the message below the table. Ends with exit code 1 where a cell is neither, or where a rank's
part that is counted twice would not have been seen.

    PYTHONPATH=.:tests/support python tests/studies/cuts.py [--only zero3] [--sizes 2 3 4 8]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from cutting import CUTS, FAMILIES, Met, meet, oracle_of, save
from ranks import RankError, pools

SECONDS = 240


def cells(only: str, sizes: Sequence[int], folder: Path) -> dict[tuple[str, str, int], Met | str]:
    """What came of every cut, family and number of ranks; a text where it is none of what may come of it."""
    found: dict[tuple[str, str, int], Met | str] = {}
    oracles = {name: oracle_of(family) for name, family in FAMILIES.items()}
    with pools() as ranks:
        for size in sizes:
            for cut in (name for name in CUTS if only in name and size in CUTS[name].sizes):
                if reason := CUTS[cut].left_out():
                    print(f"{size} ranks, {cut}: left out: {reason}", file=sys.stderr, flush=True)
                    continue
                for number, (name, family) in enumerate(FAMILIES.items()):
                    place = save(family, folder / str(number))
                    try:
                        said = ranks(size).run(meet, cut, name, place, oracles[name], timeout=SECONDS)
                    except RankError as error:
                        said = [str(error).splitlines()[0]]
                    found[cut, name, size] = agreed(said, cut)
                    print(f"{size} ranks, {cut}, {name}: {found[cut, name, size]}", file=sys.stderr, flush=True)
            ranks(size).close()
    return found


def agreed(said: Sequence[Met | str], cut: str) -> Met | str:
    """What all ranks say."""
    worst = max(said, key=lambda met: met.deviation if isinstance(met, Met) else 0.0)
    if isinstance(worst, str):
        return worst
    if len({met.refusal for met in said if isinstance(met, Met)}) > 1:
        return "ranks differ: " + " / ".join(str(met) for met in said)
    return worst if all(isinstance(met, Met) and met.is_right(CUTS[cut]) for met in said) else f"WRONG {said}"


def table(found: dict[tuple[str, str, int], Met | str]) -> list[str]:
    """The lines of the table in Markdown, and the messages of what was refused."""
    notes: dict[str, int] = {}
    lines = [f"| Cut | Ranks | {' | '.join(FAMILIES)} |", f"|---|---|{'---|' * len(FAMILIES)}"]
    met = {cut for cut, _, _ in found}
    for cut in filter(met.__contains__, CUTS):
        sizes = [size for size in CUTS[cut].sizes if any((cut, name, size) in found for name in FAMILIES)]
        row = [_words({n: found[cut, name, n] for n in sizes}, notes) for name in FAMILIES]
        lines.append(f"| {cut} | {', '.join(map(str, sizes))} | {' | '.join(row)} |")
    wrapped = (textwrap.wrap(f"{number}. {text}", 120, subsequent_indent="   ") for text, number in notes.items())
    return [*lines, "", *(line for of_note in wrapped for line in of_note)]


def _words(of_sizes: dict[int, Met | str], notes: dict[str, int]) -> str:
    """A cell: the worst deviation, and at which numbers of ranks it was refused, why."""
    equal = [met.deviation for met in of_sizes.values() if isinstance(met, Met) and not met.refusal]
    words = [f"{max(equal):.0e}"] if equal else []
    refused: dict[int, list[int]] = {}
    for size, met in of_sizes.items():
        if isinstance(met, str):
            words.append(f"ERROR at {size} ({met})")
        elif met.refusal:
            refused.setdefault(notes.setdefault(_as_one(met.refusal, size), len(notes) + 1), []).append(size)
    for note, sizes in refused.items():
        at = f" at {', '.join(map(str, sizes))}" if len(sizes) < len(of_sizes) else ""
        words.append(f"refused{at} [{note}]")
    return "; ".join(words)


def _as_one(refusal: str, size: int) -> str:
    """A message in which the number of ranks and the kind of model are any."""
    for text in (f"the {size} ranks", f"use {size} ", f"got {size}.", f"SP size {size}."):
        refusal = refusal.replace(text, text.replace(str(size), "N"))
    refusal = re.sub(r"got others \(.*?\)", "got others", refusal)
    return re.sub(r"model type '\w+'", "its model type", refusal).removeprefix("MODEL: ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cuts whose name has this in it")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3, 4, 8], help="numbers of ranks")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = cells(options.only, options.sizes, Path(folder))
    print("\n".join(table(found)))
    return int(any(isinstance(met, str) for met in found.values()))


if __name__ == "__main__":
    sys.exit(main())
