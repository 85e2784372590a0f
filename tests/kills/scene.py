"""What all stories share: a tiny model and two tasks on disk, and what runs do that nobody disturbs."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attempts import Order, Outcome, play
from moments import Seen
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist.results.heatmap_file import HEATMAP_FILE

LAYERS = tuple(range(6))
ALONE = "none"
SLOW_S = 5.0


@dataclass(frozen=True)
class Cut:
    """How a model is cut.

    Attributes:
        settings: Its configuration.
        ranks: On how many ranks stories of it play.
        elsewhere: On how many others they go on now and then.
        model: Of which model of the zoo.
    """

    settings: tuple[str, ...]
    ranks: int = 2
    elsewhere: int = 3
    model: str = "llama"


CUTS = {
    ALONE: Cut(("parallel.shard=none",), 1, 1),
    "ddp": Cut(("parallel.shard=ddp",)),
    "fsdp": Cut(("parallel.shard=fsdp",)),
    "zero3": Cut(("parallel.shard=zero3",)),
    "hybrid": Cut(("parallel.shard=fsdp", "parallel.replicate=2"), 4, 2),  # two copies, each on half of the ranks
    "ep": Cut(("parallel.shard=ddp", "parallel.ep=2"), 2, 4, "mixtral"),  # of four experts two on each
    "cp": Cut(("parallel.shard=fsdp", "parallel.cp=2"), 2, 4),  # a pass of one rank is one of both
}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbs: how long it takes, and what each rank notes."""

    seconds: float
    seen: tuple[Seen, ...]


@dataclass
class Scene:
    """A folder with everything that stories play with; undisturbed runs are made when they are asked for.

    Attributes:
        context: Forks the ranks.
        folder: Where it all is.
        model: Its name in the zoo.
    """

    context: Any
    folder: Path
    model: str = CUTS[ALONE].model
    _others: dict[str, Scene] = field(default_factory=dict)
    _known: dict[tuple[str, int], Undisturbed] = field(default_factory=dict)
    _num_attempts: Counter[str] = field(default_factory=Counter)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)  # stories may be played beside each other

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        TINY[self.model].build(num_hidden_layers=len(LAYERS)).save_pretrained(self.folder / "model")
        tasks = []
        for name, seed, num in (("a", 1, 9), ("b", 2, 8)):
            samples = mixed_samples(num, VOCAB, seed=seed, lengths=(6, 40))
            lines = [{"id": s.id, "input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples]
            (self.folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            tasks.append({"name": name, "path": str(self.folder / f"{name}.jsonl")})
        settings = {
            "model": {"path": str(self.folder / "model")},
            "tasks": tasks,
            "fisher": {"batch_size": 2},
            "statistics": {"permutations": 30},
            "compute": {"batch_tokens": 80, "factor_memory_mb": 1},  # of which one process needs more: it spills
        }
        self.config.write_text(json.dumps(settings))

    def of_cut(self, cut: str) -> Scene:
        """The scene with the model of a cut."""
        model = CUTS[cut].model
        if model == self.model:
            return self
        with self._one_at_a_time:
            return self._others.setdefault(model, Scene(self.context, self.folder / model, model))

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def reference(self) -> Path:
        """The heatmap of one process."""
        self.undisturbed(ALONE, 1)
        return self.out(f"undisturbed-{ALONE}-1") / HEATMAP_FILE

    def out(self, story: str) -> Path:
        """A story's output folder."""
        return self.folder / "out" / story

    def order(self, story: str, shard: str, num_ranks: int, *overrides: str) -> Order:
        """One more attempt of a story."""
        self._num_attempts[story] += 1
        notes = self.folder / "notes" / story / str(self._num_attempts[story])
        shard = shard if num_ranks > 1 else ALONE
        out, settings = f"output.dir={self.out(story)}", CUTS[shard].settings
        return Order(self.config, (out, *overrides), shard, settings, num_ranks, notes)

    def undisturbed(self, shard: str, num_ranks: int) -> Undisturbed:
        """What a run is like when it is left alone.

        Raises:
            RuntimeError: where it does not finish.
        """
        shard = shard if num_ranks > 1 else ALONE
        with self._one_at_a_time:
            if (shard, num_ranks) not in self._known:
                outcome = self._left_alone(shard, num_ranks)
                if outcome.seconds > SLOW_S:  # DeepSpeed builds an extension when it is first used
                    shutil.rmtree(self.out(f"undisturbed-{shard}-{num_ranks}"))
                    outcome = self._left_alone(shard, num_ranks)
                self._known[shard, num_ranks] = Undisturbed(outcome.seconds, outcome.seen)
            return self._known[shard, num_ranks]

    def _left_alone(self, shard: str, num_ranks: int) -> Outcome:
        outcome = play(self.context, self.order(f"undisturbed-{shard}-{num_ranks}", shard, num_ranks), None)
        if not outcome.finished:
            raise RuntimeError(f"an undisturbed run ended with {outcome.codes}: {' | '.join(outcome.said)[-3000:]}")
        return outcome
