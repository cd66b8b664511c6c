"""What the README tells people to type: its commands parse, its changes of the recipe train."""

import re
import shutil
import subprocess
import sys

import pytest

import train_gpt
from commands import ROOT, TINY

README = (ROOT / "README.md").read_text()
LINES = re.findall(
    r"^ *(?:\./launch|python train_gpt\.py|srun .*?train_gpt\.py)(.*)$", README, re.M
)
CHANGES = re.findall(r"```diff\n(.*?)```", README, re.S)
OWN = {  # keys of the tools in tests/
    "train": [],
    "sample": ["prompt", "tokens", "samples", "temperature", "top_k"],
    "eval": ["hellaswag"],
    "record": ["name", "runs", "target"],
    "plan": ["topology", "only"],
    "bench": ["profile", "csv", "meshes", "stage"],
}


def test_every_command_has_keys_that_there_are():
    assert len(LINES) > 10
    for line in LINES:
        words = line.split("#")[0].replace('"def f(x"', "text").split()
        words = [word for word in words if not word.startswith("--nproc=")]
        if "--help" in words:
            continue
        command = words.pop(0) if words and not words[0].startswith("--") else "train"
        if command == "test":
            continue
        keys = dict(word.removeprefix("--").partition("=")[::2] for word in words)
        own = OWN[train_gpt.choose("command", command, train_gpt.COMMANDS)]
        mine = {name: value for name, value in keys.items() if name not in own}
        train_gpt.Config(**{n: v.replace("$lr", "0.1").replace("$i", "1") for n, v in mine.items()})


def changed(source: str, diff: str) -> str:
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        old = "".join(line[1:] for line in hunk.splitlines(True) if line[0] in " -")
        new = "".join(line[1:] for line in hunk.splitlines(True) if line[0] in " +")
        assert source.count(old) == 1, f"not once in the source:\n{old}"
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.splitlines()[0])
def test_every_change_of_the_recipe_trains(tmp_path, change):
    for name in train_gpt.SOURCES:
        shutil.copy(ROOT / name, tmp_path)
    head, diff = change.split("\n", 1)
    name, *keys = head.removeprefix("# ").split()
    (tmp_path / name).write_text(changed((ROOT / name).read_text(), diff))
    code = "import sys, train_gpt as t; words = (w[2:].split('=') for w in sys.argv[1:]); "
    code += "print(t.train(t.Config(**dict(words))).val_loss)"
    command = [sys.executable, "-c", code, *TINY, "--steps=6", "--save_every=3", "--run=a", *keys]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 3 < float(done.stdout.split()[-1]) < 5.6


def test_there_are_three_changes():
    assert len(CHANGES) == 3
