"""Thousands of ranks that are not there: what `qkov plan` takes for each way to cut, and what ranks would send.

Each plan is made by a process of its own: one of Llama-3 with 405 billion parameters, for cuts of experts one of a
mixture of 128 experts (as Qwen3-235B-A22B). Prints its time and peak memory; then of the factors that all ranks send
their bytes, how many times the least that owners cannot do without that is, and how many times as much as one copy of
all factors. Ends with exit code 1 where a plan failed, or took more than --seconds or --mib.

    python tests/studies/scale.py [--ranks 4096 --samples 512 --tokens 512 --only fsdp]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

DENSE = "builtin:llama-3-405b"
EXPERTS = {
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
CUTS: Mapping[str, Mapping[str, Any]] = {
    "`shard: ddp`": {"shard": "ddp"},
    "`shard: fsdp`": {"shard": "fsdp"},
    "`shard: fsdp, replicate: 32`": {"shard": "fsdp", "replicate": 32},
    "`tp: 8, shard: fsdp`": {"tp": 8, "shard": "fsdp"},
    "`tp: 8, shard: fsdp, replicate: 32`": {"tp": 8, "shard": "fsdp", "replicate": 32},
    "`shard: zero3`": {"shard": "zero3"},
    "`ep: 128, shard: fsdp, replicate: 32`": {"ep": 128, "shard": "fsdp", "replicate": 32},
    "`ep: 32, tp: 4, shard: fsdp, replicate: 32`": {"ep": 32, "tp": 4, "shard": "fsdp", "replicate": 32},
}
REFUSED = 2


@dataclass(frozen=True)
class Planned:
    """One plan: its exit code, what it took on the clock, of the processor and of memory, its numbers and message."""

    code: int
    seconds: float
    cpu: float
    mib: float
    numbers: Mapping[str, Any]
    message: str

    @property
    def is_sound(self) -> bool:
        """Whether it was made; a model that does not fit is refused with its numbers."""
        return bool(self.numbers) and self.code in (0, REFUSED)


def planned(cut: Mapping[str, Any], folder: Path, options: argparse.Namespace) -> Planned:
    """Make one plan."""
    (folder / "experts.json").write_text(json.dumps(EXPERTS))
    tasks = [{"name": task, "path": f"{task}.jsonl"} for task in "ab"]
    model = str(folder / "experts.json") if "ep" in cut else DENSE
    compute = {"batch_tokens": options.tokens}  # a sample a batch
    config = {"model": {"path": model}, "tasks": tasks, "parallel": dict(cut), "compute": compute}
    (folder / "run.yaml").write_text(json.dumps(config))
    sizes = {"world-size": options.ranks, "samples": options.samples, "tokens": options.tokens, "gpu-memory": 80}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, "-m", "qkov_dist", "plan", str(folder / "run.yaml"), "--json", *words]
    start = time.monotonic()
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
        out.seek(0), err.seek(0)
        said, complained = out.read(), err.read()
    numbers = json.loads(said) if said else {}
    cpu = usage.ru_utime + usage.ru_stime
    return Planned(process.returncode, seconds, cpu, usage.ru_maxrss / 2**10, numbers, complained.strip())


def row(cut: str, plan: Planned) -> list[object]:
    """A plan's line of the table."""
    if not plan.is_sound:
        return [cut, plan.seconds, plan.cpu, plan.mib, plan.message[-80:]]
    every, largest = plan.numbers["sum"], plan.numbers["largest"]
    factors = sum(rank["factors_gpu"] + rank["factors_memory"] + rank["factors_disk"] for rank in plan.numbers["ranks"])
    return [
        cut,
        plan.seconds,
        plan.cpu,
        plan.mib,
        plan.numbers["peak"]["gpu"] / 2**30,
        "fits" if plan.numbers["fits"] else "refused",
        largest["sent_factors"] / 2**30,
        every["sent_factors"] / every["least_factors"],
        every["sent_factors"] / factors,
    ]


HEADERS = ["cut", "seconds", "of a core", "peak, MiB", "GPU, GiB", "", "sent, GiB a rank", "x least", "x one copy"]

FORMATS = (".0f", ".1f", ".1f", ".0f", ".1f", "", ".1f", ".3f", ".2f")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=512, help="of each task (512)")
    parser.add_argument("--tokens", type=int, default=512, help="of each sample (512)")
    parser.add_argument("--only", default="", help="cuts with this in their names")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a core that a plan may take (120)")
    parser.add_argument("--mib", type=float, default=2000.0, help="of memory that it may take (2000)")
    options = parser.parse_args(arguments)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for cut in (name for name in CUTS if options.only in name):
            plan = planned(CUTS[cut], Path(folder), options)
            failed |= not plan.is_sound or plan.cpu > options.seconds or plan.mib > options.mib
            rows.append(row(cut, plan))
            print(rows[-1], plan.message[-200:], file=sys.stderr, flush=True)
    print(
        tabulate(
            rows, HEADERS, tablefmt="github", floatfmt=(".0f", ".1f", ".1f", ".0f", ".1f", "", ".1f", ".3f", ".2f")
        )
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
