"""Task files -> tokenized samples.

A source is a stream of rows, each with its place (``FILE:LINE``). A row's form decides its token ids and labels; one
set of checks then holds for every form. Labels follow transformers: ``labels[t]`` is predicted from the tokens before
t, and -100 is ignored. ``labels[0]`` of a causal sample can never be predicted, so it is always -100 here.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .builtin_tasks import builtin_samples
from .config import TaskConfig
from .errors import QkovError

IGNORED = -100
MAX_LINE_BYTES = 64 * 2**20
FORMS = (("text",), ("prompt", "completion"), ("messages",), ("input_ids", "labels"))
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Ids = npt.NDArray[np.int64]
Row = tuple[str, int, dict[str, Any]]  # place, number from 1, content
Span = tuple[int, int]  # half-open range of characters


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenized sample: ``input_ids`` and ``labels`` are int64 [T]; ``text`` is what a report shows."""

    id: str
    input_ids: Ids
    labels: Ids
    text: str

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Number of tokens in the loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, eq=False)
class Task:
    """A name and its samples, in file order."""

    name: str
    samples: tuple[Sample, ...]


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
    samples = tuple(reader.sample(row) for row in islice(_rows(config), config.max_samples))
    if not samples:
        remedy = 'Write one sample a line, for example {"text": "..."}.'
        raise QkovError(config.path, expected="at least one sample", got="none", remedy=remedy)
    return Task(config.name, samples)


def task_fingerprint(task: Task) -> str:
    """SHA-256 over the token ids and labels of every sample, in order; names, ids and texts do not enter."""
    digest = hashlib.sha256()
    for sample in task.samples:
        digest.update(sample.num_tokens.to_bytes(8, "little"))
        for array in (sample.input_ids, sample.labels):
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def _rows(config: TaskConfig) -> Iterator[Row]:
    if config.path.startswith("builtin:"):
        for number, content in enumerate(builtin_samples(config.path, config.max_samples), 1):
            yield f"{config.path}:{number}", number, content
    elif config.path.startswith("hf:"):
        yield from _dataset_rows(config.path)
    else:
        yield from _file_rows(Path(config.path))


