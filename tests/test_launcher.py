"""Who started this process, for every launcher, from environments as they set them."""

from __future__ import annotations

import pytest

from qkov_dist.cli import main
from qkov_dist.distributed.launchers import check_interface, first_host, launched_size, rendezvous
from qkov_dist.errors import QkovError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}
SLURM_JOB = {
    "SLURM_JOB_ID": "41007",
    "SLURM_JOB_NODELIST": "gpu-[07-09,12]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = SLURM_JOB | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu-[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",  # where srun was called: a login node, perhaps
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ("3", "4", "1", "n0", "1234")),
        (MPICH, ("1", "2", "1", "127.0.0.1", "29500")),
        (OPEN_MPI, ("2", "3", "2", "127.0.0.1", "29500")),
        (SRUN, ("11", "16", "3", "gpu-08", "29509")),
        (SRUN | {"PMI_RANK": "11", "PMI_SIZE": "16"}, ("11", "16", "3", "gpu-08", "29509")),  # srun --mpi=pmi2
        (SRUN | TORCHRUN, ("3", "4", "1", "n0", "1234")),  # torchrun inside a step
        (SRUN | MPICH | {"SLURM_STEP_NUM_TASKS": "2"}, ("1", "2", "1", "gpu-08", "29509")),  # hydra's own srun
        (MPICH | {"MASTER_ADDR": "n5", "MASTER_PORT": "7"}, ("1", "2", "1", "n5", "7")),
    ],
)
def test_every_launcher_gives_what_torchrun_would(environment, expected):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    completed = environment | rendezvous(environment)
    assert tuple(completed[name] for name in names) == expected
    assert launched_size(environment) == int(expected[1])


@pytest.mark.parametrize("environment", [{}, SLURM_JOB, {"RANK": "0"}, {"WORLD_SIZE": "8"}])
def test_without_a_launcher_there_is_one_process(environment):
    """A batch script of Slurm is one process, though the job has 16 tasks."""
    assert launched_size(environment) == 1
    assert rendezvous(environment) == {}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        (TORCHRUN | {"LOCAL_RANK": " "}, "LOCAL_RANK"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        (MPICH | {"PMI_RANK": "-1"}, "PMI_RANK"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1.5"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        (SRUN | {"SLURM_PROCID": ""}, "SLURM_PROCID"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "16(x2)"}, "SLURM_STEP_NUM_TASKS"),
        (MPICH | {"FLUX_TASK_LOCAL_ID": "?"}, "FLUX_TASK_LOCAL_ID"),
    ],
)
def test_a_variable_that_is_no_number_is_named(environment, name, monkeypatch, capsys):
    for known in {**TORCHRUN, **MPICH, **OPEN_MPI, **SRUN}:
        monkeypatch.delenv(known, raising=False)
    for known, value in environment.items():
        monkeypatch.setenv(known, value)
    with pytest.raises(QkovError) as caught:
        rendezvous(environment)
    assert caught.value.where == name
    assert main(["report", "nowhere"]) == 2  # whatever the command
    assert len(capsys.readouterr().err.splitlines()) == 1


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


BARE_PMI = without(MPICH, "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


@pytest.mark.parametrize(
    "launcher",
    [
        BARE_PMI | {"PALS_LOCAL_RANKID": "5", "PALS_LOCAL_SIZE": "{size}"},
        BARE_PMI | {"FLUX_TASK_LOCAL_ID": "5", "FLUX_JOB_NNODES": "{nodes}"},
    ],
)
def test_the_local_rank_of_pals_and_flux(launcher):
    def on(nodes):
        sizes = {"size": 2 // nodes, "nodes": nodes}
        return {name: value.format(**sizes) for name, value in launcher.items()}

    assert rendezvous(on(1))["LOCAL_RANK"] == "5"
    assert rendezvous(on(1))["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(QkovError, match="MASTER_ADDR"):
        rendezvous(on(2))
    assert "MASTER_ADDR" not in rendezvous(on(2) | {"MASTER_ADDR": "n5"})
    assert rendezvous(on(2) | {"MASTER_ADDR": "n5"})["LOCAL_RANK"] == "5"


@pytest.mark.parametrize(("launcher", "local_size"), [(MPICH, "MPI_LOCALNRANKS"), (OPEN_MPI, list(OPEN_MPI)[3])])
def test_several_nodes_need_an_address(launcher, local_size):
    with pytest.raises(QkovError, match="MASTER_ADDR: expected the address of rank 0's node"):
        rendezvous(launcher | {local_size: "1"})
    assert "MASTER_ADDR" not in rendezvous(launcher | {local_size: "1", "MASTER_ADDR": "n5"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-03", "gpu-03"),
        ("gpu-[03-07,12],login", "gpu-03"),
        ("gpu-[12,03-07]", "gpu-12"),
        ("login,gpu-[03-07]", "login"),
        ("rack[1-2]-node[4,6]", "rack1-node4"),
        ("a.b.example,c", "a.b.example"),
    ],
)
def test_the_first_of_a_compressed_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("variable", "text"), [("GLOO", "lo"), ("NCCL", "l"), ("NCCL", "=lo"), ("NCCL", "^none")])
def test_a_network_interface_that_is_there_is_taken(variable, text):
    name = f"{variable}_SOCKET_IFNAME"
    check_interface(name, {name: text})


@pytest.mark.parametrize(("variable", "text"), [("GLOO", "bogus0"), ("GLOO", "l"), ("NCCL", "bogus"), ("NCCL", "=l")])
def test_a_network_interface_that_is_not_there_is_named(variable, text):
    name = f"{variable}_SOCKET_IFNAME"
    with pytest.raises(QkovError, match=rf"{name}: expected a network interface .*lo.*, got {text}"):
        check_interface(name, {name: text})
