"""The cases: who plays, and the table of what they did."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from agreement import METHODS, TOLERANCE
from contestants import FEW, LOOP_SAMPLES
from device import on_gpu
from machine import scoring_bytes, scoring_flops
from material import Facts, read_facts
from orders import Order
from rounds import Entry, Perform, Round, median, peak, plain, play, ratio
from tables import against_bare, loop_with_gradients, machine_table, phase_table, rank_phases, spread
from tabulate import tabulate

Say = Callable[[str], object]
MIB = 2**20
PEERS = ("opacus", "opacus_scores", "kronfluence", "bergson", "bergson_store", "dattri")
LIBRARIES = ("opacus", "kronfluence", "bergson", "dattri-llm")  # that they are of
TITLES = {
    "bare": "bare passes: forward with all logits, backward through activations",
    "bare_masked": "bare passes, prompts masked (all logits all the same)",
    "product": "qkov: all pairs and heads scored, tested, written",
    "product_masked": "qkov, prompts masked",
    "autograd_loop": "per-sample gradients: a backward pass each",
    "vmap": "per-sample gradients: torch.func vmap(grad)",
    "opacus": "per-sample gradients: Opacus",
    "bergson": "per-sample gradients: Bergson, no projection, no index",
    "vmap_scores": "vmap(grad), and all pairs and heads scored from its gradients",
    "opacus_scores": "Opacus, and all pairs and heads scored from its gradients",
    "bergson_store": "Bergson, no projection, its index of gradients on disk",
    "dattri": "dattri-LLM: A x B inner products, one number a pair",
    "kronfluence": "Kronfluence: diagonal factors, A x B scores per module",
    "pair_loop": "loop over A x B, heads and blocks, gradients given",
}


@dataclass(frozen=True)
class Setup:
    """What every case is told.

    Attributes:
        base: Model, samples, tokens, threads and repeats; a case changes what it is about.
        rounds: How often everybody plays.
        perform: Does an order, in a process of its own or here.
        say: Takes a line about what goes on.
        at_once: Orders that may be done at a time where nothing is timed.
    """

    base: Order
    rounds: int
    perform: Perform
    say: Say
    at_once: int = 1


@dataclass(frozen=True)
class Result:
    """A case's name, numbers and page."""

    name: str
    data: dict[str, Any]
    page: str


def main_table(setup: Setup, left_out: Collection[str] = ()) -> Result:
    """Everybody against the bare passes, but for those left out."""
    facts = prepare(setup)
    deviations = check_agreement(setup)
    entries = [
        Entry(key, title, order(setup.base, key.removesuffix("_masked"), masked="masked" in key), key in PEERS)
        for key, title in TITLES.items()
        if key not in left_out
    ]
    rounds = play(
        [*entries, Entry("machine", "", order(setup.base, "machine"))], setup.rounds, setup.perform, setup.say
    )
    rows = [against_bare(rounds, entry.key, entry.title) for entry in entries]
    if not {"pair_loop", "autograd_loop"} & {*left_out}:
        rows.append(loop_with_gradients(rounds))
    parts = [
        f"# {setup.base.samples} + {setup.base.samples} samples of {setup.base.tokens} tokens",
        _preamble(setup, facts),
        tabulate(rows, headers="keys", tablefmt="github"),
        _notes(setup, rounds, deviations),
        "## Where a run's time goes",
        phase_table(rounds),
        "## Scoring against the machine",
        machine_table(rounds, *_scoring_work(setup, facts)),
    ]
    return result("main", setup, rounds, parts, facts=vars(facts), deviations=deviations)


def samples_table(setup: Setup) -> Result:
    """Many samples: scoring, with the forming of its gradients, against the per-pair loop, which is given them."""
    facts = prepare(setup)
    entries = [Entry(key, TITLES[key], order(setup.base, key)) for key in ("product", "pair_loop")]
    entries.append(Entry("cross", "qkov: A x B alone, not tested", order(setup.base, "product", permutations=0)))
    rounds = play(
        [*entries, Entry("machine", "", order(setup.base, "machine"))], setup.rounds, setup.perform, setup.say
    )
    sides = {
        "the loop / scoring of the same pairs, gradients included": "cross:scoring",
        "the loop / scoring of all pooled pairs, gradients included": "product:scoring",
        "the loop / the whole run": "product",
    }
    rows = [{"ratio": name, "x": spread(ratio(rounds, "pair_loop", side))} for name, side in sides.items()]
    seconds = {
        key: f"{median(rounds, key):.4g} s" for key in ("pair_loop", "cross:scoring", "product:scoring", "product")
    }
    num, each = setup.base.samples, f"{median(rounds, 'pair_loop') / setup.base.samples**2 * 1e3:.3g} ms a pair"
    parts = [
        f"# {num} + {num} samples: scoring against the per-pair loop",
        _preamble(setup, facts),
        tabulate(rows, headers="keys", tablefmt="github"),
        f"The loop is timed on {LOOP_SAMPLES**2} of the {num**2} pairs of A x B and scaled ({each}); the run scores "
        f"all {(2 * num) ** 2} pooled pairs. {', '.join(f'{key}: {text}' for key, text in seconds.items())}.",
        phase_table(rounds),
        machine_table(rounds, *_scoring_work(setup, facts)),
    ]
    return result("samples", setup, rounds, parts, facts=vars(facts))


