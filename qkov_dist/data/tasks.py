"""The rows of a task -> tokenized samples.

A row's form decides its token ids and labels; one set of checks then holds for every form. ``labels[0]`` of a causal
sample can never be predicted, so it is always -100 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qkov_dist.config import TaskConfig
from qkov_dist.errors import QkovError
from qkov_dist.values import FORM_KEYS, SAMPLE_FORMS, SAMPLE_KEYS, key_hint, named, written

from .chats import CHAT_DATE, Chat, render_chat
from .messages import read_messages, read_string, read_tools
from .rows import Row
from .samples import IGNORED, Sample, Task
from .sources import rows
from .tokenization import Span, tokenize

MAX_ID = 200


def load_task(
    config: TaskConfig, tokenizer: Any, *, vocab_size: int, max_positions: int | None, objective: str = "causal"
) -> Task:
    """Read, tokenize and check the samples of one task.

    Args:
        config: Name, path, columns and limits; of the first ``max_samples`` rows, later ones are not read.
        tokenizer: A transformers tokenizer, or None where the model has none (then only ``input_ids`` can be given).
        vocab_size: Token ids and labels lie in [0, vocab_size).
        max_positions: Longest sample the model takes, in tokens; None for no limit.
        objective: ``causal``, or ``masked`` (labels are then unshifted and must be in the file).

    Raises:
        QkovError: at ``FILE:LINE`` for the first row that is not a valid sample.
    """
    reader = _Reader(config, tokenizer, vocab_size, max_positions, objective)
    samples = tuple(reader.sample(row) for row in rows(config))
    if not samples:
        remedy = 'Give it rows; of JSONL one sample a line, for example {"text": "..."}.'
        raise QkovError(config.path, expected="at least one sample", got="none", remedy=remedy)
    return Task(config.name, samples, reader.notes(), reader.warnings())


@dataclass(frozen=True)
class _Reader:
    """Turns rows into samples under one set of limits."""

    config: TaskConfig
    tokenizer: Any
    vocab_size: int
    max_positions: int | None
    objective: str
    places: dict[str, str] = field(default_factory=dict)  # sample id -> place of its row
    chats: dict[str, Chat] = field(default_factory=dict)  # sample id -> its conversation as rendered

    def sample(self, row: Row) -> Sample:
        """One checked sample; raises QkovError at the row's place."""
        place, number, content = row
        sample_id = self._id(content, place, number)
        form = _form(content, place)
        ids, labels, text = (
            self._from_ids(content, place) if form == "input_ids" else self._from_text(content, place, sample_id, form)
        )
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

    def notes(self) -> tuple[str, ...]:
        """What a reader of the results may want to know of these samples."""
        told = (
            (
                self.config.sample == "random",
                f"its {len(self.places)} samples are drawn from all rows, with seed {self.config.sample_seed}",
            ),
            (
                any(chat.dated for chat in self.chats.values()),
                f"the chat template asks for the date, and gets {CHAT_DATE:%Y-%m-%d} on any day",
            ),
        )
        return tuple(f"task {self.config.name!r}: {what}" for holds, what in told if holds)

    def warnings(self) -> tuple[str, ...]:
        """What a reader of the results must know of these samples."""
        last_only = [name for name, chat in self.chats.items() if chat.last_turn_only]
        no_tools = [name for name, chat in self.chats.items() if chat.without_tools]
        told = (
            (last_only, "only the last assistant turn is labelled: the chat template renders earlier ones otherwise"),
            (no_tools, "the chat template does not show the tools that the samples name"),
        )
        task, count = f"task {self.config.name!r}", len(self.chats)
        return tuple(f"{task}, {len(f)} of {count} chats (first {f[0]!r}): {what}" for f, what in told if f)

    def _from_ids(self, content: dict[str, Any], place: str) -> tuple[list[int], list[int], str]:
        ids = _integers(content["input_ids"], f"{place}: input_ids")
        labels = content.get("labels")
        if labels is None and self.objective == "masked":
            remedy = 'Give {"input_ids": [...], "labels": [...]} with -100 at every position that is not predicted.'
            raise QkovError(f"{place}: labels", expected="labels for a masked model", got="none", remedy=remedy)
        labels = ids if labels is None else _integers(labels, f"{place}: labels")
        if len(labels) != len(ids):
            remedy = "Give one label for each token; -100 leaves a token out of the loss."
            raise QkovError(f"{place}: labels", expected=f"{len(ids)} labels", got=f"{len(labels)}", remedy=remedy)
        kept = _without_padding(content, len(ids), place)
        ids, labels = ids[kept], labels[kept]
        in_range = self.tokenizer is not None and all(0 <= token < self.vocab_size for token in ids)
        return ids, labels, self._decode(ids) if in_range else ""

    def _from_text(self, content: dict[str, Any], place: str, name: str, form: str) -> tuple[list[int], list[int], str]:
        if self.objective == "masked" or self.tokenizer is None:
            why = "a masked model predicts only given labels" if self.objective == "masked" else "it has no tokenizer"
            remedy = "Tokenize the samples and give input_ids and labels."
            raise QkovError(place, expected=f"input_ids for this model ({why})", got="text", remedy=remedy)
        text, spans = self._spans(content, place, name, form)
        ids, labelled = tokenize(self.tokenizer, text, spans, special=name not in self.chats)
        return ids, [token if keep else IGNORED for token, keep in zip(ids, labelled, strict=True)], text

    def _spans(self, content: dict[str, Any], place: str, name: str, form: str) -> tuple[str, Sequence[Span] | None]:
        """The text of a row, and what of it is labelled: spans of characters, or None for all."""
        if form == "text":
            return read_string(content["text"], f"{place}: text", empty=False), None
        if form == "messages" or isinstance(content["prompt"], list) or isinstance(content["completion"], list):
            chat = self.chats[name] = self._chat(content, place, form)
            return chat.text, chat.spans
        prompt = read_string(content["prompt"], f"{place}: prompt", empty=True)
        text = prompt + read_string(content["completion"], f"{place}: completion", empty=False)
        return text, [(len(prompt), len(text))]

    def _chat(self, content: dict[str, Any], place: str, form: str) -> Chat:
        """A row of messages, or of a prompt and a completion that are messages, as the chat template renders it."""
        key, given = "messages", []
        if form == "prompt":
            key, given = "completion", read_messages(content["prompt"], f"{place}: prompt", assistant=False)
        messages = given + read_messages(content[key], f"{place}: {key}")
        tools = read_tools(content.get("tools"), f"{place}: tools")
        return render_chat(self.tokenizer, messages, f"{place}: {key}", tools=tools, given=len(given))

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
    """The first key of the row's form; exactly one form a row, no other keys, and null for one that is not there."""
    for key in content:
        if key not in SAMPLE_KEYS:
            remedy = key_hint(key, SAMPLE_KEYS)
            raise QkovError(f"{place}: {named(key)}", expected="a known key", got=written(key), remedy=remedy)
    for null_is_none in (True, False):
        given = {key for key in FORM_KEYS if key in content and not (null_is_none and content[key] is None)}
        for needed, allowed in SAMPLE_FORMS:
            if set(needed) <= given <= {*needed, *allowed}:
                return needed[0]
    expected = "exactly one of text; prompt and completion; messages; input_ids (and labels)"
    remedy = "Keep the keys of one form and leave the others out."
    got = ", ".join(key for key in FORM_KEYS if key in content)
    raise QkovError(place, expected=expected, got=got or "no such key", remedy=remedy)


def _without_padding(content: dict[str, Any], length: int, place: str) -> slice:
    """Where the tokens of a row are, by its ``attention_mask``: ones, with zeros at the sides alone."""
    if any(_integers(content.get("token_type_ids") or [0], f"{place}: token_type_ids")):
        remedy = "Leave token_type_ids out; a sample is one segment."
        raise QkovError(f"{place}: token_type_ids", expected="zeros alone", got="other values", remedy=remedy)
    if content.get("attention_mask") is None:
        return slice(None)
    mask = _integers(content["attention_mask"], f"{place}: attention_mask")
    kept = slice(mask.index(1), length - mask[::-1].index(1)) if 1 in mask else slice(0)
    if len(mask) != length or set(mask) - {0, 1} or not all(mask[kept]) or not any(mask):
        remedy = "Mask tokens out of the loss with labels of -100; padding may be left out altogether."
        expected = f"{length} ones, or ones with zeros on the padding at the sides"
        raise QkovError(f"{place}: attention_mask", expected=expected, got=written(mask), remedy=remedy)
    return kept


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
