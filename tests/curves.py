"""Reads metrics.csv of a run, and draws losses over steps as SVG, with nothing but text."""

from html import escape
from math import ceil, floor, isfinite

LEGEND = ("train", "steelblue"), ("validation (dots)", "firebrick"), ("target (dashes)", "black")


def read(csv: str) -> dict:
    """The curves of a metrics.csv: name -> [(step, value), ...]; what is not finite is left out.
    Empty if no step is behind it."""
    found = {}
    for row in csv.removeprefix("step,train_time_ms,name,value\n").splitlines():
        step, _, name, value = row.split(",")
        if isfinite(float(value)):
            found.setdefault(name, []).append((int(step), float(value)))
    return found if "train_loss" in found else {}


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers."""
    units = [m * 10.0**k for k in range(-3, 7) for m in (1, 2, 5)]
    unit = min(units, key=lambda unit: abs((high - low) / unit - 6))
    return [i * unit for i in range(ceil(low / unit), floor(high / unit) + 1)]


def colours(n: int) -> list[str]:
    """Of n runs: around the circle of hues, every second one darker."""
    return [f"hsl({round(210 + 360 * i / n) % 360},75%,{30 + 20 * (i % 2)}%)" for i in range(n)]


def picture(curves: list[dict], target: float | None, names: list[str] = ()) -> str:
    """SVG of the train_loss and val_loss of each, in the range after a twentieth of the steps. With
    names the runs have a colour each, and a legend below, three of them in a line.
    """
    each = {n: [c.get(n, []) for c in curves] for n in ("train_loss", "val_loss")}
    points = [point for lines in each.values() for line in lines for point in line]
    last = max(x for x, _ in points)
    ys = [y for x, y in points if x >= last / 20] + [target] * (target is not None)
    low, high = min(ys) - 0.1, max(ys) + 0.1
    at = lambda x, y: f"{60 + 720 * x / last:.1f},{400 - 380 * (y - low) / (high - low):.1f}"
    tall = 450 + 20 * ceil(len(names) / 3)

    texts = [("420,440", "step", ""), ("14,210", "loss (nats)", 'transform="rotate(-90)"')]
    texts += [(at(x, low), f"{x:g}", 'dy="18"') for x in ticks(0, last)]
    texts += [(at(0, y), f"{y:.4g}", 'dx="-20" dy="4"') for y in ticks(low, high)]
    kinds = [(w, "black" if names else c) for w, c in LEGEND[: 2 + (target is not None)]]
    texts += [(f"{480 + 120 * i},14", w, f'fill="{c}"') for i, (w, c) in enumerate(kinds)]
    own = [(colour, colour) for colour in colours(len(names))]  # of a run's line and dots
    own = own or [(LEGEND[0][1], LEGEND[1][1])] * len(curves)
    for i, (name, (colour, _)) in enumerate(zip(names, own)):
        place = f"{160 + 260 * (i % 3)},{460 + 20 * (i // 3)}"
        texts.append((place, escape(name), f'fill="{colour}" font-weight="bold"'))
    words = [f'<g transform="translate({p})"><text {more}>{w}</text></g>' for p, w, more in texts]
    path = lambda d, colour, more: f'<path stroke="{colour}" {more} d="{d}"/>'
    thin, thick = 'stroke-opacity="0.6"', 'stroke-width="6" stroke-linecap="round"'
    lines, dots = [], []
    for train, val, (line, dot) in zip(*each.values(), own):
        d = "M" + " ".join(at(*point) for point in train) if train else ""
        lines.append(path(d, line, thin))
        dots.append(path("".join(f"M{at(x, y)}h0" for x, y in val if low < y < high), dot, thick))
    if target is not None:
        lines.append(path(f"M{at(0, target)}h720", LEGEND[2][1], 'stroke-dasharray="6"'))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {tall}">
<rect width="800" height="{tall}" fill="white"/>
<g font-size="12" font-family="sans-serif" text-anchor="middle">
{chr(10).join(words)}
</g>
<clipPath id="box"><rect x="60" y="20" width="720" height="380"/></clipPath>
<g fill="none" clip-path="url(#box)">
<path stroke="gainsboro" d="{"".join(f"M{at(0, y)}h720" for y in ticks(low, high))}"/>
{chr(10).join(lines)}
</g>
<g fill="none" stroke="black">
<path d="M60,20v380h720{"".join(f"M{at(x, low)}v5" for x in ticks(0, last))}"/>
{chr(10).join(dots)}
</g>
</svg>
"""
