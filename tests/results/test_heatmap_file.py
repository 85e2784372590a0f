"""heatmap.h5: round trips, what other tools see, atomic writing, and every way in which a file can lie."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
from comparing import assert_same_heatmap
from heatmaps import ATTRIBUTES, LAYERS, NUM_A, NUM_B, make_heatmap, make_statistics, make_table
from processes import forked

from qkov_dist.errors import QkovError
from qkov_dist.results.hdf5_write import writing
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.stats.statistics import QKOVStatistics


def datasets(path: Path) -> Iterator[tuple[str, h5py.Dataset]]:
    with h5py.File(path) as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in found:
            yield name, file[name]


@pytest.fixture(scope="module")
def as_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "heatmap.h5"
    make_heatmap().with_statistics(make_statistics()).save(path)
    return path


@pytest.fixture
def saved(as_written: Path, tmp_path: Path) -> Path:
    return shutil.copy(as_written, tmp_path / "heatmap.h5")


def test_what_is_loaded_is_what_was_saved_bit_for_bit(saved: Path) -> None:
    assert_same_heatmap(make_heatmap().with_statistics(make_statistics()), load_heatmap(saved))


@pytest.mark.parametrize(("score", "deciding"), [("interference", "overlap"), ("signed", "cross_mean")])
def test_the_statistic_that_decides_still_decides_after_loading(tmp_path: Path, score: str, deciding: str) -> None:
    heatmap = make_heatmap(attributes=ATTRIBUTES | {"score": score, "estimator": "mean", "scope": "pooled"})
    result = QKOVStatistics(fdr_alpha=0.9, n_permutations=30).test_heatmap(heatmap)
    heatmap.with_statistics(result).save(tmp_path / "h.h5", "cross")
    loaded = load_heatmap(tmp_path / "h.h5")
    assert loaded.deciding == deciding
    for block, tests in result[deciding].items():
        np.testing.assert_array_equal(loaded[block].p_values, tests["p_value"])
        assert np.isfinite(tests["p_value"]).sum() == heatmap.present[block].sum()
    found = loaded.statistics
    assert found["settings"] == result["settings"]
    assert found["fdr_corrected"] == result["fdr_corrected"]
    assert any(found["fdr_corrected"].values())
    assert tuple(found["notes"]) == result["notes"]
    assert {name: found[name].keys() for name in result.arrays()} == {
        name: blocks.keys() for name, blocks in result.arrays().items()
    }


@pytest.mark.parametrize(("pairs", "groups"), [("none", []), ("cross", ["scores"]), ("all", ["scores", "scores_all"])])
def test_pairs_decides_which_scores_are_kept(tmp_path: Path, pairs: Any, groups: list[str]) -> None:
    make_heatmap().save(tmp_path / "h.h5", pairs)
    with h5py.File(tmp_path / "h.h5") as file:
        assert [name for name in file if name.startswith("scores")] == groups
        assert ("scores" in file["shared/O_bias"]) == (pairs != "none")
    loaded = load_heatmap(str(tmp_path / "h.h5"))
    assert (loaded.cross is None) == (pairs == "none")
    assert (loaded.pooled is None) == (pairs != "all")
    assert loaded.statistics is None
    assert loaded.attributes == ATTRIBUTES


def test_blocks_that_no_layer_has_stay_away(tmp_path: Path) -> None:
    heatmap = make_heatmap()
    some = {
        name: {block: getattr(heatmap, name)[block] for block in "QO"}
        for name in ("mean", "present", "fisher", "cross", "pooled")
    }
    small = make_heatmap(**some, kv_heads=())
    small.save(tmp_path / "h.h5")
    assert_same_heatmap(small, load_heatmap(tmp_path / "h.h5"))


def test_file_has_the_names_types_and_checksums_of_the_specification(saved: Path) -> None:
    found = dict(datasets(saved))
    assert {"layer", "head", "kv_head", "sample_a", "sample_b"} <= found.keys()
    for name, dataset in datasets(saved):
        assert dataset.fletcher32, name
        assert dataset.dtype.kind in "fiS", name
        root, *rest = name.split("/")
        if root == "scores":
            assert dataset.dtype == np.float32
            assert dataset.chunks == (1, 1, NUM_A, NUM_B)
        if root in ("heatmap", "fisher"):
            assert dataset.dtype == np.float64
        if root in ("scores", "scores_all", "heatmap", "present", "fisher") or rest[-1:] == ["p_value"]:
            block = next(part for part in rest if part in "QKVO")
            assert [dim[0].name for dim in dataset.dims][:2] == ["/layer", "/kv_head" if block in "KV" else "/head"]
    with h5py.File(saved) as file:
        assert file.attrs["schema"] == b"qkov-dist/1"
        assert file.attrs["run_id"] == b"run-1"
        assert file.attrs["config"].decode() == ATTRIBUTES["config"]
        assert {"versions", "seeds", "warnings"} <= set(file.attrs)
        assert {f"samples/{t}/{n}" for t in "ab" for n in ("id", "num_tokens", "loss", "text")} <= found.keys()
        assert {f"fisher/K/{n}" for n in ("mean", "min", "ridge_share", "share_a")} <= found.keys()


@pytest.mark.parametrize(
    ("group", "name", "dims"),
    [
        ("/scores", "K", ("layer", "kv_head", "sample_a", "sample_b")),
        ("/scores_all", "Q", ("layer", "head", "sample", "sample_right")),
        ("/heatmap", "V", ("layer", "kv_head")),
        ("/fisher/Q", "min", ("layer", "head")),
        ("/statistics/overlap/Q", "interval", ("layer", "head", "n2")),
        ("/samples/b", "loss", ("sample_b",)),
        ("/shared/O_bias", "scores", ("layer", "sample_a", "sample_b")),
    ],
)
def test_xarray_opens_groups_with_named_dimensions(saved: Path, group: str, name: str, dims: tuple[str, ...]) -> None:
    with xarray.open_dataset(saved, engine="h5netcdf", group=group) as data:
        assert data[name].dims == dims
        assert data[name].load().notnull().any()


def test_xarray_opens_the_root_and_the_whole_tree(saved: Path) -> None:
    with xarray.open_dataset(saved, engine="h5netcdf") as root:
        np.testing.assert_array_equal(root["layer"], LAYERS)
        assert root.attrs["schema"] == "qkov-dist/1"
        assert set(root.coords) >= {"layer", "head", "kv_head", "sample_a", "sample_b"}
    with xarray.open_datatree(saved, engine="h5netcdf") as tree:
        heatmap = make_heatmap()
        assert tree["heatmap/K"].sel(layer=5, kv_head=1).item() == heatmap.mean["K"][1, 1]
        assert tree["present/V"].dtype == bool
        assert tuple(tree["samples/a/id"].values) == heatmap.samples_a.ids


def test_strings_that_utf8_cannot_hold_are_escaped_and_long_ones_kept(tmp_path: Path) -> None:
    long = "x" * (5 << 20) + "é"
    table = make_table("b", NUM_B)
    table = type(table)(("\ud800", "", "c"), table.num_tokens, table.losses, ("", long, "z"))
    make_heatmap(samples_b=table, attributes=ATTRIBUTES | {"config": long}).save(tmp_path / "h.h5")
    loaded = load_heatmap(tmp_path / "h.h5")
    assert loaded.samples_b.ids == ("\\ud800", "", "c")
    assert loaded.samples_b.texts == ("", long, "z")
    assert loaded.attributes["config"] == long
    assert (tmp_path / "h.h5").stat().st_size < 7 << 20  # rows are padded to the longest, but compressed


def test_attributes_that_json_cannot_hold_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(QkovError, match="attribute seeds"):
        make_heatmap(attributes={"run_id": "r", "seeds": {(1, 2): 3}}).save(tmp_path / "h.h5")
    assert list(tmp_path.iterdir()) == []


# Writing: whole or not at all, and never over what is not ours.


def test_the_same_run_is_replaced_and_leftovers_of_a_killed_writer_go(saved: Path) -> None:
    (saved.parent / ".heatmap.h5.0123abcd.tmp").write_bytes(b"half")
    make_heatmap(task_a="new").save(saved)
    assert load_heatmap(saved).task_a == "new"
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(("before", "after"), [("run-1", "run-2"), ("", ""), ("run-1", "")])
def test_the_file_of_another_run_is_not_overwritten(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "h.h5"
    make_heatmap(attributes={"run_id": before}).save(path)
    bytes_before = path.read_bytes()
    with pytest.raises(QkovError, match="Nothing was overwritten"):
        make_heatmap(attributes={"run_id": after}).save(path)
    assert path.read_bytes() == bytes_before


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "h.h5"
    path.write_bytes(b"my thesis")
    with pytest.raises(QkovError, match=r"h\.h5"):
        make_heatmap().save(path)
    assert path.read_bytes() == b"my thesis"


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(ZeroDivisionError), writing(saved, "run-1") as writer:
        writer.array("layer", np.arange(1 // 0))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_order_of_durability_is_file_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))[1]
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to))[1])
    make_heatmap().save(tmp_path / "h.h5")
    assert events[0].endswith(".tmp")
    assert events[1:] == ["rename", str(tmp_path)]


def apart(function: Callable[..., None], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call a function in its own process, so that a crash of the interpreter is seen as one."""
    with forked(function, *arguments) as process:
        return process.ended()


