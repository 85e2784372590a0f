"""Faults of the machine that really happen: a full disk, a disk that cannot be written, another process in the way."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import forked
from running import exit_as_qkov, qkov

from qkov_dist import load_heatmap
from qkov_dist.results.partials import list_partials, read_partial

pytestmark = pytest.mark.long
NAMESPACE = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of linux/sched.h


def can_mount() -> bool:
    """Whether a small disk can be had here."""
    if shutil.which("unshare") is None:
        return False
    command = [*NAMESPACE, "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_a_disk = pytest.mark.skipif(not can_mount(), reason="no tmpfs can be mounted here (unshare, mount)")


def on_a_disk(folder: Path, story: Callable[..., None], *arguments: object) -> str:
    """Call a function with a folder where it may mount a disk, which is gone afterwards; returns all that was said."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    with forked(story, disk, *arguments) as process:
        done = process.ended()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def mounted(disk: Path, size: str) -> None:
    """A small disk that this process alone has; without root, it is root in a namespace of its own."""
    user, group = os.geteuid(), os.getegid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(line)
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk)


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def fills_up_and_goes_on(disk: Path, room: str, config: Path) -> None:
    mounted(disk, room)
    print("exit code", qkov("run", config, "--quiet", f"output.dir={disk}/out"))
    assert not (disk / "out" / "heatmap.h5").exists()
    for path in disk.rglob("*.h5"):
        print("kept", path)
    mount("-o", "remount,size=64m", disk)
    assert qkov("run", config, f"output.dir={disk}/out") == 0
    shutil.copy(disk / "out" / "heatmap.h5", config.parent)


def cannot_be_written(disk: Path, config: Path) -> None:
    mounted(disk, "1m")
    mount("-o", "remount,ro", disk)
    print("exit code", qkov("run", config, "--quiet", f"output.dir={disk}/out"))


def has_no_room_for_factors(disk: Path, config: Path) -> None:
    mounted(disk, "1m")
    room = ("compute.factor_memory_mb=1", "compute.factor_disk_mb=100")
    print("exit code", qkov("run", config, "--quiet", f"output.dir={disk}/out", *room))


@needs_a_disk
@pytest.mark.parametrize(
    ("room", "failed", "kept"),
    [
        ("4k", "partial_rank00000.layers/layer_0000.h5", set()),
        ("84k", "partial_rank00000.h5", {"layer_0000.h5", "layer_0001.h5"}),
        ("144k", "heatmap.h5", {"partial_rank00000.h5"}),
    ],
)
def test_a_full_disk_is_named_and_the_same_command_goes_on_once_there_is_room(
    config,
    tmp_path,
    room,
    failed,
    kept,
):
    """With room for nothing, for the layers, and for all but the heatmap."""
    said = on_a_disk(tmp_path, fills_up_and_goes_on, room, config)
    assert "exit code 2" in said
    assert f"{tmp_path}/disk/out/{failed}: expected room on the disk" in said
    assert {Path(line).name for line in said.splitlines() if line.startswith("kept ")} == kept
    assert qkov("run", config, "--quiet") == 0
    found, whole = (load_heatmap(path) for path in (tmp_path / "heatmap.h5", tmp_path / "out" / "heatmap.h5"))
    for block in whole.blocks:
        np.testing.assert_array_equal(found.cross[block], whole.cross[block])


@needs_a_disk
def test_a_disk_that_cannot_be_written_is_named(config, tmp_path):
    said = on_a_disk(tmp_path, cannot_be_written, config)
    assert "exit code 2" in said
    assert f"{tmp_path}/disk/out" in said
    assert "permission to use this" in said


@needs_a_disk
def test_spilled_factors_that_do_not_fit_say_what_to_set(config, tmp_path):
    write_large(config, tmp_path)
    said = on_a_disk(tmp_path, has_no_room_for_factors, tmp_path / "large.yaml")
    assert "exit code 2" in said
    assert "spilled factors" in said
    assert "compute.factor_memory_mb" in said


def write_large(config: Path, folder: Path) -> None:
    """The same configuration with enough samples to need some megabytes of factors."""
    raw = yaml.safe_load(config.read_text())
    for task in raw["tasks"]:
        lines = Path(task["path"]).read_text().splitlines()
        task["path"] = str(folder / f"many_{task['name']}.jsonl")
        many = [line.replace('"id": "', f'"id": "{n}-') for n in range(60) for line in lines]
        Path(task["path"]).write_text("\n".join(many))
    raw["statistics"] = {"enabled": False}
    (folder / "large.yaml").write_text(yaml.safe_dump(raw))


def test_a_second_job_on_the_same_folder_is_refused_and_the_first_finishes(config, tmp_path, capsys):
    write_large(config, tmp_path)
    out = tmp_path / "out"
    with forked(exit_as_qkov, "run", tmp_path / "large.yaml", "--quiet") as first:
        first.wait_until((out / "partial_rank00000.layers").is_dir, pause_s=0.001)  # the folder itself is made first
        first.send(signal.SIGSTOP)
        assert not (out / "heatmap.h5").exists()
        before = sorted(path for path in out.rglob("*"))
        assert qkov("run", config, "--quiet") == 2
        said = capsys.readouterr().err
        assert str(out) in said
        assert "no other process is writing" in said
        assert sorted(path for path in out.rglob("*")) == before
        first.send(signal.SIGCONT)
        assert first.ended().returncode == 0
    assert load_heatmap(out / "heatmap.h5").blocks


@pytest.mark.parametrize("command", ["merge", "stats", "report"])
def test_a_result_that_another_process_holds_open_for_writing_is_named(config, tmp_path, capsys, undrawn, command):
    assert qkov("run", config, "--quiet") == 0
    out = tmp_path / "out"
    held = out / "heatmap.h5" if command == "report" else list_partials(out)[0]
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        capsys.readouterr()
        assert qkov(command, out) == 2
        said = capsys.readouterr().err
        assert str(held) in said
        assert "HDF5_USE_FILE_LOCKING=FALSE" in said
        other.stdin.close()
    assert read_partial(list_partials(out)[0]).missing == ()
    assert qkov(command, out) == 0
