"""`qkov push` to a stand-in for the hub: which bytes arrive, which do not leave the machine, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from heatmaps import make_table
from hub import TOKEN, Hub, serving
from influences import heatmap_with_effects
from matrices import made_matrix
from processes import ran

from qkov_dist import load_heatmap
from qkov_dist.cli import main
from qkov_dist.report.page import make_page
from qkov_dist.report.shareable import without_texts

SECRET = "the patient's name is"
CONFIG = {
    "model": {"path": "/home/somebody/models/small"},
    "tasks": [{"name": "math", "path": "/home/somebody/secret project/math.jsonl"}, {"name": "c", "path": "c.jsonl"}],
    "output": {"dir": "runs/x"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run whose samples and paths are not for everybody."""
    table = dataclasses.replace(make_table("a", 4), texts=(f"{SECRET} A",) * 4)
    heatmap = heatmap_with_effects(samples_a=table)
    warning = "/home/somebody/secret project/math.jsonl: 2 samples were *cut* <b>"
    attributes = {**heatmap.attributes, "config": CONFIG, "warnings": [*heatmap.attributes["warnings"], warning]}
    (tmp_path / "run").mkdir()
    dataclasses.replace(heatmap, attributes=attributes).save(tmp_path / "run" / "heatmap.h5")
    return tmp_path / "run"


@pytest.fixture
def hub():
    with serving() as listening:
        yield listening


def pushed(hub: Hub, *words: object, home: Path, token: str = TOKEN):
    """`qkov push` in a process of its own, which knows no other hub."""
    command = (sys.executable, "-m", "qkov_dist", "push", *words, "--quiet")
    return ran(*command, HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")


@pytest.mark.long
def test_a_run_arrives_without_texts_and_is_loaded_as_its_card_says(hub, folder, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"secret project" in before["heatmap.h5"]
    done = pushed(hub, folder, "me/heatmap", "--private", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded: {hub.url}/datasets/me/heatmap\n"
    assert hub.repositories["datasets/me/heatmap"]["visibility"] == "private"
    files = hub.files["main"]
    figures = {f"figures/{name}.png" for name in ("heatmaps", "blocks", "layers", "changes", "waterfall")}
    assert {*files} == {"heatmap.h5", "report.html", "config.yaml", "README.md"} | figures
    assert files["figures/changes.png"].startswith(b"\x89PNG")
    for content in files.values():
        for private in (SECRET, "somebody", "secret project"):
            assert private.encode() not in content
    assert yaml.safe_load(files["config.yaml"]) == {
        "model": {"path": "small"},
        "tasks": [{"name": "math", "path": "math.jsonl"}, {"name": "c", "path": "c.jsonl"}],
        "output": {"dir": "runs/x"},
    }
    card, mine = files["README.md"].decode(), load_heatmap(folder)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "pretty_name": mine.title,
        "tags": ["qkov", "interpretability", "attention-heads", "task-interference"],
        "viewer": False,
    }
    assert re.sub(r"\\", "", card).count(mine.verdict.sentences[0]) == 1
    assert r"math.jsonl: 2 samples were \*cut\* \<b\>" in card
    assert mine.attributes["warnings"][0].replace("<", r"\<") in card
    assert "| block | heads | score" in card
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    (program,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    (tmp_path / "load.py").write_text(f"{program}\nheatmap.save({str(tmp_path / 'back.h5')!r})")
    loaded = ran(sys.executable, tmp_path / "load.py", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert loaded.returncode == 0, loaded.stderr
    back = load_heatmap(tmp_path / "back.h5")
    for block in mine:
        np.testing.assert_array_equal(back.cross[block], mine.cross[block])
        np.testing.assert_array_equal(back.effects[block]["adam"]["q_value"], mine.effects[block]["adam"]["q_value"])
    assert back.samples_a.ids == mine.samples_a.ids
    assert {*back.samples_a.texts} == {""}
    assert "somebody" not in json.dumps(back.attributes)


@pytest.mark.long
def test_with_samples_the_files_arrive_byte_for_byte_and_it_is_warned(hub, folder, tmp_path) -> None:
    hub.repositories["models/me/heatmap"] = {}  # it is there already, with a file of before
    hub.files["second"] = {"heatmap.h5": b"old"}
    words = ("--samples", "--repo-type", "model", "--revision", "second")
    done = pushed(hub, folder, "me/heatmap", *words, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "warning: heatmap.h5 and report.html hold the texts of samples" in done.stderr
    assert hub.branches == ["main", "second"]
    files = hub.files["second"]
    assert files["heatmap.h5"] == (folder / "heatmap.h5").read_bytes()
    assert files["report.html"].decode() == make_page(load_heatmap(folder))
    assert SECRET.encode() in files["report.html"]
    assert "revision='second'" in files["README.md"].decode()


def test_of_many_tasks_no_text_and_no_folder_is_left_in_any_pair() -> None:
    matrix = made_matrix()
    attributes = {**matrix.attributes, "config": CONFIG}
    pairs = {pair: dataclasses.replace(one, attributes=attributes) for pair, one in matrix.heatmaps.items()}
    bare = without_texts(dataclasses.replace(matrix, heatmaps=pairs, attributes=attributes))
    heatmaps = [bare.heatmap(*pair) for pair in bare.pairs]
    tables = [*bare.samples, *(table for one in heatmaps for table in (one.samples_a, one.samples_b))]
    assert {text for table in tables for text in table.texts} == {""}
    assert "somebody" not in json.dumps([dict(one.attributes) for one in (bare, *heatmaps)])
    assert any(any(table.texts) for table in matrix.samples)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "expected a token that the hub knows, got 401: .* Run `hf auth login`"),
        (403, "expected a token that may write there, got 403: .*name a repository of your own"),
        (404, "expected a repository that there is, or that may be made, got 404"),
        (400, "expected the hub to take the files, got 400: .*not you"),
        (0, "expected the hub to answer, got .*refused.*Check the network"),
    ],
)
def test_what_the_hub_refuses_is_one_message_and_nothing_is_lost(status, says, folder, monkeypatch, capsys) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no figures: they are not asked about here
    before = sorted(path.name for path in folder.iterdir())
    with serving() as hub:
        hub.refuses = status
        monkeypatch.setattr(constants, "ENDPOINT", hub.url if status else "http://127.0.0.1:9")
        assert main(["push", str(folder), "me/heatmap"]) == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert re.search(rf"qkov: dataset me/heatmap: {says}.*The run's folder is as it was\.", message)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert hub.repositories == {}


def test_an_id_that_is_none_and_a_run_that_is_not_there_are_refused_at_once(tmp_path, capsys) -> None:
    assert main(["push", str(tmp_path), "me/two/three"]) == 2
    assert "HUB_ID: expected a hub id, such as name/heatmap-of-my-model" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/heatmap"]) == 2
    assert "heatmap.h5" in capsys.readouterr().err
