"""Damage of every kind to what is read from disk: one clean error, a warning, or no harm done.

Each test records how many damaged inputs it tried (`pytest -rP` shows them)."""

import os
import shutil

import jax
import numpy as np
import pytest
from test_data import BOS, VOCAB, shard_bytes, tokens_of

import data_fineweb as data
import sharding
import train_gpt
from commands import TINY
from sharding import InputError

CLEAN = data.DataError, InputError, OSError
KEYS = dict(word[2:].split("=") for word in TINY) | {"layers": "vls,k,b", "resume": True}


def tried(record_property, n: int, at_least: int):
    record_property("damaged inputs", n)
    print(f"{n} damaged inputs")
    assert n >= at_least


def refused(f, *args) -> bool:
    """Whether f(*args) gives a clean error: one that fits in a line. Any other one is raised."""
    try:
        f(*args)
        return False
    except CLEAN as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, error
        return True


def damages(content: bytes, random) -> dict:
    """What may become of a file's content; None: it is gone, "directory": one is in its place."""
    noise = bytearray(content)
    for i in random.integers(0, max(1, len(content)), 8 if content else 0):
        noise[i] ^= random.integers(1, 256)
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "a byte short": content[:-1],
        "zeros": bytes(len(content)),
        "random": random.bytes(len(content)),
        "some bytes": bytes(noise),
        "gone": None,
        "directory": "directory",
    }


def put(path, content):
    if path.is_file():
        path.unlink()
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


def test_shards(tmp_path, record_property):
    """Every int of the header altered, every kind of end, noise: refused, or tokens in range."""
    random, good, path, n = np.random.default_rng(1), shard_bytes(tokens_of(400)), tmp_path / "x", 0
    read = lambda: data.read_shard(path, VOCAB)

    def outcome(content):
        nonlocal n
        n += 1
        put(path, content)
        if refused(read):
            return "refused"
        tokens = np.array(read())
        assert 0 < len(tokens) <= (len(content) - 1024) // 2 and tokens.max() < VOCAB
        return "same" if (tokens == tokens_of(400)[: len(tokens)]).all() else "other"

    for i in range(256):  # magic, version and count are checked, the rest is not in use
        for value in (
            0,
            -1,
            1,
            399,
            401,
            2**31 - 1,
            -(2**31),
            *random.integers(-(2**31), 2**31, 3),
        ):
            header = np.frombuffer(good[:1024], "<i4").copy()
            was, header[i] = header[i], value
            harmless = value == was or i > 2 or (i == 2 and 0 < value <= 400)
            want = "same" if harmless else "refused"
            assert outcome(header.tobytes() + good[1024:]) == want, (i, value)
    for size in {0, 1, 2, 3, 4, 1020, 1022, 1023, 1024, 1025, 1026, len(good) - 2, len(good) - 1}:
        assert outcome(good[:size]) == "refused", size
    assert outcome(good + b"x") == "same"  # an odd byte behind the last token
    for _ in range(200):
        assert outcome(random.bytes(int(random.integers(0, 3000)))) == "refused"
        token = 1024 + 2 * int(random.integers(400))
        bad = int(random.integers(VOCAB, 65536)).to_bytes(2, "little")
        assert outcome(good[:token] + bad + good[token + 2 :]) == "refused"
    path.unlink()
    path.mkdir()
    assert refused(read)
    tried(record_property, n + 1, 2900)


