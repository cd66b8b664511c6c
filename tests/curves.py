"""Reads metrics.csv of a run, and draws losses over steps as SVG, with nothing but text."""

from math import ceil, floor

LEGEND = ("train", "steelblue"), ("validation (dots)", "firebrick"), ("target (dashes)", "black")


def read(csv: str) -> dict:
    """The curves of a metrics.csv: name -> [(step, value), ...]."""
    found = {}
    for row in csv.splitlines()[1:]:
        step, _, name, value = row.split(",")
        found.setdefault(name, []).append((int(step), float(value)))
    return found


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers."""
    units = [m * 10.0**k for k in range(-3, 7) for m in (1, 2, 5)]
    unit = min(units, key=lambda unit: abs((high - low) / unit - 6))
    return [i * unit for i in range(ceil(low / unit), floor(high / unit) + 1)]


def picture(curves: list[dict], target: float) -> str:
    """SVG of the train_loss and val_loss of each, in the range after a twentieth of the steps."""
    train, val = ([p for c in curves for p in c[name]] for name in ("train_loss", "val_loss"))
    last = max(x for x, _ in val)
    ys = [target, *(y for x, y in train + val if x >= last / 20)]
    low, high = min(ys) - 0.1, max(ys) + 0.1
    at = lambda x, y: f"{60 + 720 * x / last:.1f},{400 - 380 * (y - low) / (high - low):.1f}"

    texts = [("420,440", "step", ""), ("14,210", "loss (nats)", 'transform="rotate(-90)"')]
    texts += [(at(x, low), f"{x:g}", 'dy="18"') for x in ticks(0, last)]
    texts += [(at(0, y), f"{y:.4g}", 'dx="-20" dy="4"') for y in ticks(low, high)]
    texts += [(f"{480 + 120 * i},14", w, f'fill="{c}"') for i, (w, c) in enumerate(LEGEND)]
    words = [f'<g transform="translate({p})"><text {more}>{w}</text></g>' for p, w, more in texts]
    lines = ["M" + " ".join(at(*point) for point in curve["train_loss"]) for curve in curves]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 450">
<rect width="800" height="450" fill="white"/>
<g font-size="12" font-family="sans-serif" text-anchor="middle">
{chr(10).join(words)}
</g>
<clipPath id="box"><rect x="60" y="20" width="720" height="380"/></clipPath>
<g fill="none" clip-path="url(#box)">
<path stroke="gainsboro" d="{"".join(f"M{at(0, y)}h720" for y in ticks(low, high))}"/>
<path stroke="steelblue" stroke-opacity="0.6" d="{"".join(lines)}"/>
<path stroke="black" stroke-dasharray="6" d="M{at(0, target)}h720"/>
</g>
<g fill="none" stroke="black">
<path d="M60,20v380h720{"".join(f"M{at(x, low)}v5" for x in ticks(0, last))}"/>
<path stroke="firebrick" stroke-width="6" stroke-linecap="round"
 d="{"".join(f"M{at(x, y)}h0" for x, y in val if low < y < high)}"/>
</g>
</svg>
"""
