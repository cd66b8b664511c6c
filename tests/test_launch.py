"""launch with stubs beside it: which Python it takes, and the processes of --nproc."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = (ROOT / "launch").read_text()
NEEDS = re.findall(r'"([a-z-]+>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())

# ---- the processes: train_gpt.py is a stub that runs the Python code which it is given

linux = pytest.mark.skipif(not shutil.which("setsid"), reason="several processes are for Linux")

STUB = """
import os, signal, sys, time
rank, saved = int(os.environ.get("RANK", -1)), []
def save(*_):
    saved.append(1)
def wait_and_save():
    while not saved:
        time.sleep(0.02)
    time.sleep(1.5)  # longer than a failure would leave it
    print("saved after", len(saved), flush=True)
    sys.exit(75)
exec(sys.argv[1])
"""


def script(folder, text=LAUNCH):
    (folder / "launch").write_text(text)
    (folder / "launch").chmod(0o755)
    (folder / "train_gpt.py").write_text(STUB)
    return folder / "launch"


class Launch(subprocess.Popen):
    def __init__(self, folder, *args, grace=1):
        assert LAUNCH.count(" : 10)") == 1
        command = [script(folder, LAUNCH.replace(" : 10)", f" : {grace})")), *args]
        out, err = (folder / "out").open("w"), (folder / "err").open("w")
        env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "TMPDIR": str(folder)}
        super().__init__(command, stdout=out, stderr=err, env=env, start_new_session=True)
        self.out, self.err = (folder / "out").read_text, (folder / "err").read_text

    def until(self, word, times):
        deadline = time.monotonic() + 10
        while self.out().count(word) < times:
            assert time.monotonic() < deadline, self.out() + self.err()
            time.sleep(0.02)

    def done(self, timeout=15):
        try:
            return self.wait(timeout)
        finally:
            time.sleep(0.1)  # for what the pipes still hold


@linux
def test_processes_have_ranks_a_port_and_a_prefix(tmp_path):
    keys = "[os.environ[k] for k in ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')]"
    code = f"print('to out', {keys}, sys.argv[2:]); print('one\\ntwo', file=sys.stderr)"
    launch = Launch(tmp_path, code, "--nproc=3", "--a=b c", "--d=*")
    assert launch.done() == 0
    port = re.search(r"'(\d+)'\] ", launch.out())[1]
    want = "[{0}] to out ['{0}', '3', '127.0.0.1', '{1}'] ['--a=b c', '--d=*']"
    assert sorted(launch.out().splitlines()) == [want.format(rank, port) for rank in range(3)]
    want = [f"[{rank}] {word}" for rank in range(3) for word in ("one", "two")]
    assert sorted(launch.err().splitlines()) == want
    assert 1024 <= int(port) < 65536
    assert not list(tmp_path.glob("tmp.*"))


@linux
def test_output_is_seen_at_once(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", "print('begun'); time.sleep(60)")
    launch.until("begun", 2)
    launch.terminate()
    assert launch.done() == 128 + signal.SIGTERM  # a stub without a handler


@pytest.mark.parametrize("args", [[], ["--nproc=1"]])
def test_one_process_takes_the_place_of_launch(tmp_path, args):
    launch = Launch(tmp_path, "print(os.getpid(), rank, sys.argv[2:]); sys.exit(75)", "--a", *args)
    assert launch.done() == 75
    assert launch.out() == f"{launch.pid} -1 ['--a']\n"


@linux
def test_a_failure_ends_the_others_and_is_said_last(tmp_path):
    code = "rank == 1 and sys.exit('what\\nwent wrong'); time.sleep(60)"
    launch = Launch(tmp_path, "--nproc=3", code)
    began = time.monotonic()
    assert launch.done() == 1 and time.monotonic() - began < 5
    assert launch.err().endswith("launch: [1] status 1: what\nwent wrong\n")


@linux
def test_processes_that_ignore_sigterm_are_killed(tmp_path):
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun'); "
    code += "time.sleep(0.5); rank == 1 and sys.exit(3); time.sleep(60); print('alive')"
    launch = Launch(tmp_path, "--nproc=3", code)
    began = time.monotonic()
    assert launch.done() == 3 and time.monotonic() - began < 8
    assert "alive" not in launch.out()


@linux
def test_a_process_killed_from_outside_is_a_failure(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", "rank or os.kill(os.getpid(), 9); time.sleep(60)")
    assert launch.done() == 128 + 9
    assert "launch: [0] status 137" in launch.err()


SAVING = "signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGINT, save); print('ready'); "


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path, number):
    launch = Launch(tmp_path, "--nproc=2", SAVING + "wait_and_save()")
    launch.until("ready", 2)
    os.killpg(launch.pid, number)  # as a terminal and `timeout` do
    assert launch.done() == 75
    assert sorted(launch.out().splitlines()[2:]) == ["[0] saved after 1", "[1] saved after 1"]
    assert launch.err() == ""


@linux
def test_a_second_signal_kills(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", SAVING + "time.sleep(60)")
    launch.until("ready", 2)
    launch.terminate()
    time.sleep(1.5)
    assert launch.poll() is None
    launch.terminate()
    assert launch.done(3) == 128 + 9


@linux
def test_one_preempted_process_lets_the_others_save(tmp_path):
    code = SAVING + "rank or time.sleep(0.5) or sys.exit(75); wait_and_save()"
    launch = Launch(tmp_path, "--nproc=2", code)
    assert launch.done() == 75
    assert "[1] saved after 1" in launch.out() and launch.err() == ""


@linux
def test_a_failure_after_a_signal_is_the_status(tmp_path):
    launch = Launch(tmp_path, "--nproc=2", SAVING + "rank and wait_and_save(); " + "\n"
                    "while not saved: time.sleep(0.02)\nsys.exit('disk full')")  # fmt: skip
    launch.until("ready", 2)
    launch.terminate()
    assert launch.done() == 1
    assert "[1] saved after 1" in launch.out() and "status 1: disk full" in launch.err()


@pytest.mark.parametrize("word", ["0", "-1", "2x", "", "1000"])
def test_junk_for_nproc_is_one_line_and_2(tmp_path, word):
    launch = Launch(tmp_path, "print('begun')", f"--nproc={word}")
    assert launch.done() == 2 and launch.out() == ""
    assert len(launch.err().splitlines()) == 1 and f"'{word}'" in launch.err()


# ---- which Python: python3, venv, pip and nvidia-smi are stubs; what a Python has is in site/

PYTHON = f"""#!/bin/sh
home=$(dirname "$0")/..
[ -e "$home/old" ] && [ "$1" = -c ] && exit 1
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" "$3/site" && cp "$0" "$3/bin/python" && echo venv >>"$LOG" ;;
"-m pip") echo "$@" >>"$LOG"; exec {sys.executable} "$PIP" "$home/site" "$@" ;;
*) PYTHONPATH=$home/site exec {sys.executable} -S "$@" ;;
esac
"""
PIP = """
import os, pathlib, re, sys, time
if os.path.exists(os.environ["PIP"] + ".fails"):
    sys.exit("WARNING: trying again\\nERROR: no route to host")
