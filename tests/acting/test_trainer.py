"""The callback holds heads from the first step of a Trainer to its last, and refuses DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from training import SOME_HEADS, moved_slices, selection_of
from transformers import Trainer, TrainingArguments
from zoo import TINY

from qkov_dist import FreezeHeadsCallback, QkovError


def trainer(model, folder, *callbacks):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (8, 8), generator=generator).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def test_a_trainer_leaves_the_heads_and_trains_the_rest(tmp_path):
    model = TINY["llama"].build()
    selection = selection_of(model)
    selection.to_json(tmp_path / "heads.json")
    callback = FreezeHeadsCallback(tmp_path / "heads.json")
    held, free = moved_slices(model, selection, trainer(model, tmp_path, callback).train)
    assert held == set()
    assert len(free) == len(dict(model.named_parameters()))
    held, _ = moved_slices(model, selection, trainer(model, tmp_path).train)  # it let go
    assert len(held) == len(SOME_HEADS)


def test_a_training_that_broke_off_can_be_let_go(tmp_path):
    model = TINY["llama"].build()
    selection = selection_of(model)
    callback = FreezeHeadsCallback(selection)
    callback.on_train_begin(SimpleNamespace(deepspeed=None), None, None, model=model)
    assert moved_slices(model, selection, trainer(model, tmp_path).train)[0] == set()
    callback.close()
    assert len(moved_slices(model, selection, trainer(model, tmp_path).train)[0]) == len(SOME_HEADS)


def test_deepspeed_is_refused_before_it_trains():
    model = TINY["llama"].build()
    callback = FreezeHeadsCallback(selection_of(model))
    with pytest.raises(QkovError, match=r"TrainingArguments\.deepspeed.*ZeRO"):
        callback.on_train_begin(SimpleNamespace(deepspeed="zero2.json"), None, None, model=model)