def _file_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file; blank lines count as lines and are skipped."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", number, _object(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        place = f"{path}:{number + 1}" if number else str(path)
        kind = "a readable gzip file" if path.suffix == ".gz" else "a readable file"
        got = getattr(error, "strerror", None) or str(error)
        remedy = f"Check the path and the file's contents; it is taken from {Path.cwd()}."
        raise QkovError(place, expected=kind, got=got, remedy=remedy) from error


def _object(line: bytes, place: str) -> dict[str, Any]:
    remedy = "Write one JSON object a line, in UTF-8."
    if len(line) > MAX_LINE_BYTES:
        raise QkovError(place, expected=f"at most {MAX_LINE_BYTES} bytes a line", got="a longer line", remedy=remedy)
    try:
        row = json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        got = f"byte {line[error.start]:#04x} at byte {error.start} of the line"
        raise QkovError(place, expected="UTF-8 text", got=got, remedy=remedy) from None
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
        raise QkovError(place, expected="one JSON object", got=got, remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise QkovError(place, expected="one JSON object", got=str(error), remedy=remedy) from None
    if not isinstance(row, dict):
        raise QkovError(place, expected="one JSON object", got=type(row).__name__, remedy=remedy)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a key twice among {[key for key, _ in pairs]}")
    return content


def _dataset_rows(path: str) -> Iterator[Row]:
    """Rows of ``hf:HUB_ID[:CONFIG][:SPLIT]#COLUMN``; a lone part is a config where the dataset has one of that name."""
    source, _, column = path.removeprefix("hf:").partition("#")
    hub_id, *parts = re.split(r":(?![^\[]*\])", source)
    if not hub_id or not column or len(parts) > 2:
        remedy = "Write for example hf:openai/gsm8k:main:train#question."
        raise QkovError(path, expected="hf:HUB_ID[:CONFIG][:SPLIT]#COLUMN", got=repr(path), remedy=remedy)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        remedy = "Run 'pip install datasets', or give a JSONL file."
        raise QkovError(path, expected="the package 'datasets'", got="no such package", remedy=remedy) from None
    try:
        lone_config = len(parts) == 1 and parts[0] in datasets.get_dataset_config_names(hub_id)
        name = parts[0] if len(parts) == 2 or lone_config else None
        split = parts[-1] if parts and not lone_config else "train"
        rows = datasets.load_dataset(hub_id, name or None, split=split, streaming="[" not in split)
        for number, row in enumerate(rows, 1):
            yield f"{path}:{number}", number, _dataset_row(row, column, f"{path}:{number}")
    except QkovError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        remedy = "Check the dataset's id, config and split, and the network."
        raise QkovError(path, expected="a readable dataset", got=str(error), remedy=remedy) from error


def _dataset_row(row: dict[str, Any], column: str, place: str) -> dict[str, Any]:
    if column not in row:
        remedy = f"The columns are {', '.join(row)}."
        raise QkovError(place, expected=f"a column {column!r}", got="no such column", remedy=remedy)
    value = row[column]
    if not isinstance(value, list):
        return {"text": value}
    return {"messages": value} if value and isinstance(value[0], dict) else {"input_ids": value}


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
        if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).isprintable() or value == "":
            remedy = "Give each sample a short id of its own, or none at all."
            raise QkovError(f"{place}: id", expected="printable text or a whole number", got=repr(value), remedy=remedy)
        first = self.places.setdefault(str(value), place)
        if first != place:
            remedy = "Rename one of the samples, or leave the ids out."
            raise QkovError(f"{place}: id", expected="an id of its own", got=f"{value!r} as at {first}", remedy=remedy)
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
            text, spans = _chat(self.tokenizer, _messages(content["messages"], place), place)
        else:
            prompt = _string(content.get("prompt", ""), f"{place}: prompt", empty=True)
            key = "completion" if "prompt" in content else "text"
            text = prompt + _string(content[key], f"{place}: {key}", empty=False)
            spans = [(len(prompt), len(text))]
        ids, labelled = _tokenize(self.tokenizer, text, spans, special="messages" not in content)
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
            near = difflib.get_close_matches(key, [*known, "id"], n=1, cutoff=0)[0]
            remedy = f"The nearest valid key is {near!r}."
            raise QkovError(f"{place}: {key}", expected="a known key", got=repr(key), remedy=remedy)
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
            got = f"{item!r} at position {position}"
            raise QkovError(place, expected="a list of whole numbers", got=got, remedy=remedy)
    return value


def _check_ids(ids: Sequence[int], vocab_size: int, place: str, *, ignored: bool) -> None:
    for position, token in enumerate(ids):
        if not (0 <= token < vocab_size or (ignored and token == IGNORED)):
            expected = f"token ids in [0, {vocab_size})" + (f" or {IGNORED}" if ignored else "")
            remedy = "Tokenize with the tokenizer of this very model."
            raise QkovError(place, expected=expected, got=f"{token} at position {position}", remedy=remedy)


def _messages(value: object, place: str) -> list[dict[str, Any]]:
    remedy = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    if not isinstance(value, list):
        raise QkovError(f"{place}: messages", expected="a list of messages", got=type(value).__name__, remedy=remedy)
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


def _tokenize(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool) -> tuple[list[int], list[bool]]:
    """Token ids of the text, and which of them touch one of the spans.

    A token that straddles the start of a span belongs to it. Special tokens that the tokenizer appends follow the last
    token of the text; those that it puts in front belong to no span.
    """
    if not tokenizer.is_fast:
        return _tokenize_pieces(tokenizer, text, spans, special=special)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    labelled = [any(start < stop and begin < end for begin, stop in spans) for start, end in offsets]
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


def _chat(tokenizer: Any, messages: list[dict[str, Any]], place: str) -> tuple[str, list[Span]]:
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
