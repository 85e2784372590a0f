"""``qkov inspect``: where does each head of a model live?"""

from __future__ import annotations

import argparse
import re
from itertools import groupby

from tabulate import tabulate

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout, layout_notes, layout_table

from .arguments import add_model_arguments, model_config

EXAMPLE = "qkov inspect HuggingFaceTB/SmolLM2-135M --verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, and whether to prove what is shown."""
    add_model_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="load the weights and prove every head by perturbation")


def execute(options: argparse.Namespace) -> None:
    """Show where heads live."""
    inspect_model(model_config(options), verify=options.verify)


def inspect_model(config: ModelConfig, *, verify: bool) -> None:
    """Print the table of heads; with ``verify``, load the weights and prove every slice by perturbation.

    Raises:
        QkovError: for a model that cannot be read, is refused, or disproves its layout.
    """
    if not verify:
        layout = _from_structure(config)
        print_layout(layout)
        return
    from qkov_dist.layout.proof import prove, resolve_proved
    from qkov_dist.loading.models import load_model

    loaded = load_model(config)
    model = loaded.model
    layout = resolve_proved(model)
    rows = prove(model, layout)
    print_layout(layout)
    print(f"proved by perturbation: {len(rows)} slices of {len(layout.layers)} layers, no mismatch")
    for line in loaded.remarks:
        print(line)


def print_layout(layout: Layout) -> None:
    """Print one row for each block of each run of like layers, and what is left out."""
    state = "proved" if layout.proved else "not proved yet: add --verify"
    print(f"{layout.model_type}: layout {layout.family!r}, {layout.num_layers} layers ({state})\n")
    print(tabulate(_merged_rows(layout), headers="keys"))
    for note in layout_notes(layout):
        print(f"note: {note}")


def _from_structure(config: ModelConfig) -> Layout:
    from qkov_dist.layout.resolve import candidates, resolve
    from qkov_dist.loading.architecture import meta_model

    model = meta_model(config)
    try:
        return resolve(model)
    except QkovError:
        guesses = candidates(model)
        if len(guesses) != 1:
            raise
        return guesses[0]


def _merged_rows(layout: Layout) -> list[dict[str, str]]:
    """The layout's table, with consecutive layers of the same rows as one range."""
    by_layer = [list(rows) for _, rows in groupby(layout_table(layout), key=lambda row: row["layer"])]

    def shape(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
        return [tuple(_starred(row)[key] for key in row if key != "layer") for row in rows]

    merged = []
    for _, group in groupby(by_layer, key=shape):
        layers = list(group)
        first, last = layers[0][0]["layer"], layers[-1][0]["layer"]
        name = first if first == last else f"{first}-{last}"
        merged += [{**_starred(row), "layer": name} for row in layers[0]]
    return merged


def _starred(row: dict[str, str]) -> dict[str, str]:
    return {**row, "parameter": re.sub(r"\.\d+\.", ".*.", row["parameter"])}
