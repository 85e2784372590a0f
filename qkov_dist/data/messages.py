"""The messages and tools of a row, checked: roles, contents as text or parts of text, and turns that call tools."""

from __future__ import annotations

import json
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.values import written

MAX_MESSAGES = 1000
EXAMPLE = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def read_messages(value: object, place: str, *, assistant: bool = True) -> list[dict[str, Any]]:
    """The messages of a conversation, with contents as text; keys that are null are left out.

    Args:
        value: What stands in the row.
        place: Where.
        assistant: Whether one of them must be the assistant's, to be labelled.

    Raises:
        QkovError: at the first message that is none.
    """
    if not isinstance(value, list):
        raise QkovError(place, expected="a list of messages", got=type(value).__name__, remedy=EXAMPLE)
    if len(value) > MAX_MESSAGES:
        remedy = "Cut the conversation into several samples."
        raise QkovError(place, expected=f"at most {MAX_MESSAGES} messages", got=str(len(value)), remedy=remedy)
    messages = [_message(message, f"{place}.{index}") for index, message in enumerate(value)]
    if assistant and not any(message["role"] == "assistant" for message in messages):
        got = "no message with the role 'assistant'"
        raise QkovError(place, expected="an assistant turn to label", got=got, remedy=EXAMPLE)
    return messages


def read_tools(value: object, place: str) -> list[dict[str, Any]] | None:
    """The tools of a conversation: a list of JSON objects, or its JSON text; None where there are none."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = value
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        remedy = 'Write [{"type": "function", "function": {"name": "...", "parameters": {...}}}].'
        raise QkovError(place, expected="a list of tools, each an object", got=written(value), remedy=remedy)
    return found


def read_string(value: object, place: str, *, empty: bool) -> str:
    """Text that UTF-8 can hold, where ``empty`` also none at all."""
    remedy = "Write the text between double quotes, in valid Unicode."
    if not isinstance(value, str):
        raise QkovError(place, expected="text", got=type(value).__name__, remedy=remedy)
    if not value and not empty:
        raise QkovError(place, expected="text", got="empty text", remedy="Leave the sample out.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair at character {error.start}"
        raise QkovError(place, expected="valid Unicode", got=got, remedy=remedy) from None
    return value


def _message(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise QkovError(place, expected="role and content", got=type(value).__name__, remedy=EXAMPLE)
    message = {key: part for key, part in value.items() if part is not None}
    read_string(message.get("role"), f"{place}.role", empty=False)
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        remedy = 'Write [{"type": "function", "function": {"name": "...", "arguments": {...}}}].'
        raise QkovError(f"{place}.tool_calls", expected="a list of calls", got=written(calls), remedy=remedy)
    if "content" in message or not calls:
        message["content"] = _content(message.get("content"), f"{place}.content")
    return message


def _content(value: object, place: str) -> str:
    """The text of a content, given as it is or in parts."""
    if not isinstance(value, list):
        return read_string(value, place, empty=True)
    return "".join(_part(part, f"{place}.{index}") for index, part in enumerate(value))


def _part(value: object, place: str) -> str:
    remedy = 'Write {"type": "text", "text": "..."}; only text is scored.'
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind != "text":
        got = f"one of type {written(kind)}" if isinstance(value, dict) else written(value)
        raise QkovError(place, expected="a part of type 'text'", got=got, remedy=remedy)
    return read_string(value.get("text"), f"{place}.text", empty=True)
