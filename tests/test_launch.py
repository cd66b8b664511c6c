"""launch, with stubs beside it: the processes of --nproc, and which Python it takes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_gpt

ROOT = Path(__file__).parent.parent
NEEDS = re.findall(r'"([a-z-]+>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())
TESTS = ["pytest-xdist", "ruff", "nbclient", "ipykernel"]
STUB = """
import os, signal, sys, time
rank, heard = int(os.environ.get("RANK", -1)), []
def hear(*_):
    heard.append(1)
    print("heard", flush=True)
def wait_and_save():
    while not heard:
        time.sleep(0.02)
    time.sleep(1)  # in which a second one would come
    print("saved after", len(heard), flush=True)
    sys.exit(75)
exec(sys.argv[1])
"""
HEARS = "signal.signal(signal.SIGTERM, hear); print('ready'); "


def project(folder: Path) -> Path:
    """The folder with a copy of launch, that looks for TPUs below it, and a stub to run."""
    text = (ROOT / "launch").read_text().replace("/sys/bus/pci", f"{folder}/pci")
    executable(folder / "launch", text)
    (folder / "train_gpt.py").write_text(STUB)
    return folder


def executable(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Launch(subprocess.Popen):
    """launch with a stub that runs the Python code which it is given."""

    def __init__(self, folder, *args):
        out, err = (folder / "out").open("w"), (folder / "err").open("w")
        env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "TMPDIR": str(folder)}
        command = ["env", "--default-signal=HUP", project(folder) / "launch", *args]  # nohup's not
        super().__init__(command, stdout=out, stderr=err, env=env, start_new_session=True)
        self.out, self.err = (folder / "out").read_text, (folder / "err").read_text

    def until(self, word, times):
        end = time.monotonic() + 60
        while self.out().count(word) < times:
            assert self.poll() is None and time.monotonic() < end, self.out() + self.err()
            time.sleep(0.02)


def test_processes_have_ranks_a_port_and_a_prefix(tmp_path):
    keys = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
    keys = f"[os.environ[k] for k in '{keys}'.split()]"
    code = f"print('to out', {keys}, sys.argv[2:]); print('one\\ntwo', file=sys.stderr)"
    launch = Launch(tmp_path, "--nproc=3", code, "--a=b c", "--d=*")
    assert launch.wait(60) == 0
    port = re.search(r"'(\d+)'\] ", launch.out())[1]
    want = "[{0}] to out ['{0}', '{0}', '3', '127.0.0.1', '{1}'] ['--a=b c', '--d=*']"
    assert sorted(launch.out().splitlines()) == [want.format(rank, port) for rank in range(3)]
    want = [f"[{rank}] {word}" for rank in range(3) for word in ("one", "two")]
    assert sorted(launch.err().splitlines()) == want
    assert 1024 <= int(port) < 65535  # the one above is taken, too
    assert not list(tmp_path.glob("tmp.*"))


def test_output_is_seen_at_once(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", "print('begun'); time.sleep(600)")
    launch.until("begun", 2)
    launch.terminate()
    assert launch.wait(60) == 128 + signal.SIGTERM  # a stub without a handler


@pytest.mark.parametrize("args", [[], ["--nproc=1"]])
def test_one_process_takes_the_place_of_launch(tmp_path, args):
    launch = Launch(tmp_path, *args, "print(os.getpid(), rank, sys.argv[2:]); sys.exit(75)", "--a")
    assert launch.wait(60) == 75
    assert launch.out() == f"{launch.pid} -1 ['--a']\n"


@pytest.mark.parametrize(
    "code, status, says",
    [
        ("rank == 1 and sys.exit('what\\nwent wrong'); time.sleep(600)", 1, "what\nwent wrong"),
        ("rank == 1 and os.kill(os.getpid(), 9); time.sleep(600)", 137, ""),  # from outside
        ("rank or sys.exit(75); time.sleep(0.5); rank == 1 and sys.exit('full')", 1, "full"),
    ],
)
def test_a_failure_ends_the_others_and_is_said_last(tmp_path, code, status, says):
    launch = Launch(tmp_path, "--nproc=3", code + "; time.sleep(600)")
    assert launch.wait(60) == status
    assert launch.err().endswith(f"launch: [1] status {status}: {says}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path, number):
    launch = Launch(tmp_path, "--nproc=2", HEARS + "wait_and_save()")
    launch.until("ready", 2)
    os.killpg(launch.pid, number)  # as a terminal and `timeout` do
    if number == signal.SIGHUP:  # of which a shell sends another when it ends itself
        launch.until("heard", 2)
        os.killpg(launch.pid, number)
    assert launch.wait(60) == 75
    saved = sorted(line for line in launch.out().splitlines() if "saved" in line)
    assert saved == ["[0] saved after 1", "[1] saved after 1"]
    assert launch.err() == ""


def test_a_second_signal_kills(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", HEARS + "time.sleep(600)")
    launch.until("ready", 2)
    launch.terminate()
    launch.until("heard", 2)
    launch.terminate()
    assert launch.wait(60) == 128 + signal.SIGKILL


def test_a_signal_to_processes_that_have_ended_changes_no_status(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", HEARS + "print(os.getpid(), 'is'); wait_and_save()")
    launch.until("is", 2)
    pids = re.findall(r"(\d+) is", launch.out())
    launch.terminate()
    while any(Path("/proc", pid).exists() for pid in pids):
        time.sleep(0.001)
    launch.terminate()  # before launch looks at them, five times a second
    assert launch.wait(60) == 75 and not list(tmp_path.glob("tmp.*"))


def test_one_preempted_process_lets_the_others_save(tmp_path):
    code = "rank or sys.exit(75); time.sleep(1); print('saved'); sys.exit(75)"
    launch = Launch(tmp_path, "--nproc=2", code)
    assert launch.wait(60) == 75
    assert launch.out() == "[1] saved\n" and launch.err() == ""


@pytest.mark.parametrize("word", ["0", "-1", "2x", "", "1000"])
def test_junk_for_nproc_is_one_line_and_2(tmp_path, word):
    launch = Launch(tmp_path, f"--nproc={word}", "print('begun')")
    assert launch.wait(60) == 2 and launch.out() == ""
    assert launch.err() == f"launch: --nproc={word}: expected 1 to 999\n"


# ---- which Python: python3 and nvidia-smi are stubs; the file `has` lists a Python's packages

PYTHON = f"""#!{sys.executable} -IS
import os, shutil, sys, time
from pathlib import Path
home, args, log = Path(sys.argv[0]).parent.parent, sys.argv[1:], Path(os.environ["LOG"])
has = (home / "has").read_text().split() if (home / "has").exists() else []
is_old = (home / "old").read_text() if (home / "old").exists() else ""
key = lambda need: (need.partition(">=")[0], [int(n) for n in need.partition(">=")[2].split(".")])
if args[:2] == ["-m", "venv"]:
    os.makedirs(args[2] + "/bin", exist_ok=True)
    if not os.path.lexists(python := args[2] + "/bin/python"):  # a link to another stays
        shutil.copy(sys.argv[0], python)
        Path(args[2], "old").write_text(is_old)
