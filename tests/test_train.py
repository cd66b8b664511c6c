"""The commands, through the contract: logs, exit statuses, resume, errors."""

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_data import shard_bytes, tokens_of

import sharding
import train_gpt
from commands import CODE, ONE_LAYER, PYTHON, ROOT, TINY, run, run_all
from kill import same, values

KEYS = dict(arg[2:].split("=") for arg in TINY)
ARGS = [*TINY, "--steps=12", "--val_every=5", "--save_every=5", "--run=a"]
ON_CPU = pytest.mark.skipif(bool(train_gpt.accelerator()), reason="there is such a device")
LINE = re.compile(
    r"^step:\d+/\d+ (val|train)_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$"
)


def until(process, log, word):
    """Waits till the log of the run has the word."""
    while not (log.exists() and word in log.read_text()):
        assert process.poll() is None, process.stderr and process.stderr.read()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    done = run_all(folder, *ARGS)
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
    assert (
        "compiled" in done.stdout
        and "[768, 1024, 1536] tokens/step = 8 rows = 1 devices" in done.stdout
    )
    assert "without compiling" in done.stderr  # the sample's last line


def test_64_bits_of_the_environment_change_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    done = run(tmp_path, *ARGS)
    assert done.returncode == 0, done.stderr
    assert same(finished[0], tmp_path)


def test_tensorflow_is_left_alone_where_it_is_installed(tmp_path, monkeypatch):
    """As on Kaggle: TensorBoard would import it, while JAX has the device."""
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('it could have been broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(tmp_path, *TINY, "--steps=1", "--run=a")
    assert done.returncode == 0 and list((tmp_path / "runs/a/tensorboard").iterdir()), done.stderr


def test_in_python_and_nothing_is_compiled_while_it_trains(tmp_path, monkeypatch):
    """After the first step, and what the first save needs; over all stages, to the last step."""
    monkeypatch.chdir(tmp_path)
    events, counts, scalar = [], {}, train_gpt.Journal.scalar
    listen = lambda name, *_, **more: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)

    def counted(self, step, ms, name, *more):
        counts.setdefault((name, step), len(events))
        return scalar(self, step, ms, name, *more)

    monkeypatch.setattr(train_gpt.Journal, "scalar", counted)
    keys = KEYS | {"steps": 12, "val_every": 5, "save_every": 2, "run": "a", "cpu_devices": 8}
    keys["keep"] = 1
    result = train_gpt.train(train_gpt.Config(**keys))
    assert np.isfinite(result.val_loss) and result.train_time > 0
    assert jax.config.jax_default_matmul_precision == "highest"  # float32, on any device
    assert [path.name for path in (result.run_dir / "checkpoints").iterdir()] == ["12"]
    heard = len(events)
    jax.jit(lambda x: x + heard)(1)
    assert len(events) == heard + 1
    assert counts["train_loss", 1] == counts["train_loss", 2]
    assert counts["train_loss", 3] == counts["val_loss", 12]


def test_the_train_time_is_of_steps_and_their_data_alone(tmp_path, monkeypatch):
    """A batch takes a second, a line of a validation and a save 100; through a resume."""
    monkeypatch.chdir(tmp_path)
    now, journal, manager = [0.0], train_gpt.Journal, train_gpt.ocp.CheckpointManager

    def takes(owner, name, seconds):
        f = getattr(owner, name)
        later = lambda *args: now.__setitem__(0, now[0] + seconds(*args))
        slow = lambda *args, **more: later(*args) or f(*args, **more)
        monkeypatch.setattr(owner, name, slow)

    takes(train_gpt.sharding, "global_rows", lambda *_: 1)
    takes(journal, "scalar", lambda self, step, ms, name, *_: 100 * (name == "val_loss"))
    takes(manager, "save", lambda *_: 100)
    clock = SimpleNamespace(**vars(time) | {"perf_counter": lambda: now[0]})
    monkeypatch.setattr(train_gpt, "time", clock)
    c = train_gpt.Config(**KEYS | {"layers": "pvl"}, steps=9, val_every=2, save_every=3, run="a")
    with pytest.raises(SystemExit):
        train_gpt.train(c, lambda step: step == 7)
    assert train_gpt.train(c).train_time == 9
    rows = [row.split(",") for row in (tmp_path / "runs/a/metrics.csv").read_text().split()[1:]]
    at = [float(ms) / 1000 for _, ms, name, _ in rows if name == "train_loss"]
    log = (tmp_path / "runs/a/log.txt").read_text()
    assert log.endswith(" train_time:9000ms step_avg:1000.00ms\n")
    assert at == sorted(at) and all(i < ms <= i + 2 for i, ms in enumerate(at))


