"""What a file from a stranger cannot do: lead a reader elsewhere, choose a path, run code here or where it is shown."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from samples import mixed_samples
from zoo import TINY, VOCAB

import qkov_dist
from qkov_dist import config_file
from qkov_dist.cli import main
from qkov_dist.config import ModelConfig
from qkov_dist.report.table import Table

PACKAGE = Path(qkov_dist.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = (
    "../../escaped",
    "/tmp/qkov-escaped",
    "..\\..\\escaped",
    "=1+1",
    '"><img src=x onerror=alert(1)>',
    "a/../../escaped",
)
NAMES = ("../escaped", "<script>alert(1)</script>")


def qkov(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose ids and names of tasks look like paths, formulas and markup; in ``run``, beside its inputs."""
    folder = tmp_path_factory.mktemp("outer") / "middle" / "inner"
    folder.mkdir(parents=True)
    TINY["gpt2"].build().save_pretrained(folder / "model")
    for task, seed in (("a", 1), ("b", 2)):
        samples = zip(IDS, mixed_samples(len(IDS), VOCAB, seed=seed), strict=True)
        rows = [{"id": i, "input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for i, s in samples]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "model": {"path": str(folder / "model")},
        "tasks": [{"name": name, "path": str(folder / f"{t}.jsonl")} for name, t in zip(NAMES, "ab", strict=True)],
        "statistics": {"permutations": 20},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    assert qkov("run", folder / "run.yaml", "--quiet") == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


# Files that lead elsewhere


def external_link(file: h5py.File, name: str, elsewhere: Path) -> None:
    del file[name]
    file[name] = h5py.ExternalLink(str(elsewhere), f"/{name}")


def linked_group(file: h5py.File, name: str, elsewhere: Path) -> None:
    group = name.partition("/")[0]
    del file[group]
    file[group] = h5py.ExternalLink(str(elsewhere), f"/{group}")


def soft_link(file: h5py.File, name: str, _: Path) -> None:
    file.move(name, "moved")
    file[name] = h5py.SoftLink("/moved")


def external_data(file: h5py.File, name: str, elsewhere: Path) -> None:
    raw = elsewhere.with_suffix(".raw")
    raw.write_bytes(file[name][...].tobytes())
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, dtype, external=[(str(raw), 0, raw.stat().st_size)])


def virtual_dataset(file: h5py.File, name: str, elsewhere: Path) -> None:
    layout = h5py.VirtualLayout(file[name].shape, file[name].dtype)
    layout[...] = h5py.VirtualSource(str(elsewhere), name, file[name].shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def references(file: h5py.File, name: str, _: Path) -> None:
    values = np.full(file[name].shape, file["layer"].ref)
    del file[name]
    file.create_dataset(name, data=values, dtype=h5py.ref_dtype)


HOSTILE = {
    external_link: "a soft or external link",
    linked_group: "a soft or external link",
    soft_link: "a soft or external link",
    external_data: "a virtual or external dataset",
    virtual_dataset: "a virtual or external dataset",
    references: "object",
}
READS_HEATMAP = ("report", "stats", "run")
READS_PARTIALS = ("merge", "stats", "run")


def made_hostile(path: Path, change: Callable[[h5py.File, str, Path], None], name: str) -> None:
    """Change a file; what it then leads to is there, and is the data that it had."""
    elsewhere = path.with_name("elsewhere.h5")
    shutil.copy(path, elsewhere)
    with h5py.File(path, "r+") as file:
        heads = file[name].attrs.get("heads")
        change(file, name, elsewhere)
        if heads is not None and change not in (external_link, linked_group):
            file[name].attrs["heads"] = heads


def command(name: str, finished: Path, run: Path) -> int:
    if name == "run":
        return qkov("run", finished / "run.yaml", f"output.dir={run}", "--quiet")
    return qkov(name, run, *(["--quiet"] if name == "merge" else []))


def refusal(capsys, name: str, finished: Path, run: Path) -> str:
    capsys.readouterr()
    assert command(name, finished, run) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    (message,) = [line for line in printed.splitlines() if line.startswith("qkov: ") and " expected " in line]
    return message


@pytest.mark.long
@pytest.mark.parametrize("name", dict.fromkeys((*READS_HEATMAP, *READS_PARTIALS)))
def test_a_run_from_friends_is_read(finished, run, name):
    assert command(name, finished, run) == 0


@pytest.mark.parametrize("name", READS_HEATMAP)
@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_a_heatmap_that_leads_elsewhere_is_refused(finished, run, capsys, change, name):
    made_hostile(run / "heatmap.h5", change, "heatmap/Q")
    message = refusal(capsys, name, finished, run)
    assert f"{run / 'heatmap.h5'}: heatmap" in message
    assert HOSTILE[change] in message


@pytest.mark.parametrize("name", READS_PARTIALS)
@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_a_partial_file_that_leads_elsewhere_is_refused(finished, run, capsys, change, name):
    if name == "run":
        (run / "heatmap.h5").unlink()  # with it the run is finished, and nothing else is read
    made_hostile(run / "partial_rank00000.h5", change, "partial/Q/layer_0000")
    message = refusal(capsys, name, finished, run)
    assert f"{run / 'partial_rank00000.h5'}: partial/Q/layer_0000: " in message
    assert HOSTILE[change] in message


@pytest.mark.parametrize(("file", "name"), [("heatmap.h5", "report"), ("partial_rank00000.h5", "merge")])
def test_a_file_in_a_format_without_checksums_is_not_opened(finished, run, capsys, monkeypatch, file, name):
    with h5py.File(run / file) as source, h5py.File(run / "old.h5", "w", libver="earliest") as target:
        for key in source:
            source.copy(key, target)
        target.attrs.update(source.attrs)
    (run / "old.h5").replace(run / file)
    opened: list[str] = []
    original = h5py.File
    monkeypatch.setattr(h5py, "File", lambda path, *a, **k: opened.append(str(path)) or original(path, *a, **k))
    assert "an older format of HDF5" in refusal(capsys, name, finished, run)
    assert str(run / file) not in opened


# Ids and names


@pytest.mark.long
def test_ids_and_names_of_tasks_never_become_paths(finished, run):
    assert qkov("report", run) == 0
    outer = finished.parents[1]
    top = {path.name for path in finished.iterdir()}
    assert top == {"model", "a.jsonl", "b.jsonl", "run.yaml", "run"}
    assert {path.name for path in (*outer.iterdir(), *finished.parent.iterdir())} == {"middle", "inner"}
    assert {path.name for path in run.parent.iterdir()} == {"run"}
    names = {path.name for folder in (run, finished / "run") for path in folder.rglob("*")}
    assert {"heatmap.h5", "partial_rank00000.h5", "report.html", "conflicts.csv"} <= names
    assert not [name for name in names if re.search(r"escaped|[=<\\]|\.\.", name)]
    assert not Path("/tmp/qkov-escaped").exists()


@pytest.mark.long
def test_ids_and_names_are_no_markup_in_the_page(run, undrawn):
    assert qkov("report", run) == 0
    page = (run / "report.html").read_text()
    assert "alert(1)" in page
    assert "<img" not in page
    assert "<script>alert" not in page
    tables = [path.read_text() for path in (run / "report").glob("*.md")]
    assert tables
    assert not [table for table in tables if re.search(r"(?<!\\)<", table)]


@pytest.mark.long
def test_a_spreadsheet_runs_no_id(run, undrawn):
    assert qkov("report", run) == 0
    with (run / "report" / "conflicts.csv").open(newline="") as file:
        ids = {row["id_a"] for row in csv.DictReader(file)}
    assert "'=1+1" in ids
    assert "=1+1" not in ids


SPACES = ("", " ", "\t", "\r", "\n", "\r\n", " \t\r ", "\N{NO-BREAK SPACE}", "\ufeff", "\u200b", "\0", "\x0b")


@pytest.mark.parametrize("space", SPACES, ids=ascii)
@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\uff1d1+1", "\uff0b1", "\uff0d1", "\uff20SUM(A1)"], ids=ascii
)
def test_a_spreadsheet_runs_no_formula_behind_whitespace(space, text):
    (row,) = list(csv.reader(io.StringIO(Table("t", ("c",), ((space + text,),)).to_csv(), newline="")))[1:]
    assert row == [f"'{space}{text}"]
    (row,) = list(csv.reader(io.StringIO(Table("t", ("c",), ((f"{space}a{text}",),)).to_csv(), newline="")))[1:]
    assert row[0].lstrip("'") == f"{space}a{text}"


# Code


def test_code_that_comes_with_a_model_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, mark = tmp_path / "model", tmp_path / "it ran"
    TINY["gpt2"].build().save_pretrained(model)
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "theirs", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "a.py").write_text(f"open({str(mark)!r}, 'w')\n")
    assert qkov("inspect", model) == 2
    assert "trust" in capsys.readouterr().err
    assert not mark.exists()
    assert qkov("inspect", model, "--trust-remote-code") == 2  # a.B is not there
    assert mark.exists(), "without the refusal it would have run"


