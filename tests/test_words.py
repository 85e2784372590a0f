"""Words for people hold: links, paths, names, commands, configurations and programs of every page, and the recipes."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qkov_dist
from qkov_dist import cli, load_heatmap
from qkov_dist.capture import ropes
from qkov_dist.config_file import load_config
from qkov_dist.errors import QkovError
from qkov_dist.layout.families import FAMILIES
from qkov_dist.report import figures, tables

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qkov_dist"
NOT_OURS = {".venv", ".git", "build", "dist", "runs", "node_modules", ".pytest_cache", "shared"}
RESULTS = ROOT / "tests"  # whose pages of results are written by programs
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not NOT_OURS & set(path.relative_to(ROOT).parts)
    and not (path.parent.name == "results" and RESULTS in path.parents)
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    r"[\w.-]+(/[\w.-]+)*\.(py|md|sh|sbatch|js|html|css)|([\w.-]+/)+([\w.-]+\.(yaml|json|png|toml|jsonl))?"
)
IDENTIFIER = re.compile(r"[A-Za-z]\w*_\w*|[A-Z][a-z]+[A-Z]\w*|[A-Z]{4,}")
OF_A_RUN = ("runs/", "unfinished_of_N_ranks/", "partial_rank", "report.html")  # what commands in the words write
OF_OTHERS = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}  # the code puts their names together
OF_OTHERS |= {"parallelize_module", "maybe_context_parallel"}  # a user's calls, of torch and accelerate
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def inline(page: Path) -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def wrong_links(page: Path) -> list[str]:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def missing_paths(page: Path) -> list[str]:
    """Files named in backticks that are nowhere: beside the page, or in the places that pages name files from."""
    places = (page.parent, ROOT, PACKAGE, PACKAGE / "report" / "assets")
    named = [text for text in inline(page) if PATH.fullmatch(text) and not text.startswith(OF_A_RUN)]
    return [text for text in named if not any((place / text).exists() for place in places)]


@cache
def words_of_the_code() -> frozenset[str]:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.js"), *(ROOT / "launch").iterdir(), *ROOT.glob("configs/*.yaml")]
    return frozenset(word for path in files if path.suffix != ".md" for word in re.findall(r"\w+", path.read_text()))


def words_of(folder: Path) -> frozenset[str]:
    files = list(folder.rglob("*.py"))
    return frozenset(word for path in files for word in [path.stem, *re.findall(r"\w+", path.read_text())])


def unknown_names(page: Path) -> list[str]:
    """Names in backticks that no source has; the suite's own page also names what is in the suite."""
    named = {text for text in inline(page) if IDENTIFIER.fullmatch(text)}
    words = words_of(ROOT / "tests") if page.is_relative_to(ROOT / "tests") else frozenset()
    return sorted(named - words_of_the_code() - words - OF_OTHERS)


