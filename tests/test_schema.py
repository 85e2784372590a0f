"""The configuration's JSON Schema: what editors check is what the program reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from qkov_dist.cli import main
from qkov_dist.commands.keys import schema
from qkov_dist.config import KEYS, read_value
from qkov_dist.config_file import load_config
from qkov_dist.errors import QkovError

CONFIGS = Path(__file__).parents[1] / "configs"
CHECK = Draft202012Validator(schema())
RIGHT: dict[str, Any] = {
    "model": {"path": "m"},
    "tasks": [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl", "max_samples": 3}],
}
VALUES: list[Any] = [
    None, True, False, "", " ", "text", "auto", "float32", "interference", "pooled", "none", "a", "0-3,7", " 2 - 4 , 2",
    "3-", "1,,2", "123456", -1, 0, 1, 2, 99_999, 100_000, 2**63 - 1, 2**63, 0.5, 1.5, -0.5, 1e-8,
    [], [3, 1, 3], [0, -1], [1.5], ["1"], [True], {}, {"a": 1},
]  # fmt: skip


def test_it_is_a_schema_and_the_stored_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(schema())
    assert main(["run", "--schema"]) == 0
    assert (CONFIGS / "qkov.schema.json").read_text(encoding="utf-8") == capsys.readouterr().out, (
        "run: qkov run --schema > configs/qkov.schema.json"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_name_it_and_follow_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first, _, _ = text.partition("\n")
    named = first.removeprefix("# yaml-language-server: $schema=")
    stored = json.loads((path.parent / named).read_text(encoding="utf-8"))
    Draft202012Validator(stored).validate(yaml.safe_load(text))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_takes_in_an_editor_what_it_takes_in_a_run(key: str) -> None:
    place: Any = schema()
    for part in key.split("."):
        place = place["items"] if part.isdecimal() else place["properties"][part]
    validator, entry = Draft202012Validator(place), KEYS[key]
    taken = []
    for value in VALUES:
        try:
            read_value(entry, value, key)
        except QkovError:
            continue
        taken.append(value)
    assert [repr(value) for value in VALUES if validator.is_valid(value)] == [repr(value) for value in taken]
    assert place["description"] == entry.metadata["meaning"]
    assert "default" not in place or place["default"] == entry.default


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"metrik": {}}, []),
        ({"metric": {"scor": "signed"}}, ["metric"]),
        ({"metric": {"score": "sined"}}, ["metric", "score"]),
        ({"model": {}}, ["model"]),
        ({"model": None}, ["model"]),
        ({"tasks": RIGHT["tasks"][:1]}, ["tasks"]),
        ({"tasks": RIGHT["tasks"] * 33}, ["tasks"]),
        ({"tasks": [{"name": "a"}, RIGHT["tasks"][1]]}, ["tasks", 0]),
        ({"statistics": {"permutations": 1}}, ["statistics", "permutations"]),
        ({"statistics": {"bootstrap": 100}}, ["statistics"]),
    ],
)
def test_what_a_run_refuses_an_editor_marks(change: dict[str, Any], where: list[Any], tmp_path: Path) -> None:
    wrong = RIGHT | change
    assert [list(error.absolute_path) for error in CHECK.iter_errors(wrong)] == [where]
    (tmp_path / "run.yaml").write_text(json.dumps(wrong))
    with pytest.raises(QkovError):
        load_config(tmp_path / "run.yaml")


def test_what_a_run_reads_an_editor_takes(tmp_path: Path) -> None:
    for right in (RIGHT, RIGHT | {"metric": None, "ridge": {}}):
        CHECK.validate(right)
        (tmp_path / "run.yaml").write_text(json.dumps(right))
        load_config(tmp_path / "run.yaml")
