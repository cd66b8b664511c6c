"""sample, eval and plot: what they say of a run, and what they refuse."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from types import SimpleNamespace

import eval as hellaswag
import jax
import numpy as np
import pytest
import tiktoken

import curves
import data_fineweb
import model
import plot
import sample
import sharding
import tool
import train_gpt
from commands import ONE_LAYER, ROOT, run, run_all

TINY = [*ONE_LAYER, "--steps=4", "--val_every=2", "--run=a"]
SPEED = re.compile(r"\d+ tokens in \d+\.\d\d s, \d+ tokens/s without compiling\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools")
    done = run(path, *TINY)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def unfinished(folder, tmp_path_factory):
    """The run as sweep/a, begun with 4 devices and saved by its next to last step."""
    path = tmp_path_factory.mktemp("unfinished")
    args = [*TINY, "--save_every=3", "--cpu_devices=4", "--run=sweep/a"]
    assert run(path, *args).returncode == 0
    shutil.rmtree(path / "runs/sweep/a/checkpoints/4")
    log = path / "runs/sweep/a/log.txt"
    log.write_text(log.read_text().partition("step:4/4")[0])
    return path


def test_eval_says_the_loss_of_the_log_and_the_accuracy_on_hellaswag(folder, tmp_path):
    items = [{"ctx": "a b", "endings": ["c", "d", "e", "f g"], "label": i % 4} for i in range(5)]
    (tmp_path / "h.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    (begun := folder / "runs/a/checkpoints/9.orbax-checkpoint-tmp").mkdir()  # by a training
    done = run(folder, "eval", "--run=a", f"--hellaswag={tmp_path}/h.jsonl")
    begun.rmdir()
    last = [x for x in (folder / "runs/a/log.txt").read_text().splitlines() if "4/4 val" in x][0]
    assert done.stdout.split()[0:2] == last.split()[0:2], (done.stdout, done.stderr, last)
    said = re.search(r"^hellaswag: (\d) of 5 right, accuracy (0\.\d{4})$", done.stdout, re.M)
    assert said and int(said[1]) in (1, 2) and float(said[2]) == int(said[1]) / 5, done.stdout


@pytest.mark.parametrize("name", ["sample", "eval", "record", "plot", "plan", "bench"])
def test_help_is_the_commands_own(tmp_path, name):
    done = run(tmp_path, name, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = ast.get_docstring(ast.parse((ROOT / f"tests/{name}.py").read_text()), clean=False)
    assert done.stdout.strip() == said.strip()


def test_a_model_is_asked_through_the_windows_that_it_knows(unfinished, monkeypatch):
    monkeypatch.chdir(unfinished)
    monkeypatch.setattr(train_gpt, "start", lambda c: None)  # JAX has started here
    run_ = sample.saved({"run": "sweep/a"})
    assert run_.step == 3 and run_.view is run_.p.views[2] is not run_.p.views[-1]
    seen = []
    monkeypatch.setattr(model, "features", lambda w, tokens, c, view: seen.append(view) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample.logits_of(run_)(run_.params, np.zeros((1, 128), np.int32), 0)
    rows = np.zeros((8, hellaswag.T + 1), np.int32)
    with pytest.raises(ZeroDivisionError):
        hellaswag.scores(run_, rows, rows == 0)
    assert [view.long for view in seen] == [run_.view.long] * 2 != [run_.c.val_long] * 2


def test_a_training_ends_with_a_sample(unfinished):
    """Of a run with a slash in its name, that goes on with 1 device where it had 4."""
    done = run_all(unfinished, *TINY, "--save_every=3", "--run=sweep/a")
    assert done.returncode == 0 and "step:3/4" not in done.stdout, done.stderr
    text = done.stdout.partition("step:4/4 val_loss")[2].partition("\n")[2]
    assert len(text) > 9 and SPEED.fullmatch(done.stderr), done
    again = run_all(unfinished, *TINY, "--save_every=3", "--run=sweep/a")
    assert again.returncode == 0 and SPEED.fullmatch(again.stderr), again


@pytest.mark.parametrize("end", [[], ["--end"]])
def test_what_fails_after_a_training_is_a_warning(folder, tmp_path, end):
    """Here checkpoints that cannot be read."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for path in (tmp_path / "runs/a/checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    done = run_all(tmp_path, "sample", "--run=a", *end)
    steps = (tmp_path / "runs/a/checkpoints").resolve().iterdir()
    why = f"{min(steps, key=lambda path: int(path.name))} unreadable, remove it?"
    says = "warning: no sample: " * bool(end) + why
    *orbax, line = done.stderr.splitlines()
    assert done.returncode == (0 if end else 2) and line.startswith(says), done.stderr
    assert all("absl" in line for line in orbax), orbax


