"""One, two and three processes measure the same; one that fails takes the others along."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr

from lib import measure as measuring
from lib import processes, records
from lib.__main__ import main
from lib.cka import MinibatchCKA
from lib.measurements.localisation import Localisation
from lib.records import ROOT
from lib.studies import load_study

# images, size of a minibatch: minibatches of all processes in turn
CASES = {
    "uneven": (28, 4),
    "a last one too small to use": (27, 6),
    "none for the third process": (18, 8),
}


def run(case, folder):
    os.environ["VIT_SEE_CACHE"] = str(folder)
    n, size = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measurements = [MinibatchCKA("blocks"), Localisation(["blocks.0"])]
        study = load_study("lab")
        return measuring.measure(study, ["vit_untrained"], measurements, n, size, groups=3)


def one_of(rank, count, folder):
    """What one of several processes does: every case, twice, the second time from the cache."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=120), rank=rank, world_size=count
    )
    for case in CASES:
        # Processes may be on several machines: only the first one's cache counts.
        for _ in range(2):
            record = run(case, folder / f"cache{rank}")
        records.save(record, folder / f"{case}.{rank}.nc")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def forks():
    """New processes that have imported the library already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lib.measurements.localisation", "lib.measure", "lib.studies", "timm"]
    )
    return context


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {case: run(case, tmp_path_factory.mktemp("alone")) for case in CASES}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes_measures_the_same(count, forks, alone, tmp_path):
    workers = [forks.Process(target=one_of, args=(rank, count, tmp_path)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0] * count
    for case, expected in alone.items():
        for rank in range(count):
            record = records.load(tmp_path / f"{case}.{rank}.nc")
            assert record["tap"].values.tolist() == expected["tap"].values.tolist()
            assert record.sizes == expected.sizes
            for what, values in expected.items():
                np.testing.assert_allclose(
                    record[what], values, rtol=1e-6, atol=1e-6, err_msg=f"{case}, {what}"
                )
            assert record.attrs == expected.attrs
    assert len(list((tmp_path / "cache0").iterdir())) == len(CASES)
    assert not any((tmp_path / f"cache{rank}").exists() for rank in range(1, count))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(("full", "last"), [(6, 0), (7, 1), (1, 1), (0, 1)])
def test_every_minibatch_has_one_process_and_every_process_a_full_one(
    monkeypatch, count, full, last
):
    groups = []
    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(dist, "new_group", lambda ranks: groups.append(list(ranks)))
    shares = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(full))
    dealt = [[b for b in range(full + last) if b in share] for share in shares if not share.idle]
    assert sorted(itertools.chain(*dealt)) == list(range(full + last))
    assert all(mine[0] < max(full, 1) for mine in dealt)
    assert all(ranks == list(range(len(dealt))) for ranks in groups)
    assert len(groups) == (0 if len(dealt) == count else count)


def test_without_torchrun_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.joined("cpu") as device:
        assert device == "cpu"
        assert (processes.count(), processes.rank()) == (1, 0)


# Through the command line ------------------------------------------------------------------------


ARGUMENTS = ["measure", "vit_untrained", "--taps", "blocks", "--out", "record.nc"]


def command_of(rank, count, folder, fault, arguments):
    """What torchrun starts: the command with its place among the others in the environment."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "TQDM_DISABLE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(folder))}
    os.environ["VIT_SEE_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    if fault and rank == 1:
        measuring._reduce = fault
    with (
        open(f"{rank}.txt", "w") as told,
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        status = main([*ARGUMENTS, *arguments])
    raise SystemExit(status)


def free_port(folder):
    return int((folder / "port").read_text())


def refuse(*_):
    raise ValueError("this process cannot go on")


def vanish(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def command(forks, folder, count=2, fault=None, arguments=()):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(probe.getsockname()[1]))
    given = (count, folder, fault, arguments)
    workers = [forks.Process(target=command_of, args=(rank, *given)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    return [w.exitcode for w in workers], [(folder / f"{r}.txt").read_text() for r in range(count)]


def test_the_command_writes_one_record(forks, tmp_path, alone):
    n, size = CASES["uneven"]
    arguments = ["--n-images", str(n), "--batch-size", str(size)]
    status, told = command(forks, tmp_path, arguments=arguments)
    assert status == [0, 0]
    assert "record.nc: CKA of" in told[0]
    assert told[1] == ""
    with xr.open_dataset(tmp_path / "record.nc", engine="h5netcdf") as record:
        expected = alone["uneven"]["cka"].sel(tap=record["tap"].values, other=record["tap"].values)
        np.testing.assert_allclose(record["cka"], expected, atol=1e-6)


@pytest.mark.parametrize("fault", [refuse, vanish])
def test_when_one_fails_the_others_stop_and_there_is_no_record(forks, tmp_path, fault):
    status, told = command(forks, tmp_path, 3, fault, ["--n-images", "16", "--batch-size", "4"])
    assert status == [2, 2 if fault is refuse else -signal.SIGKILL, 2]
    for rank in (0, 2):
        (line,) = told[rank].splitlines()
        assert line.startswith(f"process {rank} of 3: another process of this run has failed")
    if fault is refuse:
        assert told[1] == "process 1 of 3: this process cannot go on\n"
    assert not list(tmp_path.rglob("*.nc*"))


STUCK = """
import os, sys, time
from lib import __main__, measure

def wait(*_):
    with open(f"{os.environ['RANK']}.pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)

measure._reduce = wait
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_torchrun_ends_the_run_when_a_process_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(STUCK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "run.py", *ARGUMENTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"VIT_SEE_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    victim = tmp_path / "1.pid"
    deadline = time.monotonic() + 240
    while not (victim.exists() and victim.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int(victim.read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "SIGKILL" in err
    assert "CKA of" not in out
    assert not list(tmp_path.rglob("*.nc*"))
