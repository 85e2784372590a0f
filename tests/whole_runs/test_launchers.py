"""Every launcher starts the same run: two ranks of a tiny model give the scores of one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from places import ROOT
from processes import PATIENCE_S, TIMEOUT_S, forked
from ranks import free_port
from rounding import PASSES
from running import exit_as_qkov
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist.cli import main
from qkov_dist.config_file import from_dict, load_config
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.results.partials import PartialWriter
from qkov_dist.run import run

SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp", "zero3": "zero3"}
SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PMI", "MPI", "OMPI", "SLURM", "ACCELERATE", "TORCH")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A tiny model, two tasks, a configuration, and in ``one`` the run of one process."""
    folder = tmp_path_factory.mktemp("launchers")
    TINY["llama"].build().save_pretrained(folder / "model")
    for task, seed, num in (("a", 1, 5), ("b", 2, 4)):
        write_task(folder / f"{task}.jsonl", mixed_samples(num, VOCAB, seed=seed))
    raw = {
        "model": {"path": str(folder / "model")},
        "tasks": [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")],
        "fisher": {"batch_size": 2},
        "statistics": {"enabled": False},
        "output": {"dir": str(folder / "one")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(from_dict(raw))
    return folder


@contextlib.contextmanager
def started(*commands: Sequence[object], **environment: object) -> Iterator[list[str]]:
    """Run commands at the same time, each in a process group of its own; yields what each said on stderr.

    Args:
        commands: Command lines; a ``dict`` among the words holds variables for this command alone.
        environment: Variables for all of them.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_LAUNCHERS)}
    plain |= {"OMP_NUM_THREADS": "1", "QKOV_TIMEOUT_S": TIMEOUT_S, "QKOV_PYTHON": sys.executable, "RANKS": "2"}
    plain = {name: str(value) for name, value in (plain | environment).items()}
    processes = []
    try:
        for command in commands:
            own = {name: str(value) for word in command if isinstance(word, dict) for name, value in word.items()}
            words = [str(word) for word in command if not isinstance(word, dict)]
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=plain | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            processes.append(process)
        said = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
        for process, text in zip(processes, said, strict=True):
            assert process.returncode == 0, f"{process.args}\n{text[-4000:]}"
        yield said
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def arguments(job: Path, out: str, *overrides: str) -> list[str]:
    return [str(job / "run.yaml"), "--quiet", f"output.dir={job / out}", *overrides]


def check(job: Path, out: str, said: str, cut: str = "ddp", num_ranks: int = 2) -> None:
    """The scores of one process, from ranks that were cut as asked."""
    assert f"on {num_ranks} ranks (tp 1, {cut})" in said, said[-4000:]
    got, one = load_heatmap(job / out / "heatmap.h5"), load_heatmap(job / "one" / "heatmap.h5")
    deviation = max(
        float(np.abs(got.cross[block] - one.cross[block]).max() / np.abs(one.cross[block]).max()) for block in one
    )
    print(f"{out}: {deviation:.1e}")
    assert deviation < PASSES
    assert got.run_id == one.run_id
    assert sorted(path.name for path in (job / out).glob("partial*")) == [
        f"partial_rank0000{rank}.h5" for rank in range(num_ranks)
    ]


def script(name: str) -> list[object]:
    return ["bash", ROOT / "launch" / name]


def test_torchrun_on_one_machine_has_a_rank_for_each_device(job, tmp_path):
    """What is started; that ranks of such a torchrun end right is seen where they are killed and started again."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -m) echo "$@" >&2;; *) exec ' + f'{sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    with started([*script("torchrun.sh"), job / "run.yaml", "output.dir=x"], QKOV_PYTHON=python, RANKS=3) as (said,):
        command = (
            f"-m torch.distributed.run --standalone --nproc-per-node 3 -m qkov_dist run {job}/run.yaml output.dir=x"
        )
        assert said.splitlines()[-1] == command


@pytest.mark.long
def test_two_agents_of_torchrun_stand_in_for_nodes_with_different_numbers_of_ranks(job):
    nodes = [
        [*script("torchrun.sh"), *arguments(job, "uneven", "parallel.shard=fsdp"), {"NODE_RANK": node, "RANKS": ranks}]
        for node, ranks in enumerate((1, 2))
    ]
    with started(*nodes, NNODES=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) as (first, second):
        check(job, "uneven", first, "fsdp", 3)
        assert "qkov:" not in second  # rank 0 speaks for all


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_accelerate(job, strategy):
    """Nothing in the run's configuration says how to shard: the run follows accelerate's file. (That of ddp shards
    nothing.)
    """
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    with started([*script("accelerate.sh"), strategy, *arguments(job, f"accelerate-{strategy}")]) as (said,):
        check(job, f"accelerate-{strategy}", said, STRATEGIES[strategy])


@pytest.mark.long
def test_deepspeed(job):
    pytest.importorskip("deepspeed")
    with started([*script("deepspeed.sh"), *arguments(job, "deepspeed", "parallel.shard=zero3")]) as (said,):
        check(job, "deepspeed", said, "zero3")


@pytest.mark.long
def test_mpirun(job):
    if not (Path(sys.prefix) / "bin" / "mpirun").exists() and not shutil.which("mpirun"):
        pytest.skip("no mpirun")
    with started([*script("mpirun.sh"), *arguments(job, "mpirun", "parallel.shard=fsdp")]) as (said,):
        check(job, "mpirun", said, "fsdp")


@pytest.mark.long
def test_the_ranks_of_srun(job):
    """Two processes with the variables that srun sets: no Slurm is needed to read them."""
    step = {"SLURM_JOB_ID": "4100", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                forked(exit_as_qkov, "run", *arguments(job, "srun"), **step, SLURM_PROCID=rank, SLURM_LOCALID=rank)
            )
            for rank in "01"
        ]
        first, second = [rank.ended() for rank in ranks]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    check(job, "srun", first.stderr)
    assert "qkov:" not in second.stderr


def exit_as_qkov_until_requeued(*arguments: object) -> None:
    """The command, in a job's first start with SIGTERM when a layer is recorded: its time is up."""
    if "SLURM_RESTART_COUNT" not in os.environ:
        write_layer = PartialWriter.write_layer

        def last_written(writer, *content):
            os.kill(os.getpid(), signal.SIGTERM)
            write_layer(writer, *content)

        PartialWriter.write_layer = last_written
    exit_as_qkov(*arguments)


@pytest.mark.long
def test_a_job_that_slurm_requeues_goes_on(job):
    """With the same command, on the same port; nothing but the count of its starts differs."""
    step = {"SLURM_JOB_ID": "4100", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    words = ["run", *arguments(job, "requeued", "parallel.shard=fsdp")]
    for start, code in (({}, 143), ({"SLURM_RESTART_COUNT": "1"}, 0)):
        with contextlib.ExitStack() as stack:
            places = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
            ranks = [
                stack.enter_context(forked(exit_as_qkov_until_requeued, *words, **step, **place, **start))
                for place in places
            ]
            done = [rank.ended() for rank in ranks]
        assert [process.returncode for process in done] == [code] * 2, done[0].stderr + done[1].stderr
        assert (job / "requeued" / "heatmap.h5").exists() == (code == 0)
        assert any((job / "requeued").glob("partial_rank0000*.layers/*.h5")) == (code != 0)
    check(job, "requeued", done[0].stderr, "fsdp")


@pytest.mark.long
def test_the_batch_script_of_slurm(job, tmp_path):
    """Slurm's commands are pretended: a list of nodes longer than a pipe, an srun that starts its command on both."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\nseq 100000\n")
    (tmp_path / "srun").write_text(
        "#!/bin/bash\nset -e\nwhile [[ $1 == --* ]]; do shift; done\n"
        'SLURM_NODEID=1 "$@" & other=$!\nSLURM_NODEID=0 "$@"\nwait $other\n'
    )
    for command in ("scontrol", "srun"):
        (tmp_path / command).chmod(0o755)
    batch = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "slurm_script")  # as slurmd does
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": 4100,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": 2,
        "SLURM_NTASKS": 2,
        "SLURM_PROCID": 0,
        "SLURM_SUBMIT_DIR": ROOT,
        "MASTER_PORT": free_port(),
        "RANKS": 1,
    }
    with started(["bash", batch, *arguments(job, "slurm")], **variables) as (said,):
        check(job, "slurm", said)


@pytest.mark.long
def test_no_launcher(job):
    with forked(exit_as_qkov, "run", *arguments(job, "plain")) as process:
        done = process.ended()
    assert done.returncode == 0, done.stderr
    assert "ranks" not in done.stderr
    got, one = (load_heatmap(job / out / "heatmap.h5") for out in ("plain", "one"))
    for block in one:
        np.testing.assert_array_equal(got.cross[block], one.cross[block])


def test_a_local_rank_on_the_command_line_is_taken(capsys):
    """DeepSpeed's launcher puts it there unless it is told not to."""
    assert main(["--local_rank=1", "run", "--keys"]) == 0
    assert "factor_memory_mb" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "local_rank" not in capsys.readouterr().out


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_say_how_they_are_used(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    if path.name != "environment.sh":
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in text
    assert "# Usage" in text
    if found := shutil.which("shellcheck"):
        subprocess.run([found, "-x", "-P", "SCRIPTDIR", "-P", str(ROOT), str(path)], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_load(path):
    config = load_config(path)
    assert config.model.path
    text = path.read_text()
    assert text.startswith("#")
    assert str(path.relative_to(ROOT)) in text or path.name == "demo.yaml"


def test_a_configuration_for_each_size_of_machine():
    names = {path.stem: load_config(path) for path in CONFIGS}
    assert {"laptop", "node8", "multinode"} <= names.keys()
    assert names["node8"].model.dtype == "bfloat16"
    assert (names["multinode"].parallel.tp, names["multinode"].parallel.shard) == (8, "fsdp")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accelerate_reads_its_files(strategy):
    load = pytest.importorskip("accelerate.commands.config.config_args").load_config_from_file
    config = load(str(ROOT / "configs" / "accelerate" / f"{strategy}.yaml"))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[strategy]
    assert not config.use_cpu
