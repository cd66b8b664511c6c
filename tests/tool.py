"""What the tools behind the commands share: keys from a command line, and errors in one line."""

import csv
import os
import re
import sys
from pathlib import Path

import jax

import train_gpt
from sharding import InputError


def keys_of(argv: list[str]) -> dict:
    """--name=value as {name: value}, --name as true. Raises InputError."""
    for word in argv:
        if not word.startswith("--") and "=" not in word:
            run = f", did you mean --run={word}?" if Path("runs", word).is_dir() else ""
            raise InputError(f"{word}: keys are --name=value{run}")
    words = (word.removeprefix("--").partition("=") for word in argv)
    return {name: value if given else "true" for name, given, value in words}


def runs(file: str = "log.txt") -> list[str]:
    """Names of the runs that have such a file; one may be a path, like sweep/a."""
    return sorted(str(path.parent.relative_to("runs")) for path in Path("runs").rglob(file))


def line(error: BaseException) -> str:
    """What an error says, in one line, with its kind if that is not one for users."""
    text = str(error).strip().partition("\n")[0]
    kind = "" if isinstance(error, (InputError, OSError)) else type(error).__name__
    return ": ".join(word for word in (kind, text) if word)


def file_of(keys: dict, name: str, default: str = "") -> str:
    """Takes --name=FILE out of the keys. Raises InputError early, not behind minutes of work."""
    path = keys.pop(name, default)
    if path == "true":
        raise InputError(f"--{name}: which file? --{name}=FILE")
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise InputError(f"--{name}={path}: no file can be there")
    return path


def write_csv(path: str, rows: list[dict]):
    """Rows under a header of all their keys, if there is a path."""
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(n for row in rows for n in row))
            writer.writeheader()
            writer.writerows(rows)


def run(main):
    """Ends Python with main(arguments)'s status; what the user can mend is one line and 2, Ctrl-C
    is 130. With --help it is what the file says of itself."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        sys.exit(print(sys.modules["__main__"].__doc__))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # DataError is the same as InputError
        hints = [hint for words, hint in train_gpt.HINTS.items() if re.search(words, str(error))]
        if not (hints or isinstance(error, (InputError, OSError))):
            raise
        print(*hints[:1], line(error), file=sys.stderr, flush=True)
        sys.stdout.flush()
        if jax.distributed.is_initialized():  # whose end would wait, for minutes, for the others
            os._exit(2)
        sys.exit(2)
