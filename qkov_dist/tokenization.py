"""Text -> token ids, and which of them lie in the labelled spans of characters.

A span is what a task asks the model to predict: a completion, or the assistant's turns of a conversation.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from .errors import QkovError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # half-open range of characters


def tokenize(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool) -> tuple[list[int], list[bool]]:
    """Token ids of the text, and which of them touch one of the spans.

    A token that straddles the start of a span belongs to it. Special tokens that the tokenizer appends follow the last
    token of the text; those that it puts in front belong to no span.
    """
    if not tokenizer.is_fast:
        return _tokenize_pieces(tokenizer, text, spans, special=special)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    begins = [begin for begin, _ in spans]  # in order, and no span overlaps the next
    last_begun = (bisect_left(begins, end) - 1 for _, end in offsets)
    labelled = [at >= 0 and start < spans[at][1] for at, (start, _) in zip(last_begun, offsets, strict=True)]
    num_appended = sum(1 for _ in takewhile(lambda offset: tuple(offset) == (0, 0), reversed(offsets)))
    last = len(offsets) - num_appended
    if 0 < last < len(offsets):
        labelled[last:] = [labelled[last - 1]] * num_appended
    return list(encoded["input_ids"]), labelled


def _tokenize_pieces(
    tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool
) -> tuple[list[int], list[bool]]:
    """The same for a tokenizer without offsets: what lies in a span is tokenized apart from what does not."""
    ids: list[int] = []
    labelled: list[bool] = []
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    for index, (start, end) in enumerate(pairwise(cuts)):
        piece = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"] if start < end else []
        ids += piece
        labelled += [index % 2 == 1] * len(piece)
    if not special:
        return ids, labelled
    whole = tokenizer.build_inputs_with_special_tokens(ids)
    front = next(at for at in range(len(whole)) if whole[at : at + len(ids)] == ids)
    appended = len(whole) - front - len(ids)
    return list(whole), [False] * front + labelled + labelled[-1:] * appended


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], place: str) -> tuple[str, list[Span]]:
    """The rendered conversation and the characters that the assistant wrote.

    A template with ``{% generation %}`` says so itself. Otherwise an assistant turn is what rendering one message more
    adds, after the generation prompt; its end-of-turn mark is part of it.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(count: int, *, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    place = f"{place}: messages"
    if not tokenizer.chat_template:
        remedy = "Use a chat model, or give prompt and completion."
        raise QkovError(place, expected="a tokenizer with a chat template", got="none", remedy=remedy)
    try:
        template = tokenizer.get_chat_template()
        if GENERATION_TAG.search(template):
            rendered: Any = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
            )
            texts, spans = rendered
            return texts[0], spans[0]
        whole = render(len(messages))
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return whole, [_turn(whole, render, index, place) for index in turns]
    except (TemplateError, TypeError) as error:
        remedy = "Order and fill the messages as the model's chat template asks."
        raise QkovError(
            place, expected="messages that the chat template takes", got=str(error), remedy=remedy
        ) from error


def _turn(whole: str, render: Any, index: int, place: str) -> Span:
    """Characters of the turn ``index`` in the whole rendering."""
    before = render(index) if index else ""
    opened = render(index, prompt=True) if index else ""
    after = render(index + 1)
    start = next((at for at, pair in enumerate(zip(opened, whole, strict=False)) if pair[0] != pair[1]), len(opened))
    if not whole.startswith(after) or start < len(before):
        remedy = "This template renders a turn differently later on; give prompt and completion instead."
        raise QkovError(place, expected="turns that render one after another", got="other text", remedy=remedy)
    return start, len(after)
