"""Numbers that are wrong or weak, end to end: named by task, sample, layer and head, and never passed on in silence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jobs import job_for
from running import qkov
from samples import write_task

from qkov_dist import load_heatmap
from qkov_dist.data.samples import Sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def one_token(name: str) -> Sample:
    """A sample that predicts from its first token alone: attention has one key, so Q and K have no gradient."""
    return Sample(name, np.array([4, 7]), np.array([-100, 7]), "")


def scaled(entry, folder, factor: float, dtype: torch.dtype = torch.float32):
    """A model whose gradients are as many times larger, because its output weights are."""
    model = entry.build(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("statistics", ["true", "false"])
def test_scores_that_overflow_are_an_error_that_names_them(config, entry, tmp_path, capsys, statistics):
    model = scaled(entry, tmp_path / "large", 1e25)
    settings = [f"model.path={model}", f"statistics.enabled={statistics}"]
    assert qkov("run", config, "--quiet", *settings) == 2
    said = capsys.readouterr().err
    assert "layer 0, block Q, head 0, samples 'math: " in said
    assert "expected a finite score" in said
    assert "score_dtype" in said
    assert not (tmp_path / "out" / "heatmap.h5").exists()
    assert qkov("run", config, "--quiet", *settings, "compute.score_dtype=float64", f"output.dir={tmp_path}/wide") == 0
    heatmap = load_heatmap(tmp_path / "wide" / "heatmap.h5")
    assert all(np.isfinite(scores).all() for scores in heatmap.cross.values())


def test_gradients_that_overflow_half_precision_name_the_sample(config, entry, tmp_path, capsys):
    model = scaled(entry, tmp_path / "half", 1e5, torch.float16)
    assert qkov("run", config, "--quiet", f"model.path={model}") == 2
    said = capsys.readouterr().err
    assert "task 'math', sample '" in said
    assert "bfloat16" in said
    assert not (tmp_path / "out" / "heatmap.h5").exists()


@pytest.mark.parametrize("statistics", ["true", "false"])
def test_samples_without_a_gradient_are_named(config, entry, tmp_path, capsys, statistics):
    write_task(tmp_path / "b.jsonl", [*job_for(entry).b, one_token("short")])
    settings = [f"statistics.enabled={statistics}", "model.attn_implementation=eager"]  # its zeros are exact
    assert qkov("run", config, *settings) == 0
    heatmap = load_heatmap(tmp_path / "out" / "heatmap.h5")
    (warning,) = (text for text in heatmap.attributes["warnings"] if "exactly zero" in text)
    num_layers, heads = len(heatmap.layers), {"Q": len(heatmap.heads), "K": len(heatmap.kv_heads)}
    silent, every = num_layers * sum(heads.values()), 2 * num_layers * sum(heads.values())
    assert f"task 'code', sample 'short' in {silent} of {every} heads (first Q, layer 0, head 0)" in warning
    assert "math" not in warning
    assert warning in capsys.readouterr().err
    for block in "QK":
        assert (heatmap.cross[block][..., -1] == 0).all()
    assert (heatmap.cross["V"][..., -1] > 0).all()


def test_many_samples_without_a_gradient_are_counted(config, entry, tmp_path):
    write_task(tmp_path / "a.jsonl", [*job_for(entry).a, *(one_token(f"short{n}") for n in range(7))])
    assert qkov("run", config, "--quiet") == 0
    warnings = load_heatmap(tmp_path / "out" / "heatmap.h5").attributes["warnings"]
    (warning,) = (text for text in warnings if "exactly zero" in text)
    assert "'short4' in" in warning
    assert "'short5'" not in warning
    assert "2 samples more" in warning


def test_ordinary_samples_are_no_cause_for_a_warning(config, tmp_path):
    assert qkov("run", config, "--quiet") == 0
    warnings = load_heatmap(tmp_path / "out" / "heatmap.h5").attributes["warnings"]
    assert not any("exactly zero" in text for text in warnings)


def test_a_dominant_ridge_is_a_warning_in_the_file_and_on_the_page(config, tmp_path):
    assert qkov("run", config, "--quiet", "ridge.absolute=1000") == 0
    warnings = load_heatmap(tmp_path / "out" / "heatmap.h5").attributes["warnings"]
    assert sum("lambda exceeds I on more than half" in text for text in warnings) == 4
    assert "lambda exceeds I on more than half" in (tmp_path / "out" / "report.html").read_text()
