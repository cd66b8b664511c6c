"""What `record` trains, counts and says."""

import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import curves
import record
import train_gpt
from commands import ONE_LAYER

TINY = [*ONE_LAYER, "--steps=4", "--save_every=1"]
STUB = """import sys, time
from pathlib import Path
keys = dict(arg[2:].split("=") for arg in sys.argv[2:])
losses = {losses}
loss, run = losses[int(keys["seed"])], Path("runs", keys["run"])
print("arguments", sys.argv[1:])
if isinstance(loss, int):
    sys.exit(loss)
run.mkdir(parents=True, exist_ok=True)
rule = "=" * 100 + chr(10)
config = f'config {{{{"steps": 9, "target": {{keys["target"]}}}}}}' + chr(10)
step = f"step:9/9 val_loss:{{loss}} train_time:2500ms step_avg:277.78ms" + chr(10)
source = "pass" if loss < 9 else "another"
(run / "log.txt").write_text(source + chr(10) + rule + "a device" + chr(10) + config + rule + step)
rows = ["step,train_time_ms,name,value", "9,2500,train_loss,3.4", f"9,2500,val_loss,{{loss}}"]
(run / "metrics.csv").write_text(chr(10).join(rows))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A trainer that ends at once: a loss is what it says, an int its status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "stub.py"))
    return lambda *losses: (tmp_path / "stub.py").write_text(STUB.format(losses=losses))


def start(folder, *args):
    command = [sys.executable, record.__file__, *args]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=-1, stderr=-1)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 20, 80, 400])
@pytest.mark.parametrize("shift", [-9, -3, -0.5, -0.01, 0, 0.2, 4])
def test_p_value_is_scipys(n, shift):
    losses = 3.28 + 0.0019 * (np.random.default_rng(n).normal(size=n) + shift)
    want = scipy.stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert record.p_value(losses.tolist(), 3.28) == pytest.approx(want, rel=1e-6)


def test_p_value_of_lists_that_end_at_a_bound():
    assert record.p_value([1.5, 1.5 + 1e-12], 3.28) < 1e-9
    assert record.p_value([3.27, 3.29], 3.28) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "losses, says",
    [
        ([3.2751, 3.2762, 3.2748, 3.2755], "below 3.28 holds at the level of 0.01: p = 0.0"),
        ([3.279, 3.281, 3.28, 3.278], "below 3.28 does not hold at the level of 0.01: p = 0."),
        ([3.276, 3.278, 3.2795, 3.277], "does not hold at the level of 0.01: p = 0.02"),
        ([3.29, 3.291, 3.292], "does not hold"),
        ([3.2], "is not shown: there is no p-value"),
        ([3.2, 3.2, 3.2], "is not shown: there is no p-value"),
        ([3.5, 3.5], "is not shown: there is no p-value"),
    ],
)
def test_readme_says_whether_the_claim_holds(stub, losses, says):
    stub(*losses)
    record.main(["--name=a", f"--runs={len(losses)}", "--target=3.28"])
    (folder,) = Path("records").iterdir()
    text = (folder / "README.md").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_a", folder.name) and says in text
    assert f"./launch record --name=a --runs={len(losses)} --target=3.28" in text
    assert "a device" in text and f"mean {np.mean(losses):.4f}" in text
    assert all(f"| {i} | {x:.4f} | 2.500 | seed{i}.txt |\n" in text for i, x in enumerate(losses))
    assert ("standard deviation" in text) == (len(losses) > 1)
    if len(losses) > 1:
        assert f"standard deviation {np.std(losses, ddof=1):.4f}" in text


@pytest.mark.parametrize("status, exits", [(2, 2), (1, 1), (75, 75), (-15, 143)])
def test_a_failed_run_ends_all_and_does_not_count(stub, capfd, status, exits):
    stub(3.2, 3.1, status, 3.3) if status > 0 else stub(3.2, 3.1)
    if status < 0:  # ends by a signal
        kill = "import os, signal, sys\nif '--seed=2' in sys.argv: os.kill(os.getpid(), 15)\n"
        Path("stub.py").write_text(kill + Path("stub.py").read_text())
    with pytest.raises(SystemExit) as ended:
        record.main(["--name=a", "--runs=4", "--target=3"])
    said = capfd.readouterr()
    assert ended.value.code == exits and not Path("records").exists()
    assert said.err == f"record: runs/record-a-2 ended with status {exits}\n"
    assert said.out.count("arguments") == 3 - (status < 0)  # and seed 3 was not begun
    stub(3.2, 3.1, 3.3, 3.3)
    record.main(["--name=a", "--runs=4", "--target=3"])
    assert "| 2 | 3.3000 |" in next(Path("records").glob("*/README.md")).read_text()


def test_seeds_arguments_and_the_directory_of_an_earlier_day(stub, capfd):
    stub(*[0.0] * 5, 3.1, 3.2, 3.3)
    for name in ("2026-01-02_a", "2026-01-02_b_a", "2026-01-02_ab"):
        Path("records", name).mkdir(parents=True)
    args = ["--name=a", "--target=3", "--seed=5", "--steps=9", "--float32"]
    record.main([*args, "--runs=3"])
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("arg")]
    tail = "'--target=3', '--steps=9', '--float32=true', '--seed=6', '--run=record-a-6']"
    assert said[1] == f"arguments ['train', {tail}"
    folder, *others = sorted(Path("records").iterdir())
    assert folder.name == "2026-01-02_a" and not any(list(other.iterdir()) for other in others)
    names = ["README.md", "curves.svg", "seed5.txt", "seed6.txt", "seed7.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record.main([*args, "--runs=2"])
    assert not (folder / "seed7.txt").exists() and "seed7" not in (folder / "README.md").read_text()


def test_a_run_does_not_go_on_by_other_sources(stub):
    stub(3.1, 3.2)
    log = Path("runs/record-a-1/log.txt")
    log.parent.mkdir(parents=True)
    log.write_text("other sources\nstep:3/9 train_loss:4.0000 train_time:9ms step_avg:3.00ms\n")
    with pytest.raises(record.InputError, match="runs/record-a-1 was begun by other sources"):
        record.main(["--name=a", "--runs=2", "--target=3"])
    log.write_text(train_gpt.CODE + log.read_text())
    record.main(["--name=a", "--runs=2", "--target=3"])


def test_the_target_is_the_records_whatever_the_runs_had(stub):
    stub(3.1, 3.2)
    record.main(["--name=a", "--target=3", "--runs=2"])
    Path("stub.py").write_text("")  # they have ended, and their logs stay
    record.main(["--name=a", "--target=4.5", "--runs=2"])
    said = next(Path("records").glob("*/README.md")).read_text()
    assert "mean is below 4.5 does" in said and "[3.1, 3.2], 4.5," in said
    assert '"target": 3}' in Path("runs/record-a-0/log.txt").read_text()
    record.main(["--name=a", "--runs=2"])
    assert "mean is below 3.28 does" in next(Path("records").glob("*/README.md")).read_text()


@pytest.mark.parametrize(
    "env, first",
    [
        ({}, True),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "0", "TPU_WORKER_ID": "2"}, True),
        ({"SLURM_PROCID": "1", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_ID": "3"}, False),
    ],
)
def test_one_of_several_processes_writes(stub, monkeypatch, env, first):
    for name in record.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    stub(3.1)
    record.main(["--name=a", "--target=3", "--runs=1"])
    assert Path("runs/record-a-0/log.txt").exists() and Path("records").exists() == first


def test_runs_of_different_sources_are_no_record(stub):
    stub(3.1, 9.5)
    with pytest.raises(record.InputError, match="differ in sources"):
        record.main(["--name=a", "--target=3", "--runs=2"])
    assert not Path("records").exists()


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "--name"),
        (["--name=a/b"], "--name=a/b"),
        (["--name=.."], "--name=.."),
        (["--name=a b"], "--name=a b"),
        (["--name=a", "--runs=0"], "--runs=0"),
        (["--name=a", "--runs=-1"], "--runs=-1"),
        (["--name=a", "--runs=two"], "--runs=two"),
        (["--name=a", "--run=b"], "no --run/--resume"),
        (["--name=a", "--resume=false"], "--resume"),
        (["--name=a", "--widht=3"], "did you mean 'width'"),
        (["--name=a", "--preset=smok"], "did you mean 'smoke'"),
        (["--name=a", "--steps=x"], "--steps=x: expected int"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_2(stub, capfd, args, says):
    with pytest.raises(record.InputError) as error:
        record.main(args)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_status_2_from_the_command_line(tmp_path):
    done = start(tmp_path, "--name=a/b")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and len(err.splitlines()) == 1 and not out


def texts(svg: str) -> list[str]:
    return [node.text for node in xml.fromstring(svg).iter() if node.tag.endswith("text")]


def test_picture_is_sound_and_its_numbers_lie_where_the_data_do():
    line = [(i, 10 * 0.99**i + 1) for i in range(1, 201)]
    vals = [(0, 10.8), (100, 4.7), (200, 2.3)]
    svg = curves.picture([{"train_loss": line, "val_loss": vals, "grad_norm": [(1, 9)]}], 3.28)
    root, said = xml.fromstring(svg), texts(svg)
    assert {"step", "loss (nats)", "train", "50", "150", "200", "3", "6"} <= set(said)
    assert {int(x) for x in said if x.isdigit()} >= {3, 4, 8} and "11" not in said  # the first 5%
    numbers = [p.get("d") for p in root.iter() if p.get("stroke") == "steelblue"]
    points = np.array(re.findall(r"([\d.]+),(-?[\d.]+)", numbers[0]), float)
    assert len(points) == 200 and (np.diff(points) != 0).all()
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) > 0).all()
    assert points[-1, 0] == 780 and points[-1, 1] <= 400
    assert len(numbers) == 1 and 'viewBox="0 0 800 450"' in svg
    assert svg.count("h0") == 2  # the validation of step 0 is above the range


def test_pictures_of_one_point_and_of_equal_losses():
    for steps in [1], range(1, 9):
        curve = {"train_loss": [(i, 3.0) for i in steps], "val_loss": [(steps[-1], 3.0)]}
        svg = curves.picture([curve] * 3, 3.0)
        assert "3" in texts(svg) and "nan" not in svg


@pytest.mark.parametrize("low, high", [(0, 1490), (0, 460), (1.4, 5.6), (3.2, 3.4), (0, 4)])
def test_ticks(low, high):
    ticks = curves.ticks(low, high)
    assert 4 <= len(ticks) <= 10 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9


def test_a_record_of_two_runs_goes_on_after_a_break(tmp_path):
    """Ended in its second run; then it goes on; then it is there at once."""
    args = ["--name=tiny", "--runs=2", "--target=9", *TINY]
    first, log = start(tmp_path, *args), tmp_path / "runs/record-tiny-1/log.txt"
    while not (log.exists() and "step:1/4 train" in log.read_text()):
        assert first.poll() is None and not (tmp_path / "records").exists()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    status = first.returncode
    assert status in (75, 143), err
    assert f"record: runs/record-tiny-1 ended with status {status}" in err.splitlines()[-1]
    assert "step:4/4 val_loss" in out and not (tmp_path / "records").exists()

    second = start(tmp_path, *args)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert out.count("train_loss") <= 4  # of seed 1; of seed 0 only the last line was said again
    (folder,) = (tmp_path / "records").iterdir()
    for seed in (0, 1):
        text = (tmp_path / f"runs/record-tiny-{seed}/log.txt").read_text()
        assert (folder / f"seed{seed}.txt").read_text() == text
        last = re.search(r"^step:4/4 val_loss:(\S+) train_time:(\d+)ms", text, re.MULTILINE)
        row = f"| {seed} | {last[1]} | {int(last[2]) / 1000:.3f} |"
        assert row in (folder / "README.md").read_text()
        assert str(tmp_path) not in text and text.count("step:1/4 train_loss") == 1
    svg = (folder / "curves.svg").read_text()
    assert {"loss (nats)", "4"} <= set(texts(svg)) and svg.count("h0") == 4
    readme = (folder / "README.md").read_text()
    assert "JAX" in readme and "cpu" in readme and str(tmp_path) not in readme

    began = time.perf_counter()
    third = start(tmp_path, *args)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0 and "compiled" not in out
    assert (folder / "README.md").read_text() == readme and time.perf_counter() - began < 60
