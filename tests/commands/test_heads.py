"""`qkov heads`: the heads of a finished run in each format, from its folder or file, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from influences import heatmap_with_effects
from selections import heatmap_with_slices
from training import selection_of
from zoo import TINY

from qkov_dist import Selection, load_heatmap
from qkov_dist.cli import main
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.head_slices import slices_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    heatmap_with_slices().save(folder / "heatmap.h5")
    return folder


@pytest.fixture
def heads(folder, capsys):
    """What the command prints."""

    def run(*arguments: object) -> str:
        assert main(["heads", str(folder), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def test_the_table_says_what_it_is_of(heads, folder):
    lines = heads("--top", 2, "--blocks", "Q,K").splitlines()
    assert lines[0] == "2 of 23 heads by change_adam, most harmful first; A is 'math', B is 'cøde'"
    assert "\n".join(lines[2:]) == str(load_heatmap(folder).select(top=2, blocks="Q,K"))


def test_the_harm_of_a_step_says_which_order_decides(heads, folder):
    small, large = heads("--by", "harm", "--step", "1e-6"), heads("--by", "harm", "--step", 10, "--harms", "b")
    assert "the second order is the smaller: far from A's optimum; it overtakes at a step of" in small
    assert "the second order decides: near B's optimum" in large
    total = load_heatmap(folder).harm(10, harms="b").total
    assert f"change B's loss by {total['value']:.3g} [{total['ci_low']:.3g}, {total['ci_high']:.3g}]" in large


def test_json_is_a_selection(heads, folder, tmp_path, capsys):
    options = ("--by", "curvature", "--optimizer", "sgd", "--share", "0.1", "--format", "json")
    (tmp_path / "heads.json").write_text(heads(*options))
    expected = load_heatmap(folder).select("curvature", optimizer="sgd", share=0.1)
    assert Selection.from_json(tmp_path / "heads.json") == expected
    assert heads(*options, "--output", tmp_path / "written.json") == ""
    assert (tmp_path / "written.json").read_text() == (tmp_path / "heads.json").read_text()
    assert len(json.loads((tmp_path / "heads.json").read_text())["heads"]) == sum(len(x.ranges) for x in expected.heads)
    assert main(["heads", str(folder / "heatmap.h5"), *options]) == 0  # the file itself
    assert capsys.readouterr().out == (tmp_path / "heads.json").read_text()


def test_csv_has_a_row_for_each_rectangle(heads, folder):
    rows = list(csv.DictReader(io.StringIO(heads("--by", "overlap", "--significant", "--format", "csv"))))
    expected = [
        (x, piece) for x in load_heatmap(folder).select("overlap", significant=True).heads for piece in x.ranges
    ]
    assert len(rows) == len(expected) > 0
    for row, (head, piece) in zip(rows, expected, strict=True):
        assert (row["block"], int(row["layer"]), int(row["head"])) == (head.block, head.layer, head.head)
        assert (float(row["overlap"]), float(row["q_value"])) == (head.value, head.q_value)
        assert (row["parameter"], row["axis"]) == (piece.parameter, piece.axis)
        assert (int(row["start"]), int(row["stop"])) == (piece.start, piece.stop)


@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_peft_run(tmp_path, capsys, monkeypatch):
    """As a user would: the whole of it, and each of the two lines that stand there as comments."""
    peft = pytest.importorskip("peft")
    model = TINY["gpt2"].build()
    made = heatmap_with_effects(attributes={"slices": slices_of(resolve(model), include_bias=False)})
    made.save(tmp_path / "heatmap.h5")
    monkeypatch.chdir(tmp_path)
    selection = selection_of(model, [("Q", 0, 1), ("O", 1, 2)])
    monkeypatch.setattr("qkov_dist.results.heatmap.Heatmap.select", lambda *_, **__: selection)
    assert main(["heads", ".", "--format", "peft", "--top", "2"]) == 0
    program = capsys.readouterr().out
    assert "select(by='change_adam', top=2)" in program
    assert "2 heads by change_adam, in 2 of 4 attention modules" in program
    place = {"model": TINY["gpt2"].build()}
    exec(program, place)
    assert adapted(place["model"]) == {f"transformer.h.{n}.attn.c_{name}" for n in (0, 1) for name in ("attn", "proj")}
    coarse, reverse = (line[2:] for line in program.splitlines() if line.startswith("# LoraConfig"))
    assert adapted(peft.get_peft_model(TINY["gpt2"].build(), eval(coarse, place))) == {
        "transformer.h.0.attn.c_proj",
        "transformer.h.1.attn.c_attn",
    }
    assert adapted(peft.get_peft_model(TINY["gpt2"].build(), eval(reverse, place))) == {
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_proj",
    }


def adapted(model: Any) -> set[str]:
    names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
    return {name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in names}


def test_an_old_file_is_ranked_but_says_nothing_of_places(tmp_path, capsys):
    heatmap_with_effects().save(tmp_path / "heatmap.h5")
    assert main(["heads", str(tmp_path), "--format", "csv", "--top", "1"]) == 0
    assert capsys.readouterr().out.endswith(',"","","",""\n')
    for name in ("json", "peft"):
        assert main(["heads", str(tmp_path), "--format", name]) == 2
        assert "expected where each head lies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--by harm", "qkov: --step: expected learning rate times number of steps, got None."),
        ("--step 0.1", "qkov: --step: expected one for harm alone"),
        ("--by curv", "Did you mean 'curvature'?"),
        ("--by curvature --significant", "qkov: --significant: expected a criterion with q-values"),
        ("--share 3", "qkov: --share: expected a number above 0 and up to 1, got 3.0."),
        ("--share 0.1 --top 2", "not allowed with argument --share"),
        ("--top 0", "expected a number of at least 1, got 0"),
        ("--blocks Q,X", "qkov: --blocks: expected some of Q, K, V, O, got 'Q,X'."),
        ("--harms C", "expected one of A, B, got 'C'"),
        ("--format jsn", "Did you mean 'json'?"),
        ("--ouput x", "did you mean --output?"),
        ("--output nowhere/heads.json", "nowhere/heads.json: expected an existing file in an existing folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(folder, line, says, capsys):
    try:
        code = main(["heads", str(folder), *line.split()])
    except SystemExit as end:
        code = end.code
    assert code == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.out == ""


def test_a_folder_without_a_heatmap(tmp_path, capsys):
    assert main(["heads", str(tmp_path)]) == 2
    assert "heatmap.h5" in capsys.readouterr().err
