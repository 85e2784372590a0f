"""Text -> token ids, and which of them lie in the labelled spans of characters.

A span is what a task asks the model to predict: a completion, or the assistant's turns of a conversation. What a
tokenizer puts around a text stands there once: a text that begins with BOS, or ends with EOS, gets no second one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qkov_dist.errors import QkovError

Span = tuple[int, int]  # half-open range of characters


def tokenize(tokenizer: Any, text: str, spans: Sequence[Span] | None, *, special: bool) -> tuple[list[int], list[bool]]:
    """Token ids of the text, and which of them touch one of the spans (None: the text is one).

    A token that straddles the start of a span belongs to it. Where ``special``, the tokenizer's own tokens stand around
    the text: those at the end follow its last token, those in front belong to no span.
    """
    by = _by_offsets if tokenizer.is_fast else _by_pieces
    ids, labelled = by(tokenizer, text, [(0, len(text))] if spans is None else spans)
    if spans is None:
        labelled = [True] * len(ids)
    return _with_special(tokenizer, text, ids, labelled) if special else (ids, labelled)


def _by_offsets(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    begins = [begin for begin, _ in spans]  # in order, and no span overlaps the next
    last_begun = (bisect_left(begins, end) - 1 for _, end in offsets)
    labelled = [at >= 0 and start < spans[at][1] for at, (start, _) in zip(last_begun, offsets, strict=True)]
    return list(encoded["input_ids"]), labelled


def _by_pieces(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The same for a tokenizer without offsets: what lies in a span is tokenized apart from what does not."""
    ids: list[int] = []
    labelled: list[bool] = []
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    for index, (start, end) in enumerate(pairwise(cuts)):
        piece = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"] if start < end else []
        ids += piece
        labelled += [index % 2 == 1] * len(piece)
    return ids, labelled


def _with_special(tokenizer: Any, text: str, ids: list[int], labelled: list[bool]) -> tuple[list[int], list[bool]]:
    """Put the tokenizer's own tokens around those of a text, unless the text has them."""
    whole = list(
        tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.is_fast
        else tokenizer.build_inputs_with_special_tokens(ids)
    )
    place = next((at for at in range(len(whole)) if whole[at : at + len(ids)] == ids), None)
    if place is None:
        raise QkovError(
            type(tokenizer).__name__,
            expected="a tokenizer whose special tokens stand around a text",
            got="other tokens within it",
            remedy="Tokenize the samples and give input_ids and labels.",
        )
    front, back = whole[:place], whole[place + len(ids) :]
    if front and ids[: len(front)] == front:
        labelled, front = [False] * len(front) + labelled[len(front) :], []
    if back and ids[-len(back) :] == back:
        back = []
    return front + ids + back, [False] * len(front) + labelled + labelled[-1:] * len(back)
