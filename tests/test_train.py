"""The commands, through the contract: logs, exit statuses, resume, errors."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import train_gpt
from commands import ROOT, TINY, run

LINE = re.compile(
    r"^step:\d+/\d+ (val|train)_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, *TINY, "--steps=12", "--val_every=5", "--save_every=5", "--run=a")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_log_is_complete_and_its_lines_are_the_contracts(finished):
    folder, done = finished
    log = (folder / "runs/a/log.txt").read_text()
    for name in train_gpt.SOURCES:
        assert (ROOT / name).read_text() in log
    steps = [line for line in log.splitlines() if line.startswith("step:")]
    assert all(LINE.match(line) for line in steps), steps
    want = [f"step:{i}/12 train" for i in range(1, 13)]
    want += [f"step:{i}/12 val" for i in (0, 5, 10, 12)]
    assert sorted(line.split("_loss")[0] for line in steps) == sorted(want)
    config = json.loads(re.search(r"^config (.*)$", log, re.MULTILINE)[1])
    assert config["width"] == 32 and config["steps"] == 12
    assert "compiled" in done.stdout and "768 tokens/step = 8 rows x 96 = 1 devices" in done.stdout
    assert "with compiling" in done.stderr  # the sample's last line


def test_loss_falls(finished):
    rows = (finished[0] / "runs/a/metrics.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[3]) for row in rows if "val_loss" in row]
    assert losses[0] > 5 and losses[-1] < losses[0] - 0.5


def test_tensorboard_reads_back(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "runs/a/tensorboard"), {"tensors": 0}).Reload()
    assert {"train_loss", "val_loss", "grad_norm"} <= set(events.Tags()["tensors"])
    assert len(events.Tensors("train_loss")) == 12


def test_a_finished_run_says_its_last_line_again(finished):
    folder, _ = finished
    again = run(folder, *TINY, "--steps=12", "--val_every=5", "--save_every=5", "--run=a")
    last = [x for x in (folder / "runs/a/log.txt").read_text().splitlines() if "12/12 val" in x]
    assert again.returncode == 0 and last[0] in again.stdout


def test_another_config_is_refused(finished):
    folder, _ = finished
    other = run(folder, *TINY, "--steps=13", "--run=a")
    assert other.returncode == 2 and "steps was 12" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_goes_on_where_a_killed_run_was_saved(finished, tmp_path):
    """Killed after the checkpoint of step 5: the same losses to the last digit, no line twice."""
    args = [*TINY, "--steps=12", "--val_every=5", "--save_every=5", "--run=a"]
    log = tmp_path / "runs/a/log.txt"
    with subprocess.Popen(
        [sys.executable, ROOT / "train_gpt.py", *args], cwd=tmp_path, stdout=-3
    ) as p:
        while not (log.exists() and "step:8/12" in log.read_text()):
            assert p.poll() is None
        p.kill()
    assert run(tmp_path, *args).returncode == 0
    csv = [(folder / "runs/a/metrics.csv").read_text() for folder in (tmp_path, finished[0])]
    values = [[row.split(",")[::2] + row.split(",")[3:] for row in x.splitlines()] for x in csv]
    assert values[0] == values[1]
    steps = [
        x.split(" train_time")[0] for x in log.read_text().splitlines() if x.startswith("step:")
    ]
    assert len(steps) == len(set(steps)) == 16
    times = [int(x) for x in re.findall(r"train_loss.*train_time:(\d+)ms", log.read_text())]
    assert times == sorted(times)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--stepz=3"], "did you mean 'steps'"),
        (["--preset=smok"], "did you mean 'smoke'"),
        (["trian"], "did you mean 'train'"),
        (["--preset=smoke", "--steps=three"], "--steps=three: expected int"),
        (["--preset=smoke", "--resume=maybe"], "--resume=maybe: expected bool"),
        (["--preset=smoke", "--data=stdlip"], "stdlib"),
        (["--preset=smoke", "--mesh=fsdp:3"], "devices"),
        (["--preset=smoke", "--mesh=rows:2"], "AXIS"),
        (["--preset=smoke", "--cpu_devices=5", "--steps=3"], "cannot be split 5 ways"),
        (["--preset=smoke", "--steps=100000"], "training data lasts"),
        (["--preset=smoke", "--stages=slow"], "unknown stages"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_2(tmp_path, args, says):
    done = run(tmp_path, *args)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = dict(arg[2:].split("=") for arg in TINY)
    result = train_gpt.train(train_gpt.Config(**keys, steps=3, cpu_devices=8, val_every=9))
    assert np.isfinite(result.val_loss) and result.train_time > 0 and result.run_dir.exists()


ARGS = [*TINY, "--steps=12", "--val_every=5", "--save_every=5", "--run=a"]


def values(folder):
    """(step, name, value) of every line of metrics.csv."""
    lines = (folder / "runs/a/metrics.csv").read_text().splitlines()[1:]
    return [tuple(line.split(",")[i] for i in (0, 2, 3)) for line in lines]


def start(folder, *args):
    command = [sys.executable, ROOT / "train_gpt.py", *args]
    return subprocess.Popen(command, cwd=folder, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(finished, tmp_path, number):
    log = tmp_path / "runs/a/log.txt"
    with start(tmp_path, *ARGS) as p:
        while not (log.exists() and "step:3/12" in log.read_text()):
            assert p.poll() is None
        p.send_signal(number)
        said = p.communicate(timeout=120)
    assert p.returncode == 75 and "saved: the same command goes on" in said[0], said
    assert run(tmp_path, *ARGS).returncode == 0
    assert sorted(values(tmp_path)) == sorted(values(finished[0]))


def test_killed_at_any_moment(finished, tmp_path):
    """With SIGKILL, again and again at random moments: what it ends with is the same."""
    random, kills, done = np.random.default_rng(7), 0, 1
    while done and kills < 8:
        with start(tmp_path, *ARGS) as p:
            try:
                p.wait(random.uniform(3, 14))
            except subprocess.TimeoutExpired:
                p.kill()
                kills += 1
        done = p.returncode
    assert run(tmp_path, *ARGS).returncode == 0 and kills
    assert sorted(values(tmp_path)) == sorted(values(finished[0]))
    steps = [
        x for x in (tmp_path / "runs/a/log.txt").read_text().splitlines() if "_loss:" in x[:30]
    ]
    assert len(steps) == 16


def copied(finished, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/a/checkpoints/12")
    return tmp_path / "runs/a/checkpoints"


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    """The newest of two, in every file of its state; then both, which one line says."""
    there = copied(finished, tmp_path)
    assert sorted(path.name for path in there.iterdir() if path.name.isdigit()) == ["10"]
    shutil.copytree(there / "10", there / "11")
    for path in (there / "11").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00damaged")
    again = run(tmp_path, *ARGS)
    assert again.returncode == 0 and "cannot be read, passed over" in again.stdout, again.stderr
    assert sorted(values(tmp_path)) == sorted(values(finished[0]))
    (tmp_path / "b").mkdir()
    for path in copied(finished, tmp_path / "b").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    none = run(tmp_path / "b", *ARGS)
    assert none.returncode == 2 and "no checkpoint can be read" in none.stderr


@pytest.mark.parametrize("mesh", ["fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_goes_on_with_another_mesh(finished, tmp_path, mesh):
    copied(finished, tmp_path)
    again = run(tmp_path, *ARGS, "--cpu_devices=8", f"--mesh={mesh}", "--device_rows=1")
    assert again.returncode == 0, again.stderr
    got, want = dict(), dict()
    for found, folder in ((got, tmp_path), (want, finished[0])):
        found |= {(step, name): float(value) for step, name, value in values(folder)}
    assert got.keys() == want.keys()
    for key in want:
        assert abs(got[key] / want[key] - 1) < 1e-4, key


def test_resume_false_starts_over_under_another_name(finished, tmp_path):
    copied(finished, tmp_path)
    before = (tmp_path / "runs/a/log.txt").read_bytes()
    again = run(tmp_path, *TINY, "--steps=2", "--run=a", "--resume=false")
    assert again.returncode == 0 and (tmp_path / "runs/a-1/log.txt").exists(), again.stderr
    assert (tmp_path / "runs/a/log.txt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run(tmp_path, *ARGS, "--adam_lr=1e30")
    assert done.returncode == 2 and re.match(r"step \d+: loss", done.stderr), done.stderr


def test_a_run_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file where a directory should be")
    done = run(tmp_path, *TINY, "--steps=2", "--run=a")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
