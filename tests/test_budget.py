"""The user's limits: 1000 lines of product code, 100 columns, six files."""

import subprocess
import sys
from pathlib import Path

import train_gpt

ROOT = Path(__file__).parent.parent


def test_at_most_1000_lines_of_100_columns():
    lines = [line for name in train_gpt.SOURCES for line in (ROOT / name).read_text().splitlines()]
    assert len(lines) <= 1000
    assert max(map(len, lines)) <= 100


def test_no_other_product_file():
    found = {path.name for path in ROOT.glob("*.py")} | {"launch"}
    assert found == set(train_gpt.SOURCES)


def test_launch_is_sound_bash_and_passes_on_arguments_and_status(tmp_path):
    subprocess.run(["bash", "-n", ROOT / "launch"], check=True)
    (tmp_path / "launch").write_text((ROOT / "launch").read_text())
    (tmp_path / "train_gpt.py").write_text("import sys; print(sys.argv[1:]); sys.exit(75)")
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", tmp_path / "launch", "train", "--a=b c"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 75 and "['train', '--a=b c']" in done.stdout


def test_the_readme_has_every_key_and_command():
    text = (ROOT / "README.md").read_text()
    names = [word.split("=")[0] for word in train_gpt.KEYS.split()]
    assert all(f"`{name}`" in text for name in names)
    assert all((ROOT / f"tests/{name}.py").exists() for name in train_gpt.COMMANDS[1:])
    assert all(f"./launch {name}" in text for name in train_gpt.COMMANDS[1:])
