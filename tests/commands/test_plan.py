"""`qkov plan`: models that are not there, machines that are not there, and what would make a run fit."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist.cli import main
from qkov_dist.config import ModelConfig
from qkov_dist.distributed.parallelism import Parallelism
from qkov_dist.errors import QkovError
from qkov_dist.layout.resolve import resolve
from qkov_dist.planning.described import described_model
from qkov_dist.planning.hardware import GPUS, hardware, measured_cpu

LLAMAS = {"8b": (8.03e9, 32, 8), "70b": (70.6e9, 64, 8), "405b": (405.9e9, 128, 8)}
SAMPLES = ("--samples", 128, "--tokens", 512)


def llama(size: str) -> str:
    return f"builtin:llama-3-{size}"


@pytest.fixture
def config(tmp_path):
    """A configuration of a tiny model on disk with tasks of token ids."""
    TINY["llama"].build().save_pretrained(tmp_path / "model")
    for task, seed in (("a", 1), ("b", 2)):
        write_task(tmp_path / f"{task}.jsonl", mixed_samples(5, VOCAB, seed=seed))
    plain = {
        "model": {"path": str(tmp_path / "model")},
        "tasks": [{"name": task, "path": str(tmp_path / f"{task}.jsonl")} for task in "ab"],
        "output": {"dir": str(tmp_path / "out")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def qkov_plan(config: Path, *arguments: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["plan", str(config), *map(str, arguments)])


@pytest.mark.parametrize("size", LLAMAS)
def test_llama_3_has_as_many_parameters_and_heads_as_it_should(size):
    parameters, heads, kv_heads = LLAMAS[size]
    model = described_model(ModelConfig(path=llama(size)))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.005)
    assert all(parameter.is_meta and parameter.itemsize == 2 for parameter in model.parameters())
    layout = resolve(model)
    assert (layout.num_heads, layout.num_kv_heads) == (heads, kv_heads)


@pytest.mark.long
def test_a_model_too_large_for_one_gpu_is_refused_with_what_would_fit(config, capsys):
    arguments = [f"model.path={llama('405b')}", *SAMPLES, "--gpu-memory", 80]
    assert qkov_plan(config, *arguments) == 2
    message = capsys.readouterr().err
    assert "builtin:llama-3-405b on 1 rank: expected at most 80.0 GiB on each GPU, got 913.2 GiB on a GPU" in message
    (way,) = re.findall(r"It fits with (.*)\.$", message, flags=re.MULTILINE)
    num_ranks = int(re.search(r"--world-size (\d+)", way)[1])
    assert "parallel.shard=fsdp" in way
    assert qkov_plan(config, *arguments, *way.split()) == 0
    assert f"on {num_ranks} ranks (tp 1, fsdp)" in capsys.readouterr().out
    fewer = way.replace(f"--world-size {num_ranks}", f"--world-size {num_ranks // 2}")
    assert qkov_plan(config, *arguments, *fewer.split()) == 2


def test_each_way_that_is_named_fits_by_itself(config, capsys):
    arguments = [f"model.path={llama('8b')}", "model.dtype=float32", *SAMPLES, "--gpu-memory", 50]
    assert qkov_plan(config, *arguments) == 2
    ways = re.findall(r"It fits with (.*)\.$", capsys.readouterr().err, flags=re.MULTILINE)[0].split("; or with ")
    kinds = ("model.dtype=bfloat16", "compute.batch_tokens=", "--world-size 2 parallel.shard=fsdp")
    assert len(ways) == len(kinds)
    for way, kind in zip(ways, kinds, strict=True):
        assert way.startswith(kind)
        assert qkov_plan(config, *arguments, *way.split()) == 0


@pytest.mark.long
def test_what_nothing_makes_fit_says_so(config, capsys):
    assert qkov_plan(config, f"model.path={llama('405b')}", *SAMPLES, "--gpu-memory", 10) == 2
    assert "No more ranks, smaller batches or bfloat16 make it fit" in capsys.readouterr().err


def test_a_plan_is_printed_with_its_assumptions_and_reads_no_weights(config, capsys, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    assert qkov_plan(config, "--world-size", 2, "--hardware", "h100", "parallel.shard=fsdp") == 0
    printed = capsys.readouterr().out
    assert "on 2 ranks (tp 1, fsdp); 2 of 2 layers scored; 5 + 5 samples" in printed
    for row in ("weights", "factors in memory", "Fisher and gradients", "scores of one layer", "network: factors"):
        assert re.search(rf"^{row}.* [\d.]+ (B|KiB|MiB) +[\d.]+ (B|KiB|MiB)$", printed, flags=re.MULTILINE), row
    for row in ("forward", "backward", "scoring", "statistics"):
        assert re.search(rf"^operations: {row} .* MFLOP +[\d.]+ MFLOP$", printed, flags=re.MULTILINE), row
    assert re.search(r"^capture +[\d.]+ ms", printed, flags=re.MULTILINE)
    for note in ("samples: read from the tasks", "activations are an estimate", "time: products reach 50%"):
        assert f"- {note}" in printed
    assert "fits in 74.5 GiB on each GPU" in printed
    assert not (tmp_path / "out").exists()


def test_numbers_of_every_rank_as_json(config, capsys):
    assert qkov_plan(config, "--world-size", 3, "--gpu-memory", 1.5, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert len(numbers["ranks"]) == 3
    assert numbers["sum"]["flops_scoring"] == sum(rank["flops_scoring"] for rank in numbers["ranks"])
    assert numbers["largest"]["weights"] == max(rank["weights"] for rank in numbers["ranks"])
    assert numbers["parallelism"] == asdict(Parallelism(1, "ddp", 3))
    assert numbers["fits"] is True
    assert qkov_plan(config, "--gpu-memory", 0.5, "--json") == 2  # less than a GPU's own context
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_sizes_that_are_given_replace_the_tasks(config, capsys):
    assert qkov_plan(config, "--samples", 7, "--tokens", 9, "--gpu-memory", 8) == 0
    printed = capsys.readouterr().out
    assert "7 + 7 samples, 112 tokens" in printed  # the last token predicts nothing
    assert "samples: assumed to be 7 + 7 of up to 9 tokens, all labelled (sizes were given)" in printed


def test_tasks_that_cannot_be_read_are_taken_as_their_limits_say(config, capsys):
    arguments = ["tasks.a.path=none.jsonl", "tasks.a.max_samples=4", "tasks.a.max_tokens=6", "--gpu-memory", 8]
    assert qkov_plan(config, *arguments) == 2
    assert "task 'b': expected samples to plan with, or max_samples and max_tokens" in capsys.readouterr().err
    assert qkov_plan(config, *arguments, "tasks.b.max_samples=3", "tasks.b.max_tokens=8") == 0
    assert "assumed to be 4 + 3 of up to 8 tokens, all labelled (the tasks cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "V100"], "--hardware: expected one of A100-40"),
        (["model.path=none.json"], "none.json: expected a readable JSON file"),
        (["model.path=builtin:llama-3"], "model.path: expected one of builtin:llama-3-405b, builtin:llama-3-70b, "),
        (["--world-size", 3, "parallel.tp=2"], "parallel.tp: expected a divisor of the 3 ranks"),
        (["--world-size", 4, "parallel.tp=4"], "parallel.tp: expected a divisor of the 4 query and 2 kv heads"),
        (["compute.batch_token=3"], "compute.batch_token"),
        (
            [
                *(f"compute.factor_{place}_mb={size}" for place, size in (("gpu", 0), ("memory", 1), ("disk", 0))),
                *("--samples", 4000, "--tokens", 12),
            ],
            "compute.factor_memory_mb",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(config, capsys, arguments, message):
    assert qkov_plan(config, *arguments, "--gpu-memory", 8) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1]", "{}", "{", '{"model_type": "no such type"}'])
def test_a_description_without_a_model_is_refused(text, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(QkovError, match=r"model\.json: expected"):
        described_model(ModelConfig(path=str(path)))


def test_hardware_is_found_by_name_and_the_cpu_is_measured():
    assert hardware("mi300x") is GPUS["MI300X"]
    cpu = measured_cpu()
    assert not cpu.is_gpu
    assert min(cpu.rates.values()) > 1e6
    assert cpu.memory > 2**28
    for gpu in GPUS.values():
        assert gpu.rates["bfloat16"] > gpu.rates["float32"] > gpu.rates["float64"]
        assert gpu.rate(2) == gpu.rates["bfloat16"]


def test_a_sample_too_long_for_any_rank_is_shared_among_ranks(config, capsys):
    arguments = [f"model.path={llama('8b')}", "--samples", 4, "--tokens", 40_000, "--world-size", 4]
    arguments += ["parallel.shard=fsdp", "--gpu-memory", 80]
    assert qkov_plan(config, *arguments) == 2
    (way,) = re.findall(r"It fits with (.*)\.$", capsys.readouterr().err, flags=re.MULTILINE)
    assert way == "parallel.cp=4"
    assert qkov_plan(config, *arguments, way) == 0
    assert "a sample's tokens over 4" in capsys.readouterr().out
    assert qkov_plan(config, *arguments, "parallel.cp=2") == 2