elif args[:1] == ["-c"]:
    sys.exit(is_old and "ModuleNotFoundError: No module named 'tomllib'")
elif args[:5] == ["-m", "pip", "install", "-q", "--dry-run"]:
    assert args[5] == "--no-index"
    for need in args[6:]:
        name, least = key(need + ">=0" * (">=" not in need))
        assert any(name == n and v >= least for n, v in map(key, has)), need
elif args[:4] == ["-m", "pip", "install", "-q"]:
    if is_old or os.environ.get("PIP_USER") != "0":
        sys.exit("ERROR: requires a different Python, or: can not perform a '--user' install")
    log.open("a").write(" ".join(args[4:]) + "\\n")
    while Path(f"{{log}}.is-slow").exists():
        time.sleep(0.02)
    if Path(f"{{log}}.fails").exists():
        sys.exit("WARNING: trying again\\nERROR: no route to host")
else:
    print(*args)
"""


class Machine:
    """A folder with the project, and one that comes first on PATH."""

    def __init__(self, folder, has=("jax>=0.10.1", *NEEDS[1:], "pytest-xdist>=3")):
        self.folder, self.log = project(folder), folder / "log"
        self.launch = self.folder / "launch"
        shutil.copy(ROOT / "pyproject.toml", folder)
        executable(folder / "base/bin/python3", PYTHON)
        executable(folder / "base/bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
        (folder / "base/has").write_text("\n".join(has))

    def start(self, *args):
        env = {"PATH": f"{self.folder}/base/bin:/usr/bin:/bin", "LOG": str(self.log)}
        env |= {"PIP_USER": "1"}  # as some clusters have it
        command, pipe = [self.launch, *args], subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True
        )

    def installs(self, *args) -> list:
        """What pip is asked for in a run, which must go well: nothing where python3 will do."""
        self.log.write_text("")
        process = self.start(*args)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and f"{self.folder}/train_gpt.py" in out + err, out + err
        return self.log.read_text().split()


def test_a_python3_that_has_everything_is_used(tmp_path):
    machine = Machine(tmp_path)
    assert machine.installs() == [] and not (tmp_path / ".venv").exists()


def test_a_shell_that_says_where_it_goes(tmp_path):
    machine = Machine(tmp_path)
    env = {"PATH": f"{tmp_path}/base/bin:/usr/bin:/bin", "LOG": str(machine.log), "CDPATH": "."}
    command = [f"{tmp_path.name}/launch", "--key=value"]
    done = subprocess.run(command, env=env, cwd=tmp_path.parent, capture_output=True, text=True)
    assert done.stdout == f"-u {tmp_path}/train_gpt.py --key=value\n", done


def test_a_link_to_launch_finds_the_project(tmp_path):
    machine = Machine(tmp_path, has=[])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/launch").symlink_to(machine.launch)
    machine.launch = tmp_path / "bin/launch"
    assert machine.installs() == [*NEEDS, *TESTS] and (tmp_path / ".venv/made").exists()


@pytest.mark.parametrize("i, has", [(0, "jax>=0.9.2"), (3, "scipy>=1"), (7, "ruff>=1")])
def test_a_python3_that_lacks_something_is_not(tmp_path, i, has):
    all_but_one = [*NEEDS, "pytest-xdist>=3"]
    all_but_one[i] = has
    machine = Machine(tmp_path, all_but_one)
    assert machine.installs() == [*NEEDS, *TESTS] and (tmp_path / ".venv/made").exists()
    assert machine.installs() == []


def test_pip_itself_says_what_a_python_has():
    ask = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-index", *NEEDS]
    if subprocess.run([*ask[:3], "--version"], capture_output=True).returncode:
        pytest.skip("no pip in this Python")
    for more, status in (["pytest-xdist"], 0), (["optax>=99"], 1):
        assert subprocess.run([*ask, *more], capture_output=True).returncode == status, more


@pytest.mark.parametrize(
    "driver, cuda",
    [
        ("CUDA Version: 9.2", 12),
        ("CUDA Version: 12.8", 12),
        ("CUDA Version: 13.0", 13),
        ("CUDA UMD Version: 13.2", 13),
        ("CUDA UMD Version: 14.1", 13),
        ("CUDA Version: N/A", 13),
    ],
)
def test_the_cuda_of_jax_suits_the_driver(tmp_path, driver, cuda):
    machine = Machine(tmp_path)
    says = f"[ $1. != . ] && exec echo GPU 0; echo '| SMI 570.1  Driver Version: 570.1  {driver} |'"
    ends = "exit 14"  # with a warning, for a GPU that works
    executable(tmp_path / "base/bin/nvidia-smi", f"#!/bin/sh\n{says}\n{ends}\n")
    assert machine.installs()[0] == f"jax[cuda{cuda}]>=0.10"
    assert machine.installs() == []


@pytest.mark.parametrize(
    "device, tpu",
    [("0042", 0), ("001F", 0), *((n, 1) for n in "0027 005E 0062 0063 006F 0076".split())],
)
def test_network_and_disks_of_google_are_no_tpu(tmp_path, monkeypatch, device, tpu):
    """By launch, and by Python."""
    uevent = tmp_path / "pci/devices/0000:00:04.0/uevent"
    uevent.parent.mkdir(parents=True)
    uevent.write_text(f"DRIVER=x\nPCI_ID=1AE0:{device}\nPCI_SUBSYS_ID=1AE0:0063\n")
    assert Machine(tmp_path).installs()[:1] == ["jax[tpu]>=0.10"] * tpu
    monkeypatch.setattr(train_gpt, "Path", lambda path: tmp_path / Path(path).name)
    assert train_gpt.accelerator() == "TPU" * tpu
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()  # a driver without a GPU
    assert train_gpt.accelerator() == "TPU" * tpu
    (tmp_path / "dev/nvidia0").touch()
    assert train_gpt.accelerator() == "GPU"


def test_new_dependencies_are_installed(tmp_path):
    machine = Machine(tmp_path, has=[])
    assert machine.installs() == [*NEEDS, *TESTS]
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("optax>=0.2.8", "optax>=0.2.12"))
    assert "optax>=0.2.12" in machine.installs() and machine.installs() == []


def test_an_install_that_was_cut_short_is_done_again(tmp_path):
    machine = Machine(tmp_path, has=[])
    (slow := tmp_path / "log.is-slow").touch()
    process = machine.start()
    while not (machine.log.exists() and machine.log.read_text()):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    slow.unlink()
    assert machine.installs() == [*NEEDS, *TESTS] and machine.installs() == []


def test_an_environment_of_too_old_a_python_is_made_anew_by_a_newer_one(tmp_path):
    machine = Machine(tmp_path, has=[])
    (old := tmp_path / "base/old").write_text("3.10")
    process = machine.start()
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2 and "needs Python 3.11 with venv and a network" in said[-1]
    old.unlink()
    assert machine.installs() == [*NEEDS, *TESTS] and machine.installs() == []


def test_an_environment_whose_python_is_gone_is_made_anew(tmp_path):
    machine = Machine(tmp_path, has=[])
    assert machine.installs() == [*NEEDS, *TESTS]
    (python := tmp_path / ".venv/bin/python").unlink()
    python.symlink_to("/not/there/python3")
    assert machine.installs() == [*NEEDS, *TESTS] and machine.installs() == []


def test_without_a_network_one_line_of_launch_says_so(tmp_path):
    machine = Machine(tmp_path, has=[])
    (fails := tmp_path / "log.fails").touch()
    process = machine.start()
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2
    assert ["network" in line for line in said] == [False, False, True], said  # two are pip's
    fails.unlink()
    assert machine.installs() == [*NEEDS, *TESTS]


def test_the_command_test_runs_pytest():
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    command = [ROOT / "launch", "test", "-n0", "-k", "no_other_product_file"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_pytest_gets_all_words_and_the_cpu():
    code = "import os, runpy; "
    code += "os.execv = lambda path, argv: print(*argv, os.environ['JAX_PLATFORMS']); "
    code += f"runpy.run_path('{ROOT}/tests/test.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "-k", "a b"], capture_output=True, text=True)
    assert done.stdout == f"{sys.executable} -m pytest -q {ROOT}/tests -k a b cpu\n", done.stderr
    assert done.returncode == 0
