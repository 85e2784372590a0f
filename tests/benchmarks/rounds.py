"""Rounds of contestants: each in a fresh process, one after another, so that a noisy neighbour hits all alike.

A ratio is taken within a round, between processes that ran minutes apart; what is reported is the median of the rounds.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from contestants import perform
from orders import Order, Report
from places import SUPPORT

HERE = Path(__file__).parent
Perform = Callable[[Order], Report]
Round = Mapping[str, Report]


@dataclass(frozen=True)
class Entry:
    """A contestant of a table.

    Attributes:
        key: Its name in the results.
        title: What the table says of it.
        order: What its process is told.
        optional: Whether the table can do without it.
    """

    key: str
    title: str
    order: Order
    optional: bool = False


def play(
    entries: Sequence[Entry], rounds: int, perform_one: Perform, say: Callable[[str], object] = print
) -> list[Round]:
    """Let everybody play once in every round; who failed is not asked again.

    Raises:
        RuntimeError: for a contestant that failed and is not optional.
    """
    played: list[dict[str, Report]] = []
    for number in range(rounds):
        reports: dict[str, Report] = {}
        for entry in entries:
            if played and played[0][entry.key].error:
                reports[entry.key] = played[0][entry.key]
                continue
            report = perform_one(replace(entry.order, output=f"{entry.key}-{number}"))
            if report.error and not entry.optional:
                raise RuntimeError(f"{entry.key}: {report.error}")
            reports[entry.key] = report
            say(f"round {number + 1} of {rounds}: {entry.key}: {report.error or f'{report.seconds:.2f} s'}")
        played.append(reports)
    return played


def in_a_process(order: Order) -> Report:
    """Do what is ordered in a process of its own, or in one for each rank.

    Rank 0 speaks; memory is that of the rank that takes most, what was sent is that of all ranks.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(order.ranks)]
    command = [sys.executable, *(launcher if order.ranks > 1 else []), str(HERE / "contestants.py")]
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(order.threads), "PYTHONPATH": path}
    done = subprocess.run(
        [*command, json.dumps(asdict(order))], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return Report(error=_reason(done.stderr) or f"exit code {done.returncode}")
    reports = list(_reports(done.stdout))
    memory = {name: max(getattr(report, name) for report in reports) for name in ("peak_rss", "growth", "peak_gpu")}
    sent = {"sent": sum(report.found["sent"] for report in reports)} if "sent" in reports[0].found else {}
    return replace(reports[0], **memory, found={**reports[0].found, **sent})


def in_this_process(order: Order) -> Report:
    """Do what is ordered here; an optional library that is missing is reported, any other failure is raised."""
    try:
        return perform(order)
    except ModuleNotFoundError as error:
        return Report(error=str(error))


def ratio(rounds: Sequence[Round], above: str, below: str) -> tuple[float, float, float]:
    """Median, least and most of a ratio over rounds; each side is ``key``, ``key:phase`` or ``key:(cpu)``."""
    each = [_side(one, above) / _side(one, below) for one in rounds]
    return statistics.median(each), min(each), max(each)


def median(rounds: Sequence[Round], side: str) -> float:
    """The median over rounds of ``key``, ``key:phase`` or ``key:(cpu)``."""
    return statistics.median(_side(one, side) for one in rounds)


def peak(rounds: Sequence[Round], key: str, *, gpu: bool = False) -> float:
    """The median over rounds of a process's largest memory, in MiB: the host's or a GPU's."""
    return statistics.median(one[key].peak_gpu if gpu else one[key].peak_rss for one in rounds)


def error(rounds: Sequence[Round], key: str) -> str:
    """Why a contestant has no numbers; empty where it has."""
    return rounds[0][key].error


def plain(rounds: Sequence[Round]) -> list[dict[str, object]]:
    """All reports as JSON values."""
    return [{key: asdict(report) for key, report in one.items() if not report.error} for one in rounds]


def _side(one: Round, side: str) -> float:
    """Seconds of a whole job, its processor time, or what it found by that name."""
    key, _, name = side.partition(":")
    report = one[key]
    return {"": report.seconds, "(cpu)": report.cpu_seconds}.get(name) or report.found[name]


def _reports(output: str) -> Iterator[Report]:
    """The ranks' reports, by rank."""
    decoder, opening = json.JSONDecoder(), '{"rank": '  # ranks share one pipe: two reports may stand on one line
    starts = [found.start() for found in re.finditer(re.escape(opening), output)]
    lines = [decoder.raw_decode(output, start)[0] for start in starts]
    for line in sorted(lines, key=lambda line: int(line["rank"])):
        del line["rank"]
        yield Report(**line)


def _reason(stderr: str) -> str:
    """The last line of the first traceback, or of anything."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]*(Error|Exception)\b", line)]
    return (errors[:1] or lines[-1:] or [""])[0][:300]
