"""Several processes, real ones: they find each other, train as one does, stop and go on together.

Each run is the next one's start, of one layer: compiling takes most of the time, and on a CPU JAX
keeps for the next start what the first process has compiled, alone.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import jax
import numpy as np
import pytest

import sharding
import train_gpt
from commands import ONE_LAYER, ROOT, run
from kill import values

ARGS = [*ONE_LAYER, "--width=16", "--steps=20", "--val_every=99", "--save_every=5"]
ARGS += ["--run=a", "--device_rows=1"]
PROXY = {"http_proxy": "http://127.0.0.1:9"}  # nothing is there, and it is not for us
LAUNCH = [ROOT / "launch", "--nproc=2", "--cpu_devices=4", *ARGS]


def losses(folder) -> dict:
    return {x[:2]: float(x[2]) for x in values(folder) if x[1].endswith("loss")}


def same_losses(a, b):
    a, b = losses(a), losses(b)
    assert a.keys() == b.keys() and len(a) == 22
    worst = max(abs(a[key] / b[key] - 1) for key in a)
    print(f"worst relative difference of 22 losses: {worst:.1e}")
    assert worst < 1e-4


def cut(old, folder, step=15):
    """A copy of the run, as if it had been killed after the save of that step."""
    shutil.copytree(old / "runs", folder / "runs")
    for path in (folder / "runs/a/checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    log = folder / "runs/a/log.txt"
    log.write_text(log.read_text().partition("step:20/20")[0])


def by_hand(folder, *environments):
    """`python train_gpt.py` in each of the environments. -> what they said"""
    command = [sys.executable, ROOT / "train_gpt.py", "--cpu_devices=4", *ARGS]
    start = lambda env: subprocess.Popen(
        command, cwd=folder, env=os.environ | PROXY | env, stdout=-1, stderr=-2, text=True
    )
    both = [start(env) for env in environments]
    try:
        said = [process.communicate(timeout=600)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert "proxy" not in "".join(said)  # nor does JAX warn of it
    return said


def launched(folder, word, number):
    """Sends one of two processes a signal when the log has the word. -> status, output"""
    log, out = folder / "runs/a/log.txt", folder / "out"
    env = os.environ | {"PYTHON": sys.executable} | PROXY
    with out.open("w") as file:
        with subprocess.Popen(LAUNCH, cwd=folder, env=env, stdout=file, stderr=file) as launch:
            while not (log.exists() and word in log.read_text()):
                assert launch.poll() is None, out.read_text()
                time.sleep(0.02)
            children = f"/proc/{launch.pid}/task/{launch.pid}/children"
            ours = [pid for pid in open(children).read().split() if rank(pid) == "1"]
            os.kill(int(ours[0]), number)
            launch.wait(300)
    return launch.returncode, out.read_text()


def rank(pid: str) -> str:
    try:
        env, line = (open(f"/proc/{pid}/{name}").read() for name in ("environ", "cmdline"))
    except OSError:  # it has ended since, as launch's `sleep` does
        return ""
    found, python = re.search(r"(?:^|\0)RANK=(\d+)", env), "train_gpt.py" in line
    return found[1] if found and python else ""


def started(prints: str, *environments: dict, first: str = "") -> list[list[str]]:
    """What processes of such environments print, word by word, when each has tried to join."""
    code = f"import sys; sys.path.insert(0, '{ROOT}'); import jax, sharding; {first}"
    code += f"sharding.start_processes(); print({prints})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    all_ = [subprocess.Popen(command, env=os.environ | env, **pipes) for env in environments]
    said = [process.communicate(timeout=120) for process in all_]
    assert [process.returncode for process in all_] == [0] * len(all_), said
    return [out.split() for out, _ in said]


def port() -> str:
    with socket.create_server(("", 0)) as server:
        return str(server.getsockname()[1])


def first_of_two(port: str) -> dict:
    """torchrun's variables."""
    return {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process with 8 devices."""
    folder = tmp_path_factory.mktemp("one")
    done = run(folder, *ARGS, "--cpu_devices=8")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    return folder, *launched(folder, "step:3/20", signal.SIGTERM)


@pytest.fixture(scope="module")
def killed(stopped):
    folder, status, said = stopped
    assert status == 75, said
    return folder, *launched(folder, "step:12/20", signal.SIGKILL)


@pytest.fixture(scope="module")
def two(killed):
    """After all that, by torchrun's variables alone, of which Kubeflow has no LOCAL_RANK."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    folder = killed[0]
    world["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir()
    return folder, *by_hand(folder, {"RANK": "0", "LOCAL_RANK": "0"} | world, {"RANK": "1"} | world)


@pytest.mark.parametrize(
    "ranks, ids",
    [
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (2, 1, 1)),
        ({"LOCAL_RANK": "1"}, (2, 1, 1)),  # as launch starts them
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (2, 1, None)),
        ({}, (2, 1, None)),
    ],
)
def test_a_process_that_is_alone_on_its_host_takes_all_gpus(monkeypatch, ranks, ids):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    world = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"} | ranks
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **more: args)
    assert sharding.start_processes() == ("a:2", *ids)


