"""Result files that ought to be refused: bytes damaged without knowing the format, and valid HDF5 that lies."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import h5py
from fuzz_bytes import IN_PLACE, SEEDS, damaged, one_of_files
from fuzz_text import changed, json_texts, leaves, trees
from hdf5_edits import CONTENT, FALSE_VALUES, Edit, json_word
from hdf5_storage import STORAGE
from hypothesis import strategies as st
from result_files import HEATMAP, LAYER_FILE, PARTIALS, metadata, old_results, results

from qkov_dist.results.metadata import to_json

MOST_SECONDS = 60  # of an edit
_REFUSALS = (ValueError, TypeError, KeyError, OSError, RuntimeError, OverflowError, NotImplementedError)


def edited(content: bytes, edits: Sequence[tuple[Edit, int]], value: Any) -> bytes:
    """A file after some edits; those that h5py refuses are left out.

    A process of its own makes them: HDF5 crashes over some, and what is then on disk will do as well.
    """
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "file.h5"
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which this child does not have
            child = os.fork()
        if child == 0:
            try:
                _edit(path, edits, value)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return path.read_bytes()


def _edit(path: Path, edits: Sequence[tuple[Edit, int]], value: Any) -> None:
    faulthandler.disable()
    signal.alarm(MOST_SECONDS)
    with contextlib.suppress(*_REFUSALS), h5py.File(path, "r+") as file:
        for edit, seed in edits:
            with contextlib.suppress(*_REFUSALS):
                edit(file, Random(seed), value)


def lies(contents: Sequence[bytes], edits: Sequence[Edit] = (*CONTENT, *STORAGE)) -> st.SearchStrategy[bytes]:
    """Files that are valid HDF5 and lie."""
    some = st.lists(st.tuples(st.sampled_from(list(edits)), SEEDS), min_size=1, max_size=3)
    of_trees = st.builds(edited, one_of_files(contents), some, st.one_of(trees, leaves))
    word = SEEDS.map(lambda seed: [(json_word, seed)])
    return st.one_of(of_trees, of_trees, of_trees, st.builds(edited, one_of_files(contents), word, json_texts))


def _wrapped(content: bytes, before: int, after: bytes) -> bytes:
    """A file behind a user block, and before what does not belong to it."""
    return bytes(before) + content + after


def any_damage(names: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Every kind of damage to the files of these names; some are in HDF5's first format, without checksums."""
    new, old = [results()[name] for name in names], [old_results()[name] for name in names]
    return st.one_of(
        lies(new),
        lies(new),
        damaged(new, IN_PLACE),
        damaged(new),
        damaged(old, IN_PLACE),
        st.builds(_wrapped, one_of_files(new), st.sampled_from((0, 512, 1024, 100)), st.binary(max_size=100)),
    )


def _two(damage: bytes, rank: int) -> dict[str, bytes]:
    """The partial files of two ranks, one of them damaged."""
    return {name: results()[name] for name in PARTIALS} | {PARTIALS[rank]: damage}


def _both(damage: bytes, other: bytes) -> dict[str, bytes]:
    return dict(zip(PARTIALS, (damage, other), strict=True))


partial_inputs = any_damage(PARTIALS[:1]).map(lambda damage: {PARTIALS[0]: damage})
resume_inputs = st.one_of(partial_inputs, any_damage([LAYER_FILE]).map(lambda damage: {LAYER_FILE: damage}))
gather_inputs = st.one_of(
    st.builds(_two, any_damage(PARTIALS), st.sampled_from((0, 1))),
    st.builds(_both, lies([results()[PARTIALS[0]]]), lies([results()[PARTIALS[1]]])),
)
_of_two = st.builds(_two, lies([results()[name] for name in PARTIALS], FALSE_VALUES), st.sampled_from((0, 1)))
_over_one = any_damage([HEATMAP]).map(
    lambda damage: {**_both(*(results()[name] for name in PARTIALS)), HEATMAP: damage}
)
merge_inputs = st.one_of(_of_two, _of_two, _over_one)
heatmap_inputs = any_damage([HEATMAP]).map(lambda damage: {HEATMAP: damage})
shown_inputs = lies([results()[HEATMAP]], FALSE_VALUES).map(lambda damage: {HEATMAP: damage})
frame_inputs = st.builds(changed, st.builds(lambda: to_json(metadata())), SEEDS, st.one_of(trees, leaves, leaves)).map(
    lambda tree: {"frame.json": json.dumps(tree).encode()}
)
