"""One contestant in one process: set up, warm up on a few samples, do the work some times, report as JSON.

A contestant is a function that is handed the subject and the order, sets up what it is not timed for, and returns its
work. What the work returns is reported too: ``times`` says how many times the part that was done makes the whole job,
``untimed`` how many of its seconds do not count.

    python contestants.py '{"contestant": "bare", "folder": FOLDER, "samples": 32, "tokens": 96}'
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import count
from pathlib import Path

import peers
import torch
from agreement import (
    METHODS,
    dattri_deviation,
    dense_deviation,
    gradient_deviation,
    kronfluence_deviation,
    loop_deviation,
    same_metric,
)
from dense_scores import dense_scores
from device import finish, gpu_peak
from gradients import Gradients, bare_passes, exhaust
from machine import measure_machine
from material import Subject, read_facts, write_material
from orders import Found, Order, Report, Work
from pair_loop import heads_of, kept_gradients, mean_fisher, per_pair_loop
from stopwatch import PHASES, REST, counted_bytes, timed_phases

from qkov_dist.config import ComputeConfig, OutputConfig, RunConfig, StatisticsConfig
from qkov_dist.distributed.connect import connected
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.run import run

MIB = 2**20
FEW = 2  # samples of each task, to warm up with and to compare contestants on
LOOP_SAMPLES = 4  # of each task: the per-pair loop is timed on all pairs of these


def perform(order: Order) -> Report:
    """Do what is ordered, in this process."""
    torch.set_num_threads(order.threads)
    make, subject = CONTESTANTS[order.contestant], order.subject()
    if order.contestant not in ONCE:
        make(subject.few(FEW), order)()
    work = make(subject, order)
    timings = [_timed(work) for _ in range(order.repeats)]
    seconds, cpu, growth = (statistics.median(timing[n] for timing in timings) for n in range(3))
    every = [found for *_, found in timings]
    found = {key: statistics.median(one[key] for one in every) for key in every[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Report(seconds, cpu, peak, growth, gpu_peak(), found)


def _timed(work: Work) -> tuple[float, float, float, Found]:
    """Wall seconds of the whole job, processor seconds, MiB of memory, and what was found."""
    before = _memory_before()
    finish()
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    finish()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    untimed, times = found.get("untimed", 0.0), found.get("times", 1.0)
    cpu = (cpu - found.get("untimed (cpu)", 0.0)) * times
    return (seconds - untimed) * times, cpu, _memory("VmHWM") - before, found


def _memory_before() -> float:
    """Forget the most memory so far, where the system can, and tell the memory now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> float:
    """MiB of memory by its name in Linux's process status; not a number elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(name)), float("nan"))


def material(subject: Subject, order: Order) -> Work:
    """Write what the others read."""
    write_material(subject.folder, order.model, order.samples, order.tokens)
    return dict


def bare(subject: Subject, order: Order) -> Work:
    """Forward with all logits, backward through activations alone."""
    return _silent(bare_passes, subject)


def product(subject: Subject, order: Order) -> Work:
    """`qkov run` beyond loading: every pair and head, scored, tested and written."""
    configs = (_product_config(subject, order, number) for number in count())

    def work() -> Found:
        with timed_phases() as watch, counted_bytes() as sent:
            run(next(configs))
        phases = {name: watch.wall[name] for name in (*PHASES, REST)}
        cpu = {f"{name} (cpu)": watch.cpu[name] for name in phases}
        return {
            **phases,
            **cpu,
            "sent": float(sent["factors"]),
            "untimed": phases["loading"],
            "untimed (cpu)": cpu["loading (cpu)"],
        }

    return work


def _product_config(subject: Subject, order: Order, number: int) -> RunConfig:
    factors = read_facts(subject.folder).factor_bytes * subject.samples / order.samples
    memory = max(int(order.factor_share * factors / MIB), 1)
    fits = order.factor_share >= 1
    return RunConfig(
        model=subject.model,
        tasks=subject.task_configs,
        statistics=_statistics(order.permutations),
        compute=ComputeConfig(factor_memory_mb=memory + 1 if fits else memory, factor_gpu_mb=None if fits else 0),
        output=OutputConfig(dir=str(subject.folder / f"{order.output}-{subject.samples}-{number}"), resume=False),
    )


def _statistics(permutations: int) -> StatisticsConfig:
    if not permutations:
        return StatisticsConfig(enabled=False)
    return StatisticsConfig(permutations=permutations)


def pair_loop(subject: Subject, order: Order) -> Work:
    """Scores alone, pair by pair, from materialized gradients; on some pairs, for all pairs of A x B."""
    some = subject.few(LOOP_SAMPLES)
    gradients, heads = kept_gradients(some), heads_of(some)
    fisher = mean_fisher(gradients)
    of_a, of_b = gradients[: some.samples], gradients[some.samples :]
    times = subject.samples**2 / (len(of_a) * len(of_b))

    def work() -> Found:
        per_pair_loop(of_a, of_b, fisher, heads)
        return {"times": times}

    return work


def per_sample(method: Callable[[Subject], Gradients]) -> Callable[[Subject, Order], Work]:
    """A contestant that forms the per-sample gradients of all projections and keeps none."""
    return lambda subject, order: _silent(lambda read: exhaust(method(read)), subject)


def scored(method: Callable[[Subject], Gradients]) -> Callable[[Subject, Order], Work]:
    """A contestant that forms them, keeps all, and scores all pairs at every head."""
    return lambda subject, order: _silent(lambda read: dense_scores(read, method(read)), subject)


def bergson(subject: Subject, order: Order) -> Work:
    """Bergson's gradient collection."""
    return _silent(peers.bergson_collection, subject)