def test_a_step_begins_with_the_state_alone(tmp_path, monkeypatch):
    """The gradients of the last one would take as much memory as the weights."""
    monkeypatch.chdir(tmp_path)
    held = lambda: sum(x.nbytes for x in jax.live_arrays())
    begins, before = [], held()
    c = train_gpt.Config(
        **KEYS | {"bigram_rows": 8192}, steps=4, val_every=9, save_every=9, run="a"
    )
    train_gpt.train(c, lambda step: begins.append(held() - before))
    like = train_gpt.program(c, train_gpt.sharding.make_mesh("")).like
    state, weights = (sum(x.size for x in jax.tree.leaves(t)) * 4 for t in (like, like["params"]))
    assert state <= min(begins) and max(begins) < state + weights / 2, (begins, state, weights)


def test_loss_falls(finished):
    rows = (finished[0] / "runs/a/metrics.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[3]) for row in rows if "val_loss" in row]
    assert losses[0] > 5 and losses[-1] < losses[0] - 0.5


def on_board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "runs/a/tensorboard"), {"tensors": 0}).Reload()


def test_tensorboard_reads_back(finished):
    events = on_board(finished[0])
    assert {"train_loss", "val_loss", "grad_norm"} <= set(events.Tags()["tensors"])
    assert len(events.Tensors("train_loss")) == 12


def test_a_finished_run_says_its_last_line_again(finished):
    folder, _ = finished
    free = "--target=3 --keep=1 --val_every=4 --save_every=7 --mesh=fsdp:1 --device_rows=1"
    again = run(folder, *ARGS, *free.split())
    last = [x for x in (folder / "runs/a/log.txt").read_text().splitlines() if "12/12 val" in x]
    assert again.returncode == 0 and last[0] in again.stdout


def test_other_sources_are_said(finished, tmp_path):
    copied(finished, tmp_path)
    log = tmp_path / "runs/a/log.txt"
    log.write_text(log.read_text().replace("import", "improt", 1))
    again = run(tmp_path, *ARGS)
    assert "warning: runs/a was begun by other sources" in again.stdout and again.returncode == 0
    assert "warning" not in run(finished[0], *ARGS).stdout


def test_another_config_is_refused(finished):
    folder, _ = finished
    keys = "--steps=13 --seed=1 --val_tokens=4096 --val_row_tokens=512 --rows=16 --fp8 --muon_lr=1"
    other = run(folder, *TINY, *keys.split(), "--run=a")
    was = "seed was 0, steps was 12, fp8 was False, rows was 8, muon_lr was 0.08"
    assert other.returncode == 2 and was in other.stderr
    assert "val_tokens was 8192, val_row_tokens was 1024: try another" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_goes_on_where_a_killed_run_was_saved(finished, tmp_path):
    """Killed after the checkpoint of step 5: the same losses to the last digit, no line twice."""
    log = tmp_path / "runs/a/log.txt"
    with subprocess.Popen([*PYTHON, *ARGS], cwd=tmp_path, stdout=-3) as p:
        until(p, log, "step:8/12")
        p.kill()
    assert run(tmp_path, *ARGS).returncode == 0
    assert same(tmp_path, finished[0])
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
        (["--preset=smoke", "--resume=maybe"], "--resume=maybe: expected true or false"),
        (["--preset=smoke", "--save_every=0"], "--save_every=0: expected int above 0"),
        (["--preset=smoke", "--heads=3"], "need even --heads"),
        (["--preset=smoke", "--data=stdlip"], "stdlib"),
        (["--preset=smoke", "--mesh=fsdp:3"], "devices"),
        (["--preset=smoke", "--mesh=rows:2"], "AXIS"),
        (["--preset=smoke", "--cpu_devices=5", "--steps=3"], "cannot be split 5 ways"),
        (["--preset=smoke", "--steps=100000"], "training data lasts"),
        (["--preset=smoke", "--stages=slow"], "unknown stages"),
        (["--preset=smoke", "--device=cuda"], "unknown device 'cuda'"),
        pytest.param(["--preset=smoke", "--device=gpu"], "no gpu", marks=ON_CPU),
        pytest.param(["--preset=smoke", "--device=tpu"], "tpu", marks=ON_CPU),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_2(tmp_path, args, says):
    done = run(tmp_path, *args)
    assert done.returncode == 2, done.stderr
    *more, line = done.stderr.strip().splitlines()
    if "--device=tpu" not in args or not importlib.util.find_spec("libtpu"):  # it says more
        assert not more, more
    assert says in line and not (tmp_path / "runs").exists()