def shell_lines(page: Path) -> list[str]:
    """Command lines of shell blocks, and those of prose and tables that call this package."""
    lines = [line for text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    called = r"(qkov|bash|python) [\w-]|.* -m qkov_dist|.* qkov run "
    return [line for line in lines if line.strip()] + [text for text in inline(page) if re.match(called, text)]


def check_command(line: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whether what a line names is there, and whether its arguments are those of the real parser."""
    words = shlex.split(line.partition(" #")[0])
    if "bash" in words[:2] or "sbatch" in words[:2]:
        script = next(word for word in words if word.endswith((".sh", "/run", ".sbatch")))
        assert (ROOT / script).is_file(), script
        return
    if "-m" in words and (module := words[words.index("-m") + 1]) != "qkov_dist":
        assert find_spec(module), module
    marks = [place for place, word in enumerate(words) if word in ("qkov", "qkov_dist")]
    if marks:
        parse(words[marks[0] + 1 :], monkeypatch, folder)


def check_mention(words: list[str]) -> None:
    """Whether a command that is only named, such as `qkov stats --output`, is there and has these flags."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as end:
        cli.main([words[0], "--help"])
    assert end.value.code == 0
    assert [word for word in words[1:] if word not in told.getvalue()] == []


class ParsedError(BaseException):
    """The parser took a command line, and the command is about to start."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def stop(environment: object) -> int:
        raise ParsedError

    monkeypatch.setattr(cli, "launched_size", stop)
    with contextlib.suppress(ParsedError):
        assert cli.main(words) == 0  # such as --version
    keys = [word for word in words[1:] if re.match(r"[a-z_]+\.[\w.]+=", word)]
    file = folder / "whole.yaml"
    tasks = [{"name": name, "path": "x.jsonl"} for name in "ab"]
    file.write_text(yaml.safe_dump({"model": {"path": "x"}, "tasks": tasks}))
    load_config(file, keys)
    named = [word for word in words[1:] if word.startswith("configs/")]
    assert not [word for word in named if not (ROOT / word).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_paths_and_names_of_a_page_are_there(page: Path) -> None:
    assert wrong_links(page) == []
    assert missing_paths(page) == []
    if page.name != "CHANGELOG.md":  # which names what is gone
        assert unknown_names(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if shell_lines(page)], ids=name_of)
def test_commands_of_a_page_are_taken(page: Path, monkeypatch, tmp_path, capsys) -> None:
    for line in shell_lines(page):
        match line.split():
            case ["qkov", name, *flags] if name[0] != "-" and all(flag.startswith("-") for flag in flags):
                check_mention([name, *flags])
            case _:
                check_command(line, monkeypatch, tmp_path)


def test_what_is_wrong_in_a_page_is_found(monkeypatch, tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One head\n[a](#one-head) [b](#two) [c](gone.md) `layout/gone.py` `layout/heads.py` `NoSuchThing`\n"
    )
    assert wrong_links(page) == ["#two", "gone.md"]
    assert missing_paths(page) == ["layout/gone.py"]
    assert unknown_names(page) == ["NoSuchThing"]
    with pytest.raises(SystemExit):
        check_command("qkov run first.yaml --gone", monkeypatch, tmp_path)
    with pytest.raises(QkovError, match=r"metric\.gone"):
        check_command("RANKS=2 torchrun -m qkov_dist run first.yaml metric.gone=1", monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check_mention(["stats", "--gone"])
    with pytest.raises(AssertionError, match="launch/gone"):
        check_command("bash launch/gone.sh", monkeypatch, tmp_path)


def test_configurations_in_words_are_taken(tmp_path) -> None:
    found = [text for page in PAGES for text in blocks(page, "yaml")]
    assert found
    for text in found:
        (tmp_path / "words.yaml").write_text(text)
        load_config(tmp_path / "words.yaml")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_programs_in_words_compile_and_import_what_there_is(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Import(names=names):
                    assert all(find_spec(alias.name) for alias in names)
                case ast.ImportFrom(module=str(module), names=names):
                    assert all(hasattr(importlib.import_module(module), alias.name) for alias in names)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_tour_names_every_file_of_the_package() -> None:
    named = set(inline(PACKAGE / "README.md"))
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert {file for file in files if "/" not in file or not file.endswith("__init__.py")} - named == set()


def test_the_tour_names_every_room_from_the_top_down() -> None:
    """The order in words is that of the imports' test."""
    source = ast.parse((ROOT / "tests" / "test_imports.py").read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in source.body if isinstance(node, ast.Assign)}
    order = [set(names) for names in ast.literal_eval(assigned["ORDER"])]
    (drawn,) = re.findall(r"^    (cli ->.*?)\n\n", (PACKAGE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    floors = [set(re.split(r",\s*", floor.strip())) for floor in drawn.split("->")]
    assert [{"__main__"}, *floors] == [*order, {"files at the root"}]


def test_the_chapter_of_layouts_lists_the_architectures_that_are_known() -> None:
    listed: set[str] = set()
    for row in re.findall(r"^\|.*\|.*\|(.*)\|$", (PACKAGE / "layout" / "README.md").read_text(), re.MULTILINE):
        listed |= set(re.findall(r"[a-z][\w-]+", re.sub(r"\([^)]*\)|`[^`]*`|---", "", row)))
    assert listed == {model_type for family in FAMILIES for model_type in family.model_types}


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """README's first heatmap on a small model: its files, and what `qkov run first.yaml` made of them."""
    folder = tmp_path_factory.mktemp("first")
    vocabulary = {token: n for n, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=CHAT).save_pretrained(
        folder / "my-model"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, **heads)).save_pretrained(folder / "my-model")
    rows = blocks(ROOT / "README.md", "json")
    for file, text in zip(("math.jsonl", "code.jsonl"), rows, strict=True):
        (folder / file).write_text(text)
    (config,) = blocks(ROOT / "README.md", "yaml")
    (folder / "first.yaml").write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["run", "first.yaml", "--quiet"]) == 0
        yield SimpleNamespace(folder=folder, heatmap=load_heatmap("runs/first"))


@pytest.mark.long
def test_the_first_heatmap_is_made_and_the_programs_run(followed, capsys) -> None:
    """In the order of the words; each program stands alone."""
    (three,) = re.findall(r"^qkov (run .*runs/three)$", (PACKAGE / "results" / "README.md").read_text(), re.MULTILINE)
    assert cli.main([*three.split(), "--quiet"]) == 0
    assert (followed.folder / "runs/first/report.html").is_file()
    for page in (ROOT / "README.md", PACKAGE / "results" / "README.md"):
        for text in blocks(page, "python"):
            exec(compile(text, name_of(page), "exec"), {})
    assert (followed.folder / "from_python.h5").is_file()
    assert (followed.folder / "heatmap.png").is_file()


def test_every_form_of_a_sample_in_the_words_is_read(followed) -> None:
    from transformers import AutoTokenizer

    from qkov_dist.config import TaskConfig
    from qkov_dist.data.tasks import load_task

    (text,) = blocks(ROOT / "configs" / "README.md", "json")
    file = followed.folder / "forms.jsonl"
    file.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(followed.folder / "my-model")
    task = load_task(TaskConfig("forms", str(file)), tokenizer, vocab_size=512, max_positions=None)
    assert len(task.samples) == 4


@pytest.mark.long
def test_tables_in_the_words_are_run_as_printed(followed) -> None:
    """Once as CSV and Parquet, and the samples from Python."""
    import pyarrow.csv
    import pyarrow.parquet

    page = ROOT / "configs" / "README.md"
    (table,), (config,), (program,) = (blocks(page, language) for language in ("csv", "yaml", "python"))
    Path("gsm8k.csv").write_text(table)
    Path("gsm8k.yaml").write_text(config)
    Path("data").mkdir()
    rows = pyarrow.csv.read_csv("gsm8k.csv", parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    assert pyarrow.types.is_integer(rows.schema.field("level").type)
    pyarrow.parquet.write_table(rows, "data/part.parquet")
    assert cli.main(["run", "gsm8k.yaml", "--quiet"]) == 0
    heatmap = load_heatmap("runs/gsm8k")
    assert [len(samples) for samples in (heatmap.samples_a, heatmap.samples_b)] == [3, 2]
    assert heatmap.samples_a.texts[0].endswith("cost?2 * 3 + 14 = 20\n#### 20")
    assert all(re.search(r"Level: \d$", text) for text in heatmap.samples_b.texts)
    assert heatmap.attributes["config"]["tasks"][1]["sample"] == "random"
    found = {}
    exec(compile(program, name_of(page), "exec"), found)
    assert tuple(sample.text for sample in found["samples"]) == heatmap.samples_a.texts


def recipe(title: str) -> str:
    """A section of the tour."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", (PACKAGE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return text


def files_of(title: str) -> set[str]:
    """The files of the package that a recipe names."""
    return {text for text in re.findall(r"`([\w/]+\.py)`", recipe(title)) if (PACKAGE / text).is_file()}


FOLLOWED = """
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
import qkov_dist
from qkov_dist import FisherCollector, QKOVConfig, QKOVInterferenceMetric
from qkov_dist.config import describe
from qkov_dist.config_file import from_dict
from qkov_dist.layout.proof import resolve_proved
from qkov_dist.scoring.score import pair_scores

assert qkov_dist.__file__.startswith(FOLDER), qkov_dist.__file__
torch.manual_seed(0)
model = GPTNeoXForCausalLM(GPTNeoXConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()
model.config.model_type = "made_up_wrong"
try:
    resolve_proved(model)
except qkov_dist.QkovError as error:
    print("refused", error)
else:
    raise AssertionError("a wrong order of rows was believed")
model.config.model_type = "made_up"
layout = resolve_proved(model)
assert (layout.family, layout.proved) == ("made up", True), layout

task, metric = {"path": "x.jsonl"}, {"made_up": 3, "score": "made_up"}
given = {"model": {"path": "x"}, "tasks": [task | {"name": "a"}, task | {"name": "b"}], "metric": metric}
assert from_dict(given).metric.made_up == 3
assert "made_up" in describe()

g, fisher = torch.randn(3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
found = pair_scores(g, fisher, left=slice(0, 3), right=slice(0, 3), score="made_up", epsilon=0.0, ridge=0.1)
torch.testing.assert_close(found, (g**2 / (fisher + 0.1) ** 0.5) @ (g**2).T)
collector, config = FisherCollector(), QKOVConfig.from_model(model)
for name in ("a", "b"):
    collector.collect_fisher(model, {"input_ids": torch.randint(64, (3, 6))}, task=name)
heatmap = QKOVInterferenceMetric(config, collector, score="made_up").compute_heatmap("a", "b")
assert (heatmap["Q"]["scores"] > 0).all(), "the engine scores it as it scores its own"

from qkov_dist.cli import main
from qkov_dist.distributed.parallelism import Parallelism, resolve_parallelism
cut = from_dict(given | {"parallel": {"shard": "made_up"}}).parallel
assert resolve_parallelism(cut, 4, {}) == Parallelism(1, "made_up", 4)
try:
    resolve_parallelism(cut, 1, {})
except qkov_dist.QkovError as error:
    print("refused", error)
else:
    raise AssertionError("a cut was accepted where it cannot be")
assert main(["madeup", "--times", "3"]) == 0
"""
ONE_RANK = """    if config.shard == "made_up" and replicas == 1:
        raise QkovError("parallel.shard", expected="several ranks", got="1", remedy="Start more.")
"""
COMMAND = '''
"""What `qkov madeup` does."""
import argparse
EXAMPLE = "qkov madeup --times 2"

def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=1)

def execute(options: argparse.Namespace) -> int:
    print("command " * options.times)
    return 0
'''


@pytest.mark.long
def test_what_is_added_by_a_recipe_takes_the_files_that_it_names(tmp_path) -> None:
    """In a copy of the package: an architecture is proved, a wrong one refused; a score is scored; a key is read; a cut
    is resolved, or refused; a command runs.
    """
    shutil.copytree(PACKAGE, tmp_path / "qkov_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shape = "'attention', (('query_key_value', {!r}), ('dense', 'cols H*v')), dims=HeadDims(q='head_size')"
    families = [
        f"    Family('made up', ('made_up',), {shape.format('H*(q k v)')}),\n",
        f"    Family('wrong', ('made_up_wrong',), {shape.format('H*q H*k H*v')}),\n",
    ]
    changes = [  # recipe, file, what stands there, what comes after it
        ("an architecture", "layout/families.py", "FAMILIES: tuple[Family, ...] = (\n", "".join(families)),
        ("a score", "scoring/score_kinds.py", 'Score = Literal["interference", ', '"made_up", '),
        (
            "a score",
            "scoring/score_kinds.py",
            "ScoreKind] = {\n",
            '    "made_up": ScoreKind("square", "square", 0.5),\n',
        ),
        ("a score", "config.py", 'score: str = _key(one_of("interference", ', '"made_up", '),
        ("a configuration key", "config.py", "", '    made_up: int = _key(COUNT, "a number", 1)\n'),
        ("a way to cut", "config.py", '        one_of("auto", "none", "ddp", ', '"made_up", '),
        ("a way to cut", "distributed/parallelism.py", "    replicas = world_size // config.tp\n", ONE_RANK),
        ("a command", "cli.py", "COMMANDS = {", '\n    "madeup": "Do what was made up.",'),
    ]
    (tmp_path / "qkov_dist" / "commands" / "madeup.py").write_text(COMMAND)
    for title, file, anchor, after in changes:
        assert file in files_of(f"Add {title}")
        path = tmp_path / "qkov_dist" / file
        text = path.read_text()
        place = text.index(anchor) + len(anchor) if anchor else text.index("    include_bias: bool")
        path.write_text(text[:place] + after + text[place:])
    program = f"FOLDER = {str(tmp_path)!r}\n{FOLLOWED}"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused") == 2
    assert "command command command" in done.stdout


def test_a_rope_that_follows_lengths_is_a_name(monkeypatch) -> None:
    """Its frequencies are those of a first sample in a pass, and what it remembers is put back."""
    assert "capture/ropes.py" in files_of("Add a rope variant")
    assert '`BY_LENGTH = ("dynamic", "longrope")`' in recipe("Add a rope variant")
    rope = torch.nn.Module()
    rope.rope_type, rope.max_seq_len_cached, rope.original_max_seq_len = "made_up", 99, 8
    for name, value in (("inv_freq", 3.0), ("original_inv_freq", 1.0)):
        rope.register_buffer(name, torch.tensor([value]))
    with ropes.fresh_ropes(rope):
        assert float(rope.inv_freq) == 3.0, "one that is in no list is left alone"
    monkeypatch.setattr(ropes, "BY_LENGTH", (*ropes.BY_LENGTH, "made_up"))
    with ropes.fresh_ropes(rope):
        assert (float(rope.inv_freq), rope.max_seq_len_cached) == (1.0, 8)
    assert (float(rope.inv_freq), rope.max_seq_len_cached) == (3.0, 99)


def test_a_launcher_is_one_line_of_the_table(monkeypatch) -> None:
    from qkov_dist.distributed import launchers

    assert "distributed/launchers.py" in files_of("Add a launcher")
    assert "`LAUNCHERS`" in recipe("Add a launcher")
    environment = {"MADE_UP_RANK": "1", "MADE_UP_SIZE": "4", "MADE_UP_LOCAL": "1", "MADE_UP_LOCAL_SIZE": "4"}
    assert launchers.launched_size(environment) == 1
    line = type(launchers.TORCH)(*environment)
    monkeypatch.setattr(launchers, "LAUNCHERS", (*launchers.LAUNCHERS, line))
    assert launchers.launched_size(environment) == 4
    found = launchers.rendezvous(environment)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "4", "1")


def test_a_column_of_what_tests_give_is_a_name(followed, monkeypatch) -> None:
    assert "report/tables.py" in files_of("Add a column of the report's table")
    assert "`TEST_COLUMNS`" in recipe("Add a column of the report's table")
    before = tables.heads_table(followed.heatmap).columns
    monkeypatch.setattr(tables, "TEST_COLUMNS", (*tables.TEST_COLUMNS, "detectable"))
    table = tables.heads_table(followed.heatmap)
    assert set(table.columns) - set(before) == {"overlap_detectable", "cross_mean_detectable"}
    place = table.columns.index("overlap_detectable")
    assert all(isinstance(row[place], float) for row in table.rows)


def test_a_figure_is_a_function_and_its_name(followed, monkeypatch) -> None:
    assert "report/figures.py" in files_of("Add a chart")
    assert "`FIGURES`" in recipe("Add a chart")
    monkeypatch.setattr(figures, "FIGURES", {"made_up": figures.FIGURES["layers"]})
    written = dict(figures.figures(followed.heatmap))
    assert set(written) == {"made_up.pdf", "made_up.png"}
    assert written["made_up.png"].startswith(b"\x89PNG")


def test_pages_are_found() -> None:
    """The package under test is the one whose pages these are."""
    assert Path(qkov_dist.__file__).parent == PACKAGE
    assert {"README.md", "qkov_dist/README.md", "launch/README.md", ".github/SECURITY.md"} <= set(map(name_of, PAGES))
