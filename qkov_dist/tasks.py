"""The rows of a task -> tokenized samples.

A row's form decides its token ids and labels; one set of checks then holds for every form. ``labels[0]`` of a causal
sample can never be predicted, so it is always -100 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from .config import TaskConfig
from .errors import QkovError
from .kinds import key_hint, named, written
from .samples import IGNORED, Sample, Task
from .sources import Row, rows
from .tokenization import render_chat, tokenize

MAX_ID, MAX_MESSAGES = 200, 1000
FORMS = (("text",), ("prompt", "completion"), ("messages",), ("input_ids", "labels"))


def load_task(
    config: TaskConfig, tokenizer: Any, *, vocab_size: int, max_positions: int | None, objective: str = "causal"
) -> Task:
    """Read, tokenize and check the samples of one task.

    Args:
        config: Name, path and limits; rows after the first ``max_samples`` are not read.
        tokenizer: A transformers tokenizer, or None where the model has none (then only ``input_ids`` can be given).
        vocab_size: Token ids and labels lie in [0, vocab_size).
        max_positions: Longest sample the model takes, in tokens; None for no limit.
        objective: ``causal``, or ``masked`` (labels are then unshifted and must be in the file).

    Raises:
        QkovError: at ``FILE:LINE`` for the first row that is not a valid sample.
    """
    reader = _Reader(config, tokenizer, vocab_size, max_positions, objective)
    samples = tuple(reader.sample(row) for row in islice(rows(config), config.max_samples))
    if not samples:
        remedy = 'Write one sample a line, for example {"text": "..."}.'
        raise QkovError(config.path, expected="at least one sample", got="none", remedy=remedy)
    return Task(config.name, samples)


@dataclass(frozen=True)
class _Reader:
    """Turns rows into samples under one set of limits."""

    config: TaskConfig
    tokenizer: Any
    vocab_size: int
    max_positions: int | None
    objective: str
    places: dict[str, str] = field(default_factory=dict)  # sample id -> place of its row

    def sample(self, row: Row) -> Sample:
        """One checked sample; raises QkovError at the row's place."""
        place, number, content = row
        sample_id = self._id(content, place, number)
        form = _form(content, place)
        ids, labels, text = self._from_ids(content, place) if form == "input_ids" else self._from_text(content, place)
        _check_ids(ids, self.vocab_size, f"{place}: input_ids", ignored=False)
        _check_ids(labels, self.vocab_size, f"{place}: labels", ignored=True)
        limit = self.config.max_tokens
        if limit is not None and len(ids) > limit:
            ids, labels = ids[:limit], labels[:limit]
            text = self._decode(ids)
        if self.max_positions is not None and len(ids) > self.max_positions:
            remedy = f"Set max_tokens of task {self.config.name!r} to cut samples, or leave this one out."
            expected = f"at most {self.max_positions} tokens, the model's longest input"
            raise QkovError(place, expected=expected, got=f"{len(ids)} tokens", remedy=remedy)
        if self.objective == "causal":
            labels = [IGNORED, *labels[1:]]
        self._check_labelled(labels, place)
        return Sample(sample_id, np.array(ids, np.int64), np.array(labels, np.int64), text)

    def _id(self, content: dict[str, Any], place: str, number: int) -> str:
        value = content.get("id", f"{self.config.name}-{number}")
        is_text = isinstance(value, str | int) and not isinstance(value, bool)
        if not is_text or not str(value).isprintable() or not 0 < len(str(value)) <= MAX_ID:
            remedy = "Give each sample a short id of its own, or none at all."
            expected = f"at most {MAX_ID} printable characters or a whole number"
            raise QkovError(f"{place}: id", expected=expected, got=written(value), remedy=remedy)
        first = self.places.setdefault(str(value), place)
        if first != place:
            remedy = "Rename one of the samples, or leave the ids out."
            got = f"{written(value)} as at {first}"
            raise QkovError(f"{place}: id", expected="an id of its own", got=got, remedy=remedy)
        return str(value)

    def _from_ids(self, content: dict[str, Any], place: str) -> tuple[list[int], list[int], str]:
        ids = _integers(content["input_ids"], f"{place}: input_ids")
        if "labels" not in content and self.objective == "masked":
            remedy = 'Give {"input_ids": [...], "labels": [...]} with -100 at every position that is not predicted.'
            raise QkovError(f"{place}: labels", expected="labels for a masked model", got="none", remedy=remedy)
        labels = _integers(content.get("labels", content["input_ids"]), f"{place}: labels")
        if len(labels) != len(ids):
            remedy = "Give one label for each token; -100 leaves a token out of the loss."
            raise QkovError(f"{place}: labels", expected=f"{len(ids)} labels", got=f"{len(labels)}", remedy=remedy)
        in_range = self.tokenizer is not None and all(0 <= token < self.vocab_size for token in ids)
        return ids, labels, self._decode(ids) if in_range else ""

    def _from_text(self, content: dict[str, Any], place: str) -> tuple[list[int], list[int], str]:
        if self.objective == "masked" or self.tokenizer is None:
            why = "a masked model predicts only given labels" if self.objective == "masked" else "it has no tokenizer"
            remedy = "Tokenize the samples and give input_ids and labels."
            raise QkovError(place, expected=f"input_ids for this model ({why})", got="text", remedy=remedy)
        if "messages" in content:
            text, spans = render_chat(self.tokenizer, _messages(content["messages"], place), place)
        else:
            prompt = _string(content.get("prompt", ""), f"{place}: prompt", empty=True)
            key = "completion" if "prompt" in content else "text"
            text = prompt + _string(content[key], f"{place}: {key}", empty=False)
            spans = [(len(prompt), len(text))]
        ids, labelled = tokenize(self.tokenizer, text, spans, special="messages" not in content)
        if "text" in content:
            return ids, ids, text
        return ids, [token if keep else IGNORED for token, keep in zip(ids, labelled, strict=True)], text

    def _check_labelled(self, labels: Sequence[int], place: str) -> None:
        if any(label != IGNORED for label in labels):
            return
        if self.config.max_tokens is not None and len(labels) == self.config.max_tokens:
            remedy = f"Raise max_tokens of task {self.config.name!r}, or shorten the part before the labelled tokens."
            got = f"none in the first {len(labels)} tokens (max_tokens: {self.config.max_tokens})"
        else:
            remedy = "Label a token; the first token of a sample is never predicted and does not count."
            got = f"none among {len(labels)} tokens"
        raise QkovError(place, expected="at least one labelled token", got=got, remedy=remedy)

    def _decode(self, ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(ids)))


