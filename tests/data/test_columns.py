"""What a source calls the keys of a sample: names, templates, and every wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from task_files import CONVERSATION, labelled_text, load, refused
from toy_tokenizers import CHATTER

from qkov_dist.config import TaskConfig, identity, to_dict
from qkov_dist.config_file import from_dict, load_config
from qkov_dist.errors import QkovError

ROW = {"question": "a b", "answer": "42", "level": 3, "sure": True, "share": 0.5, "note": None, "steps": ["a"], "id": 9}


@pytest.mark.parametrize(
    ("columns", "text", "labelled"),
    [
        ({"prompt": "question", "completion": "answer"}, "a b42", "42"),
        ({"completion": "answer", "prompt": "{question}\nAnswer: "}, "a b\nAnswer: 42", "42"),
        ({"text": "{question}{answer} {level} {sure} {share}"}, "a b42 3 True 0.5", "a b42 3 True 0.5"),
        ({"prompt": "{{{level}}} ", "completion": "{{}}"}, "{3} {}", "{}"),
        ({"text": "question", "id": "{level}-{answer}"}, "a b", "a b"),
    ],
)
def test_names_and_templates(file: Callable[..., Path], columns: dict[str, str], text: str, labelled: str) -> None:
    task = load(file(ROW), columns=columns)
    assert (task.samples[0].text, labelled_text(task)) == (text, labelled)
    assert task.samples[0].id == ("3-42" if "id" in columns else "math-1")


def test_a_key_that_is_not_named_keeps_its_name(file: Callable[..., Path]) -> None:
    path = file({"prompt": "a ", "answer": "b", "completion": "c"}, {"answer": "b"})
    assert load(path, columns={"completion": "answer"}, max_samples=1).samples[0].text == "a b"
    assert refused(path, columns={"completion": "answer"}).expected == "a column 'prompt'"


def test_lists_may_be_messages_and_null_no_labels(file: Callable[..., Path]) -> None:
    path = file({"asked": CONVERSATION[:1], "said": CONVERSATION[1:2]})
    task = load(path, CHATTER, columns={"prompt": "asked", "completion": "said"})
    assert labelled_text(task, CHATTER) == "yes ab<|end|>"
    assert (
        refused(path, columns={"text": "asked"}).remedy == "Name a column of text for text; of messages for messages."
    )
    path = file({"ids": [5, 6, 7], "marks": None})
    assert load(path, columns={"input_ids": "ids", "labels": "marks"}).samples[0].labels.tolist() == [-100, 6, 7]
    assert refused(path, columns={"input_ids": "ids", "labels": "lables"}).expected == "a column 'lables'"


@pytest.mark.parametrize(
    ("columns", "key", "expected", "got"),
    [
        ({"prompt": "question", "completion": "note"}, "completion (column 'note')", "a value", "null"),
        ({"prompt": "{note}", "completion": "answer"}, "prompt (column 'note')", "a value", "null"),
        ({"prompt": "level", "completion": "answer"}, "prompt (column 'level')", "text", "3 (int)"),
        ({"text": "steps"}, "text (column 'steps')", "text", "['a'] (list)"),
        ({"text": "{steps}"}, "text (column 'steps')", "text or a number", "['a'] (list)"),
        ({"text": "question", "id": "note"}, "id (column 'note')", "a value", "null"),
        ({"messages": "question"}, "messages", "a list of messages", "str"),
    ],
)
def test_values_of_a_wrong_kind(
    file: Callable[..., Path], columns: dict[str, str], key: str, expected: str, got: str
) -> None:
    path = file({**ROW, "note": "fine", "level": "3", "steps": "a", "question": "q"}, "", ROW)
    error = refused(path, CHATTER, columns=columns) if "messages" in columns else refused(path, columns=columns)
    line = 1 if "messages" in columns else 3
    assert (error.where, error.expected, error.got) == (f"{path}:{line}: {key}", expected, got)


def test_a_column_that_one_row_lacks(file: Callable[..., Path]) -> None:
    path = file(ROW, {"qestion": "a", "level": 1})
    for columns in ({"text": "question"}, {"text": "{level}: {question}"}):
        error = refused(path, columns=columns)
        assert (error.where, error.expected) == (f"{path}:2", "a column 'question'")
        assert error.remedy == "Did you mean 'qestion'? The columns are qestion, level."


@pytest.mark.parametrize(
    ("columns", "where", "got"),
    [
        ({"text": "{question.upper}"}, "columns.text", "the field '{question.upper}'"),
        ({"text": "{question[0]}"}, "columns.text", "the field '{question[0]}'"),
        ({"text": "{question!r}"}, "columns.text", "the field '{question!r}'"),
        ({"text": "{level:>9}"}, "columns.text", "the field '{level:>9}'"),
        ({"text": "{level:{n}}"}, "columns.text", "the field '{level:{n}}'"),
        ({"text": "a {} b"}, "columns.text", "the field '{}'"),
        ({"text": "{question"}, "columns.text", "expected '}' before end of string"),
        ({"text": "question}"}, "columns.text", "Single '}' encountered in format string"),
        ({"messages": "{chat}"}, "columns.messages", "'{chat}'"),
        ({"promt": "question"}, "columns.promt", "'promt'"),
        ({"text": "a", "prompt": "b"}, "columns", "text, prompt"),
        ({"tools": "a"}, "columns", "tools"),
        ({"id": "a"}, "columns", "id"),
    ],
)
def test_wrong_columns_are_refused_with_the_configuration(columns: dict[str, str], where: str, got: str) -> None:
    with pytest.raises(QkovError) as caught:
        TaskConfig(name="math", path="nowhere.csv", columns=columns)
    assert (caught.value.where, caught.value.got) == (f"task 'math': {where}", got)


def test_a_configuration_holds_columns_and_what_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {path: m}\ntasks:\n"
        '- {name: a, path: a.csv, columns: {prompt: "{q}\\n", completion: c}, max_samples: 5, sample: random}\n'
        "- {name: b, path: b.csv}\n"
    )
    config = load_config(tmp_path / "run.yaml", ["tasks.b.columns={text: body}"])
    assert config.tasks[0].columns == {"prompt": "{q}\n", "completion": "c"}
    assert config.tasks[1].columns == {"text": "body"}
    assert from_dict(to_dict(config)) == config
    for other in ("tasks.a.columns={prompt: q, completion: c}", "tasks.a.sample=first", "tasks.a.sample_seed=1"):
        changed = load_config(tmp_path / "run.yaml", ["tasks.b.columns={text: body}", other])
        assert identity(changed) != identity(config)
    with pytest.raises(QkovError, match="no max_samples") as caught:
        load_config(tmp_path / "run.yaml", ["tasks.a.max_samples=null"])
    assert caught.value.where == f"{tmp_path}/run.yaml: task 'a': sample"
    for wrong in ("{}", "[a]", "{text: 3}", "{text: ''}", "prompt"):
        with pytest.raises(QkovError) as caught:
            load_config(tmp_path / "run.yaml", [f"tasks.b.columns={wrong}"])
        assert caught.value.where == f"{tmp_path}/run.yaml: tasks.1.columns (command line)"
