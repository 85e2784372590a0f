"""The same for a ``transformers.Trainer``: heads are held from its first step to its last."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from qkov_dist.results.selection import Selection

from .freeze import freeze_heads
from .places import zero_refused


class FreezeHeadsCallback(TrainerCallback):
    """Trains with the slices of some heads held; ``Trainer(..., callbacks=[FreezeHeadsCallback(selection)])``.

    A training that was broken off leaves them held until the next one begins, or :meth:`close` is called.

    Args:
        selection: As for :func:`qkov_dist.acting.freeze.freeze_heads`.
        factor: What updates are multiplied by, in place of freezing.
    """

    def __init__(self, selection: Selection | str | Path, factor: float = 0.0) -> None:
        self._selection, self._factor = selection, factor
        self._held = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Hold the heads of the model that is trained; weights and adapters are as training begins with them.

        Raises:
            QkovError: as ``freeze_heads`` does.
        """
        self.close()
        if getattr(args, "deepspeed", None):
            raise zero_refused("TrainingArguments.deepspeed")
        model: nn.Module = more["model"]
        self._held.enter_context(freeze_heads(model, self._selection, self._factor))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let them go."""
        self.close()

    def close(self) -> None:
        """Let go of what is held."""
        self._held.close()
