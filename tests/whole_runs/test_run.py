"""`qkov run` from a configuration file to heatmap.h5, in this process, on a tiny model on disk."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from comparing import as_blocks, assert_close, assert_identical, deviation
from expected import expected_scores
from jobs import job_for
from processes import forked
from rounding import PASSES
from running import exit_as_qkov, interrupt_at, qkov
from samples import mixed_samples, write_task
from zoo import VOCAB

import qkov_dist.run
from qkov_dist import load_heatmap
from qkov_dist.capture.hooks import Capture
from qkov_dist.capture.side_by_side import WORTH
from qkov_dist.cli import main
from qkov_dist.data.samples import Sample


def test_a_run_equals_the_oracle_and_writes_what_it_promises(config, entry, tmp_path, capsys):
    assert qkov("run", config, "--quiet") == 0
    printed = capsys.readouterr()
    assert "strongest heads" in printed.out
    assert str(tmp_path / "out" / "heatmap.h5") in printed.out
    heatmap = load_heatmap(tmp_path / "out" / "heatmap.h5")
    assert_close(as_blocks(heatmap), expected_scores(entry, entry.build(), job_for(entry)))
    assert heatmap.samples_a.ids == tuple(s.id for s in job_for(entry).a)
    assert heatmap.samples_b.num_tokens.tolist() == [(s.labels != -100).sum() for s in job_for(entry).b]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heatmap.h5",
        "partial_rank00000.h5",
        "report.html",
    ]
    with h5py.File(tmp_path / "out" / "heatmap.h5") as file:
        assert file.attrs["schema"] == b"qkov-dist/1"
        assert file["scores/K"].shape == (2, 2, 5, 3)
        assert file["heatmap/Q"].dtype == np.float64
        assert file["scores/Q"].dims[0][0] == file["layer"]
        assert {"statistic", "p_value", "q_value", "q_value_by", "p_max", "effect_size", "ci_low", "ci_high"} <= set(
            file["statistics/overlap/V"]
        )
        datasets = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        assert all(dataset.fletcher32 for dataset in datasets)
    with h5py.File(tmp_path / "out" / "partial_rank00000.h5") as file:
        assert file["partial/K/layer_0001"].shape == (2, 8, 8)
        assert file["partial/K/layer_0001"].attrs["heads"].tolist() == [0, 1]


def test_a_run_makes_several_passes_at_a_time_where_that_is_worth_it(config, tmp_path, monkeypatch):
    """Of enough operations; what comes of it is the same to rounding."""
    before, found, threads, run_batch = torch.get_num_threads(), [], set(), Capture.run

    def watched(session, batch, sink):
        threads.add(threading.current_thread().name.partition("_")[0])
        return run_batch(session, batch, sink)

    monkeypatch.setattr(Capture, "run", watched)
    torch.set_num_threads(2)
    try:
        for worth, expected in ((WORTH, {"MainThread"}), (0, {"MainThread", "qkov-passes"})):
            monkeypatch.setattr("qkov_dist.capture.side_by_side.WORTH", worth)
            assert qkov("run", config, "output.resume=false", "compute.batch_tokens=24") == 0
            assert threads == expected
            found.append(load_heatmap(tmp_path / "out" / "heatmap.h5"))
    finally:
        torch.set_num_threads(before)
    assert deviation(*found) < PASSES


def test_losses_are_those_of_transformers(config, entry, tmp_path):
    assert qkov("run", config, "--quiet", "metric.layers=1") == 0
    heatmap = load_heatmap(tmp_path / "out" / "heatmap.h5")
    model = entry.build()
    for sample, loss in zip(job_for(entry).a, heatmap.samples_a.losses, strict=True):
        ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)[None]
        assert float(model(input_ids=ids, labels=labels).loss) == pytest.approx(loss, rel=PASSES)


def test_xarray_opens_the_file(config, tmp_path):
    xarray = pytest.importorskip("xarray")
    assert qkov("run", config, "--quiet") == 0
    with xarray.open_dataset(tmp_path / "out" / "heatmap.h5", engine="h5netcdf", group="scores") as scores:
        assert scores["K"].dims == ("layer", "kv_head", "sample_a", "sample_b")
        assert scores["Q"].sizes == {"layer": 2, "head": 4, "sample_a": 5, "sample_b": 3}


@pytest.mark.long
def test_pairs_all_and_none(config, tmp_path):
    assert qkov("run", config, "--quiet", "output.pairs=all", f"output.dir={tmp_path}/all") == 0
    assert qkov("run", config, "--quiet", "output.pairs=none", f"output.dir={tmp_path}/none") == 0
    everything, summary = (load_heatmap(tmp_path / name / "heatmap.h5") for name in ("all", "none"))
    assert everything.pooled["Q"].shape == (2, 4, 8, 8)
    assert summary.cross is None
    np.testing.assert_array_equal(everything.mean["V"], summary.mean["V"])


def test_without_statistics_only_cross_pairs_are_scored(config, tmp_path):
    off = ("statistics.enabled=false", "output.partials=false")
    assert qkov("run", config, "--quiet", *off) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heatmap.h5", "report.html"]
    assert load_heatmap(tmp_path / "out" / "heatmap.h5").statistics is None


@pytest.mark.long
def test_a_finished_run_is_not_computed_again_unless_asked(config, tmp_path, capsys, monkeypatch):
    assert qkov("run", config, "--quiet") == 0
    before = load_heatmap(tmp_path / "out" / "heatmap.h5")
    monkeypatch.setattr(qkov_dist.run, "score_rounds", None)
    assert qkov("run", config, "--quiet") == 0
    assert "finished already" in capsys.readouterr().err
    monkeypatch.undo()
    assert qkov("run", config, "--quiet", "output.resume=false") == 0
    assert_identical(load_heatmap(tmp_path / "out" / "heatmap.h5"), before)


def test_a_run_goes_on_from_the_layers_on_disk_bit_for_bit(config, tmp_path, capsys, monkeypatch):
    assert qkov("run", config, "--quiet") == 0
    interrupt_at(1, monkeypatch)
    again = f"output.dir={tmp_path}/again"
    assert qkov("run", config, "--quiet", again) == 130
    assert not (tmp_path / "again" / "heatmap.h5").exists()
    monkeypatch.undo()
    assert qkov("run", config, "--quiet", again) == 0
    assert "1 of 2 layers are on disk" in capsys.readouterr().err
    assert_identical(*(load_heatmap(tmp_path / name / "heatmap.h5") for name in ("again", "out")))


@pytest.mark.long
def test_a_killed_run_is_resumed_by_the_same_command(config, tmp_path):
    with forked(exit_as_qkov, "run", config, "--quiet", f"output.dir={tmp_path}/killed") as process:
        process.wait_until(lambda: any((tmp_path / "killed").glob("partial_rank00000.layers/layer_*.h5")))
        process.send(signal.SIGKILL)
        process.ended()
    assert qkov("run", config, "--quiet") == 0
    assert qkov("run", config, "--quiet", f"output.dir={tmp_path}/killed") == 0
    assert_identical(*(load_heatmap(tmp_path / name / "heatmap.h5") for name in ("out", "killed")))


# Bad input: one message, exit code 2, and nothing overwritten


def assert_refused(capsys, tmp_path, *arguments: object, expect: str) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert qkov(*arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("qkov: ")
    assert expect in message
    assert "Traceback" not in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("override", "expect"),
    [
        ("model.path=./nowhere", "./nowhere: expected a model directory or a .gguf file, got no such file"),
        ("tasks.a.path=./nowhere.jsonl", "nowhere.jsonl"),
        ("model.dtyp=float32", "nearest valid key is 'model.dtype'"),
        ("fisher.decay=1.5", "fisher.decay (command line): expected a number above 0 and below 1, got 1.5"),
        ("metric.layers=0-2", "metric.layers: expected layers with softmax attention among 0 to 1, got 2"),
        ("metric.heads=7", "metric.heads: expected query heads 0 to 3 (layer 0), got 7"),
        ("parallel.tp=2", "parallel"),
        ("tasks.b.name=math", "expected different names"),
        ("metric.score=loud", "expected one of interference, signed, symmetric, curvature"),
    ],
)
def test_bad_settings(config, tmp_path, capsys, override, expect):
    assert_refused(capsys, tmp_path, "run", config, "--quiet", override, expect=expect)


@pytest.mark.parametrize(
    ("lines", "expect"),
    [
        ([], "expected at least one sample, got none"),
        (['{"input_ids": [1, 2, 3]}', "{broken"], "a.jsonl:2"),
        ([json.dumps({"input_ids": [1, VOCAB]})], "a.jsonl:1"),
        (['{"input_ids": [1, 2, 3], "labels": [1, 2]}'], "a.jsonl:1"),
        (['{"input_ids": [1, 2], "labels": [1, -100]}'], "a.jsonl:1"),
        (['{"text": "no tokenizer"}'], "a.jsonl:1"),
        (['{"input_ids": [1, 2, 3]}'], "task 'math': expected at least two samples"),
    ],
)
def test_bad_samples(config, tmp_path, capsys, lines, expect):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert_refused(capsys, tmp_path, "run", config, "--quiet", expect=expect)


def test_a_loss_that_is_not_finite_names_task_and_sample(config, entry, tmp_path, capsys):
    model = entry.build()
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    write_task(
        tmp_path / "b.jsonl", [*job_for(entry).b, Sample("bad", np.array([4, 2, 5]), np.array([-100, 2, 5]), "")]
    )
    assert qkov("run", config, "--quiet", f"model.path={tmp_path}/nan") == 2
    assert "task 'code', sample 'bad': expected a finite loss, got nan" in capsys.readouterr().err
    assert not (tmp_path / "out" / "heatmap.h5").exists()


def test_a_folder_of_another_run_is_left_alone(config, tmp_path, capsys):
    assert qkov("run", config, "--quiet") == 0
    assert_refused(capsys, tmp_path, "run", config, "--quiet", "metric.score=signed", expect="Nothing was overwritten")
    (tmp_path / "out" / "heatmap.h5").unlink()
    assert_refused(capsys, tmp_path, "run", config, "--quiet", "metric.score=signed", expect="Nothing was overwritten")


def test_other_samples_or_another_model_are_another_run(config, entry, tmp_path, capsys):
    assert qkov("run", config, "--quiet") == 0
    write_task(tmp_path / "a.jsonl", mixed_samples(5, VOCAB, seed=9))
    assert_refused(capsys, tmp_path, "run", config, "--quiet", expect="Nothing was overwritten")
    write_task(tmp_path / "a.jsonl", job_for(entry).a)
    model = entry.build()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 3] += 1e-3
    folder = Path(yaml.safe_load(config.read_text())["model"]["path"])
    model.save_pretrained(folder)
    assert_refused(capsys, tmp_path, "run", config, "--quiet", expect="Nothing was overwritten")
    entry.build().save_pretrained(folder)


def test_wrong_commands_exit_with_2(capsys):
    for arguments in (["fly"], ["run"], ["inspect"], ["demo", "--samples", "0"], ["demo", "--samples", "x"]):
        with pytest.raises(SystemExit) if arguments != ["run"] else _returns() as caught:
            code = main(arguments)
        assert (caught.value.code if arguments != ["run"] else code) == 2
        assert capsys.readouterr().err.startswith("qkov")


class _returns:  # noqa: N801
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("command", ["run", "demo", "merge", "inspect", "check", "stats", "report", "validate"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert re.search(rf"example: .*qkov {command}", capsys.readouterr().out)


def test_keys_lists_every_setting(capsys):
    assert main(["run", "--keys"]) == 0
    assert "factor_memory_mb" in capsys.readouterr().out


def test_an_error_of_ours_exits_with_1(config, capsys, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(qkov_dist.run, "make_metadata", broken)
    assert qkov("run", config, "--quiet") == 1
    assert "internal error: ZeroDivisionError: a mistake" in capsys.readouterr().err


def test_a_users_error_under_debug_exits_with_2_and_shows_where(tmp_path, capsys):
    assert qkov("report", tmp_path, "--debug") == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith(f"qkov: {tmp_path}: expected a folder with heatmap.h5")


@pytest.mark.long
def test_commands_take_a_run_by_its_folder_or_its_file(config, tmp_path, capsys, undrawn):
    assert qkov("run", config, "--quiet") == 0
    folder = tmp_path / "out"
    file = folder / "heatmap.h5"
    assert load_heatmap(folder).run_id == load_heatmap(file).run_id
    (folder / "report.html").unlink()
    assert qkov("report", file) == 0
    assert (folder / "report.html").exists()
    assert qkov("stats", file, "--permutations", "20") == 0
    assert load_heatmap(folder).statistics["settings"]["n_permutations"] == 20
    assert qkov("merge", folder / "partial_rank00000.h5", "--output", folder / "sum.h5", "--quiet") == 0
    (folder / "report.html").unlink()
    assert qkov("report", folder / "sum.h5") == 0
    assert (folder / "report.html").exists()
    assert_refused(capsys, tmp_path, "stats", folder / "sum.h5", expect="expected a run's folder, or heatmap.h5 in it")


@pytest.fixture
def read_only(monkeypatch):
    """Every call that would change a disk is refused as on one that is mounted read-only, missing files included."""

    def refuse(path, *_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def unless(writes, call):
        return lambda path, *args, **kwargs: refuse(path) if writes(*args) else call(path, *args, **kwargs)

    def forbid():
        for name in ("unlink", "mkdir", "replace", "rename"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr(os, "open", unless(lambda flags=0, *_: flags & (os.O_CREAT | os.O_WRONLY), os.open))
        monkeypatch.setattr(io, "open", unless(lambda mode="r", *_: set(mode) & set("wax+"), io.open))

    return forbid


@pytest.mark.parametrize("command", ["report", "stats", "merge"])
def test_a_read_only_disk_is_one_message(config, tmp_path, capsys, read_only, command):
    assert qkov("run", config, "--quiet") == 0
    read_only()
    assert_refused(capsys, tmp_path, command, tmp_path / "out", expect="expected permission to use this file")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EISDIR])
def test_what_the_file_system_refuses_anywhere_is_the_users_to_mend(config, capsys, monkeypatch, number):
    def refused(*_args, **_kwargs):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(qkov_dist.run, "make_metadata", refused)
    assert qkov("run", config, "--quiet") == 2
    assert "qkov: /some/file: expected" in capsys.readouterr().err


def test_a_broken_connection_is_not_of_the_file_system(config, monkeypatch, capsys):
    def refused(*_args, **_kwargs):
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(qkov_dist.run, "make_metadata", refused)
    assert qkov("run", config, "--quiet") == 1
    assert "internal error" in capsys.readouterr().err


def test_inspect_works_from_a_config_alone(entry, tmp_path, capsys):
    entry.config().save_pretrained(tmp_path)
    assert qkov("inspect", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "self_attn.k_proj.weight" in printed
    assert "not proved yet" in printed


@pytest.mark.long
def test_inspect_verify_proves_and_check_holds(model_dir, capsys):
    assert qkov("inspect", model_dir, "--verify") == 0
    assert "24 slices of 2 layers, no mismatch" in capsys.readouterr().out
    assert qkov("check", model_dir) == 0
    printed = capsys.readouterr().out
    assert "all six properties hold" in printed
    assert "BROKEN" not in printed


def test_inspect_refuses_what_it_does_not_know(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "diffllama", "vocab_size": 96, "hidden_size": 32}))
    assert qkov("inspect", tmp_path) == 2
    assert "diffllama" in capsys.readouterr().err