def save_with_room_for(path: Path, size: int) -> None:
    before, told = resource.getrlimit(resource.RLIMIT_FSIZE), ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        make_heatmap().with_statistics(make_statistics()).save(path)
    except QkovError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # what is said goes into a file, too
    print(told)


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.99])
def test_a_full_disk_is_one_clear_error_and_keeps_the_old_file(saved: Path, share: float) -> None:
    before = saved.read_bytes()
    result = apart(save_with_room_for, saved, int(len(before) * share))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert str(saved) in result.stdout
    assert "room on the disk" in result.stdout
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("good_writes", [0, 1, 40])
def test_a_write_that_fails_once_fails_the_file(saved: Path, good_writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may be full for a moment: what is lost then stays lost, whatever succeeds afterwards."""
    before, pwrite, calls = saved.read_bytes(), os.pwrite, iter(range(1 << 20))

    def failing(*arguments: Any) -> int:
        if next(calls) == good_writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(QkovError, match="room on the disk"):
        make_heatmap().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(QkovError, match="existing folder"):
        make_heatmap().save(tmp_path / "no" / "h.h5")


def test_a_file_that_another_process_writes_says_what_to_set(saved: Path) -> None:
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(saved)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(QkovError, match="HDF5_USE_FILE_LOCKING") as raised:
            load_heatmap(saved)
        assert str(saved) in str(raised.value)
        other.stdin.close()


# Reading: damage and lies.


def refused(path: Path, *words: str) -> None:
    with pytest.raises(QkovError) as raised:
        load_heatmap(path)
    for word in (str(path), *words):
        assert word in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_a_flipped_byte_in_any_dataset_is_a_checksum_error(saved: Path) -> None:
    original = saved.read_bytes()
    places = {}
    for name, dataset in datasets(saved):
        if name in ("n2", "sample", "sample_right"):  # 0, 1, 2, ... for other tools
            continue
        chunk = dataset.id.get_chunk_info(0)
        places[name] = chunk.byte_offset + chunk.size // 2
    assert len(places) > 60
    for name, place in places.items():
        saved.write_bytes(original[:place] + bytes([original[place] ^ 0x10]) + original[place + 1 :])
        refused(saved, name, "checksum")


def test_without_a_checksum_the_same_flip_would_go_unseen(tmp_path: Path) -> None:
    """What the test above relies on."""
    path = tmp_path / "plain.h5"
    with h5py.File(path, "w") as file:
        place = file.create_dataset("x", data=np.ones((2, 2)), chunks=(2, 2)).id
        file.flush()
        place = place.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
    with h5py.File(path) as file:
        assert not (file["x"][...] == 1).all()


def count_refused_damage(path: Path) -> None:
    original, right, rng, refused = path.read_bytes(), load_heatmap(path), np.random.default_rng(0), 0
    for _ in range(150):
        data = bytearray(original)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            assert_same_heatmap(right, load_heatmap(path))
        except QkovError as error:
            refused += str(path) in str(error) or sys.exit(f"does not name its file: {error}")
    print(refused)


@pytest.mark.long
def test_random_damage_is_refused_or_harmless_and_never_crashes(saved: Path) -> None:
    result = apart(count_refused_damage, saved)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 75


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    refused(saved)


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.h5", "existing file")
    (tmp_path / "text.h5").write_text("x" * 10_000)
    refused(tmp_path / "text.h5", "signature")
    refused(tmp_path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    refused(tmp_path / "other.h5", "schema")


def replace(name: str, make: Callable[[h5py.File, Path], None]) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, path: Path) -> None:
        del file[name]
        make(file, path)

    return change


def external_dataset(file: h5py.File, path: Path) -> None:
    (path.parent / "raw").write_bytes(bytes(1000))
    file.create_dataset("heatmap/Q", (3, 6), "f8", external=[(str(path.parent / "raw"), 0, 1000)])


def virtual_dataset(file: h5py.File, path: Path) -> None:
    layout = h5py.VirtualLayout((3, 6), "f8")
    layout[:] = h5py.VirtualSource(str(path), "fisher/Q/mean", (3, 6))
    file.create_virtual_dataset("heatmap/Q", layout)


def references(file: h5py.File, _: Path) -> None:
    file.create_dataset("heatmap/Q", data=np.full((3, 6), file["layer"].ref), dtype=h5py.ref_dtype)


def variable_strings(file: h5py.File, _: Path) -> None:
    file.create_dataset("samples/a/id", data=["a"] * NUM_A, dtype=h5py.string_dtype())


def never_written(file: h5py.File, _: Path) -> None:
    """A terabyte that takes a kilobyte on disk."""
    file.create_dataset("layer", (1 << 37,), "i8", chunks=(1 << 20,), fletcher32=True)


def bomb(file: h5py.File, _: Path) -> None:
    """Zeros that compress a thousandfold, declared over a chunk of which only a part is data."""
    file.create_dataset("layer", (3,), "i8", chunks=(1 << 26,), maxshape=(None,), compression="gzip")
    file["layer"].id.write_direct_chunk((0,), b"x\x9c\x03\x00\x00\x00\x00\x01")


def unknown_filter(file: h5py.File, _: Path) -> None:
    file.create_dataset("heatmap/Q", data=np.ones((3, 6)), chunks=(3, 6), compression="lzf")


MANY_FIELDS = [(f"field {n}", "f4") for n in range(500)]
LIES = {
    "external link": (
        replace("heatmap/Q", lambda f, p: f.__setitem__("heatmap/Q", h5py.ExternalLink(str(p), "/fisher/Q/mean"))),
        "link",
    ),
    "linked group": (
        replace("heatmap", lambda f, _: f.__setitem__("heatmap", h5py.ExternalLink("other.h5", "/heatmap"))),
        "link",
    ),
    "soft link": (
        replace("heatmap/Q", lambda f, _: f.__setitem__("heatmap/Q", h5py.SoftLink("/fisher/Q/min"))),
        "link",
    ),
    "external data": (replace("heatmap/Q", external_dataset), "external dataset"),
    "virtual data": (replace("heatmap/Q", virtual_dataset), "virtual"),
    "references": (replace("heatmap/Q", references), "kind f"),
    "variable strings": (replace("samples/a/id", variable_strings), "fixed-length"),
    "too large": (replace("layer", never_written), "stored bytes"),
    "bomb": (replace("layer", bomb), "stored bytes"),
    "unknown filter": (replace("heatmap/Q", unknown_filter), "known filters"),
    "missing mean": (replace("heatmap/Q", lambda *_: None), "heatmap/Q"),
    "missing scores": (replace("scores/V", lambda *_: None), "scores/V"),
    "missing pooled": (replace("scores_all/K", lambda *_: None), "scores_all/K"),
    "missing axis": (replace("kv_head", lambda *_: None), "kv_head"),
    "missing texts": (replace("samples/b", lambda *_: None), "samples/b"),
    "group for data": (replace("heatmap/Q", lambda f, _: f.create_group("heatmap/Q")), "a dataset"),
    "other shape": (
        replace("heatmap/Q", lambda f, _: f.create_dataset("heatmap/Q", data=np.ones((3, 5)))),
        "shape (3, 6)",
    ),
    "integers": (replace("heatmap/Q", lambda f, _: f.create_dataset("heatmap/Q", data=np.ones((3, 6), int))), "kind f"),
    "null": (replace("heatmap/Q", lambda f, _: f.create_dataset("heatmap/Q", dtype="f8")), "a dataset with a shape"),
    "name of two lines": (
        lambda f, _: f.create_dataset("statistics/overlap/Q/x\ny", dtype="f8"),
        r"statistics/overlap/Q/x\ny: expected a dataset with a shape",
    ),
    "deep names that move the cursor": (
        lambda f, _: f.create_group("statistics/overlap/Q" + 9 * "/\x1b[2J"),
        r"\x1b[2J: expected at most 8 nested groups",
    ),
    "type of many fields": (
        replace("heatmap/Q", lambda f, _: f.create_dataset("heatmap/Q", data=np.zeros((3, 6), MANY_FIELDS))),
        "numbers of kind f, got [('field 0'",
    ),
    "infinite score": (lambda f, _: f["scores/Q"].__setitem__((0, 0, 0, 0), np.inf), "scores/Q: expected finite"),
    "infinite mean": (lambda f, _: f["heatmap/Q"].__setitem__((0, 0), -np.inf), "heatmap/Q: expected finite"),
    "other schema": (lambda f, _: f.attrs.__setitem__("schema", "qkov-dist/2"), "qkov-dist/2"),
    "no task": (lambda f, _: f.attrs.__delitem__("task_a"), "task_a"),
    "odd attribute": (lambda f, _: f.attrs.__setitem__("config", np.array([b"x", b"y"])), "config"),
    "bad JSON": (lambda f, _: f.attrs.__setitem__("versions", "{"), "intact"),
    "circle": (lambda f, _: f.__setitem__("statistics/again", f["statistics"]), "nested"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(saved: Path, lie: str) -> None:
    change, word = LIES[lie]
    with h5py.File(saved, "r+") as file:
        change(file, saved)
    refused(saved, word)


def test_other_tools_attributes_and_datasets_do_no_harm(saved: Path) -> None:
    with h5py.File(saved, "r+") as file:
        file.attrs["_NCProperties"] = h5py.Empty("f")
        file["mine"] = np.arange(3)
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/")
    assert_same_heatmap(make_heatmap().with_statistics(make_statistics()), load_heatmap(saved))
