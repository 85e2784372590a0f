"""The package as it is handed out: what the wheel holds, what it says it needs, and what it uses that is going away."""

from __future__ import annotations

import ast
import json
import re
import sys
import tarfile
import tomllib
import warnings
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from heatmaps import make_heatmap
from jobs import mixed_samples
from processes import forked, ran
from ranks import without_launcher
from zoo import TINY, VOCAB

import qkov_dist
from qkov_dist.cli import main

PACKAGE = Path(qkov_dist.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NO_DATA = {".md", ".pyc"}  # words beside the code are for readers of a checkout

# Runs `qkov` with transformers' own announcements, which loading keeps quiet, on stderr.
ANNOUNCED = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
ANNOUNCING = """
import sys
from transformers.utils import logging
from qkov_dist.cli import main

logging.set_verbosity_warning()
logging.set_verbosity_error = lambda: None
sys.exit(main([*sys.argv[1:], "--debug", "--quiet"]))
"""
GOING = re.compile(r"^.*(?:deprecat|will be removed|FutureWarning).*$", re.IGNORECASE | re.MULTILINE)


def built(kind: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive that setuptools makes of a source tree."""
    monkeypatch.chdir(source)
    done = ran(sys.executable, "-c", BUILD, f"build_{kind}", out)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, made from the source archive as ``python -m build`` does, where the rest of a checkout lies too."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "qkov_dist", "configs", "launch", "tests"):
        (source / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        archive = built("sdist", source, out, monkeypatch)
        with tarfile.open(archive) as file:
            file.extractall(out, filter="data")
        return built("wheel", out / archive.name.removesuffix(".tar.gz"), out, monkeypatch)


@pytest.mark.long
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        (place,) = (name for name in held if name.endswith("/METADATA"))
        facts = message_from_string(file.read(place).decode())
    wanted = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in NO_DATA
    }
    assert {name for name in held if not name.startswith(place.rpartition("/")[0])} == wanted
    assert {"qkov_dist/py.typed", "qkov_dist/report/assets/page.html"} < wanted
    assert "qkov_dist/planning/described_models/llama-3-405b.json" in wanted
    assert [facts["Name"], facts["Requires-Python"]] == ["qkov-dist", ">=3.11"]
    assert {wanted for wanted in facts.get_all("Requires-Dist") if "extra" not in wanted} == {*PROJECT["dependencies"]}


@pytest.mark.long
def test_what_the_wheel_holds_works_far_from_a_checkout(wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    alone = {"PYTHONPATH": str(tmp_path / "site")}
    where = ran(sys.executable, "-P", "-c", "import qkov_dist; print(qkov_dist.__file__)", **alone)
    assert where.stdout.startswith(str(tmp_path / "site"))
    tasks = [{"name": name, "path": f"builtin:{name}"} for name in ("arithmetic", "python")]
    plain = {"model": {"path": "builtin:llama-3-8b"}, "tasks": tasks, "output": {"dir": "out"}}
    Path("run.yaml").write_text(yaml.safe_dump(plain))
    sizes = ("--samples", 8, "--tokens", 64, "--gpu-memory", 80)
    plan = ran(sys.executable, "-P", "-m", "qkov_dist", "plan", "run.yaml", *sizes, **alone)
    assert (plan.returncode, "32 of 32 layers scored" in plan.stdout) == (0, True), plan.stderr
    make_heatmap().save("heatmap.h5")
    report = ran(sys.executable, "-P", "-m", "qkov_dist", "report", "heatmap.h5", **alone)
    assert report.returncode == 0, report.stderr
    assert "</html>" in Path("report.html").read_text(encoding="utf-8")


def test_a_described_model_cannot_be_run(capsys, tmp_path):
    tasks = [{"name": name, "path": f"builtin:{name}"} for name in ("arithmetic", "python")]
    plain = {"model": {"path": "builtin:llama-3-8b"}, "tasks": tasks, "output": {"dir": str(tmp_path / "out")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    assert main(["run", str(tmp_path / "run.yaml")]) == 2
    assert "builtin:llama-3-8b: expected a model with weights, got the description of one" in capsys.readouterr().err


def plain_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_what_modules_import_at_once_is_declared():
    """But Triton, which torch brings along where it can be used: by one module, which is imported where it is there."""
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "triton_kernels.py"]
    nodes = [node for source in sources for node in ast.parse(source).body]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    libraries = {name.partition(".")[0] for name in names} - {PACKAGE.name} - sys.stdlib_module_names
    needed = {plain_name({"yaml": "PyYAML"}.get(library, library)) for library in libraries}
    assert {"torch", "pyyaml", "huggingface-hub"} <= needed
    assert needed <= {*map(plain_name, PROJECT["dependencies"])}


def test_every_dependency_has_a_lower_bound():
    """``launch/lowest.sh`` installs what is stated, and leaves to chance what is not."""
    own = (f"{PROJECT['name']}[", "types-")
    stated = [*PROJECT["dependencies"], *(name for extra in EXTRAS.values() for name in extra)]
    assert not [name for name in stated if not name.startswith(own) and not re.match(r"[\w.-]+>=[\d.]+(;|$)", name)]


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """A configuration of a tiny model on disk, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    TINY["llama"].build().save_pretrained("model")
    for task, seed in (("a", 1), ("b", 2)):
        samples = mixed_samples(3, VOCAB, seed=seed)
        rows = [{"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist()} for sample in samples]
        Path(f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [{"name": task, "path": f"{task}.jsonl"} for task in "ab"]
    Path("run.yaml").write_text(yaml.safe_dump({"model": {"path": "model"}, "tasks": tasks, "output": {"dir": "out"}}))
    Path("announcing.py").write_text(ANNOUNCING)
    return "run.yaml"


@pytest.mark.long
def test_nothing_is_used_that_torch_or_transformers_will_take_away(configuration):
    loud = ",".join(f"error::{kind.__name__}" for kind in ANNOUNCED)
    done = ran(sys.executable, "announcing.py", "run", configuration, PYTHONWARNINGS=loud)
    assert done.returncode == 0, done.stderr[-4000:]
    assert GOING.findall(done.stderr) == []


def announcing(script: str, *arguments: str) -> None:
    """As the script does in a process of its own, where others have imported the libraries."""
    for kind in ANNOUNCED:
        warnings.simplefilter("error", kind)
    sys.argv[1:] = arguments
    exec(script)


@pytest.mark.long
@pytest.mark.parametrize("cut", ["parallel.shard=fsdp", "parallel.tp=2"])
def test_no_cut_uses_what_will_be_taken_away(configuration, cut):
    """It loads no module that one process does not load."""
    for done in without_launcher(2, announcing, ANNOUNCING, "run", configuration, cut):
        assert done.returncode == 0, done.stderr[-4000:]
        assert GOING.findall(done.stderr) == []


@pytest.mark.parametrize(
    ("old", "said"),
    [("LlamaConfig().torch_dtype", "`torch_dtype` is deprecated"), ("warnings.warn('old', FutureWarning)", "Future")],
)
def test_what_will_be_taken_away_is_seen(old, said):
    script = ANNOUNCING.replace("sys.exit(", f"import warnings\nfrom transformers import LlamaConfig\n{old}\nsys.exit(")
    with forked(announcing, script, "run", "--keys") as process:
        (line,) = GOING.findall(process.ended().stderr)
    assert said in line
