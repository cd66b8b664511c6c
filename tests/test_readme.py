"""What the README tells people to type: its commands parse, its changes of the recipe train."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

import train_gpt
from commands import ROOT, TINY

README = (ROOT / "README.md").read_text()
CHANGES = re.findall(r"```diff\n(.*?)```", README, re.S)
OWN = {  # keys of the tools in tests/
    "train": [],
    "sample": ["prompt", "tokens", "samples", "temperature", "top_k"],
    "eval": ["hellaswag"],
    "record": ["name", "runs"],
    "plot": ["out"],
    "plan": ["topology", "only"],
    "bench": ["profile", "csv", "meshes", "stage"],
}


def code(text: str) -> list[str]:
    """Lines of blocks without a language, joined where one goes on, and the code in the text."""
    parts, found = re.split(r"^```(.*)\n", text, flags=re.M), []
    for i, part in enumerate(parts[::2]):
        if i % 2 == 0:
            found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", part)]
        elif not parts[2 * i - 1]:
            found += re.sub(r"\\\n", " ", part).splitlines()
    return found


def launched(line: str) -> list[list[str]]:
    """The arguments of every ./launch or train_gpt.py in a line of shell, or in a quote in it."""
    found, words = [], None
    for word in shlex.split(line, comments=True):
        if word in ("./launch", "train_gpt.py"):
            found.append(words := [])
        elif "./launch" in word:
            found += launched(word)
        elif word in ("&&", "||", "|", ">", "&", "done"):
            words = None
        elif words is not None:
            words.append(re.sub(r"\$\w+", "1", word.removesuffix(";")))
    return found


LINES = [line for line in code(README) if "./launch" in line or "train_gpt.py" in line]


@pytest.mark.parametrize("line", LINES)
def test_every_command_has_keys_that_there_are(line, monkeypatch):
    monkeypatch.setitem(train_gpt.STAGES, "flat", train_gpt.STAGES["smoke"])  # of a change
    for words in launched(line):
        words = [word for word in words if not word.startswith("--nproc=")]
        command = words.pop(0) if words and not words[0].startswith("--") else "train"
        if "--help" in words or command == "test":
            continue
        own = OWN[train_gpt.choose("command", command, train_gpt.COMMANDS)]
        names = [word for word in words if not word.startswith("--")]
        assert not names or command == "plot", names
        keys = dict(w.removeprefix("--").partition("=")[::2] for w in words if w not in names)
        train_gpt.Config(**{name: value for name, value in keys.items() if name not in own})


def test_no_command_is_passed_over():
    found = [words for line in LINES for words in launched(line)]
    assert len(found) >= README.count("./launch") > 20
    for words in (  # in a quote, behind a line's end, in the text
        ["--preset=speedrun", "--run=a"],
        ["--preset=speedrun", "--rows=16", "--val_row_tokens=131072", "--run=a"],
        ["plan", "--topology=v6e:2x4"],
    ):
        assert words in found, words
    assert any("--meshes" in word for words in found for word in words)


def test_every_link_and_picture_is_there():
    found = [
        (path, name)
        for path in [ROOT / "README.md", *ROOT.glob("records/*/README.md")]
        for name in re.findall(r"\]\(([^):#]+)\)", path.read_text())
    ]
    assert len(found) >= 3
    assert [name for path, name in found if not (path.parent / name).is_file()] == []
    headings = [line.lstrip("# ").lower() for line in README.splitlines() if line[:1] == "#"]
    assert {*re.findall(r"\]\(#([^)]+)\)", README)} <= {h.replace(" ", "-") for h in headings}


def test_the_shipped_record_is_what_the_readme_says():
    (folder,) = (path for path in ROOT.glob("records/*") if path.is_dir())
    logs = [path.read_text() for path in sorted(folder.glob("seed*.txt"))]
    losses = [float(re.findall(r"^step:(\d+)/\1 val_loss:(\S+)", log, re.M)[-1][1]) for log in logs]
    assert f"| {sum(losses) / len(losses):.3f} nats per byte" in README and len(losses) == 3


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
