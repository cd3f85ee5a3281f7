"""What does the curriculum buy? MeanFlow (α = 0 all along) against α-Flow, on one core in two hours:

    python data.py mnist && OMP_NUM_THREADS=1 python tests/bench_study.py          # typed again, it goes on
    python tests/bench_study.py --tables --picture assets/study.png                # from study.jsonl alone

"toy": points of a checkerboard and a small MLP; sliced Wasserstein-2 distance from 10,240 drawn points to as
many real ones (two sets of real ones: 0.013; the noise itself: 0.145). "mnist": the runs are commands, kept
in the file, `python train.py --data mnist ...`; fid.py's distance on pixels, 1,000 pictures. All distances:
averaged weights, the same noise. Warm-up and averaging are train.py's; the rate is constant, as in the paper:
where it falls at the end, a curriculum that ends late has no rate left for α = 0.

Budgets: under-trained, as the paper's are; chosen on MeanFlow alone, share ½, so that ×3 steps gain more
than a fifth at 1 NFE, twice: toy 0.186, 0.111, 0.070 (learning rate 1e-2, mean of seeds 100 to 103), mnist
100, 63, 44 (1e-3, seed 100). Fairness: each method has the rate of RATES that is best for it at the middle
budget and 1 NFE on PILOT_SEEDS, which the study does not use; α-Flow's, found with window (0, ½), holds
for all curricula. Cost is in forwards of a batch, not seconds. MeanFlow at equal FLOPs: each seed's own
distances at three budgets, joined by lines in log-log (the first prolonged to the left); for shares, runs
of fewer steps.
"""
import copy
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from loss import alpha_flow_loss, sample_times, u_target  # noqa: E402

STEPS = {"toy": 100, "mnist": 220}                      # of the smallest budget; then 3 and 9 times as many
BASE = {"toy": dict(batch=64), "mnist": dict(batch=16, lr_decay="constant", model="Ti/8")}
RATES = {"toy": (3e-3, 1e-2, 3e-2), "mnist": (3e-4, 1e-3, 3e-3)}
PILOT_SEEDS = {"toy": range(100, 110), "mnist": range(100, 101)}
SHARES, NFES = (0.0, 0.25, 0.5, 0.75), (1, 2, 16)
MEANFLOW = dict(alpha_schedule="constant", alpha_start=0.0)
HALF, WHOLE = (dict(alpha_schedule="sigmoid", alpha_window=[0.0, end]) for end in (0.5, 1.0))


