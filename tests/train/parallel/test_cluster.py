"""Which cluster the variables of launchers describe, and what is said of those that cannot work."""

import logging

import pytest
from jax._src.clusters import ClusterEnv  # what the detection must agree with

from diffjax.train.errors import ConfigError
from diffjax.train.parallel.cluster import Cluster, find

# What `srun` sets for task 5 of 8 on two nodes of four.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
# What `mpirun` of Open MPI 4 sets.
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
FLAGS = dict(coordinator="node0:1234", num_processes=2, process_id=1)


def test_alone():
    assert find({}) is None
    assert find({}, num_processes=1, process_id=0) is None
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find(SLURM | one) is None


def test_flags_and_variables():
    expected = ("node0:1234", 2, 1, ())
    assert find({}, **FLAGS)[1:] == expected
    variables = {f"DIFFJAX_{name.upper()}": str(value) for name, value in FLAGS.items()}
    assert find(variables)[1:] == expected
    assert find(variables, process_id=0).index == 0
    assert find(variables | {"JAX_LOCAL_DEVICE_IDS": "0,1"}).devices == (0, 1)


@pytest.mark.parametrize("environ", [SLURM, MPI], ids=["slurm", "mpi"])
def test_agrees_with_what_jax_detects(environ, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = find(environ)
    coordinator, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 5
    )
    assert found.coordinator is None and coordinator.rpartition(":")[0] in ("node07", "10.96.0.1")
    assert (found.count, found.index, list(found.devices)) == (count, index, devices)


def test_who_joins_nobody_needs_no_coordinator():
    assert find({}, num_processes=4, process_id=1, joins=False) == ("--num_processes, --process_id", None, 4, 1, ())
    fifth = {name: value for name, value in MPI.items() if "hnp" not in name}
    assert find(fifth, joins=False)[1:4] == (None, 4, 2)


def test_a_flag_replaces_a_part():
    found = find(SLURM, coordinator="login:9000")
    assert found == Cluster("--coordinator over SLURM", "login:9000", 8, 5, (1,))
    assert find({}, coordinator="auto") == Cluster("JAX's own detection", None, None, None, None)


@pytest.mark.parametrize(
    "changed, devices",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, ()),  # one task a node: all of its devices
        ({"CUDA_VISIBLE_DEVICES": "3"}, ()),  # bound by the launcher: the one device has the number 0
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (1,)),
        # `--gpus-per-task` binds each task to its own, numbered from 0 where cgroups hide the others.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2", "SLURM_LOCALID": "2"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "4,5", "SLURM_GPUS_PER_TASK": "a100:2", "SLURM_LOCALID": "2"}, ()),
        ({"ROCR_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100,h100:1"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "1"}, (1,)),  # with `--gpu-bind=none`
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "8"}, (1,)),
        ({"SLURM_GPUS_PER_TASK": "2"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "7,1"}, ()),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,7"}, (1,)),
    ],
)
def test_devices_of_a_slurm_task(changed, devices):
    assert find(SLURM | changed).devices == devices


def test_slurm_without_srun_is_said(caplog):
    batch = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}
    with caplog.at_level(logging.WARNING):
        assert find(batch) is None
    assert "SLURM_NTASKS=8" in caplog.text and "srun" in caplog.text


@pytest.mark.parametrize(
    "environ, flags, words",
    [
        ({}, dict(num_processes=2), ["--coordinator=HOST:PORT", "missing: --coordinator, --process_id"]),
        ({}, dict(num_processes=2, joins=False), ["need --num_processes=N and", "missing: --process_id"]),
        ({"DIFFJAX_PROCESS_ID": "1"}, {}, ["given: DIFFJAX_PROCESS_ID; missing: --coordinator, --num_processes"]),
        ({}, FLAGS | dict(process_id=2), ["process id 2 of 2", "0 to 1"]),
        ({}, FLAGS | dict(process_id=-1), ["process id -1 of 2"]),
        ({}, FLAGS | dict(num_processes=0), ["0 processes"]),
        ({}, FLAGS | dict(coordinator="node0"), ["coordinator 'node0'", "HOST:PORT"]),
        ({}, FLAGS | dict(coordinator="node0:99999"), ["node0:99999"]),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "all"}, {}, ["JAX_LOCAL_DEVICE_IDS='all'", "whole number"]),
        ({"DIFFJAX_PROCESS_ID": "one"}, {}, ["DIFFJAX_PROCESS_ID='one'", "whole number"]),
        (SLURM | {"SLURM_PROCID": "8"}, {}, ["SLURM", "process id 8 of 8"]),
        (SLURM | {"SLURM_PROCID": ""}, {}, ["SLURM_PROCID=''"]),
        ({k: v for k, v in MPI.items() if "hnp" not in k}, {}, ["Open MPI 5", "--coordinator=HOST:PORT"]),
    ],
)
def test_what_cannot_work(environ, flags, words):
    with pytest.raises(ConfigError) as error:
        find(environ, **flags)
    for word in words:
        assert word in str(error.value)
