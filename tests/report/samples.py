"""Contents of reports as runs leave them: an ordinary one, one with hostile names, a large one, an empty one."""

import math
import random

FORMATS = {
    "fp16": {"smallest": -24, "normal": -14, "largest": 15},
    "bf16": {"smallest": -133, "normal": -126, "largest": 127},
    "e4m3": {"smallest": -9, "normal": -6, "largest": 8},
    "e5m2": {"smallest": -16, "normal": -14, "largest": 15},
}
HOSTILE_NAMES = (
    '<img src=x onerror="window.pwned=1">',
    "</script><script>window.pwned=2</script>",
    '"><svg onload=window.pwned=3>',
    "' onfocus='window.pwned=4' autofocus='",
    "javascript:window.pwned=5",
    "<!-- <script>",
    "{{ 7 * 7 }}{% raw %}",
    "two\nlines\tand\u2028a separator",
    "שכבה.ראשונה",
    "model.🔥.\u202eright-to-left",
    "model." + "very_long_segment." * 12 + "weight",
    "lone \ud800 surrogate",
    "&lt;b&gt;&amp;",
)


def report(*runs):
    return {
        "version": 1,
        "title": "precision report",
        "made": "2026-11-28 04:10 UTC",
        "runs": list(runs),
        "formats": FORMATS,
    }


def layer_names(count):
    kinds = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = [f"model.blocks.{k // len(kinds)}.{kinds[k % len(kinds)]}" for k in range(max(count - 3, 0))]
    return ["model.embed", *blocks, "model.norm", "model.head"][:count]


