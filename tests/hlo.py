"""Reads the text of a program that XLA compiled: what runs, how often, and what it costs."""

import re
from collections import Counter, namedtuple
from math import inf, prod

PALLAS = "attention (estimated, not by the compiler)"
WIDTH = {"16": 2, "32": 4, "64": 8}  # bytes, by the end of a type's name; others 1
COLLECTIVE = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
Instruction = namedtuple("Instruction", "name type op args text")


def parse(text: str) -> dict:
    """The computations of an HLO text, name -> instructions; that of the whole program is ENTRY."""
    found, body = {}, []
    text = re.sub(r"\n(?! *(ROOT )?%|ENTRY|\}?\n)", " ", text)  # some instructions have many lines
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
            body = found["ENTRY" if head[1] else head[2]] = []
        elif i := re.match(r" +(?:ROOT )?%([\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)(.*)", line):
            body.append(Instruction(*i.groups()))
    return found


def called(i: Instruction, roles: str) -> list[str]:  # computations named in such attributes
    found = re.findall(rf"\b(?:{roles})=\{{?((?:%[\w.-]+(?:, )?)+)", i.text)
    return re.findall(r"%([\w.-]+)", " ".join(found))


def trips(module: dict, loop: Instruction) -> int:
    """How often a while loop turns, 0 if unknown. JAX's loops count from 0, by 1."""
    if known := re.search(r"known_trip_count[^\d}]*(\d+)", loop.text):
        return int(known[1])
    test = [i for name in called(loop, "condition") for i in module[name]]
    test += [i for fusion in test for name in called(fusion, "calls") for i in module[name]]
    ends = {int(i.args) for i in test if i.op == "constant" and re.match(r"[su]32\[\]", i.type)}
    return ends.pop() if len(ends) == 1 and any("direction=LT" in i.text for i in test) else 0


def walk(module: dict, name: str = "ENTRY", times: float = 1):
    """(instruction, its runs per step) of a computation and all that it runs; a fusion is one.
    Branches share their runs evenly, as Adam acts every second step.
    """
    for i in module[name]:
        yield i, times
        runs = i.op in ("while", "conditional", "call", "async-start")
        inner = called(i, r"body|to_apply|calls|\w+_computations?") if runs else ()
        turns = {"while": trips(module, i) or 1, "conditional": 1 / max(1, len(inner))}
        for computation in inner:
            yield from walk(module, computation, times * turns.get(i.op, 1))


def size(shapes: str) -> int:  # bytes of all arrays in a type
    found = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", shapes)
    return sum(
        WIDTH.get(kind[-2:], 1) * prod(int(n) for n in d.split(",") if n) for kind, d in found
    )


def pallas_flops(i: Instruction) -> int:
    """FLOPs of a Pallas call: as declared, else of the blocks that a splash kernel goes through (a
    grid that was not shrunk to the blocks of the mask counts whole), else 0.
    """
    if declared := re.search(r'"flops":"?(\d+)', i.text):
        return int(declared[1])
    kind = re.search(r"splash_\w+?_(fwd|dq|dkv)_", i.name)
    grid = re.search(r"[{ ]s(?:8|32)\[[\d,]+?,(\d+),(\d+)\]", i.text)  # operands: of the mask,
    q = re.search(
        r"[{ ]b?f\d+\[([\d,]+),\d+,(\d+)\]", i.text.partition("constraints=")[2]
    )  # queries
    blocks = [int(n) for n in re.findall(r'block_k?[qv]\w*\\*": (\d+)', i.text)[:2]]
    if not (kind and grid and q and blocks):
        return 0
    matmuls = {"fwd": 2, "dq": 3, "dkv": 5 if i.type.count("bf16") > 2 else 4}[kind[1]]
    area = int(grid[1]) * int(grid[2]) * prod(blocks)
    return 2 * matmuls * prod(map(int, q[1].split(","))) * area * int(q[2])


def cost(text: str, pallas_speed: float = inf) -> tuple[Counter, dict, list]:
    """Of a step: cycles by (name, operation, origin), {collective: (count, bytes)}, notes. Pallas
    calls, of which the compiler knows nothing, take their FLOPs over pallas_speed, FLOPs per cycle.
    """
    module, cycles, moved, channels, notes = parse(text), Counter(), {}, set(), []
    types = {i.name: i.type for body in module.values() for i in body}
    for i, times in walk(module):
        estimate, what = re.search(r'"estimated_cycles":"?(\d+)', i.text), i.op
        spent = int(estimate[1]) if estimate else 0
        if '"tpu_custom_call"' in i.text:
            what, spent = PALLAS, pallas_flops(i) / pallas_speed
            notes += (
                [] if spent else [f"{i.name}: a Pallas call without an estimate counts nothing"]
            )
        if i.op == "while" and not trips(module, i):
            notes.append(f"{i.name}: how often it turns is unknown, it counts once")
        origin = re.search(r'op_name="([^"]*)"', i.text)
        cycles[i.name, what, origin[1] if origin else ""] += times * spent
        inside = called(i, "calls") if i.op == "fusion" else ()
        for part in [i, *(part for name in inside for part in module[name])]:
            channel = re.search(r"channel_id=(\d+)", part.text)
            if not (found := re.fullmatch(COLLECTIVE, part.op)):
                continue
            if part is not i and channel and channel[1] in channels:
                continue  # several fusions can be the parts of one; else CPUs share a channel
            if re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<)", part.text):
                continue  # of each device with itself: CPUs leave them in
            channels.add(channel and channel[1])
            given = sum(size(types.get(name, "")) for name in re.findall(r"%([\w.-]+)", part.args))
            got = size(part.type) - (given if found[2] else 0)  # a start returns its operands, too
            kind = "reduce-scatter" if "%all-reduce-scatter" in i.text else found[1]
            count, total = moved.get(kind, (0, 0))
            moved[kind] = count + times, total + times * max(given, got)
    return cycles, moved, notes
