"""The command line itself: which commands there are, what it says of a wrong word, how a shell completes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from heatmaps import make_heatmap

import qkov_dist.commands
from qkov_dist.cli import COMMANDS, main
from qkov_dist.commands.completion import settings
from qkov_dist.config import KEYS
from qkov_dist.stats.statistics import QKOVStatistics

BESIDE_COMMANDS = {"__init__", "arguments", "completion", "keys", "parser", "version"}


def refused(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_every_command_has_a_file_of_its_own() -> None:
    files = {path.stem for path in Path(qkov_dist.commands.__file__).parent.glob("*.py")}
    assert files - BESIDE_COMMANDS == COMMANDS.keys()


def test_alone_it_prints_its_help_which_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(re.search(rf"^ +{command} ", printed.out, re.MULTILINE) for command in COMMANDS)


def test_the_version_goes_before_any_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version", "run"]) == 0
    assert re.fullmatch(r"qkov-dist \S+ \(Python \S+, torch \S+, transformers \S+\)\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rnu", "got 'rnu'. Did you mean 'run'? See"),
        ("xyz", "compare, report, push, got 'xyz'. See"),
        ("merge runs --tests keeep", "argument --tests: expected one of run, keep, got 'keeep'. Did you mean 'keep'?"),
        ("--verison", "--verison: did you mean --version?"),
        ("run c.yaml --quite", "no such argument: --quite. --quite: did you mean --quiet? See `qkov run --help`."),
        ("run c.yaml --layers 0-3", "--layers is a key of the configuration: write metric.layers=0-3. See"),
        ("run c.yaml --tp=2", "--tp is a key of the configuration: write parallel.tp=2."),
        ("run c.yaml --tp 2 --fdr_alpha 0.1", "write parallel.tp=2. --fdr_alpha is a key of the configuration: write "
         "statistics.fdr_alpha=0.1."),
        ("run c.yaml -layers 3", "write metric.layers=3."),
        ("plan c.yaml --score-dtype", "write compute.score_dtype=...."),
        ("run c.yaml --seed metric.layers=3", "write statistics.seed=...."),
        ("run c.yaml --path m", "write one of model.path=m, tasks.0.path=m, tasks.1.path=m."),
        ("run c.yaml --metric.heads 3", "write metric.heads=3."),
        ("run c.yaml --layer 3", "--layer: did you mean metric.layers=3?"),
        ("run c.yaml --fisher mean", "section fisher has the keys fisher.estimator, fisher.decay, fisher.scope, "
         "fisher.batch_size."),
        ("run c.yaml --zzz 3", "qkov run: no such argument: --zzz. See"),
        ("demo --scope a", "qkov demo: no such argument: --scope a. See"),  # takes no keys
    ],
)  # fmt: skip
def test_a_wrong_word_is_told_which_was_right(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(*line.split())
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_settings_stand_anywhere_on_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{model: {path: m}, tasks: [{name: a, path: a}, {name: b, path: b}]}")
    for words in (["--quiet", str(config), "tasks.0.name=1"], [str(config), "--quiet", "tasks.0.name=1"]):
        assert main(["run", *words]) == 2
        assert "tasks.0.name (command line): expected text, got 1" in capsys.readouterr().err


COMPLETE = r"""
source <("$PYTHON" -m qkov_dist --print-completion bash)
qkov() { "$PYTHON" -m qkov_dist "$@"; }
while IFS= read -r COMP_LINE; do
    read -r -a COMP_WORDS <<< "$COMP_LINE"
    [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
    COMP_POINT=${#COMP_LINE} COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_TYPE=9 COMPREPLY=()
    $(complete -p qkov | sed 's/.*-F \([^ ]*\) .*/\1/') qkov
    (IFS=,; echo "${COMPREPLY[*]}")
done
"""
COMPLETIONS = {
    "qkov r": "run,report",
    "qkov stats --stat": "--statistic ",
    "qkov run conf": "conf.yaml ",  # of conf.yaml and conf.txt
    "qkov run conf.yaml metric.la": "metric.layers=",
    "qkov plan conf.yaml compute.matmul_precision=h": "highest,high",
}


@pytest.mark.long
def test_bash_completes_commands_options_files_and_keys(tmp_path: Path) -> None:
    for name in ("conf.yaml", "conf.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE],
        input="".join(f"{line}\n" for line in COMPLETIONS),
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(zip(COMPLETIONS, done.stdout.splitlines(), strict=True)) == COMPLETIONS


def test_every_key_completes_and_its_choices_are_what_it_accepts() -> None:
    assert settings("") == [f"{key}=" for key in KEYS]
    assert settings("compute.compile=") == [f"compute.compile={value}" for value in ("auto", "true", "false")]
    assert settings("metric.layers=") == settings("metrik.layers=") == []  # the shell then offers files


@pytest.mark.parametrize("shell", ["zsh", "tcsh", "fish"])
def test_other_shells_get_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", shell]) == 0
    assert "qkov" in capsys.readouterr().out


def test_stats_refuses_a_missing_folder_before_it_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(QKOVStatistics, "test_heatmap", lambda *_: pytest.fail("tested first"))
    make_heatmap().save(tmp_path / "heatmap.h5")
    output = tmp_path / "missing" / "tests.h5"
    assert main(["stats", str(tmp_path), "--output", str(output)]) == 2
    assert f"{output}: expected a file in an existing folder, got none." in capsys.readouterr().err
    assert not output.parent.exists()