for need in sys.argv[5:]:
    name, extra, version = re.fullmatch(r"([a-z-]+)(?:\\[(\\w+)])?(?:>=([\\d.]+))?", need).groups()
    for dist in [name] + ([f"jax_{extra}_plugin"] if extra else []):
        dist = "libtpu" if extra == "tpu" and dist != name else dist
        module = pathlib.Path(sys.argv[1], dist.replace("-", "_"))
        module.with_suffix(".py").touch()
        info = pathlib.Path(f"{module}-{version or 1}.dist-info")
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Name: {dist}\\nVersion: {version or 1}\\n")
time.sleep(os.path.exists(os.environ["PIP"] + ".is-slow") and 1)
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A folder with the project, and one that comes first on PATH."""

    def __init__(self, folder, has=NEEDS):
        self.base, self.project, self.log = folder / "base", folder / "project", folder / "log"
        self.pip = folder / "pip.py"
        self.pip.write_text(PIP)
        self.project.mkdir()
        (self.base / "site").mkdir(parents=True)
        script(self.project, LAUNCH.replace("/sys/bus/pci", str(folder / "pci")))
        shutil.copy(ROOT / "pyproject.toml", self.project)
        executable(self.base / "bin/python3", PYTHON)
        for name in ("python3.14", "python3.13", "python3.12", "python3.11", "nvidia-smi"):
            executable(self.base / "bin" / name, "#!/bin/sh\nexit 9\n")
        self.env = {"PATH": f"{self.base}/bin:/usr/bin:/bin", "LOG": self.log, "PIP": self.pip}
        self.install(*has)

    def install(self, *needs):
        command = [sys.executable, self.pip, self.base / "site", "-m", "pip", "install", *needs]
        subprocess.run(command, env=self.env, check=True)

    def gpu(self, version):
        says = f"case $1 in -L) echo GPU 0;; *) echo '| SMI 1.2.3  {version} |';; esac"
        executable(self.base / "bin/nvidia-smi", f"#!/bin/sh\n{says}\n")

    def start(self):
        command = [self.project / "launch", "print('runs in', sys.path[1])"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self.env,
                                start_new_session=True)  # fmt: skip

    def runs_in(self, status=0):
        """python3, venv, or what is said on stderr when the status is not 0."""
        process = self.start()
        out, err = process.communicate(timeout=20)
        assert process.returncode == status, out + err
        return err if status else "venv" if "/.venv/" in out else "python3"

    def installs(self):
        """What venv and pip were asked for since the last time."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return [line.removeprefix("-m pip install -q ") for line in lines]