def test_so_it_does_if_slurm_has_started_torchrun():
    """Of which JAX would learn that a task has the one GPU of its number."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}
    job |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    job |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    prints = "jax.process_count(), jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value"
    said = started(prints, *(job | {"RANK": n, "SLURM_PROCID": n} for n in "01"))
    assert said == [["2", "all"]] * 2


def test_processes_with_unlike_tokens_do_not_train(tmp_path):
    """As where each host has its own copy of the data, or its own Python with --data=stdlib."""
    at = port()
    command = [sys.executable, ROOT / "train_gpt.py", *ARGS, "--cpu_devices=4", "--data=texts"]
    both = []
    for rank in "01":
        (tmp_path / rank / "texts").mkdir(parents=True)
        (tmp_path / rank / "texts/a.txt").write_text(f"{rank}123456789" * 60_000)
        (tmp_path / rank / "runs").symlink_to(tmp_path)
        env = os.environ | first_of_two(at) | {"RANK": rank, "LOCAL_RANK": rank}
        both.append(subprocess.Popen(command, cwd=tmp_path / rank, env=env, stderr=-1, text=True))
    try:
        _, error = both[1].communicate(timeout=300)
        assert both[1].returncode == 2 and both[0].poll() is None, error
        assert "runs/a was begun with other tokens" in error.splitlines()[-1]
    finally:
        for process in both:
            process.kill()
            process.wait()


def saved_in_all(folder, status, said):
    assert status == 75, said
    (step,) = {int(step) for step in re.findall(r"stopped after step (\d+): ", said)}
    assert 3 <= step < 20
    assert str(step) in os.listdir(folder / "runs/a/checkpoints")


def test_sigterm_to_one_saves_in_all_at_the_same_step(stopped):
    saved_in_all(*stopped)


def test_a_signal_while_a_resumed_run_compiles_is_not_lost(stopped, tmp_path):
    """JAX stops at the step behind the last that it was asked of, and at that one alone."""
    shutil.copytree(stopped[0] / "runs", tmp_path / "runs")
    log, env = tmp_path / "runs/a/log.txt", os.environ | {"PYTHON": sys.executable}
    steps = len(re.findall("train_loss:", log.read_text()))
    with subprocess.Popen(LAUNCH, cwd=tmp_path, env=env, stdout=-1, stderr=-1) as launch:
        while len(re.findall(r"compiling \d", log.read_text())) < 2:
            assert launch.poll() is None
            time.sleep(0.02)
        launch.terminate()
        said = launch.communicate(timeout=300)
    assert launch.returncode == 75, said
    assert log.read_text().splitlines()[-1].startswith("stopped after step")
    assert len(re.findall("train_loss:", log.read_text())) == steps > 0


def test_ctrl_c_in_one_does_so_too(tmp_path):
    saved_in_all(tmp_path, *launched(tmp_path, "step:3/20", signal.SIGINT))


def test_sigkill_of_one_ends_all_and_is_said_last(killed):
    folder, status, said = killed
    assert status == 128 + signal.SIGKILL
    assert "launch: [1] status 137" in "".join(said.splitlines()[-4:]), said[-2000:]
    assert "10" in os.listdir(folder / "runs/a/checkpoints")


def test_an_error_of_one_ends_all_and_is_said_last(tmp_path, monkeypatch):
    """JAX would wait for the others, which wait in vain, and then abort."""
    elsewhere = "import os\nif os.environ.get('RANK') == '1':\n    os.chdir('/')\n"
    (tmp_path / "sitecustomize.py").write_text(elsewhere)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(" ".join(map(str, range(50000))))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(tmp_path, "--data=texts", command=LAUNCH)
    said = "".join(done.stderr.splitlines()[-4:])
    assert done.returncode == 2, done.stderr[-2000:]
    assert "launch: [1] status 2" in said and "--data=texts: no " in said, done.stderr[-2000:]


def test_a_bug_in_one_ends_it_at_once(tmp_path):
    """Then torchrun and SLURM end the others, for which JAX would have it wait for minutes."""
    code = f"import runpy, sys; sys.path.insert(0, '{ROOT}'); import data_fineweb; "
    code += f"data_fineweb.plan = None; runpy.run_path('{ROOT}/train_gpt.py', run_name='__main__')"
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    start = lambda command, rank: subprocess.Popen(
        [sys.executable, *command, "--cpu_devices=4", *ARGS],
        cwd=tmp_path,
        env=os.environ | world | {"RANK": rank},
        stdout=-3,
        stderr=-1,
        text=True,
    )
    with start([ROOT / "train_gpt.py"], "0") as other, start(["-c", code], "1") as it:
        try:
            said = it.communicate(timeout=120)[1]
        finally:
            other.kill()
            it.kill()
    assert it.returncode == 1 and "Traceback" in said and "TypeError" in said, said[-2000:]


def test_a_process_that_cannot_join_does_not_train_alone(tmp_path):
    """As where another job has the port: the first process would listen there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - 1  # of torchrun: ours is the next
        env = first_of_two(str(port))
        command = [sys.executable, ROOT / "train_gpt.py", *ARGS]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300
        )
    assert not (tmp_path / "runs").exists(), done.stdout + done.stderr
    # jaxlib 0.10.2 raises an error, or crashes with the same message, by how fast its threads are.
    assert done.returncode in (2, -11), done.stderr
    assert "Failed to add port to server" in done.stderr
    said = "cannot join the job (variables, port?): "
    assert done.returncode == -11 or done.stderr.splitlines()[-1].startswith(said), done.stderr


