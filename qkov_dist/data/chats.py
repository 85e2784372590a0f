"""A conversation -> the text that a model's chat template makes of it, and what of it the assistant wrote.

A template with ``{% generation %}`` says so itself. Otherwise an assistant turn is what rendering one message more
adds, after the generation prompt; its end-of-turn mark is part of it. Templates that ask for the date get one and the
same on any day: what a template prints decides a sample's tokens, and they decide the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qkov_dist.errors import QkovError

from .tokenization import Span

CHAT_DATE = datetime(2024, 7, 26)
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOCK = "strftime_now"  # transformers' name for a function that templates may call
DIRECTIVES = tuple(f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYZ" for flag in ("-", ""))


Message = dict[str, Any]
Render = Callable[..., str]


@dataclass(frozen=True)
class Chat:
    """A rendered conversation.

    Attributes:
        text: What the template makes of it.
        spans: The characters that the assistant wrote, in order.
        last_turn_only: Whether earlier turns are left out, since the template renders them otherwise once more follow.
        without_tools: Whether it names tools that the template does not show.
        dated: Whether the template asks for the date, which is ``CHAT_DATE``.
    """

    text: str
    spans: Sequence[Span]
    last_turn_only: bool = False
    without_tools: bool = False
    dated: bool = False


def render_chat(
    tokenizer: Any, messages: list[Message], place: str, *, tools: list[Any] | None = None, given: int = 0
) -> Chat:
    """Render a conversation.

    Args:
        tokenizer: Whose chat template it is.
        messages: Of any roles; a content is text.
        place: Where they stand, for the message of an error.
        tools: What the template shows as tools.
        given: How many of the first messages are a prompt, of which nothing is labelled.

    Raises:
        QkovError: without a template, for messages that it does not take, and where it does not show what the assistant
            wrote in its last turn.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        remedy = "Use a chat model, or give prompt and completion."
        raise QkovError(place, expected="a tokenizer with a chat template", got="none", remedy=remedy)
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
        render = _renderer(tokenizer, _dated(template), tools)
        messages = _as_the_template_takes(render, messages)
        if GENERATION_TAG.search(template):
            text, spans = _rendered_with_marks(tokenizer, _dated(template), messages, tools)
            first, last_only = _opened(text, render, messages, given) if given else 0, False
            spans = [span for span in spans if span[0] >= first]
        else:
            text = render(messages)
            spans, last_only = _turns(text, render, messages, place, given)
    except (TemplateError, TypeError) as error:
        remedy = "Order and fill the messages as the model's chat template asks."
        expected = "messages that the chat template takes"
        raise QkovError(place, expected=expected, got=str(error), remedy=remedy) from error
    return Chat(text, spans, last_only, bool(tools) and "tools" not in template, CLOCK in template)


def _dated(template: str) -> str:
    """The template with a clock of its own that stands still; nothing of what it renders moves by a character."""
    if CLOCK not in template:
        return template
    stopped = "".join(f"|replace({name!r},{_shown(name)!r})" for name in DIRECTIVES)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{stopped} }}}}{{%- endmacro %}}\n{template}"


def _shown(directive: str) -> str:
    text = CHAT_DATE.strftime(directive.replace("-", ""))
    return (text.lstrip("0") or "0") if "-" in directive else text


def _renderer(tokenizer: Any, template: str, tools: list[Any] | None) -> Render:
    def render(messages: list[Message], *, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        )

    return render


def _rendered_with_marks(
    tokenizer: Any, template: str, messages: list[Message], tools: list[Any] | None
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, spans = rendered
    return texts[0], list(spans[0])


def _as_the_template_takes(render: Render, messages: list[Message]) -> list[Message]:
    """The messages with contents as text or, where the template shows no such text, as lists of one part.

    Templates of models that see images often look at parts alone, and leave out a plain text without a word.
    """
    from jinja2 import TemplateError

    texts = [m["content"].strip() for m in messages if m["role"] == "user" and m.get("content")]
    in_parts = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]
    refusal: Exception | None = None
    for form in (messages, in_parts):
        try:
            text = render(form)
        except (TemplateError, TypeError) as error:
            refusal = refusal or error
            continue
        if all(part in text for part in texts):
            return form
    if refusal:
        raise refusal
    return messages  # the template changes what users write


def _turns(whole: str, render: Render, messages: list[Message], place: str, given: int) -> tuple[list[Span], bool]:
    """The assistant's turns in the whole rendering; the last one alone where an earlier one does not stand in it."""
    from jinja2 import TemplateError

    *earlier, last = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= given]
    final = _turn(whole, render, messages, last)
    if final is None:
        remedy = "This template renders a turn differently later on; give prompt and completion as text instead."
        raise QkovError(
            place, expected="a last turn that stands as the template renders it", got="other text", remedy=remedy
        )

    def found() -> Iterator[Span | None]:
        for index in earlier:
            try:
                yield _turn(whole, render, messages, index)
            except (TemplateError, TypeError):
                yield None  # the template does not take the conversation up to here

    spans = [span for span in found() if span is not None]
    if len(spans) < len(earlier):
        return [final], True
    return [*spans, final], False


def _turn(whole: str, render: Render, messages: list[Message], index: int) -> Span | None:
    """Characters of the turn ``index`` in the whole rendering; None where it does not stand there."""
    before = render(messages[:index]) if index else ""
    after = render(messages[: index + 1])
    start = _opened(whole, render, messages, index)
    return (start, len(after)) if whole.startswith(after) and start >= len(before) else None


def _opened(whole: str, render: Render, messages: list[Message], index: int) -> int:
    """Where the message ``index`` begins: behind what the whole has in common with a prompt for it."""
    opened = render(messages[:index], prompt=True) if index else ""
    return next((at for at, pair in enumerate(zip(opened, whole, strict=False)) if pair[0] != pair[1]), len(opened))