FORBIDDEN_CALLS = re.compile(
    r"(c?[pP]ickle|dill|joblib|marshal|shelve|cloudpickle)\.\w+"
    r"|eval|exec|compile|__import__|os\.(system|popen)"
    r"|.*\.(all_gather_object|broadcast_object_list|gather_object|scatter_object_list|send_object_list)"
    r"|(np|numpy)\.(load|fromregex)"
)


def dangers(source: str) -> Iterator[str]:
    """Calls in a module that run what they are given, or unpickle it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if FORBIDDEN_CALLS.fullmatch(name):
            yield name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if re.fullmatch(r"yaml\.(unsafe_load|full_load|load_all|load|unsafe_load_all|full_load_all)", name):
            yield f"{name} with {ast.unparse(node.args[1]) if len(node.args) > 1 else given.get('Loader')}"
        yield from (f"{key}={given[key]}" for key in ("allow_pickle", "shell") if given.get(key) == "True")
        yield from (f"{name} trusts" for key in given if key == "trust_remote_code" and given[key] == "True")
        if name.endswith("from_pretrained") and given.get("weights_only") == "False":
            yield "from_pretrained without weights_only"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_unpickles_nothing_and_runs_no_text(path):
    found = list(dangers(path.read_text(encoding="utf-8")))
    assert found == (["yaml.load with _Loader"] if path.stem == "config_file" else [])


def test_the_one_yaml_loader_is_safe():
    assert issubclass(config_file._Loader, yaml.SafeLoader)
    known = {tag for tag in config_file._Loader.yaml_constructors if tag and "python" in tag}
    assert not known


def test_models_load_tensors_alone_and_trust_nobody_by_default():
    assert '"weights_only": True' in (PACKAGE / "loading" / "models.py").read_text()
    assert ModelConfig("m").trust_remote_code is False


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "pickle.Unpickler(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "np.load(path)",
        "read(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "dist.all_gather_object(found, value)",
        "auto.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_every_danger_is_seen(source):
    assert list(dangers(source))
    assert not list(
        dangers("model.eval()\nyaml.safe_load(text)\ntorch.load(path, weights_only=True)\nre.compile(text)")
    )