def recipe_of(which, settings):
    """All settings of a run, as train.py would have them."""
    return {**train.PAPER, "warmup": settings["steps"] // 10, **BASE[which], **settings}


def forwards(which, settings):
    """What the run costs, in forwards of a batch."""
    recipe = recipe_of(which, settings)
    return sum(train.forwards_of_step(recipe, train.alpha_of(recipe, k)) for k in range(recipe["steps"]))


def runs(rows, which, settings, kind="study"):
    """{seed: distances at NFES} of the runs with these settings."""
    return {row["seed"]: list(row["distance"].values()) for row in rows
            if (row["data"], row["kind"], row["settings"]) == (which, kind, settings)}


def questions(rows, which):
    """{question: [(name, settings), ...]}: "pilot" chooses the rates; what two questions share is one run."""
    methods = ("MeanFlow", MEANFLOW), ("α-Flow (0, ½)", HALF), ("α-Flow (0, 1)", WHOLE)
    pilot = [(f"{name}, rate {rate}", dict(method, fm_ratio=0.5, steps=3 * STEPS[which], lr=rate))
             for rate in RATES[which] for name, method in methods[:2]]
    ends = [spread([d[0] for d in runs(rows, which, s, "pilot").values()])[0] for _, s in pilot]
    best = [min(zip(ends[k::2], RATES[which]))[1] for k in (0, 1)]

    def run(method, budget=3.0, **more):
        settings = dict(method, fm_ratio=0.5, steps=round(budget * STEPS[which])) | more
        return settings | dict(lr=best[method is not MEANFLOW])

    def three(share):                                   # the last: MeanFlow with α-Flow's FLOPs
        mean, alpha = run(MEANFLOW, fm_ratio=share), run(WHOLE, fm_ratio=share)
        less = run(MEANFLOW, 3 * forwards(which, alpha) / forwards(which, mean), fm_ratio=share)
        names = "MeanFlow", "α-Flow (0, 1)", "MeanFlow, fewer steps"
        return [(f"{name}, {share}", s) for name, s in zip(names, (mean, alpha, less))]

    moving = [("sigmoid", (0.0, 0.25)), ("sigmoid", (0.0, 0.5)), ("sigmoid", (0.25, 0.75)),
              ("sigmoid", (0.0, 1.0)), ("step", (0.5, 0.5)), ("linear", (0.0, 1.0)), ("cosine", (0.0, 1.0))]
    late = [{}, dict(shrink_c=True), dict(alpha_gamma=10.0), dict(shrink_c=True, alpha_gamma=10.0)]
    return {
        "pilot": pilot,
        "budget": [(f"{name}, steps ×{k}", run(method, k)) for name, method in methods for k in (1, 3, 9)],
        "share": [pair for share in SHARES for pair in three(share)],
        "schedule": [("MeanFlow", run(MEANFLOW))] + [
            (f"{name} {ab}", run(dict(alpha_schedule=name, alpha_window=list(ab)))) for name, ab in moving],
        "late weights of α-Flow (0, ½)": [(str(more or "published"), run(HALF, **more)) for more in late],
        "conflict": [(name, run(method)) for name, method in methods[::2]],
    }


def checkerboard(n, generator):
    """(n, 16, 2): n rows of 16 points in the 8 dark squares of 16, with variance 1. A row shares times and
    weight: were 1/(err + c) each point's own, the network would learn not the mean, but a frequent velocity.
    """
    column, row = (torch.randint(high, (n, 16), generator=generator) for high in (4, 2))
    corner = torch.stack([column, 2 * row + column % 2], dim=-1)
    return (corner + torch.rand(n, 16, 2, generator=generator) - 2) / math.sqrt(4 / 3)


class ToyNet(nn.Module):
    """u(z, t, r, y) of each point in z (B, 16, 2): three hidden layers of 128, at first u = 0; no y."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((10, 128), (128, 128), (128, 128), (128, 2)))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, z, t, r, y, v=None):
        """u; given v, loss.du_dt by hand, which takes half of the time."""
        angle = torch.stack([t, t - r, 2 * t, 2 * (t - r)], dim=-1)[:, None].expand(-1, z.shape[1], -1)
        h, rate = torch.cat([z, angle.sin(), angle.cos()], dim=-1), torch.tensor([1.0, 1.0, 2.0, 2.0])
        d = None if v is None else torch.cat([v, rate * angle.cos(), -rate * angle.sin()], dim=-1)
        for layer in self.layers[:-1]:
            h = layer(h)                                # then d times the slope of SiLU at h
            d = None if v is None else torch.ops.aten.silu_backward(d @ layer.weight.T, h)
            h = F.silu(h)
        return self.layers[-1](h) if v is None else d @ self.layers[-1].weight.T


def toy_du_dt(net, z, t, r, v, y):
    return net(z, t, r, y, v)


def toy_distances(net):
    """{nfe: sliced Wasserstein-2} over 64 directions, the same noise and real points for all.

    Clamped to the board, as pictures are to black and white: else one point that runs away decides.
    """
    g, angle, found = data.generator(2026), torch.arange(64) * math.pi / 64, {}
    real, z = checkerboard(640, g), torch.randn(640, 16, 2, generator=g)
    directions = torch.stack([angle.cos(), angle.sin()])
    for nfe in NFES:
        made = sample.ode(net, z, None, sample.uniform_grid(nfe)).nan_to_num().clamp(-3**0.5, 3**0.5)
        a, b = ((x.flatten(0, 1) @ directions).sort(dim=0).values for x in (made, real))
        found[nfe] = (a - b).square().mean().sqrt().item()
    return found


def conflict(net, alpha, generator, n=64):
    """How L_TFM and L_TC pull against each other on a fresh batch of 2·n rows with r < t.

    cos_tfm_tc: of their gradients, as loss.gradient_conflict has it. halves: the same, L_TFM on one half of
    the batch, L_TC on the other. cancelled: 1 - |g_TFM + g_TC| / (|g_TFM| + |g_TC|), what is lost in the sum.
    """
    gradients = []
    for _ in range(2):
        x, e = checkerboard(n, generator), torch.randn(n, 16, 2, generator=generator)
        t, r = sample_times(n, 0.0, generator=generator)
        z, v = x + t[:, None, None] * (e - x), e - x
        u, target = net(z, t, r, None), u_target(net, z, t, r, v, t, alpha, math.inf, toy_du_dt)
        for loss in ((u - v).square().mean(), (2 * (v - target) * u).mean()):
            parts = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            gradients.append(torch.cat([p.flatten() for p in parts]).double())
    fm_1, tc_1, fm_2, tc_2 = gradients
    fm, tc, cosine = fm_1 + fm_2, tc_1 + tc_2, lambda a, b: torch.cosine_similarity(a, b, dim=0).item()
    return {"cos_tfm_tc": cosine(fm, tc), "halves": (cosine(fm_1, tc_2) + cosine(fm_2, tc_1)) / 2,
            "cancelled": 1 - ((fm + tc).norm() / (fm.norm() + tc.norm())).item()}


def toy_run(settings, seed, watch):
    """Train and measure: {"distance": ...} and, if `watch`, the conflict at 40 steps."""
    torch.manual_seed(seed)
    recipe, g, net, measured = recipe_of("toy", settings), data.generator(seed), ToyNet(), []
    ema, y = copy.deepcopy(net).requires_grad_(False), torch.zeros(recipe["batch"], dtype=torch.int64)
    betas, options = (recipe["beta1"], recipe["beta2"]), {k: recipe[k] for k in ("fm_ratio", "c", "shrink_c")}
    optimizer = torch.optim.Adam(net.parameters(), recipe["lr"], betas, fused=True)
    for step in range(recipe["steps"]):
        alpha, x = train.alpha_of(recipe, step), checkerboard(recipe["batch"], g)
        if watch and step % (recipe["steps"] // 40) == 0:
            at_0, now = (conflict(net, a, data.generator(seed, step)) for a in (0.0, alpha))
            measured.append(at_0 | {f"{k}_now": v for k, v in now.items() if 0 < alpha < 1})
        alpha_flow_loss(net, x, y, alpha, generator=g, derivative=toy_du_dt, **options)[0].backward()
        optimizer.param_groups[0]["lr"] = train.lr_at(recipe, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, p in zip(ema.parameters(), net.parameters()):
                average.lerp_(p, 1 - train.ema_decay(recipe, step))
    return {"distance": toy_distances(ema), "conflict": measured}


@functools.cache
def real_mnist():
    """(the extractor, what it has measured of the real pictures, how often each class occurs)."""
    real, extractor = data.load("mnist"), fid.Extractor("pixels")
    return extractor, *fid.measure(fid.from_dataset(real), [extractor]), real.describe()["label_counts"]


def mnist_run(settings, seed, watch, out=Path("out/study")):
    """Call train.py, then measure as `fid.py --features pixels --samples 1000 --nfe ...` does."""
    steps = settings["steps"]
    flags = BASE["mnist"] | settings | dict(data="mnist", seed=seed, device="cpu", preview_every=steps)
    flags |= dict(conflict_every=steps // 40) if watch else {}
    (out / "ckpt.pt").unlink(missing_ok=True)           # of the run before
    command = ["train.py", "--out", str(out)]
    for name, value in flags.items():                   # True is a flag alone, a list is A,B
        name = "--" + name.replace("_", "-")
        command += [name] + [str(value).strip("[]").replace(" ", "")] * (value is not True)
    result, found = {"command": "python " + " ".join(command)}, {}
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], capture_output=True, text=True)
    if done.returncode:                                 # it stops where the loss is not finite
        return result | {"distance": dict.fromkeys(NFES, math.inf), "error": done.stderr[-300:]}
    (extractor, theirs, counts), (net, decode) = real_mnist(), sample.load(out / "ckpt.pt")
    labels = sample.make_labels("data", 1000, 10, 0, counts)
    for nfe in NFES:
        made = fid.from_network(net, decode, labels, sample.uniform_grid(nfe), "ode", 0, {})
        found[nfe], = fid.compare(extractor, *fid.measure(made, [extractor]), theirs).values()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return result | {"distance": found, "conflict": [row for row in log if "cos_tfm_tc" in row]}


def study(path, rows, only):
    """All runs that are not in the file yet; seeds in turn, so that half a study has something to say."""
    turns = [("pilot", which, seed) for which in STEPS for seed in PILOT_SEEDS[which]]
    for k in range(4):
        turns += [("study", "toy", 5 * k + i) for i in range(5)] + [("study", "mnist", k)] * (k < 3)
    for kind, which, seed in [turn for turn in turns if only in (None, turn[1])]:
        asked = questions(rows, which)
        pilot, watched = asked.pop("pilot"), [s for _, s in asked["conflict"]]
        for _, s in pilot if kind == "pilot" else sum(asked.values(), []):
            if seed in runs(rows, which, s, kind):
                continue
            began, watch = time.perf_counter(), s in watched and seed < {"toy": 5, "mnist": 1}[which]
            result = {"toy": toy_run, "mnist": mnist_run}[which](s, seed, watch)
            rows.append(dict(data=which, kind=kind, seed=seed, settings=s, base=BASE[which], **result,
                             forwards=forwards(which, s), seconds=time.perf_counter() - began))
            with data.replacing(path) as file:
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            print(time.strftime("%H:%M"), which, kind, seed, s, result["distance"], flush=True)


def spread(values):
    """(mean, standard deviation), also of one run or none; not finite if one diverged."""
    values = torch.tensor(values or [math.nan], dtype=torch.float64)
    return values.mean().item(), values.std(correction=min(1, len(values) - 1)).item()


def mean_flow_at(rows, which, cost):
    """{seed: distances} of MeanFlow at that cost, on the log-log lines between its three budgets."""
    curve = [s for _, s in questions(rows, which)["budget"][:3]]
    x, found = [math.log(forwards(which, s)) for s in curve], [runs(rows, which, s) for s in curve]
    k = int(math.log(cost) > x[1])                      # between budgets k and k + 1
    part = (math.log(cost) - x[k]) / (x[k + 1] - x[k])
    return {seed: [a * (b / a) ** part for a, b in zip(found[k][seed], found[k + 1][seed])]
            for seed in set.intersection(*map(set, found))}


def tables(rows):
    """Means and standard deviations over seeds. Two methods' lines cross where their ratio passes 1."""
    def cell(values):
        return "{:.3g} ± {:.2g}".format(*spread(list(values))).replace("nan ± nan", "")
    head = "| | seeds | forwards | 1 NFE | 2 NFE | 16 NFE | MeanFlow at equal FLOPs, 1 NFE | " \
           "ratio to it | 2 NFE | 16 NFE |\n" + "|---" * 10 + "|"
    for which in STEPS:
        asked = questions(rows, which)
        for title, pairs in asked.items():
            print(f"\n{which}, {title}\n\n{head}")
            for i, (name, s) in enumerate(pairs):
                ours, other = runs(rows, which, s, "pilot" if title == "pilot" else "study"), {}
                if title == "share":                    # of three rows the last costs as much as the second
                    other = runs(rows, which, pairs[i // 3 * 3 + 2][1])
                elif s["alpha_schedule"] != "constant":
                    other = mean_flow_at(rows, which, forwards(which, s))
                both = [(d, other[seed]) for seed, d in ours.items() if seed in other]
                cells = [cell(d[k] for d in ours.values()) for k in range(3)] + [cell(b[0] for _, b in both)]
                cells += [cell(a[k] / b[k] for a, b in both) for k in range(3)]
                print(f"| {name} | {len(ours)} | {forwards(which, s):,.0f} | {' | '.join(cells)} |")
        keys = "cos_tfm_tc", "halves", "cancelled"
        print(f"\n{which}, conflict over the run, median (5 to 95 %)\n\n| | " + " | ".join(keys) + " |")
        print("|---" * 4 + "|")
        for name, s in asked["conflict"]:
            found = [m for row in rows if row["settings"] == s for m in row.get("conflict", [])]
            for at, alpha in [("", "at α = 0"), ("_now", "at its α")][:1 + (name != "MeanFlow")]:
                values = [sorted(m[key + at] for m in found if m.get(key + at)) or [math.nan] for key in keys]
                cells = ["{:.2f} ({:.2f} to {:.2f})".format(*(v[int(q * len(v))] for q in (0.5, 0.05, 0.95)))
                         for v in values]
                print(f"| {name}, {alpha} | {' | '.join(cells)} |")


def picture(rows, path):
    """Distance at 1 NFE against the share of rows with r = t, drawn twice as large and reduced."""
    image = Image.new("RGB", (1600, 720), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(30)
    for left, which in ((60, "toy"), (880, "mnist")):
        pairs = questions(rows, which)["share"]
        ends = [spread([d[0] for d in runs(rows, which, s).values()]) for _, s in pairs]
        top = max([1e-9, *(mean + sd for mean, sd in ends if math.isfinite(mean))])
        pen.line([(left, 80), (left, 600), (left + 660, 600)], "black", 3)
        pen.text((left, 20), f"{which}: distance at 1 NFE, equal steps, 0 to {top:.2g}", "black", font)
        pen.text((left + 330, 680), "share of rows with r = t", "black", font, "mm")
        for i, name, colour in ((0, "MeanFlow", "#c03020"), (1, "alpha-Flow (0, 1)", "#2050a0")):
            spots = [(left + 60 + 180 * k + 12 * i, 600 - 520 * mean / top, 520 * sd / top)
                     for k, (mean, sd) in enumerate(ends[i::3]) if math.isfinite(mean)]
            pen.line([spot[:2] for spot in spots], colour, 6)
            for share, (x, y, sd) in zip(SHARES, spots):
                pen.line([(x, y - sd), (x, y + sd)], colour, 4)
                pen.text((x - 12 * i, 630), str(share), "black", font, "mm")
            pen.text((left + 400, 480 + 50 * i), name, colour, font)
    image.resize((800, 360), Image.LANCZOS).save(path)


def main():
    p = data.Parser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("study.jsonl"), help="a line a run [study.jsonl]")
    p.add_argument("--only", choices=list(STEPS), help="one of the two data sets")
    p.add_argument("--tables", action="store_true", help="print what the file holds, as Markdown")
    p.add_argument("--picture", metavar="FILE.png", help="distance against the share of rows with r = t")
    args = p.parse_args()
    text = args.out.read_text() if args.out.exists() else ""
    rows = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]    # but a last one cut short
    if args.tables:
        tables(rows)
    if args.picture:
        picture(rows, args.picture)
    if not (args.tables or args.picture):
        torch.set_num_threads(1)
        study(args.out, rows, args.only)


if __name__ == "__main__":
    data.run(main)