def test_more_devices_than_rows_is_one_line_too(tmp_path):
    done = run(tmp_path, "--preset=smoke", "--cpu_devices=16", "--steps=3")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "rows of 8 cannot be split 16 ways" in done.stderr


def test_fewer_rows_of_validation_than_devices_leave_no_run(tmp_path):
    few = ["--val_tokens=16384", "--val_row_tokens=8192"]
    done = run(tmp_path, "--preset=smoke", "--cpu_devices=8", "--steps=3", *few)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "rows of 2 cannot be split 8 ways" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name, value, says",
    [
        *((name, "0", "expected int above 0") for name in ("save_every", "val_every", "steps")),
        *((name, "0", "expected int above 0") for name in ("rows", "device_rows", "width")),
        ("steps", "-1", "expected int above 0"),
        ("steps", "1.5", "expected int above 0"),
        ("heads", "3", "need even --heads"),
        ("width", "20", "--width = 4 n heads"),
        ("width", "8", "--width = 4 n heads"),  # fewer than a gate reads
        ("bos", "300", "--bos below --vocab"),
        ("rows", "6", "--rows that divide"),
        ("seed", "01", "expected int"),
        ("layers", "x,z", "expected layers"),
        ("seed", str(2**40), "expected int"),
        ("seed", "-1", "expected int"),
        ("seed", "１０", "expected int"),
        ("muon_lr", "nan", "expected float"),
        ("muon_lr", "00.02", "expected float"),
        ("muon_lr", "-1", "expected float"),
        ("float32", "1", "expected true or false"),
    ],
)
def test_values_that_no_training_can_have_are_refused(name, value, says):
    with pytest.raises(train_gpt.InputError, match=re.escape(says)) as error:
        train_gpt.Config(preset="smoke", **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", [(0.3, 0.6, 0.9), (0.6, 0.3, 1), (0.5, 0.5, 1), (0.5, 1, 2)])
def test_a_table_of_stages_that_does_not_end_at_1_is_refused(monkeypatch, ends):
    stages = [s._replace(end=end) for s, end in zip(train_gpt.STAGES["smoke"], ends)]
    monkeypatch.setitem(train_gpt.STAGES, "mine", stages)
    with pytest.raises(train_gpt.InputError) as error:
        train_gpt.Config(preset="smoke", stages="mine", heads=3)
    assert str(error.value) == "need even --heads, stages whose ends rise to 1"


def test_the_cpu_asked_for_on_a_machine_with_a_gpu_gets_the_small_preset(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train_gpt, "accelerator", lambda: "GPU")
    monkeypatch.setattr(train_gpt, "train", lambda c, stop: seen.append(c.preset) or 1 / 0)
    monkeypatch.setattr(train_gpt, "signal", lambda *args: None)
    for args in (["--device=cpu"], [], ["--device=gpu"]):
        with pytest.raises(ZeroDivisionError):
            train_gpt.main(args)
    assert seen == ["smoke", "speedrun", "speedrun"]
    assert "as this machine has GPU" in capsys.readouterr().out
    cache = f"{jax.config.jax_compilation_cache_dir}/."  # the same, but asked for
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    with pytest.raises(train_gpt.InputError, match="JAX sees the CPU alone and no GPU"):
        train_gpt.start(train_gpt.Config(device="auto", cpu_devices=8))
    assert jax.config.jax_compilation_cache_dir == cache


def test_a_device_takes_as_many_rows_at_once_as_it_may():
    turns = lambda n, at_once: train_gpt.turns(SimpleNamespace(device_rows=at_once), n)
    assert [turns(8, k) for k in (1, 2, 3, 4, 7, 8, 9)] == [8, 4, 4, 2, 2, 1, 1]


def test_values_and_their_texts_are_the_same_config():
    c = train_gpt.Config(preset="smoke", seed="7", muon_lr="1e-3", fp8="True", layers="p,v")
    assert c == train_gpt.Config(preset="smoke", seed=7, muon_lr=0.001, fp8=True, layers="p,v")
    assert c.muon_lr == train_gpt.Config(preset="smoke", muon_lr="1E-3").muon_lr
    large = train_gpt.Config(preset="smoke", adam_lr="1e30")
    assert large == train_gpt.Config(**vars(large))  # Python writes it as 1e+30
    assert c == train_gpt.Config(**vars(c)) and type(c.seed) is int and c.fp8 is True


@pytest.mark.parametrize("layers", ["k", "kb,k"])
def test_a_network_without_attention_trains_and_saves(tmp_path, monkeypatch, layers):
    monkeypatch.chdir(tmp_path)
    keys = KEYS | {"layers": layers, "steps": 3, "save_every": 2, "run": "a"}
    loss = train_gpt.train(train_gpt.Config(**keys)).val_loss
    assert 0 < loss < 6 and (tmp_path / "runs/a/checkpoints/3").exists()


def start(folder, *args):
    command = ["env", "--default-signal=HUP", *PYTHON, *args]  # though the tests run under nohup
    return subprocess.Popen(command, cwd=folder, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(finished, tmp_path, number):
    log = tmp_path / "runs/a/log.txt"
    with start(tmp_path, *ARGS) as p:
        until(p, log, "step:3/12")
        for _ in range(1 + (number == signal.SIGHUP)):  # twice by a shell in a terminal that closes
            p.send_signal(number)
            time.sleep(0.02)
        said = p.communicate(timeout=120)
    goes_on = r"stopped after step \d+: the same --run goes on, runs/a$"
    assert p.returncode == 75 and re.search(goes_on, said[0], re.M), said
    assert run(tmp_path, *ARGS).returncode == 0
    assert same(tmp_path, finished[0])


def test_under_nohup_a_terminal_may_close(finished, tmp_path):
    log, command = tmp_path / "runs/a/log.txt", ["env", "--ignore-signal=HUP", *PYTHON, *ARGS]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as p:
        until(p, log, "step:3/12")
        p.send_signal(signal.SIGHUP)
        assert p.communicate(timeout=120) and p.returncode == 0
    assert same(tmp_path, finished[0])


@pytest.mark.parametrize("gone", [True, False], ids=["a closed terminal", "a full disk"])
def test_a_console_that_takes_no_more_ends_nothing(finished, tmp_path, gone):
    log = tmp_path / "runs/a/log.txt"
    terminal, out = os.openpty() if gone else (None, os.open("/dev/full", os.O_WRONLY))
    with subprocess.Popen([*PYTHON, *ARGS], cwd=tmp_path, stdout=out, stderr=-1) as p:
        until(p, log, "step:2/12")
        os.close(out)
        if gone:
            os.close(terminal)
        said = p.communicate(timeout=120)[1]
    assert p.returncode == 0, said
    assert same(tmp_path, finished[0])


def test_ctrl_c_saves_though_the_reader_of_the_output_ends_first(finished, tmp_path):
    """As `| tee` does, which hears a terminal's Ctrl-C as well."""
    log, command = tmp_path / "runs/a/log.txt", [PYTHON[0], "-u", *PYTHON[1:], *ARGS]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as p:
        until(p, log, "step:3/12")
        p.stdout.close()
        p.send_signal(signal.SIGINT)
        assert p.wait(120) == 75, p.stderr.read()
    assert "stopped after step" in log.read_text()
    assert run(tmp_path, *ARGS).returncode == 0
    assert same(tmp_path, finished[0])


def test_a_run_that_is_in_training_is_left_alone(finished, tmp_path):
    """A second trainer ends with a line, and harms neither the first nor what it saves."""
    log, often = tmp_path / "runs/a/log.txt", [*ARGS, "--save_every=1"]
    with start(tmp_path, *often) as p:
        until(p, log, "step:2/12")
        p.send_signal(signal.SIGSTOP)
        before = log.read_bytes()
        second = run(tmp_path, *often)
        after = log.read_bytes()
        p.send_signal(signal.SIGCONT)  # before all that can fail: the end of `with` waits for it
        assert p.wait(120) == 0
    assert after == before
    assert second.returncode == 2 and "runs/a is in training: end that" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert same(tmp_path, finished[0])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, number):
    def lockf(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "lockf", lockf)
    assert train_gpt.train(train_gpt.Config(**KEYS, steps=1, run="a")).val_loss > 0


def test_killed_at_any_moment(finished, tmp_path):
    """With SIGKILL, again and again at random moments: what it ends with is the same, metrics and
    parameters. (python tests/kill.py 100 tries more of them, and aims at saves and validations.)"""
    random, kills, done = np.random.default_rng(7), 0, 1
    while done and kills < 8:
        with start(tmp_path, *ARGS) as p:
            try:
                p.wait(random.uniform(1, 8))
            except subprocess.TimeoutExpired:
                p.kill()
                kills += 1
        done = p.returncode
    assert run(tmp_path, *ARGS).returncode == 0 and kills
    assert same(tmp_path, finished[0])
    steps = [
        x for x in (tmp_path / "runs/a/log.txt").read_text().splitlines() if "_loss:" in x[:30]
    ]
    assert len(steps) == 16


def copied(finished, tmp_path):
    """Checkpoints of a copy of the run, as if it had been killed after the save of step 10."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/a/checkpoints/12")
    log = tmp_path / "runs/a/log.txt"
    log.write_text(log.read_text().partition("step:12/12")[0])  # with its last line it is done
    return tmp_path / "runs/a/checkpoints"


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    """The newest of two, in every file of its state; then both, which one line says. What a kill
    left in the middle of a save is gone in the end, as `same` asks."""
    there = copied(finished, tmp_path)
    assert sorted(path.name for path in there.iterdir() if path.name.isdigit()) == ["10"]
    shutil.copytree(there / "10", there / "11")
    shutil.copytree(there / "10", there / "11.orbax-checkpoint-tmp")
    for path in (there / "11").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00damaged")
    again = run(tmp_path, *ARGS)
    assert again.returncode == 0 and "unreadable, passed over" in again.stdout, again.stderr
    assert same(tmp_path, finished[0])
    (tmp_path / "b").mkdir()
    for path in copied(finished, tmp_path / "b").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    none = run(tmp_path / "b", *ARGS)
    assert "step:" not in none.stdout
    assert none.returncode == 2 and "checkpoints/10 unreadable, remove it?" in none.stderr


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    done = run(folder, *ARGS, "--cpu_devices=8", "--mesh=fsdp:8")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.parametrize(
    "saved_by, devices, mesh",
    [
        ("finished", 8, "fsdp:8"),
        ("finished", 8, "data:2,fsdp:2,tensor:2"),
        ("sharded", 1, "fsdp:1"),
        ("sharded", 8, "data:2,tensor:2"),
    ],
)
def test_goes_on_with_another_mesh(request, tmp_path, saved_by, devices, mesh):
    before = request.getfixturevalue(saved_by)
    copied(before, tmp_path)
    more = f"--cpu_devices={devices}", f"--mesh={mesh}", "--device_rows=1"
    again = run(tmp_path, *ARGS, *more)
    assert again.returncode == 0, again.stderr
    assert "step:11/12" in again.stdout and "step:10/12 train" not in again.stdout
    got, want = ({x[:2]: float(x[2]) for x in values(f)} for f in (tmp_path, before[0]))
    assert got.keys() == want.keys()
    for key in want:
        assert abs(got[key] / want[key] - 1) < 1e-4, key


def test_resume_false_starts_over_under_another_name(finished, tmp_path):
    copied(finished, tmp_path)
    before = (tmp_path / "runs/a/log.txt").read_bytes()
    again = run(tmp_path, *ARGS, "--resume=false")
    logs = list((tmp_path / "runs").glob("a-*/log.txt"))  # with the time in its name
    assert again.returncode == 0 and len(logs) == 1, again.stderr
    assert (tmp_path / "runs/a/log.txt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run(tmp_path, *ARGS, "--adam_lr=1e30")
    says = r"runs/a: step \d+: train_loss nan: the run is as last saved\n"
    assert done.returncode == 2 and re.fullmatch(says, done.stderr), done.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_written(value):
    with pytest.raises(train_gpt.InputError, match="runs/a: step 1: val_loss"):
        train_gpt.Journal.scalar(SimpleNamespace(run="runs/a"), 1, 1.0, "val_loss", value)


MEMORY = "out of device memory: try --device_rows=N, N smaller, or more --rows: RESOURCE_EXHAUSTED"
QUOTA = "RESOURCE_EXHAUSTED: Failed to write 179 bytes [OS error 122: EDQUOT Disk quota exceeded]"


@pytest.mark.parametrize(
    "error, says",
    [("RESOURCE_EXHAUSTED: 9 GB", MEMORY), (QUOTA, "disk full, make room, and the same --run")],
)
def test_out_of_memory_or_disk_says_what_to_do(tmp_path, error, says):
    """In the words of XLA, and of what writes a checkpoint."""
    code = f"import runpy, sys; sys.path.insert(0, '{ROOT}'); import jax, train_gpt as t\n"
    code += "def program(*_):\n    raise jax.errors.JaxRuntimeError(ERROR)\n"
    code += f"ERROR = {error!r}\nt.model.param_table = program\n"
    code += f"runpy.run_path('{ROOT}/train_gpt.py', run_name='__main__')"
    done = run(tmp_path, *TINY, command=[*PYTHON[:2], code])
    assert done.returncode == 2 and done.stderr.startswith(says), done.stderr


def test_a_run_whose_last_loss_is_not_finite_is_not_done(tmp_path):
    args = [*ARGS, "--steps=2", "--adam_lr=1e30"]
    for done in (run(tmp_path, *args), run(tmp_path, *args)):
        assert done.returncode == 2 and "step 2: val_loss nan" in done.stderr, done.stderr
        assert "step:2/2 val_loss" not in done.stdout


@pytest.mark.parametrize("changed", ["b.txt", "x_train_1.bin", "x_val_1.bin"])
def test_a_run_goes_on_with_the_tokens_it_was_begun_with_alone(tmp_path, monkeypatch, changed):
    """Not with a text more, other documents or another validation: rows, losses would be others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = ["x_train_1.bin", "x_val_1.bin"] if "bin" in changed else ["a.txt"]
    begun = {tmp_path / "data" / name: shard_bytes(tokens_of(90_000)) for name in names}
    for path, content in begun.items():
        path.write_bytes(content)
    c = train_gpt.Config(**KEYS, data="data", steps=9, run="a")
    with pytest.raises(SystemExit):
        train_gpt.train(c, lambda step: step == 3)
    log = (tmp_path / "runs/a/log.txt").read_bytes()
    (tmp_path / "data" / changed).write_bytes(shard_bytes(tokens_of(90_001)))
    with pytest.raises(sharding.InputError, match="runs/a was begun with other tokens"):
        train_gpt.train(c)
    assert (tmp_path / "runs/a/log.txt").read_bytes() == log
    (tmp_path / "data" / changed).unlink()
    for path, content in begun.items():
        path.write_bytes(content)
    assert np.isfinite(train_gpt.train(c).val_loss)


def test_a_save_is_made_where_a_later_checkpoint_cannot_be_read(tmp_path, monkeypatch, capsys):
    """Orbax, asked for an earlier one, or that one, keeps to what it has."""
    monkeypatch.chdir(tmp_path)
    c = train_gpt.Config(**KEYS, steps=12, val_every=99, save_every=4, run="a")
    steps = lambda: sorted(int(path.name) for path in (tmp_path / "runs/a/checkpoints").iterdir())

    def damage(step):
        for path in (tmp_path / f"runs/a/checkpoints/{step}/default").rglob("*"):
            path.write_bytes(b"damaged") if path.is_file() else None

    with pytest.raises(SystemExit):
        train_gpt.train(c, lambda step: step == 11)
    assert steps() == [8, 11]
    damage(11)
    with pytest.raises(SystemExit):
        train_gpt.train(c, lambda step: step == 9)
    assert steps() == [8, 9] and "checkpoint 11 unreadable" in capsys.readouterr().out
    damage(9)
    with pytest.raises(SystemExit):
        train_gpt.train(c, lambda step: step == 9)
    assert steps() == [8, 9] and "checkpoint 9 unreadable" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_gpt.train(c, lambda step: step == 10)
    assert steps() == [9, 10] and "unreadable" not in capsys.readouterr().out
    damage(10)
    assert np.isfinite(train_gpt.train(c).val_loss) and steps() == [9, 12]  # not 10, which is less
    assert "checkpoint 10 unreadable" in capsys.readouterr().out


FAILS = f"""import sys
sys.path.insert(0, "{ROOT}")
import train_gpt
scalar = train_gpt.Journal.scalar
def fails(self, step, ms, name, *more):
    if (step, name) == (5, "val_loss"):
        raise OSError("as soon as the save has begun")
    scalar(self, step, ms, name, *more)
train_gpt.Journal.scalar = fails
train_gpt.main(sys.argv[1:])"""


def test_a_save_that_has_begun_ends_whatever_comes(tmp_path):
    """Orbax writes behind the loop's back, which Python would cut off at the end of a process."""
    args = "--steps=6", "--save_every=5", "--val_every=5", "--run=a"
    large = "--bigram_rows=262144"  # 140 MB, which takes a while
    done = run(tmp_path, *ONE_LAYER, *args, large, command=[*PYTHON[:2], FAILS])
    assert "as soon as the save has begun" in done.stderr and done.returncode == 1
    assert [path.name for path in (tmp_path / "runs/a/checkpoints").iterdir()] == ["5"]
    assert len(on_board(tmp_path).Tensors("train_loss")) == 5


@pytest.mark.parametrize("chip, at_once", [("gpu NVIDIA H100", 1), ("tpu TPU v5 lite", None)])
def test_a_gpu_compiles_one_program_after_the_other(tmp_path, monkeypatch, chip, at_once):
    """On which XLA times kernels meanwhile; other devices have nothing to do with it."""
    program, pool, asked = train_gpt.program, train_gpt.ThreadPoolExecutor, []

    def as_if(c, mesh):
        p = program(c, mesh)
        p.views = [view._replace(chip=chip) for view in p.views]
        return p

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "program", as_if)
    monkeypatch.setattr(train_gpt, "start", lambda c: None)  # joins a job in a pool of its own
    monkeypatch.setattr(train_gpt, "ThreadPoolExecutor", lambda n: asked.append(n) or pool(n))
    c = train_gpt.Config(**KEYS | {"layers": "pvl"}, steps=2)
    assert np.isfinite(train_gpt.train(c).val_loss)
    assert asked == [at_once]


