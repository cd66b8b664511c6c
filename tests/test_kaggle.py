"""The notebook for Kaggle, with every cell run as it is, on the CPU and with a tiny model."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "kaggle.ipynb").read_text())
EXTRA = "--layers=pvl --width=32 --heads=2 --bigram_rows=64 --val_tokens=8192"
EXTRA += " --val_row_tokens=1024 --save_every=1 --float32"
NO_JAX = "import sys\nassert not {'jax', 'jaxlib'} & set(sys.modules), 'the TPU has an owner'"


def code_cells(settings):
    """The notebook's code cells, with the settings changed, and a look at what is imported before
    the cells that train in the notebook's own process.
    """
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    own = ["in-process" in cell["metadata"].get("tags", ()) for cell in cells]
    sources = ["".join(cell["source"]) for cell in cells]
    assert "parameters" in cells[0]["metadata"]["tags"] and own == sorted(own) and any(own)
    changed = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    first = own.index(True)
    return [sources[0], changed, *sources[1:first], NO_JAX, *sources[first:]]


def execute(settings):
    """What the cells print. Fails where a cell does."""
    sources = code_cells(settings)
    try:
        import nbclient
        import nbformat
    except ImportError:  # then as a script: there is nothing in the cells but Python
        command = [sys.executable, "-c", "\n".join(sources)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Settings, and what two executions print; the second finds the run as after its first step."""
    folder = tmp_path_factory.mktemp("kaggle")
    settings = {"REPO": str(ROOT), "PRESET": "smoke", "RUN": "try", "STEPS": 2, "EXTRA": EXTRA}
    settings |= {"WORK": str(folder / "working"), "INPUT": str(folder / "input")}
    code = folder / "input/code"  # an attached data set with the code
    code.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "launch", ROOT / "pyproject.toml"]:
        shutil.copy(path, code)
    (folder / "working").mkdir()
    run = folder / "working/runs/try"
    first = execute(settings)
    shutil.copy(run / "log.txt", folder)
    shutil.rmtree(run / "checkpoints/2")
    log = (run / "log.txt").read_text().partition("step:2/2 train_loss")[0]
    (run / "log.txt").write_text(log)
    return folder, settings, first, execute(settings)


def test_the_cells_train(ran):
    folder, _, first, _ = ran
    for name, log in ("try", folder / "log.txt"), ("try-here", None):
        log = (log or folder / f"working/runs/{name}/log.txt").read_text()
        lines = [line for line in log.splitlines() if line.startswith("step:")]
        assert lines[-1].startswith("step:2/2 val_loss:") and lines[-1] in first
    assert f"code: {folder}/input/code" in first and "JAX 0." in first


def test_run_again_they_go_on(ran):
    folder, _, first, second = ran
    again = (folder / "working/runs/try/log.txt").read_text()
    losses = [
        re.findall(r"^step:\S+ \S+", x, re.M) for x in ((folder / "log.txt").read_text(), again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert "step:1/2" in first and "step:1/2" not in second and "step:2/2 train" in second
    assert re.search(r"^step:2/2 val_loss:.*\n.*try-here", second, re.M)  # that one had finished


def test_shards_are_found_attached_or_here(ran, tmp_path, capsys):
    _, settings, *_ = ran
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 9
    shard = header.tobytes() + np.arange(9, dtype="<u2").tobytes()
    names = ["val_000000", *(f"train_{i:06d}" for i in range(1, 6))]
    for place in "working/data/fineweb10B", "input/somebody/shards":
        (tmp_path / place).mkdir(parents=True)
        for name in names:
            (tmp_path / place / f"fineweb_{name}.bin").write_bytes(shard)
        settings = settings | {"PRESET": "speedrun", "WORK": str(tmp_path / "working")}
        settings["INPUT"] = str(tmp_path / "input")
        setup, changed, _, data, *_ = code_cells(settings)
        scope = {}
        exec(f"import sys\nfrom pathlib import Path\nCODE = {str(ROOT)!r}", scope)
        for source in (setup, changed, data):
            exec(source, scope)
        found = "data" in scope["keys"] and scope["keys"]["data"]
        assert found == ("input" in place and tmp_path / place)
        said = capsys.readouterr().out
        assert "5 shards in" in said if found else said.count(": 9 tokens") == 6
    assert scope["keys"]["steps"] == 2 and scope["keys"]["save_every"] == "1"


def settled(folder, **settings):
    """What the names of the settings are, in a folder of its own, and the cells by their names."""
    for name in ("working", "input"):
        (folder / name).mkdir(exist_ok=True)
    cells = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
    scope = {}
    exec(cells["settings"], scope)
    scope |= {"WORK": f"{folder}/working", "INPUT": f"{folder}/input"} | settings
    return cells, scope


def test_an_address_that_nobody_set_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells, scope = settled(tmp_path)
    for name in ("JAX_COMPILATION_CACHE_DIR", "GIT_TERMINAL_PROMPT"):  # which the cell changes
        monkeypatch.setenv(name, "")
    with pytest.raises(ValueError, match="set REPO in the settings above") as error:
        exec(cells["code"], scope)
    assert "\n" not in str(error.value) and not (tmp_path / "working/nanogpt-speedrun").exists()


def commands(tmp_path, monkeypatch, jax, **settings):
    """What the first cell runs, where such a JAX is installed; pip and the device are stand-ins."""
    monkeypatch.chdir(ROOT)  # with the code in it
    cells, scope = settled(tmp_path, **settings)
    for name in ("JAX_COMPILATION_CACHE_DIR", "GIT_TERMINAL_PROMPT"):
        monkeypatch.setenv(name, "")
    found, ran = {"jax": jax} if jax else {}, []

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    done = nullcontext(SimpleNamespace(stdout=["installed\n"], returncode=0))
    asked = SimpleNamespace(stdout="", stderr="", returncode=-11)  # a libtpu that crashes
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: ran.append(command) or done)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: asked)
    exec(cells["code"], scope)
    return [command[5:] for command in ran if command[1:5] == ["-m", "pip", "install", "-q"]]