def test_a_python3_that_has_everything_is_used(tmp_path):
    machine = Machine(tmp_path)
    assert machine.runs_in() == "python3" and machine.installs() == []


@pytest.mark.parametrize("lacks", [NEEDS[0], NEEDS[2], NEEDS[-1]])
def test_a_python3_that_lacks_something_is_not(tmp_path, lacks):
    machine = Machine(tmp_path, has=[need for need in NEEDS if need != lacks])
    assert machine.runs_in() == "venv"
    assert machine.installs() == ["venv", " ".join([*NEEDS, "pytest", "ruff"])]
    assert machine.runs_in() == "venv" and machine.installs() == []


@pytest.mark.parametrize("version, place", [("0.9.2", "venv"), ("0.10.1", "python3")])
def test_the_version_of_jax_counts(tmp_path, version, place):
    machine = Machine(tmp_path, has=[f"jax>={version}", *NEEDS[1:]])
    assert machine.runs_in() == place


@pytest.mark.parametrize(
    "driver, plugin, place",
    [
        ("CUDA Version: 13.0", "cuda12", "python3"),
        ("CUDA Version: 13.0", "cuda13", "python3"),
        ("CUDA UMD Version: 13.2", "cuda12", "python3"),
        ("CUDA Version: 12.8", "cuda12", "python3"),
        ("CUDA Version: 12.8", "cuda13", "cuda12"),
        ("CUDA Version: 12.8", "", "cuda12"),
        ("CUDA Version: 13.0", "", "cuda13"),
        ("CUDA UMD Version: 14.1", "", "cuda13"),
        ("CUDA Version: N/A", "", "cuda13"),
    ],
)
def test_the_cuda_plugin_suits_the_driver(tmp_path, driver, plugin, place):
    machine = Machine(tmp_path)
    machine.gpu(driver)
    if plugin:
        machine.install(f"jax[{plugin}]>=0.10")
    if place == "python3":
        assert machine.runs_in() == place
    else:
        assert machine.runs_in() == "venv"
        assert machine.installs()[1].startswith(f"jax[{place}]>=0.10 ")
        assert machine.runs_in() == "venv" and machine.installs() == []