OPEN = f"""import os, runpy, sys
sys.path.insert(0, "{ROOT}")
os.dup2(0, 77)  # as the library of a TPU holds one open
start = os.execv
shows = "import os; print('open:', [n for n in os.listdir('/proc/self/fd') if int(n) > 3])"
os.execv = lambda path, argv: start(path, [path, "-c", shows])
runpy.run_path("{ROOT}/train_gpt.py", run_name="__main__")"""


def test_the_sample_holds_nothing_open_that_the_training_had(tmp_path):
    """A TPU can be opened but once, and the sample is of the training's process."""
    done = run(tmp_path, *ONE_LAYER, "--steps=2", command=[*PYTHON[:2], OPEN])
    assert done.stdout.endswith("\nopen: []\n"), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("folder, name", [("project [2026]", "a"), ("project", "lr[0.1]")])
def test_a_path_of_which_no_checkpoint_would_be_read_again_is_refused(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    done = run(tmp_path / folder, *TINY, "--steps=2", f"--run={name}")
    assert done.returncode == 2 and not (tmp_path / folder / "runs").exists()
    run_dir = tmp_path / folder / "runs" / name
    assert done.stderr == f"{run_dir}: checkpoints need a path without a bracket\n"


def test_a_run_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file where a directory should be")
    done = run(tmp_path, *TINY, "--steps=2", "--run=a")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("save_every, saved, last", [(99, 12, 12), (5, 5, 10)])
def test_a_run_is_done_when_its_last_state_is_saved(tmp_path, monkeypatch, save_every, saved, last):
    """The log's last line comes after the last save, or a failed one would never be repeated. And
    no save begins before the one before it has ended."""
    monkeypatch.chdir(tmp_path)

    manager, saves = train_gpt.ocp.CheckpointManager, []

    def fails(self):
        if saves:
            raise OSError("the last save fails")

    monkeypatch.setattr(manager, "save", lambda self, step, **more: saves.append(step))
    monkeypatch.setattr(manager, "wait_until_finished", fails)
    with pytest.raises(OSError, match="the last save fails"):
        c = train_gpt.Config(**KEYS, steps=12, run="a", save_every=save_every, val_every=99)
        train_gpt.train(c)
    log = (tmp_path / "runs/a/log.txt").read_text()
    assert f"step:{last}/12 train_loss" in log and f"step:{last + 1}/12" not in log
    assert saves == [saved] and "step:12/12 val_loss" not in log


def test_a_file_system_that_does_not_know_its_size_is_not_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0)
    monkeypatch.setattr(train_gpt.os, "statvfs", lambda path: unknown)
    train_gpt.train(train_gpt.Config(**KEYS, steps=2, run="a"))
    assert (tmp_path / "runs/a/checkpoints/2").exists()


