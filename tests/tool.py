"""What the tools behind the commands share: keys from a command line, and errors in one line."""

import csv
import sys

from sharding import InputError


def keys_of(argv: list[str]) -> dict:
    """--name=value as {name: value}, --name as true."""
    words = (word.removeprefix("--").partition("=") for word in argv)
    return {name: value if given else "true" for name, given, value in words}


def write_csv(path: str, rows: list[dict]):
    """Rows under a header of all their keys, if there is a path."""
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(n for row in rows for n in row))
            writer.writeheader()
            writer.writerows(rows)


def run(main):
    """Ends Python with main(arguments)'s status; what the user can mend is one line and 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, OSError) as error:  # InputError is DataError, too
        sys.exit(print(str(error).strip().partition("\n")[0], file=sys.stderr) or 2)