@pytest.mark.parametrize("device, tpu", [("0042", 0), ("001F", 0), ("0063", 1), ("005E", 1)])
def test_network_and_disks_of_google_are_no_tpu(tmp_path, device, tpu):
    machine = Machine(tmp_path)
    uevent = tmp_path / "pci/devices/0000:00:04.0/uevent"
    uevent.parent.mkdir(parents=True)
    uevent.write_text(f"DRIVER=x\nPCI_ID=1AE0:{device}\nPCI_SUBSYS_ID=1AE0:0063\n")
    assert machine.runs_in() == ("venv" if tpu else "python3")
    assert not tpu or machine.installs()[1].startswith("jax[tpu]>=0.10 ")


def test_new_dependencies_are_installed(tmp_path):
    machine = Machine(tmp_path, has=[])
    assert machine.runs_in() == "venv" and len(machine.installs()) == 2
    project = machine.project / "pyproject.toml"
    project.write_text(project.read_text().replace("optax>=0.2.8", "optax>=0.2.12"))
    assert machine.runs_in() == "venv" and "optax>=0.2.12" in machine.installs()[1]
    assert machine.runs_in() == "venv" and machine.installs() == []


def test_of_two_first_starts_one_installs(tmp_path):
    machine = Machine(tmp_path, has=[])
    (tmp_path / "pip.py.is-slow").touch()
    both = [machine.start(), machine.start()]
    assert ["/.venv/" in process.communicate(timeout=20)[0] for process in both] == [True, True]
    assert len(machine.installs()) == 2


def test_an_install_that_was_cut_short_is_done_again(tmp_path):
    machine = Machine(tmp_path, has=[])
    slow = tmp_path / "pip.py.is-slow"
    slow.touch()
    process = machine.start()
    while len(list(machine.project.glob(".venv/site/*.dist-info"))) < len(NEEDS) + 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    slow.unlink()
    machine.installs()
    assert machine.runs_in() == "venv" and len(machine.installs()) == 2


def test_without_a_network_one_line_says_so(tmp_path):
    machine = Machine(tmp_path, has=[])
    fails = tmp_path / "pip.py.fails"
    fails.touch()
    said = machine.runs_in(status=2)
    assert len(said.splitlines()) == 1 and "network" in said and "no route" in said
    assert "3.11" not in said
    fails.unlink()
    assert machine.runs_in() == "venv"


def test_a_python_that_is_too_old(tmp_path):
    machine = Machine(tmp_path)
    (machine.base / "old").touch()
    said = machine.runs_in(status=2)
    assert len(said.splitlines()) == 1 and "3.11" in said and "network" not in said
    newer = tmp_path / "newer/bin/python3"
    executable(newer, PYTHON)
    executable(machine.base / "bin/python3.12", f'#!/bin/sh\nexec {newer} "$@"\n')
    assert machine.runs_in() == "venv"


def test_the_command_test_runs_pytest_on_the_cpu(tmp_path):
    machine = Machine(tmp_path)
    machine.env["PYTHON"] = tmp_path / "python"
    executable(tmp_path / "python", '#!/bin/sh\necho "$JAX_PLATFORMS $*"; exit 5\n')
    command = [machine.project / "launch", "test", "-k", "a b"]
    done = subprocess.run(command, env=machine.env, capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stdout == f"cpu -m pytest -q {machine.project}/tests -k a b\n"


def test_the_command_test_needs_pytest(tmp_path):
    machine = Machine(tmp_path)
    command = [machine.project / "launch", "test"]
    subprocess.run(command, env=machine.env, capture_output=True, timeout=20)
    assert machine.installs()[0] == "venv"
    machine.install("pytest")
    subprocess.run(command, env=machine.env, capture_output=True, timeout=20)
    assert machine.installs() == []