FULL = """
mount -t tmpfs -o size=$1 none . && cd "$PWD" || exit 99
shift
"$@"
status=$?
echo "had $(ls -m runs/a/checkpoints 2>&1)"
mount -o remount,size=64m .
[ $status != 2 ] || "$@" > /dev/null
cp -r runs "$SAVED"
exit $status
"""


UNSEEN = f"""import os, types
os.statvfs = lambda path: types.SimpleNamespace(f_bavail=10**12, f_frsize=1000, f_blocks=10**12)
{CODE}"""


@pytest.mark.parametrize(
    "size, says, had",
    [
        ("2800k", "runs/a: disk", "3, 6"),
        ("50k", "disk full, make room", ""),
        ("1200k", "disk full, make room", None),  # in the middle of a save
    ],
)
def test_a_full_disk(finished, tmp_path, size, says, had):
    """One line that names the place; what was saved is kept, and it goes on when there is room."""
    python = PYTHON if had is not None else [*PYTHON[:2], UNSEEN]
    command = [*python, *ARGS, "--save_every=3"]
    sh = ["unshare", "-rm", "bash", "-c", FULL, "bash", size, *command]
    (tmp_path / "disk").mkdir()
    env = os.environ | {"SAVED": str(tmp_path / "runs")}
    try:
        done = subprocess.run(sh, cwd=tmp_path / "disk", env=env, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode in (1, 99) and "runs" not in done.stderr + done.stdout:
        pytest.skip("may not mount")
    assert done.returncode == 2, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "tokens/s" not in line]
    said = said if had is not None else [line for line in said if says in line]  # or orbax's, too
    assert len(said) == 1 and says in said[0], said
    assert had is None or f"had {had}\n" in done.stdout
    assert same(tmp_path, finished[0])