@pytest.mark.parametrize("jax", ["0.9.2", None])
def test_an_old_jax_ends_the_cell_and_says_how_to_get_another(tmp_path, monkeypatch, capsys, jax):
    with pytest.raises(RuntimeError, match="set UPGRADE_JAX = True") as error:
        commands(tmp_path, monkeypatch, jax)
    assert f"here is {jax or 'none'}:" in str(error.value)
    assert capsys.readouterr().out == f"code: {ROOT}\n"
    (got, more) = commands(tmp_path, monkeypatch, jax, UPGRADE_JAX=True)
    assert got == ["jax[tpu]>=0.10"] and more


def test_the_images_jax_gets_its_own_libtpu(tmp_path, monkeypatch, capsys):
    """Kaggle's image puts an older one in its place, with which no Pallas kernel compiles."""
    got, small = commands(tmp_path, monkeypatch, "0.10.2")
    assert got == ["jax[tpu]==0.10.2"]
    assert "tensorboard" in " ".join(small) and "jax" not in " ".join(small)
    said = capsys.readouterr().out
    assert "exit status -11" in said and "restart the session" in said
    (small,) = commands(tmp_path, monkeypatch, "0.10.2", EXTRA="")
    assert "jax" not in " ".join(small) and "no TPU" not in capsys.readouterr().out


@pytest.mark.parametrize("runs", [[], ["a"], ["a-here"], ["a", "a-here"]])
def test_the_runs_that_are_there_are_drawn(tmp_path, monkeypatch, runs):
    """By a stand-in for matplotlib, which is not among what the project needs."""
    drawn, titles = [], []
    plot = SimpleNamespace(legend=lambda: None, set=lambda **more: titles.append(more["title"]))
    plot.plot = lambda x, y, style, label: drawn.append((x, y, label))
    stub, package = ModuleType("matplotlib.pyplot"), ModuleType("matplotlib")
    stub.subplots, stub.show = lambda *args, **more: (None, [[plot] * 2]), lambda: None
    package.pyplot = stub
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", stub)
    cells, scope = settled(tmp_path, RUN="a", Path=Path)
    for run in runs:
        folder = tmp_path / "working/runs" / run
        folder.mkdir(parents=True)
        rows = ["step,train_time_ms,name,value", "1,9,train_loss,5.5", "2,9,train_loss,4.5"]
        (folder / "metrics.csv").write_text("\n".join(rows))
    exec(cells["plot"], scope)
    assert titles == runs and drawn == [((1, 2), (5.5, 4.5), "train_loss")] * len(runs)


def test_the_file_is_valid():
    nbformat = pytest.importorskip("nbformat", reason="nbformat checks the file, and is not here")
    nbformat.validate(nbformat.from_dict(NOTEBOOK))


def test_the_file_holds_no_output_no_magic_and_no_path_but_kaggles():
    cells = NOTEBOOK["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    for cell, source in zip(cells, sources):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile(source, cell["id"], "exec")  # it is Python alone
    paths = re.findall(r"[\s\"'`](/\w[\w/]+)", "\n".join(sources))
    assert set(paths) == {"/kaggle/working", "/kaggle/input"}


def test_an_interrupted_cell_lets_the_training_save(tmp_path):
    """A second interrupt, while it saves, kills it, or it would keep the TPU."""
    cells, scope = settled(tmp_path)
    (run,) = [line for line in cells["code"].split("\n\n\n") if line.startswith("def run(")]
    hears = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: {})\n"
    hears += "print('begun', flush=True)\ntime.sleep(600)"
    code = f"import subprocess, sys\nWORK = {str(tmp_path)!r}\n{run}\n"
    for does, interrupts, says in (("sys.exit(print('saved'))", 1, "saved"), ("0", 2, "")):
        cell = [sys.executable, "-c", f"{code}run(sys.executable, '-c', {hears.format(does)!r})"]
        with subprocess.Popen(cell, stdout=-1, stderr=-1, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline().startswith("ends; a training saves")
            if interrupts == 2:
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert out.strip() == says and err.strip().endswith("KeyboardInterrupt"), err