@pytest.mark.parametrize(
    "without, says", [("MASTER_ADDR", "MASTER_ADDR"), ("RANK", "process id"), ("", "two")]
)
def test_a_job_of_which_a_variable_is_missing_or_wrong_is_one_line(tmp_path, without, says):
    env = first_of_two(port())
    env |= {"WORLD_SIZE": "two"} if not without else {}
    env = {name: value for name, value in (os.environ | env).items() if name != without}
    command = [sys.executable, ROOT / "train_gpt.py", *ARGS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "cannot join the job" in line and says in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_others_is_ended_by_a_second_signal(tmp_path, number):
    env = first_of_two(port())
    at = "127.0.0.1", int(env["MASTER_PORT"]) + 1
    command = [sys.executable, ROOT / "train_gpt.py", *ARGS]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | env, stderr=-1) as process:
        while True:  # till it listens
            assert process.poll() is None
            with suppress(OSError), socket.create_connection(at):
                break
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(1)
            process.send_signal(number)
        try:
            assert process.wait(20) == -number
        finally:
            process.kill()


def test_stopped_killed_and_gone_on_has_the_losses_of_one_process(one, two):
    c = train_gpt.Config(**dict(arg[2:].split("=") for arg in ARGS))
    assert c.float32 and [c.stage(step) for step in (0, 7, 13)] == [0, 1, 2]  # untied in 13, too
    assert "step:11/20" not in two[2] and "step:20/20 val_loss" in two[1]
    same_losses(two[0], one)


def test_only_the_first_process_writes(two):
    folder, first, second = two
    log = (folder / "runs/a/log.txt").read_text()
    steps = [x.split(" train_time")[0] for x in log.splitlines() if x.startswith("step:")]
    assert len(steps) == len(set(steps)) == 22
    lines = (folder / "runs/a/metrics.csv").read_text().splitlines()
    names = [tuple(line.split(",")[i] for i in (0, 2)) for line in lines]
    assert len(names) == len(set(names)) == 1 + 20 + 20 + 2
    assert len(list((folder / "runs/a/tensorboard").iterdir())) == 3  # a file for each start
    assert "step:20/20" in first and "step:" not in second
    assert not list((folder / "tmp").iterdir())