def grid(start, end, most):
    """At most so many bins from start to end, in whole steps."""
    count = min(most, end - start)
    return [start + (end - start) * k // count for k in range(count + 1)]


def curve_of(start, end, noise, drop=0.0):
    edges = grid(start, end, 600)
    loss, scale, skipped = [], [], []
    level = 65536.0
    for k in range(len(edges) - 1):
        progress = k / max(len(edges) - 2, 1)
        loss.append((2.3 - drop) * math.exp(-3.5 * progress) + 0.12 + noise.gauss(0, 0.03))
        lost = int(k < 2 or noise.random() < 0.006)
        level = level / 2 if lost else level * 2 if k % 150 == 149 else level
        scale.append(level)
        skipped.append(lost)
    spread = [abs(noise.gauss(0.1, 0.06)) + 0.02 for _ in loss]
    low = [max(x - s, 0.01) for x, s in zip(loss, spread, strict=True)]
    high = [x + 1.4 * s for x, s in zip(loss, spread, strict=True)]
    return {"edges": edges, "loss": loss, "loss_min": low, "loss_max": high, "scale": scale, "skipped": skipped}


def row_of(label, layers, number, span, edges, noise, moved_at):
    is_norm, is_moved = "norm" in label, number % 7 == 2
    start, end = span
    first = "fp32" if is_norm or "head" in label else "fp16"
    spans = [[start, moved_at, first], [moved_at, end, "bf16"]] if is_moved else [[start, end, first]]
    depth, drift = noise.random(), 0.0
    row = {"label": label, "layers": layers, "spans": [span for span in spans if span[0] < span[1]]}
    row |= {key: [] for key in ("underflow_rate", "headroom_bits", "grad_cosine", "sqnr_db")}
    for left in edges[:-1]:
        in_fp16 = first == "fp16" and not (is_moved and left >= moved_at)
        missing = number % 11 == 5 and left < start + (end - start) // 3
        drift = 0.95 * drift + noise.gauss(0, 0.08)
        rate = min(10 ** (-4 + 3.7 * depth + drift), 0.95) if in_fp16 else 0.0
        bits = 9 - 8 * depth + 2 * drift if in_fp16 else 100.0
        row["underflow_rate"].append(None if missing else rate if rate > 1e-4 else 0.0)
        row["headroom_bits"].append(None if missing else bits)
        row["grad_cosine"].append(None if missing else 1 - 10 ** (-6 + 4.2 * depth + drift))
        row["sqnr_db"].append(None if missing or left % 3 else (66 if in_fp16 else 48) - 25 * depth + drift)
    return row


def rows_of(names, most, span, edges, noise, moved_at):
    size = math.ceil(len(names) / most)
    groups = [names[k : k + size] for k in range(0, len(names), size)]
    return [
        row_of(group[0] if len(group) == 1 else f"{group[0]} +{len(group) - 1}", group, k, span, edges, noise, moved_at)
        for k, group in enumerate(groups)
    ]


def histogram_of(layer, number, step, noise):
    def counted(center, width, count):
        lowest = int(center - 4 * width)
        bell = [int(count * math.exp(-0.5 * ((lowest + k - center) / width) ** 2)) for k in range(int(8 * width))]
        return {"lowest": lowest, "counts": [int(x * noise.uniform(0.8, 1.2)) for x in bell], "zeros": count // 20}

    gradient = counted(-18 - 2.2 * number, 3.5, 200_000)
    output = counted(-2 + number % 5, 2.5, 400_000) if number % 4 != 3 else None
    name = "bf16" if number % 5 == 2 else "fp16"
    return {
        "layer": layer,
        "format": name,
        "step": step,
        "loss_scale": 65536.0,
        "gradient": gradient,
        "output": output,
    }


def alerts_of(names, step):
    worst, other = names[len(names) // 2], names[-1]
    return [
        {
            "level": "error",
            "title": "The forward overflows in fp16",
            "text": "In fp32 the largest output is 3.06e+06; fp16 ends at 65,504. The step was skipped.",
            "advice": "Compute the layer, and where its output goes, in bf16.",
            "layer": worst,
            "step": step,
            "count": 3,
            "of": "times",
        },
        {
            "level": "warning",
            "title": "A large share of the gradient vanishes",
            "text": "12 % of its gradient elements are zero in fp16 at a loss scale of 65,536, in 9 of 24 samples.",
            "advice": "Raise the loss scale or compute the layer in bf16.",
            "layer": other,
            "step": step * 2,
            "count": 9,
            "of": "times",
        },
        {
            "level": "note",
            "title": "The loss scale was searched in the first steps",
            "text": "2 steps were skipped until a scale of 16,384 was found. This is usual and accuses no layer.",
            "advice": "",
            "layer": None,
            "step": 0,
            "count": 2,
            "of": "times",
        },
    ]


def sample_run(name, layers=24, steps=264, seed=0, start=0, state="finished", drop=0.0):
    """A run of fp16 in which some layers move to bf16 after a third of the time."""
    noise, names = random.Random(seed), layer_names(layers)
    span, edges = (start, start + steps), grid(start, start + steps, 60)
    moved_at = start + max(steps * (3 + seed) // 9, 1)
    rows = rows_of(names, 150, span, edges, noise, min(moved_at, start + steps))
    moved = [layer for row in rows if len(row["spans"]) > 1 for layer in row["layers"]]
    curve = curve_of(*span, noise, drop)
    return {
        "name": name,
        "status": {"state": state, "message": "MixPrecError: no finite step" if state == "failed" else ""},
        "facts": [
            {"label": "optimizer steps", "value": f"{steps:,}", "hint": f"{sum(curve['skipped'])} skipped"},
            {"label": "last loss", "value": f"{curve['loss'][-1]:.3f}", "hint": "mean of the last 10 steps"},
            {"label": "loss scale", "value": f"{curve['scale'][-1]:,.0f}", "hint": "started at 65,536"},
            {"label": "16-bit arithmetic", "value": "93 %", "hint": "of all flops"},
            {"label": "overflows", "value": "3", "hint": "1 layer"},
            {"label": "worst underflow", "value": "12 %", "hint": names[-1]},
        ],
        "alerts": alerts_of(names, start + max(steps // 9, 1)),
        "watched": ["OverflowMonitor", "UnderflowMonitor", "FidelityMonitor"],
        "span": list(span),
        "curve": curve,
        "moves": moves_of(moved, moved_at, span),
        "rows": rows,
        "samples": {"edges": edges},
        "histograms": [histogram_of(layer, k, moved_at, noise) for k, layer in enumerate(names[:12:2])],
        "assignment": [assignment_of(layer, layer in moved, layers) for layer in names],
        "arithmetic": [
            {"format": "fp16", "share": 0.71},
            {"format": "bf16", "share": 0.22},
            {"format": "fp32", "share": 0.07},
        ],
        "environment": [["torch", "2.14.1"], ["lightning", "2.6.6"], ["device", "NVIDIA H100 80GB HBM3"]],
    }


def moves_of(moved, step, span):
    if not moved or step >= span[1]:
        return []
    reason = "gradients of the layers before it vanish"
    head = [{"step": step, "from": "fp16", "to": "bf16", "layers": moved, "reason": reason}]
    later = min(step + (span[1] - span[0]) // 3, span[1] - 1)
    return [*head, {"step": later, "from": "fp32", "to": "fp16", "layers": moved[:1], "reason": "trial: headroom"}]


def assignment_of(layer, is_moved, layers):
    is_wide = "norm" in layer or "head" in layer
    return {
        "layer": layer,
        "type": "LayerNorm" if "norm" in layer else "Linear",
        "parameters": 768 if "norm" in layer else 589_824,
        "param": "fp32",
        "compute": "fp32" if is_wide else "bf16" if is_moved else "fp16",
        "output": "input" if "norm" in layer else "",
        "rule": "model.**.norm*: c=fp32,o=input" if "norm" in layer else "learned" if is_moved else "default",
        "flops": None if "norm" in layer else 1 / layers,
    }


def sample():
    return report(sample_run("version_3"))


def pair():
    first = sample_run("version_3")
    second = sample_run("version_4", layers=25, steps=330, seed=2, drop=0.4)
    second["assignment"][5]["compute"] = second["assignment"][6]["compute"] = "bf16"
    second["facts"][1]["value"] = "0.142"
    return report(first, second)


def large(noisy=False):
    """1,000 layers in 150 rows, 600 points, 60 cells; noisy: values that jump from cell to cell, the worst to pack."""
    run = sample_run("large", layers=1000, steps=120_000, seed=5)
    noise = random.Random(1)
    for row in run["rows"] if noisy else []:
        row["underflow_rate"] = [10 ** noise.uniform(-4, 0) for _ in row["underflow_rate"]]
        row["headroom_bits"] = [noise.uniform(-2, 12) for _ in row["headroom_bits"]]
    return report(run)


def hostile():
    """Every text that a user or a model can put into a report is a hostile one."""
    names = list(HOSTILE_NAMES)
    run = sample_run(names[0], layers=len(names), steps=100, seed=3)
    renamed = dict(zip(layer_names(len(names)), names, strict=True))
    for row in run["rows"]:
        row["label"], row["layers"] = renamed[row["label"]], [renamed[layer] for layer in row["layers"]]
    for each in [*run["histograms"], *run["assignment"], *run["alerts"]]:
        each["layer"] = renamed.get(each["layer"])
    for each in run["assignment"]:
        each["rule"], each["type"], each["output"] = names[1], names[2], names[0]
    for each in run["alerts"]:
        each["title"], each["text"], each["advice"] = names[1], names[2], names[3]
    for move in run["moves"]:
        move["layers"], move["reason"], move["to"] = names, names[1], names[0]
    run["status"] = {"state": "failed", "message": names[1] + names[0]}
    run["facts"] = [{"label": name, "value": name, "hint": name} for name in names[:5]]
    run["watched"], run["environment"] = names, [[name, name] for name in names]
    run["arithmetic"] = [{"format": names[0], "share": 0.5}, {"format": names[2], "share": 0.5}]
    run["rows"][0]["spans"][0][2] = names[1]
    run["histograms"][0]["format"] = names[0]
    return report(run)


def empty():
    """A run that ended before anything was recorded."""
    run = sample_run("empty", layers=1, steps=1)
    run |= {key: [] for key in ("facts", "alerts", "watched", "moves", "rows", "histograms", "assignment")}
    nothing = {"loss": [None], "loss_min": [None], "loss_max": [None], "scale": [None], "skipped": [0]}
    run |= {"arithmetic": [], "environment": [], "curve": {"edges": [0, 1], **nothing}}
    return report(run)