def test_texts(tmp_path, record_property):
    """Text in any encoding is text, what is no file is passed over, what cannot be read is said."""
    random, n = np.random.default_rng(2), 0
    texts = [
        ("Größe, 数, \u202e…\n" * 300).encode(e, "ignore") for e in "utf-8 utf-16 cp1252".split()
    ]
    texts += ["Größe\n".encode("latin-1") * 300, b"\0" * 900, b"\xff\xfe\xed\xa0\x80" * 300, b""]
    texts += [random.bytes(int(random.integers(0, 4000))) for _ in range(40)]
    for i, text in enumerate(texts):
        n, folder = n + 1, tmp_path / f"{i}"
        folder.mkdir()
        (folder / "a.txt").write_bytes(text)
        (folder / "empty.txt").touch()
        (folder / "dangling.txt").symlink_to(folder / "nothing")
        (folder / "loop.txt").symlink_to(folder / "loop.txt")
        (folder / "directory.txt").mkdir()
        if refused(data.open_corpus, str(folder), VOCAB, BOS):
            assert len(text) < 2
        else:
            got = data.open_corpus(str(folder), VOCAB, BOS)
            tokens = np.concatenate([*got.train, got.val])
            assert sorted(tokens[tokens < 256].tolist()) == sorted(text)
    good = tmp_path / "good"
    good.mkdir()
    (good / "a.txt").write_text("words " * 900)
    (good / "b.txt").symlink_to("/proc/self/mem")  # a file whose first byte nobody can read
    if (good / "b.txt").exists():
        assert refused(data.open_corpus, str(good), VOCAB, BOS)
        n += 1
    (good / "b.txt").unlink()
    (good / "c.txt").write_text("secret")
    (good / "c.txt").chmod(0)
    assert refused(data.open_corpus, str(good), VOCAB, BOS) == (not os.access(good / "c.txt", 4))
    tried(record_property, n + 1, len(texts) + 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Config, program and states 1 and 2, which are in the checkpoints of the run `a` there."""
    folder = tmp_path_factory.mktemp("saved")
    words = " ".join(map(str, range(20000)))
    (folder / "text.txt").write_text(words)
    c = train_gpt.Config(**KEYS, run="a", data=str(folder / "text.txt"), steps=9, mesh="fsdp:1")
    run = folder / "runs/a"
    p = train_gpt.program(c, sharding.make_mesh(c.mesh))
    manager, *_ = train_gpt.opened(c, run, p)
    journal, states = train_gpt.Journal(run, c, {"step": 0, "log": 0, "csv": 0}), {}
    for step in (1, 2):
        journal.scalar(step, 1.0, "train_loss", 5.0)
        states[step] = p.init(step)
        sizes = {"log": journal.log.tell(), "csv": journal.csv.tell()}
        sizes |= {"step": step, "train_time": 1.0, "bits": int(p.bits(states[step]))}
        args = train_gpt.ocp.args.StandardSave(states[step])
        manager.save(step, args=args, custom_metadata=sizes)
    manager.close()
    journal.board.close()
    return folder, c, p, {step: jax.tree.map(np.array, state) for step, state in states.items()}


def copy(saved, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[0] / "runs/a", folder)
    return folder


def test_checkpoints(saved, tmp_path, capsys, record_property):
    """The newest, damaged in each file in turn: it or the one before it comes back, bit by bit."""
    folder, c, p, states = saved
    random, n, passed_over = np.random.default_rng(3), 0, 0
    newest = folder / "runs/a/checkpoints/2"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    for name in files:
        kinds = damages((newest / name).read_bytes(), random)
        for kind, content in kinds.items():
            run = copy(saved, tmp_path / "a")
            put(run / "checkpoints/2" / name, content)
            manager, state, meta = train_gpt.opened(c, run, p)
            n, step = n + 1, meta["step"]
            same = jax.tree.map(lambda a, b: (np.array(a) == b).all(), state, states[step])
            assert jax.tree.all(same), f"{name}, {kind}: other values came back"
            warned = "checkpoint 2 unreadable" in capsys.readouterr().out
            assert warned or step == 2 or 2 not in manager.all_steps(), f"{name}, {kind}"
            passed_over += step == 1
            manager.close()
    assert passed_over > 20  # the others are files that nothing is read from
    tried(record_property, n, 100)


def test_the_sum_of_bits_sees_the_last_of_each_array(saved):
    *_, p, states = saved
    leaves, tree = jax.tree.flatten(states[2])
    was = int(p.bits(states[2]))
    for i, leaf in enumerate(leaves):
        other = leaf.copy()
        other.view("uint32").flat[-1] ^= 1
        changed = jax.tree.unflatten(tree, [*leaves[:i], other, *leaves[i + 1 :]])
        assert int(p.bits(changed)) != was


class Reached(Exception):
    """The run goes on: it has come to compiling."""


def test_logs(saved, tmp_path, monkeypatch, record_property):
    """log.txt and metrics.csv: the run goes on without inventing text, or says what is wrong."""
    folder, c, p, _ = saved
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "program", lambda c, mesh: p)

    def reached(*_):
        raise Reached

    monkeypatch.setattr(train_gpt, "turns", reached)
    random, n, run = np.random.default_rng(4), 0, tmp_path / "runs/a"
    for name in ("log.txt", "metrics.csv"):
        content = (folder / "runs/a" / name).read_bytes()
        cases = list(damages(content, random).values())
        if name == "log.txt":  # its config: cut, of another kind, not of our keys
            at = content.index(b"\nconfig ") + 8
            cases += [content[: at + k] for k in (0, 1, 9, 99)]
            cases += [content[:at] + x + b"\n" for x in (b"[]", b"{}", b"3", b"{", b'{"a": 1}')]
        for content in cases:
            n += 1
            copy(saved, run)
            put(run / name, content)
            before = sorted(path.name for path in (run / "checkpoints").iterdir())
            try:
                assert refused(train_gpt.train, c)
            except Reached:
                assert (run / name).stat().st_size <= len(content or b"")
            after = sorted(path.name for path in (run / "checkpoints").iterdir())
            assert before == after, f"{name}: {len(before)} checkpoints, now {len(after)}"
    tried(record_property, n, 25)