def test_slurm_and_a_checkpoint_of_one_process_in_two(one, tmp_path):
    """JAX takes the port by the job's number, and the first node's name."""
    cut(one, tmp_path)
    job = {"SLURM_JOB_ID": port(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_NODES": "1"}
    said = by_hand(tmp_path, *({"SLURM_PROCID": n, "SLURM_LOCALID": n} | job for n in "01"))
    assert "8 devices" in said[0] and "step:20/20" in said[0] and "step:" not in said[1]
    assert "step:15/20" not in said[0]
    same_losses(tmp_path, one)


@pytest.mark.parametrize("tasks, gpus", [("1", "all"), ("1(x2)", "all"), ("2", "1")])
def test_a_slurm_task_that_is_alone_on_its_node_has_all_its_gpus(tasks, gpus):
    """Else JAX gives a task the one GPU of its number."""
    job = {"SLURM_JOB_ID": port(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "1"}
    job |= {"SLURM_TASKS_PER_NODE": tasks}
    prints = "jax.distributed.is_initialized(), jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value"
    assert started(prints, job) == [["True", gpus]]


def test_a_shell_in_slurms_allocation_is_no_job():
    """One process in salloc's, which has the number of all tasks: JAX would wait for the others."""
    job = {"SLURM_JOB_ID": port(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "8"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "1"}
    job |= {"SLURM_TASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": ""}
    assert started("jax.distributed.is_initialized()", job) == [["False"]]


def test_kaggles_tpu_host_is_no_job():
    """Its image has these variables, by which JAX would wait for a host of the name "local"."""
    kaggle = {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_ID": "0"}
    first = "from jax._src.clusters import cloud_tpu_cluster as tpu; "
    first += "tpu.running_in_cloud_tpu_vm, tpu.get_metadata = True, lambda key: ('', 404); "
    first += "assert tpu.GkeTpuCluster.is_env_present(), 'JAX knows it by other means'; "
    assert started("jax.distributed.is_initialized()", kaggle, first=first) == [["False"]]


def test_a_part_that_one_cannot_read_ends_all(two, tmp_path, monkeypatch):
    """None goes on from another step than the others: what to remove is said in the last line."""
    cut(two[0], tmp_path)
    there = tmp_path / "runs/a/checkpoints/15"
    parts = (there / "default/ocdbt.process_1/d").iterdir()
    max(parts, key=lambda path: path.stat().st_size).write_bytes(b"damaged")
    monkeypatch.setenv("PYTHON", sys.executable)
    done = run(tmp_path, command=LAUNCH)
    said = "".join(done.stderr.splitlines()[-4:])
    assert done.returncode == 2 and f"{there} unreadable, remove it?" in said, done.stderr[-2000:]
    assert "step:" not in done.stdout


def test_a_checkpoint_of_two_processes_in_one(one, two, tmp_path):
    cut(two[0], tmp_path)
    done = run(tmp_path, *ARGS, "--cpu_devices=8")
    assert done.returncode == 0 and "step:15/20" not in done.stdout, done.stderr
    same_losses(tmp_path, one)


def test_several_processes_take_all_devices_or_none(monkeypatch):
    """One whose devices are left out would wait for ever, or end in JAX's own error."""
    assert sharding.make_mesh("fsdp:4").size == 4
    monkeypatch.setattr(sharding.jax, "process_count", lambda: 2)
    assert sharding.make_mesh("fsdp:8").size == 8
    with pytest.raises(sharding.InputError, match="is 4 devices, but there are 8"):
        sharding.make_mesh("fsdp:4")


def test_a_process_reads_only_its_rows(monkeypatch):
    """As the second of two with 4 devices each: rows 4 to 7."""
    mesh, rows, asked = sharding.make_mesh("fsdp:8"), np.arange(40).reshape(8, 5), []
    assert (sharding.global_rows(mesh, rows.shape, rows.__getitem__) == rows).all()

    def make(shape, at, read):  # as JAX does
        theirs = {d: i for d, i in at.devices_indices_map(shape).items() if d.id >= 4}
        return np.concatenate([read(i) for i in theirs.values()])

    monkeypatch.setattr(sharding.jax, "make_array_from_callback", make)
    read = lambda cut: asked.append(cut.indices(8)[:2]) or rows[cut]
    assert (sharding.global_rows(mesh, rows.shape, read) == rows[4:]).all()
    assert asked == [(4, 5), (5, 6), (6, 7), (7, 8)]
