"""Conversations as chat templates of all kinds render them: what is labelled, warned of, and the same on any day."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_files import CONVERSATION, labelled_text, load, refused
from toy_tokenizers import CHAT, CHATTER, TAGGED_CHAT, byte_tokenizer
from transformers.utils import chat_template_utils

from qkov_dist.data.samples import Task, task_fingerprint

Files = Callable[..., Path]
ASK, ANSWER = CONVERSATION[:2]
IN_PARTS = CHAT.replace("{{ message['content'] }}", "{% for p in message['content'] %}{{ p['text'] }}{% endfor %}")
EITHER = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}(thought){% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls or () %}[{{ call.function.name }}]{% endfor %}",
)
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} {% macro on() %}"
DATED += "{{ strftime_now('%-d/%-m') }}{% endmacro %}{{ on() }}" + CHAT
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def only(path: Path, template: str) -> Task:
    return load(path, byte_tokenizer(template), max_positions=None)


@pytest.mark.parametrize("template", [CHAT, IN_PARTS, EITHER, TAGGED_CHAT])
def test_contents_in_parts_are_texts(file: Files, template: str) -> None:
    """Also where the template sees parts alone, and would leave out a text without a word."""
    as_text = only(file({"messages": CONVERSATION}), template)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CONVERSATION]
    in_parts = only(file({"messages": parts}), template)
    assert as_text.samples[0].text == in_parts.samples[0].text
    assert as_text.samples[0].text.startswith("<|user|>hi<|end|><|assistant|>yes ab<|end|>")
    assert labelled_text(as_text).startswith("yes ab")
    assert task_fingerprint(as_text) == task_fingerprint(in_parts)


def test_parts_are_read_on_without_a_gap(file: Files) -> None:
    split = [{"type": "text", "text": "yes"}, {"type": "text", "text": " ab"}]
    task = only(file({"messages": [ASK, {**ANSWER, "content": split}]}), CHAT)
    assert labelled_text(task) == "yes ab<|end|>"


def test_a_turn_that_calls_a_tool_needs_no_content(file: Files) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "no"}]
    for call in ({"content": None}, {}, {"content": ""}):
        messages = [ASK, {"role": "assistant", "tool_calls": calls, **call}, *turns]
        task = only(file({"messages": messages, "tools": None}), WITH_TOOLS)
        assert labelled_text(task) == "[add]<|end|>no<|end|>"
        assert "None" not in task.samples[0].text


def test_tools_are_shown_to_the_template(file: Files) -> None:
    rows = [{"messages": CONVERSATION, "tools": tools} for tools in (TOOLS, json.dumps(TOOLS))]
    task = only(file(*rows), WITH_TOOLS)
    for sample in task.samples:
        assert sample.text.startswith('[{"type": "function", "function": {"name": "add"')
    assert labelled_text(task) == "yes ab<|end|>no<|end|>"
    assert task.warnings == ()


def test_tools_that_a_template_does_not_show_are_warned_of(file: Files) -> None:
    task = only(file({"messages": CONVERSATION}, {"messages": CONVERSATION, "tools": TOOLS}), CHAT)
    (warning,) = task.warnings
    assert warning.startswith("task 'math', 1 of 2 chats (first 'math-2'): the chat template does not show the tools")


@pytest.mark.parametrize(("template", "end"), [(CHAT, "<|end|>"), (TAGGED_CHAT, "")])
def test_prompt_and_completion_of_messages(file: Files, template: str, end: str) -> None:
    """The assistant's turns of the completion are labelled, those of the prompt are not."""
    task = only(file({"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}), template)
    assert labelled_text(task) == f"no{end}"
    assert task.samples[0].text == only(file({"messages": CONVERSATION}), template).samples[0].text
    assert (
        labelled_text(only(file({"prompt": [ASK], "completion": CONVERSATION[1:]}), template)) == f"yes ab{end}no{end}"
    )
    with_tools = only(file({"prompt": [ASK], "completion": [ANSWER], "tools": TOOLS}), WITH_TOOLS)
    assert with_tools.samples[0].text.startswith("[{")


def test_a_template_that_renders_the_last_turn_otherwise_labels_that_one(file: Files) -> None:
    task = only(file({"messages": [ASK, ANSWER]}, {"messages": CONVERSATION}), THINKING)
    assert labelled_text(task, index=0) == "(thought)yes ab<|end|>"
    assert labelled_text(task, index=1) == "(thought)no<|end|>"
    (warning,) = task.warnings
    assert warning.startswith("task 'math', 1 of 2 chats (first 'math-2'): only the last assistant turn is labelled")


def test_a_generation_mask_labels_every_turn_of_such_a_template(file: Files) -> None:
    content = "{% generation %}{% if loop.last %}(thought){% endif %}{{ message['content'] }}{% endgeneration %}"
    marked = TAGGED_CHAT.replace("{% generation %}{{ message['content'] }}{% endgeneration %}", content)
    task = only(file({"messages": CONVERSATION}), marked)
    assert labelled_text(task) == "yes ab(thought)no"
    assert task.warnings == ()


def test_a_last_turn_that_does_not_stand_in_the_whole_is_refused(file: Files) -> None:
    path = file({"messages": [*CONVERSATION, {"role": "user", "content": "hi"}]})
    assert refused(path, byte_tokenizer(THINKING)).got == "other text"


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2031, 11, 5)


@pytest.mark.parametrize(
    "template", [DATED, DATED.replace(CHAT, TAGGED_CHAT), "\n  " + DATED, "  {% if true %}{% endif %}" + DATED]
)
def test_a_template_that_prints_the_date_is_the_same_on_any_day(
    file: Files, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    path = file({"messages": CONVERSATION})
    before = only(path, template)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    after = only(path, template)
    assert task_fingerprint(before) == task_fingerprint(after)
    own = byte_tokenizer(template).apply_chat_template(CONVERSATION, tokenize=False)
    assert "05 Nov 2031 5/11" in own
    assert after.samples[0].text == own.replace("05 Nov 2031 5/11", "26 Jul 2024 26/7")
    assert after.notes == ("task 'math': the chat template asks for the date, and gets 2024-07-26 on any day",)


def test_other_templates_have_nothing_to_note(file: Files) -> None:
    task = load(file({"messages": CONVERSATION}, {"text": "ab"}), CHATTER)
    assert (task.notes, task.warnings) == ((), ())
