r"""Heads of projections that train through LoRA: W = W_0 + s B A, with B [out, r] and A [r, in].

    head of    is                W's slice moves by         held by
    Q, K, V    rows of W         s B[rows] A                B[rows] = 0, as in a fresh adapter
    O          columns of W      s B A[:, columns]          A[:, columns] = 0, set while B = 0

Both factors train, so holding B's rows or A's columns at any value but zero would not hold the slice. In a fresh
adapter B is zero, so that zeroing A's columns changes no weight; once B is trained they have to stay zero, also
afterwards, or the slice would move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import is_transposed
from qkov_dist.layout.names import plain_name
from qkov_dist.layout.rects import Rect
from qkov_dist.results.head_slices import HeadRange

from .places import Place, is_zero, place_of, whole

_FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter of one projection."""

    name: str
    a: nn.Parameter
    b: nn.Parameter


def wrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules in which PEFT adapts another one, by the name of that one in the plain model."""
    return {
        plain_name(path): module
        for path, module in model.named_modules()
        if isinstance(module._modules.get("base_layer"), nn.Module)
    }


def adapters_of(name: str, module: nn.Module) -> Iterator[Adapter]:
    """The adapters of a projection that train.

    Raises:
        QkovError: for adapters that are no plain LoRA.
    """
    base = {id(parameter) for parameter in module.get_submodule("base_layer").parameters()}
    known: set[int] = set(base)
    for adapter in _names(module):
        a, b = (module.get_submodule(f"{factor}.{adapter}").get_parameter("weight") for factor in _FACTORS)
        known |= {id(a), id(b)}
        bias = module.get_submodule(f"lora_B.{adapter}")._parameters.get("bias")
        known |= set() if bias is None else {id(bias)}
        if a.requires_grad or b.requires_grad:
            if variant := getattr(module, "lora_variant", {}).get(adapter):
                raise _no_lora(name, f"the LoRA variant {type(variant).__name__}")
            yield Adapter(f"{name}, adapter {adapter!r}", a, b)
    others = [path for path, p in module.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise _no_lora(name, f"{type(module).__name__} with {others[0]}")


def _names(module: Any) -> list[str]:
    found = module._modules.get("lora_A")
    return [] if found is None else list(found.keys())


def _no_lora(name: str, got: str) -> QkovError:
    return QkovError(
        name,
        expected="a projection that trains whole, or through plain LoRA",
        got=got,
        remedy="Adapt it with LoraConfig(use_dora=False) and no other variant, or leave it out: exclude_modules.",
    )


def adapter_places(
    adapter: Adapter, module: nn.Module, pieces: Sequence[HeadRange], factor: float, undo: list[Callable[[], None]]
) -> Iterator[Place | None]:
    """The rectangles of B and of A that stand for slices of a weight; every rank asks.

    Args:
        adapter: The adapter.
        module: What PEFT has put around the projection.
        pieces: Ranges of the projection's weight, as it is stored.
        factor: What updates are multiplied by; A's columns are multiplied by it at once.
        undo: Takes what puts A's columns back.

    Raises:
        QkovError: where the adapter has moved the slice already: it could not be held.
    """
    outputs = "cols" if is_transposed(module.get_submodule("base_layer")) else "rows"
    of_b = _place(f"{adapter.name}: lora_B", adapter.b, [p for p in pieces if p.axis == outputs], by_rows=True)
    of_a = _place(f"{adapter.name}: lora_A", adapter.a, [p for p in pieces if p.axis != outputs], by_rows=False)
    whole_a, whole_b = whole(adapter.a), whole(adapter.b)
    if factor == 0 and not is_zero(whole_b[piece.start : piece.stop] for piece in pieces if piece.axis == outputs):
        raise _moved(adapter.name, "rows of lora_B")
    inputs = [piece for piece in pieces if piece.axis != outputs]
    if not is_zero(whole_a[:, piece.start : piece.stop] for piece in inputs):
        if not is_zero([whole_b]):
            raise _moved(adapter.name, "columns of lora_A, or the whole of lora_B,")
        if of_a is not None:
            undo.append(_multiplied(of_a.views(), factor))
    yield of_b
    yield of_a


def bias_places(name: str, module: nn.Module, pieces: Sequence[HeadRange]) -> Iterator[Place | None]:
    """The rows of biases that adapters add (``lora_bias``): they add up, so each is held as it is."""
    for adapter in _names(module):
        bias = module.get_submodule(f"lora_B.{adapter}")._parameters.get("bias")
        if bias is not None:
            yield _place(f"{name}, adapter {adapter!r}: lora_B.bias", bias, pieces, by_rows=True)


def _place(name: str, parameter: nn.Parameter, pieces: Sequence[HeadRange], *, by_rows: bool) -> Place | None:
    """Bands of rows, or of columns, of a factor."""
    rows, cols = (*parameter.shape, 1)[:2]
    bands = ((piece.start, piece.stop) for piece in pieces)
    return place_of(name, parameter, [Rect(*band, 0, cols) if by_rows else Rect(0, rows, *band) for band in bands])


def _multiplied(views: Sequence[Tensor], factor: float) -> Callable[[], None]:
    """Multiply in place; returns what puts the values back."""
    before = [view.clone() for view in views]

    def put_back() -> None:
        for view, values in zip(views, before, strict=True):
            view.copy_(values)

    for view in views:
        view.mul_(factor)
    return put_back


def _moved(name: str, expected: str) -> QkovError:
    return QkovError(
        name,
        expected=f"{expected} that are zero, as in a fresh adapter: LoRA leaves a head's slice as it is only then",
        got="numbers: the adapter was trained before",
        remedy="Merge the adapter into the model (merge_and_unload()) and begin with a fresh one.",
    )