def ranks_table(setup: Setup) -> Result:
    """Two ranks of one thread against one rank of one thread."""
    setup = replace(setup, base=order(setup.base, "", threads=1))
    facts = prepare(setup)
    entries = [
        Entry(f"ranks{ranks}", f"{ranks} of one thread", order(setup.base, "product", ranks=ranks)) for ranks in (1, 2)
    ]
    rounds = play(entries, setup.rounds, setup.perform, setup.say)
    rows = [
        {"": name, "x": spread(ratio(rounds, f"ranks1{phase}", f"ranks2{phase}"))}
        for name, phase in {"whole run beyond loading": "", "capture": ":capture", "scoring": ":scoring"}.items()
    ]
    parts = [
        "# Two ranks against one",
        _preamble(setup, facts),
        tabulate(rows, headers="keys", tablefmt="github"),
        "How many times faster two ranks (data parallel, gloo, torchrun) are than one.",
        tabulate([rank_phases(rounds, entry) for entry in entries], headers="keys", tablefmt="github", floatfmt=".3g"),
    ]
    return result("ranks", setup, rounds, parts, facts=vars(facts))


def spill_table(setup: Setup) -> Result:
    """A quarter of the factors in memory, the rest on disk, against all of them in memory."""
    facts = prepare(setup)
    shares = {"fits": 1.0, "quarter": 0.25}
    entries = [Entry(key, key, order(setup.base, "product", factor_share=share)) for key, share in shares.items()]
    rounds = play(entries, setup.rounds, setup.perform, setup.say)
    rows = [
        {"factors in memory": key, "x": spread(ratio(rounds, key, "fits")), "seconds": median(rounds, key),
         "scoring, s": median(rounds, f"{key}:scoring"), "peak RSS, MiB": peak(rounds, key)}
        for key in shares
    ]  # fmt: skip
    parts = [
        "# Factors on disk",
        _preamble(setup, facts),
        tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g"),
        f"The factors are {facts.factor_bytes / MIB:.0f} MiB.",
    ]
    return result("spill", setup, rounds, parts, facts=vars(facts))


def order(base: Order, contestant: str, **changes: Any) -> Order:
    """The base's order for another contestant."""
    return Order(**{**vars(base), "contestant": contestant, **changes})


def prepare(setup: Setup) -> Facts:
    """Write the material."""
    report = setup.perform(order(setup.base, "material"))
    if report.error:
        raise RuntimeError(f"material: {report.error}")
    return read_facts(Path(setup.base.folder))


def check_agreement(setup: Setup) -> dict[str, float]:
    """Each contestant's deviation from this product on a few samples.

    Raises:
        AssertionError: for one that computes something else.
    """
    deviations = {}
    names = (*METHODS, "dense_scores", "kronfluence", "dattri", "pair_loop")
    orders = [order(setup.base, "agreement", of=name, output=f"agreement-{name}") for name in names]
    with ThreadPoolExecutor(setup.at_once) as pool:
        reports = list(pool.map(setup.perform, orders))
    for name, report in zip(names, reports, strict=True):
        if report.error and name not in PEERS:
            raise RuntimeError(f"agreement of {name}: {report.error}")
        deviation = report.found.get("deviation", 0.0)
        assert deviation < TOLERANCE, f"{name} is off by {deviation:.2g}: it does not compute the same thing"
        if not report.error:
            deviations[name] = deviation
        setup.say(f"{name}: {report.error or f'agrees to {deviation:.1e}'}")
    return deviations


def result(name: str, setup: Setup, rounds: Sequence[Round], parts: Sequence[str], **more: Any) -> Result:
    """A case's results."""
    settings = {key: value for key, value in vars(setup.base).items() if key not in ("folder", "output", "contestant")}
    data = {"case": name, "settings": settings, **more, "rounds": plain(rounds)}
    return Result(name, data, "\n\n".join(part for part in parts if part) + "\n")


def _scoring_work(setup: Setup, facts: Facts) -> tuple[int, int]:
    """Operations of scoring, and on a GPU the bytes that it moves."""
    num = 2 * setup.base.samples
    flops = scoring_flops(facts.layer_elements, num, facts.tokens)
    return flops, scoring_bytes(facts.layer_elements, num) if on_gpu() else 0


def _place(base: Order) -> str:
    threads = f"{base.threads} threads each"
    return f"{torch.cuda.get_device_name()}, {threads} on the host" if on_gpu() else threads


def _preamble(setup: Setup, facts: Facts) -> str:
    base = setup.base
    return (
        f"{base.model}, float32, {_place(base)}; Q, K, V and O of {len(facts.layer_elements)} layers. "
        f"Each contestant in a process of its own, warmed up on {FEW} + {FEW} samples; median of {setup.rounds} rounds "
        f"(least-most) of ratios within a round, each of {base.repeats} repeats."
    )


def _notes(setup: Setup, rounds: Sequence[Round], deviations: dict[str, float]) -> str:
    masked = spread(ratio(rounds, "product_masked", "bare_masked"))
    pairs, every = LOOP_SAMPLES**2, setup.base.samples**2
    checked = ", ".join(f"{name} {deviation:.1e}" for name, deviation in deviations.items())
    return (
        f"With prompts masked, the run takes {masked} times the bare passes that mask them too (half of each sample is "
        f"prompt). The loop is timed on {pairs} of the {every} pairs of A x B and scaled; the run scores all "
        f"{4 * every} pairs of pooled samples, and holds its factors in memory. Largest deviation from this product's "
        f"gradients (of one layer, {FEW} + {FEW} samples) or scores: {checked}."
    )
