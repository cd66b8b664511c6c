"""Tokens per second that batch() packs on one core: python tests/bench_loader.py."""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from data_fineweb import Corpus, plan

BOS, ROWS = 50256, 8


def main():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, BOS, 40_000_000).astype(np.uint16)
    lengths = np.exp(rng.normal(6, 1, len(tokens) // 400)).astype(int) + 1  # as FineWeb's, about
    starts = np.append(0, np.cumsum(lengths))
    tokens[starts[starts < len(tokens)]] = BOS
    corpus = Corpus([tokens], tokens, BOS, lambda tokens: tokens)
    for row_tokens, max_doc in ((16384, 896), (32768, 2048), (49152, 2048)):
        began = time.perf_counter()
        steps = plan(corpus, [(row_tokens, max_doc, ROWS)] * 40)
        planned = time.perf_counter() - began
        for batch in steps[:5]:
            batch(slice(ROWS))
        began = time.perf_counter()
        for batch in steps:
            batch(slice(ROWS))
        seconds = time.perf_counter() - began
        packed = len(steps) * ROWS * row_tokens / seconds
        print(
            f"{ROWS} rows x {row_tokens}: {packed / 1e6:.0f} M tokens/s packed,"
            f" {1000 * seconds / len(steps):.2f} ms a step, planned in {1000 * planned:.0f} ms"
        )


if __name__ == "__main__":
    main()