@pytest.mark.parametrize(
    "error, says",
    [
        (RuntimeError("Unable to initialize backend\nat all"), "RuntimeError: Unable to initial"),
        (KeyError("x"), "KeyError: 'x'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError("no room"), "no room"),
    ],
)
def test_any_error_is_a_warning_with_end_alone(monkeypatch, capsys, error, says):
    def saved(keys):
        raise error

    monkeypatch.setattr(sample, "saved", saved)
    assert sample.main(["--run=a", "--end"]) is None
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: no sample: {says}") and not said.out
    assert len(said.err.splitlines()) == 1
    with pytest.raises(type(error)):
        sample.main(["--run=a"])


def test_no_way_to_the_vocabulary_says_what_to_do(tmp_path, monkeypatch, capsys):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # it may be in memory
    run_ = SimpleNamespace(c=train_gpt.Config())
    monkeypatch.setattr(sample, "saved", lambda keys: run_)
    says = "no vocabulary of GPT-2: it takes a network, or TIKTOKEN_CACHE_DIR=FOLDER with"
    sample.main(["--run=a", "--end"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: no sample: {says}")
    monkeypatch.setattr(sys, "argv", ["sample", "--run=a"])
    with pytest.raises(SystemExit) as ended:
        tool.run(sample.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(says)


def test_ctrl_c_ends_a_tool_without_a_traceback(capsys):
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        tool.run(main)
    assert ended.value.code == 130 and capsys.readouterr() == ("", "")


def test_samples_are_texts_with_the_prompt_and_the_same_for_a_seed(folder):
    args = ["sample", "--run=a", "--prompt=def f(x", "--tokens=9", "--samples=2"]
    a, b, again = (run(folder, *args, f"--seed={seed}") for seed in (0, 1, 0))
    assert a.stdout.count("def f(x") == 2 and a.stdout == again.stdout != b.stdout
    assert SPEED.fullmatch(a.stderr) and a.stderr.startswith("18 tokens"), a.stderr
    greedy = run(folder, *args, "--top_k=1").stdout.rstrip("\n").split("\n" + "-" * 100 + "\n")
    assert len(greedy) == 2 and greedy[0] == greedy[1]
    cut = run(folder, "sample", "--run=a", "--prompt=caf\udcc3", "--tokens=3")  # half a letter
    assert cut.returncode == 0 and cut.stdout.startswith("caf"), cut.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_training_is_done_though_its_sample_is_stopped(tmp_path, name):
    """From the first line on, while it imports."""
    (tmp_path / "jax.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    command = [sys.executable, ROOT / "tests/sample.py", "--run=a", "--end"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: no sample, as it was stopped\n")


def test_a_sample_is_as_likely_as_temperature_and_top_k_say(monkeypatch):
    """Of a model that has the letter behind the last as the best, and those behind as worse."""
    c = train_gpt.Config(preset="smoke")
    ahead = lambda token: (np.arange(c.vocab) - token - 1) % c.vocab

    def logits(params, tokens, i):
        assert (tokens[:, 0] == c.bos).all()
        return np.stack([-ahead(token) for token in tokens[:, i]])

    def letters(*args):  # how far each is behind the last
        texts, _ = sample.write(SimpleNamespace(c=c, params=None), "!", 20, 2, *args)
        assert [text[0] for text in texts] == ["!", "!"] and [*map(len, texts)] == [21, 21]
        return {ord(b) - ord(a) for text in texts for a, b in zip(text, text[1:])}

    monkeypatch.setattr(sample, "logits_of", lambda run: logits)
    assert letters(5.0, 1) == letters(0.0, 50) == letters(0.05, 50) == {1}
    assert letters(5.0, 3) == {1, 2, 3}
    monkeypatch.setattr(sample, "logits_of", lambda run: lambda *args: logits(*args) // 2)
    assert letters(5.0, 2) == {1, 2}  # though the third is as good as the second


@pytest.mark.parametrize(
    "args, says",
    [
        (["sample", "--run=b"], "no such run; there are: a"),
        (["eval"], "no such run"),
        (["sample", "--run=a", "--promt=x"], "did you mean 'prompt'"),
        (["sample", "--run=a", "--tokens=many"], "expected int"),
        (["sample", "--run=a", "--tokens=0"], "--tokens=0: expected int above 0"),
        (["sample", "--run=a", "--end=perhaps"], "--end=perhaps: expected true or false"),
        (
            ["sample", "--run=a", "--prompt=def f(x", "--tokens=99999"],
            "--prompt has 7 tokens and --tokens=99999: 3071 fit together",
        ),
        (["sample", "--run=a", "--device=abacus"], "unknown device 'abacus': did you mean"),
        (["eval", "--run=a", "--hellaswag=nothing.jsonl"], "--hellaswag=nothing.jsonl"),
        (["plot", "b"], "b: no such run; there are: a"),
        (["plot", "a", "--uot=b.svg"], "did you mean 'out'"),
        (["plot", "--out=not/there.svg"], "not/there.svg"),
        (["plot", "--out"], "--out: which file?"),
        (["plot", "--out=runs"], "--out=runs: no file can be there"),
        (["sample", "a"], "a: keys are --name=value, did you mean --run=a?"),
        (["eval", "c"], "c: keys are --name=value\n"),
        (["bench", "--csv=not/there.csv"], "--csv=not/there.csv: no file can be there"),
        (["plan", "--csv=not/there.csv"], "--csv=not/there.csv: no file can be there"),
        (["plan", "--topology=v7:2x4"], "--topology=v7:2x4: no such slice"),
    ],
)
def test_refused_in_one_line(folder, args, says):
    done = run(folder, *args)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_hellaswag_of_a_model_whose_answers_are_known(tmp_path, monkeypatch):
    """A head that always says the same letter: the ending with the most of it wins."""
    keys = dict(word[2:].split("=") for word in TINY if "run" not in word)
    c = train_gpt.Config(**keys)
    mesh = sharding.make_mesh("fsdp:1")
    p = train_gpt.program(c, mesh)
    params = jax.tree.map(np.array, p.init(0)["params"])
    params["embed"][:] = 1  # every token looks the same, so every state is the same
    for name in ("value0", "bigram"):
        params[name][:] = 0
    params["head"][:] = 0
    params["head"][ord("z")] = 1
    run_ = type("Run", (), {"c": c, "mesh": mesh, "p": p, "params": params, "view": p.views[-1]})
    items = [
        {"ctx": "a b", "endings": ["q q", "zzzz", "z q", "qz"], "label": 1},
        {"ctx": "c" * 400, "endings": ["zzz zz", "nothing", "zq", "qqq"], "label": "0"},
        {"ctx": "x", "endings": ["aa", "bb", "cc", "dzzd"], "label": 2},
    ]
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    read = hellaswag.questions(str(path))
    rows, ending = hellaswag.pairs(read, c)
    assert rows[1, :9].tolist() == [c.bos, *b"a b zzzz"[:8]] and ending[1].nonzero()[0][0] == 4
    assert bytes(rows[1][ending[1]].tolist()) == b" zzzz"
    best = hellaswag.scores(run_, rows, ending).reshape(-1, 4).argmax(1)
    assert best.tolist() == [1, 0, 3]
    assert sum(int(a) == int(i["label"]) for a, i in zip(best, read)) == 2
    assert data_fineweb.encode(b"z", c.vocab)[0] == ord("z")


def test_hellaswag_comes_from_the_hub_as_parquet(tmp_path, monkeypatch):
    path, asked = tmp_path / "validation.parquet", []
    download = lambda *args, **more: asked.append((*args, more["repo_type"])) or str(path)
    monkeypatch.setattr(hellaswag, "hf_hub_download", download)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(sharding.InputError, match=r"-m pip install pyarrow, which reads that file"):
        hellaswag.questions("true")
    table = SimpleNamespace(to_pylist=lambda: [GOOD | {"ind": 7}])
    parquet = SimpleNamespace(read_table=lambda path, columns: table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    assert hellaswag.questions("true") == hellaswag.questions(str(path)) == [GOOD]
    file = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet", "dataset")
    assert asked == [file, file]


def test_hellaswag_in_parquet_as_pyarrow_has_it(tmp_path):
    arrow = pytest.importorskip("pyarrow")  # which only this needs
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow.Table.from_pylist([GOOD | {"ind": 7}] * 2), path := tmp_path / "a.parquet"
    )
    assert hellaswag.questions(str(path)) == [GOOD, GOOD]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(sharding.InputError, match="not HellaSwag's items"):
        hellaswag.questions(str(path))


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "3"}


@pytest.mark.parametrize(
    "items, says",
    [
        ([], "no items"),
        ([GOOD, GOOD | {"endings": ["b", "c", "d"]}], "item 2: no ctx with 4 endings"),
        ([GOOD | {"endings": [*"bcdef"]}], "item 1"),
        ([GOOD | {"endings": "bcde"}], "item 1"),
        ([GOOD | {"endings": ["b", "c", "d", 4]}], "item 1"),
        ([GOOD | {"ctx": None}], "item 1"),
        ([GOOD | {"label": ""}], "a label of 0 to 3"),  # as in the test split
        ([GOOD | {"label": 4}], "item 1"),
        ([GOOD | {"label": -1}], "item 1"),
        ([GOOD | {"label": None}], "item 1"),
        ([{"ctx": "a", "endings": [*"bcde"]}], "label"),
        ([7], "not HellaSwag"),
    ],
)
def test_what_is_not_hellaswag_is_refused(tmp_path, items, says):
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    with pytest.raises(sharding.InputError, match=says) as error:
        hellaswag.questions(str(path))
    assert str(error.value).startswith(f"--hellaswag={path}: ")


def written(run, *lines):
    """A run's metrics.csv, with these lines behind the header."""
    path = tool.Path("runs", run, "metrics.csv")
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(["step,train_time_ms,name,value", *lines]))


def test_a_plot_has_a_colour_and_a_name_for_every_run(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    written("sweep/<b>", *(f"{i},{i},train_loss,{5 - i}" for i in (1, 2)), "2,2,val_loss,nan")
    written("just-begun", "0,0,val_loss,5.5")
    plot.main([])
    assert capsys.readouterr().out == "plot: runs/plot.svg: a, sweep/<b>\n"
    root = xml.fromstring(tool.Path("runs/plot.svg").read_text())
    said = {node.text: node.get("fill") for node in root.iter() if node.tag.endswith("text")}
    drawn = [node.get("stroke") for node in root.iter() if node.tag.endswith("path")]
    assert {"a", "sweep/<b>"} < {*said} and said["a"] != said["sweep/<b>"]
    for name in ("a", "sweep/<b>"):  # a line of training, dots of validation
        assert drawn.count(said[name]) == 2
    assert "target (dashes)" not in said  # that one has no config
    plot.main(["a", "a", "--out=a.svg"])
    assert capsys.readouterr().out == "plot: a.svg: a\n"
    assert "target (dashes)" in tool.Path("a.svg").read_text()


def test_runs_that_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = lambda *args: pytest.raises(sharding.InputError, match=args[0])
    with refused("no run under runs/ has a loss yet"):
        plot.main([])
    with refused("there are: none yet"):
        plot.main(["a"])
    written("a", "0,0,val_loss,5.5")
    with refused("a: no step has a loss yet"):
        plot.main(["a"])
    written("b", "1,1,train_loss,5.5", "2,2,tra")
    with refused("runs/b/metrics.csv is damaged"):
        plot.main(["b"])
    assert not tool.Path("runs/plot.svg").exists()


def test_colours_of_runs_differ():
    for n in (1, 2, 3, 8, 20):
        assert len(set(curves.colours(n))) == n