def bergson_store(subject: Subject, order: Order) -> Work:
    """The same with its index on disk."""
    return _silent(lambda read: peers.bergson_collection(read, store=True), subject)


def dattri(subject: Subject, order: Order) -> Work:
    """dattri-LLM's inner products of the gradients of A x B."""
    return _silent(peers.dattri_scores, subject)


def kronfluence(subject: Subject, order: Order) -> Work:
    """Kronfluence's diagonal factors and pairwise scores per module."""
    analyse = peers.kronfluence_analysis(subject)
    return _silent(lambda read: analyse(), subject)


def machine(subject: Subject, order: Order) -> Work:
    """Rates of matrix products and memory."""
    return lambda: measure_machine(2 * order.samples, order.tokens, order.threads)


def agreement(subject: Subject, order: Order) -> Work:
    """How far a contestant's results are from this product's, on a few samples."""
    few = subject.few(FEW)
    if order.of in METHODS:
        return lambda: {"deviation": gradient_deviation(few, order.of)}
    if order.of == "dattri":
        return lambda: {"deviation": dattri_deviation(few)}
    if order.of == "kronfluence":
        return lambda: {"deviation": kronfluence_deviation(few)}
    config = same_metric(_product_config(few, order, 0))

    def work() -> Found:
        heatmap = run(config)
        assert isinstance(heatmap, Heatmap)
        deviation = dense_deviation if order.of == "dense_scores" else loop_deviation
        return {"deviation": deviation(few, heatmap)}

    return work


CONTESTANTS: dict[str, Callable[[Subject, Order], Work]] = {
    "material": material,
    "bare": bare,
    "product": product,
    "pair_loop": pair_loop,
    "autograd_loop": per_sample(METHODS["autograd_loop"]),
    "vmap": per_sample(METHODS["vmap"]),
    "opacus": per_sample(METHODS["opacus"]),
    "vmap_scores": scored(METHODS["vmap"]),
    "opacus_scores": scored(METHODS["opacus"]),
    "kronfluence": kronfluence,
    "bergson": bergson,
    "bergson_store": bergson_store,
    "dattri": dattri,
    "machine": machine,
    "agreement": agreement,
}
ONCE = ("material", "machine", "agreement")  # no warm-up: nothing of theirs is timed from outside


def _silent(work: Callable[[Subject], object], subject: Subject) -> Work:
    """Read model, samples and layout now; work that reports nothing."""
    assert subject.tasks
    assert subject.layout.layers

    def done() -> Found:
        work(subject)
        return {}

    return done


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    with redirect_stdout(sys.stderr), connected() as world:
        line = json.dumps({"rank": world.rank, **asdict(perform(order))})
    print(line, flush=True)


if __name__ == "__main__":
    main()
