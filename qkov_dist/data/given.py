"""Samples as a caller in Python gives them: a padded batch, or a list of samples.

Padding is taken off, and put back, on the right, when the samples are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkov_dist.errors import QkovError

from .samples import IGNORED, Sample

BATCH_KEYS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")


def samples_given(
    batch: Mapping[str, Any] | Sequence[Sample], *, where: str, vocab_size: int, max_tokens: int | None
) -> list[Sample]:
    """The samples of a batch, at least one, each of at most ``max_tokens``.

    Args:
        batch: What :func:`samples_of_batch` takes, or samples.
        where: What messages call the batch.
        vocab_size: Token ids lie in [0, vocab_size).
        max_tokens: The longest input of the model; None for no limit.

    Raises:
        QkovError: for anything else, and as ``samples_of_batch`` does.
    """
    if not isinstance(batch, Mapping) and not _are_samples(batch):
        raise QkovError(
            where,
            expected="a mapping with input_ids [samples, tokens], or a list of Sample",
            got=_kind_of(batch),
            remedy="Tokenize with padding=True and return_tensors='pt'; single encodings with tokenizer.pad.",
        )
    if isinstance(batch, Mapping):
        batch = list(samples_of_batch(batch, where=where, vocab_size=vocab_size))
    samples = list(batch)
    if not samples:
        raise QkovError(
            where,
            expected="at least one sample",
            got="none",
            remedy="Leave out empty batches: each call is one step of the Fisher average.",
        )
    for sample in samples:
        if max_tokens is not None and sample.num_tokens > max_tokens:
            raise QkovError(
                f"{where}, sample {sample.id}",
                expected=f"at most {max_tokens} tokens, the model's longest input",
                got=f"{sample.num_tokens} tokens",
                remedy="Cut the sample, or leave it out.",
            )
    return samples


def samples_of_batch(batch: Mapping[str, Any], *, where: str, vocab_size: int) -> Iterator[Sample]:
    """Take the padding off a batch.

    Args:
        batch: ``input_ids`` [N, T], and optionally ``attention_mask`` (padding on either side) and ``labels`` (-100
            ignored; by default every real token), as tensors or nested lists; None is as good as nothing. What else
            tokenizers and collators give may be there where it says nothing more: ``token_type_ids`` of zeros, and
            ``position_ids`` that count each sample's tokens from 0.
        where: What messages call the batch.
        vocab_size: Token ids lie in [0, vocab_size).

    Raises:
        QkovError: for other keys, other shapes, ids out of range, and samples without a label.
    """
    given = {key: value for key, value in batch.items() if value is not None}
    if "input_ids" not in given or set(given) - set(BATCH_KEYS):
        raise QkovError(
            where,
            expected=f"input_ids, and optionally {', '.join(BATCH_KEYS[1:])}",
            got=", ".join(map(str, batch)) or "nothing",
            remedy="Pass tokens only; positions and padding are worked out from the attention mask.",
        )
    tensors = {key: _tensor(value, where) for key, value in given.items()}
    ids = tensors["input_ids"]
    mask, labels = tensors.get("attention_mask", torch.ones_like(ids)), tensors.get("labels", ids)
    if ids.ndim != 2 or ids.is_floating_point() or any(tensor.shape != ids.shape for tensor in tensors.values()):
        raise QkovError(
            where,
            expected=f"integer {', '.join(tensors)} of one shape [samples, tokens]",
            got=f"{', '.join(str(list(tensor.shape)) for tensor in tensors.values())} of {ids.dtype}",
            remedy="Tokenize with padding=True and return_tensors='pt'.",
        )
    _check_mask(mask, where)
    mask = mask.bool()
    _check_implied(tensors, mask, where)
    for n in range(len(ids)):
        kept_ids, kept_labels = (t[n][mask[n]].cpu().numpy().astype(np.int64) for t in (ids, labels))
        yield _checked(Sample(str(n), kept_ids, kept_labels, ""), f"{where}, sample {n}", vocab_size)


def _check_mask(mask: Tensor, where: str) -> None:
    """Raise unless every row is ones with zeros on one or both sides: padding, and nothing else."""
    starts = (torch.nn.functional.pad(mask.to(torch.int64), (1, 0)).diff(dim=1) == 1).sum(dim=1)
    if not bool(((mask == 0) | (mask == 1)).all()) or bool((starts > 1).any()):
        raise QkovError(
            f"{where}: attention_mask",
            expected="ones on a sample's tokens and zeros on the padding at its sides",
            got="other values, or zeros between tokens",
            remedy="Pass each sample's tokens without gaps; mask tokens out of the loss with labels of -100.",
        )


def _check_implied(tensors: Mapping[str, Tensor], mask: Tensor, where: str) -> None:
    """Raise unless segments and positions say what follows from the mask alone."""
    implied = {"token_type_ids": torch.zeros_like(mask, dtype=torch.int64), "position_ids": mask.cumsum(dim=1) - 1}
    for name, wanted in implied.items():
        if name in tensors and not bool((tensors[name].to(wanted.device)[mask] == wanted[mask]).all()):
            raise QkovError(
                f"{where}: {name}",
                expected="zeros alone" if name == "token_type_ids" else "0, 1, 2, ... over each sample's own tokens",
                got="other values",
                remedy="Leave it out; a sample is one segment, and its first token is at position 0.",
            )


def _tensor(values: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise QkovError(
            where,
            expected="tensors or nested lists of equally long rows",
            got=str(error),
            remedy="Tokenize with padding=True and return_tensors='pt'.",
        ) from error


def _checked(sample: Sample, where: str, vocab_size: int) -> Sample:
    labels = sample.labels[sample.labels != IGNORED]
    for what, values in (("input_ids", sample.input_ids), ("labels", labels)):
        if len(values) and (values.min() < 0 or values.max() >= vocab_size):
            raise QkovError(
                f"{where}: {what}",
                expected=f"token ids from 0 to {vocab_size - 1}",
                got=f"{values.min()} to {values.max()}",
                remedy="Use the tokenizer of this model.",
            )
    if not (sample.labels[1:] != IGNORED).any():
        raise QkovError(
            where,
            expected="at least one labelled token after the first",
            got="none",
            remedy="Leave out samples without labels; nothing predicts the first token.",
        )
    return sample


def _are_samples(batch: object) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str) and all(isinstance(s, Sample) for s in batch)


def _kind_of(batch: object) -> str:
    """What was passed in place of a batch, in short."""
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {type(next(s for s in batch if not isinstance(s, Sample))).__name__}"
    return type(batch).__name__