def _form(content: dict[str, Any], place: str) -> str:
    """The first key of the row's form; exactly one form a row, and no other keys."""
    known = [key for form in FORMS for key in form]
    for key in content:
        if key not in (*known, "id"):
            remedy = key_hint(key, [*known, "id"])
            raise QkovError(f"{place}: {named(key)}", expected="a known key", got=written(key), remedy=remedy)
    given = tuple(key for key in known if key in content)
    if given in FORMS or given == ("input_ids",):
        return given[0]
    expected = "exactly one of text; prompt and completion; messages; input_ids (and labels)"
    remedy = "Keep the keys of one form and leave the others out."
    raise QkovError(place, expected=expected, got=", ".join(given) or "no such key", remedy=remedy)


def _string(value: object, place: str, *, empty: bool) -> str:
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


def _integers(value: object, place: str) -> list[int]:
    remedy = "Write a list of token ids, such as [1, 5, 7]."
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise QkovError(place, expected="a list of whole numbers", got=got, remedy=remedy)
    for position, item in enumerate(value):
        if type(item) is not int:
            got = f"{written(item)} at position {position}"
            raise QkovError(place, expected="a list of whole numbers", got=got, remedy=remedy)
    return value


def _check_ids(ids: Sequence[int], vocab_size: int, place: str, *, ignored: bool) -> None:
    for position, token in enumerate(ids):
        if not (0 <= token < vocab_size or (ignored and token == IGNORED)):
            expected = f"token ids in [0, {vocab_size})" + (f" or {IGNORED}" if ignored else "")
            remedy = "Tokenize with the tokenizer of this very model."
            raise QkovError(place, expected=expected, got=f"{written(token)} at position {position}", remedy=remedy)


def _messages(value: object, place: str) -> list[dict[str, Any]]:
    remedy = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    if not isinstance(value, list):
        raise QkovError(f"{place}: messages", expected="a list of messages", got=type(value).__name__, remedy=remedy)
    if len(value) > MAX_MESSAGES:
        remedy = "Cut the conversation into several samples."
        expected = f"at most {MAX_MESSAGES} messages"
        raise QkovError(f"{place}: messages", expected=expected, got=str(len(value)), remedy=remedy)
    for index, message in enumerate(value):
        inner = f"{place}: messages.{index}"
        if not isinstance(message, dict):
            raise QkovError(inner, expected="role and content", got=type(message).__name__, remedy=remedy)
        for key in ("role", "content"):
            _string(message.get(key), f"{inner}.{key}", empty=key == "content")
    if not any(message["role"] == "assistant" for message in value):
        got = "no message with the role 'assistant'"
        raise QkovError(f"{place}: messages", expected="an assistant turn to label", got=got, remedy=remedy)
    return value
