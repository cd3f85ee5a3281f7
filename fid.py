"""How far are generated pictures from real ones? One number, and beside it all that it depends on.

    python fid.py --ckpt out/digits/ckpt.pt --nfe 1          # against the checkpoint's own training data
    python fid.py --ckpt out/digits/ckpt.pt --grid 1,0.55,0 --sampler consistency --json digits.json
    python fid.py --ckpt out/mnist/ckpt.pt --ref data/other --num 10000 --labels balanced --raw

Both sets of pictures become rows of numbers (features). Each set of rows is summarised by its mean μ and
covariance Σ, and the distance is that of the two normal distributions which have them:

    d² = |μ1 - μ2|² + tr(Σ1 + Σ2 - 2·(Σ1·Σ2)^½)

The features decide what it means. With those of Inception-v3 it is the FID of the papers. With bare
pixels, all that is here so far, it is a "Fréchet distance on pixels": a thermometer for tiny pictures,
never an FID.
"""
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import sample

# ------------------------------------------------------------------ the distance


def frechet_distance(mu1, cov1, mu2, cov2):
    """The d² above, a float >= 0 in the features' unit squared.

    mu (d,), cov (d, d), numpy or torch, computed in float64; d = 1 may come as plain numbers.
    Sources: Dowson & Landau 1982 for the formula, Heusel et al. 2017, eq. 6, for its use on pictures.
    ValueError if the dimensions disagree, or a covariance is not square, symmetric and finite.
    """
    mu1, A1, trace1 = _gaussian(mu1, cov1, "first")
    mu2, A2, trace2 = _gaussian(mu2, cov2, "second")
    if len(mu1) != len(mu2):
        raise ValueError(f"the first distribution has {len(mu1)} dimensions, the second {len(mu2)}: "
                         "compare the same features of pictures of the same size")
    # With Σ1 = A1·A1ᵀ and Σ2 = A2·A2ᵀ, the eigenvalues of Σ1·Σ2 are the squared singular values of
    # A1ᵀ·A2, so the trace of its root is their plain sum. No root of a non-symmetric matrix is taken:
    # nothing turns complex, the diagonal needs no ridge, and fewer pictures than dimensions do no harm.
    root = np.linalg.svd(A1.T @ A2, compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + (trace1 + trace2 - 2 * root)
    return max(0.0, float(distance))            # d² >= 0, but rounding can take it below, by 1e-16·tr Σ


def _gaussian(mu, cov, which):
    """-> mu (d,), A (d, d) with A·Aᵀ = cov, and tr cov; numpy, float64."""
    mu, cov = _float64(mu).numpy().reshape(-1), _float64(cov).numpy()
    d = len(mu)
    cov = cov.reshape(1, 1) if d == cov.size == 1 else cov      # numpy gives a bare number for d = 1
    if d == 0 or cov.shape != (d, d):
        raise ValueError(f"the {which} mean has {d} dimensions, its covariance shape {cov.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        raise ValueError(f"the {which} mean or covariance holds NaN or infinity")
    if abs(cov - cov.T).max() > 1e-5 * abs(cov).max():         # eigh reads one half and never tells
        raise ValueError(f"the {which} covariance is not symmetric")
    w, v = np.linalg.eigh(cov)                                                            # (d,), (d, d)
    # Eigenvalues that ought to be 0 come out as ± rounding errors, and the root makes 1e-8 of 1e-16.
    # With fewer pictures than features there are many of those, and their sum would show.
    w = np.where(w < d * 2.2e-16 * w.max(), 0, w).clip(min=0)
    return mu, v * np.sqrt(w), cov.trace()


def _float64(x):
    if torch.is_tensor(x):
        return x.detach().cpu().double()          # to the CPU first: not every device has float64
    return torch.tensor(np.asarray(x, dtype=np.float64))


# ------------------------------------------------------------------ mean and covariance, batch by batch


class RunningStats:
    """.n, .mean (dim,) and .cov() (dim, dim) of rows that are never in memory together, float64.

    E[x²] - E[x]² would cancel where the mean is large beside the spread. Kept instead is the scatter
    about the mean so far, Σ (x - mean)(x - mean)ᵀ, corrected when the mean moves (Chan et al. 1983).
    """

    def __init__(self, dim):
        self.dim, self.n = int(dim), 0
        self.mean = torch.zeros(self.dim, dtype=torch.float64)
        self.scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)

    def update(self, features):
        """Add rows (n, dim), n >= 0, torch or numpy. ValueError for another width, NaN or infinity."""
        x = _float64(features)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"expected features of shape (n, {self.dim}), got {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("the features hold NaN or infinity: look at the pictures they come from")
        centre = x.mean(0)
        return self._add(len(x), centre, (x - centre).T @ (x - centre))

    def merge(self, other):
        """Add all rows that another RunningStats has seen. ValueError for another width."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of {other.dim} features into those of {self.dim}")
        return self._add(other.n, other.mean, other.scatter)

    def _add(self, n, mean, scatter):
        if n:                                                      # the mean of no rows is NaN
            total, move = self.n + n, mean - self.mean
            self.scatter = self.scatter + scatter + torch.outer(move, move) * (self.n * n / total)
            self.mean = self.mean + move * (n / total)
            self.n = total
        return self

    def cov(self, ddof=1):
        """Covariance with divisor n - ddof. ValueError for n <= 1: one row has no spread."""
        if self.n <= max(1, ddof):
            raise ValueError(f"a covariance needs at least {max(1, ddof) + 1} pictures, got {self.n}")
        return self.scatter / (self.n - ddof)

    def state(self):
        """n, mean and scatter as one float64 tensor (1 + dim + dim²,)."""
        return torch.cat([self.mean.new_tensor([self.n]), self.mean, self.scatter.flatten()])

    def all_merge(self, device="cpu"):
        """A new RunningStats of the rows of all torch.distributed ranks, the same bits on each.

        All ranks must call it. device: "cuda" for NCCL, which does not send from the CPU.
        """
        mine = self.state().to(device)
        states = [mine]
        if dist.is_available() and dist.is_initialized():
            states = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(states, mine)
        everyone = RunningStats(self.dim)
        for state in states:                                # in the order of ranks: all round alike
            n, mean, scatter = state.cpu().split([1, self.dim, self.dim ** 2])
            everyone._add(int(n), mean, scatter.reshape(self.dim, self.dim))
        return everyone


# ------------------------------------------------------------------ features by name


def pixels(pictures):
    """uint8 (n, C, H, W) -> the pixels themselves, u/127.5 - 1 in [-1, 1], float64 (n, C·H·W).

    ValueError above 3,072 numbers a picture (3x32x32): there the covariance outgrows its use.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4:
        raise ValueError(f"expected uint8 (n, C, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
    if (dim := math.prod(pictures.shape[1:])) > 3072:
        raise ValueError(f"the distance on pixels is for tiny pictures: at most 3072 numbers, not {dim}")
    return pictures.flatten(1).double() / 127.5 - 1


FEATURES = {"pixels": pixels}                       # name: uint8 pictures (n, C, H, W) -> rows (n, dim)
TITLES = {"pixels": "Fréchet distance on pixels"}   # what the distance between them may be called


def statistics(batches, features="pixels", total=None, what="pictures"):
    """RunningStats of an iterable of uint8 batches (b, C, H, W), each looked at once and let go."""
    stats = None
    with tqdm(total=total, desc=what, unit="img", disable=None, leave=False) as bar:
        for batch in batches:
            rows = FEATURES[features](batch)                                                # (b, dim)
            stats = (stats or RunningStats(rows.shape[1])).update(rows)
            bar.update(len(batch))
    return stats


# ------------------------------------------------------------------ a network against a data set


def evaluate(net, decode, dataset, grid, sampler="ode", num=None, labels="data", seed=0, batch=256,
             features="pixels"):
    """Draw `num` pictures (default: as many as `dataset` has) and compare them with all of `dataset`.

    net, decode: from sample.load. grid: times from 1 down to 0. labels: "data" (each class as often as
    in `dataset`), "balanced" or "random". Returns a dict of plain values: the distance and its protocol.
    ValueError for num < 2, features that do not suit, or labels "data" where class counts differ.
    """
    num = len(dataset) if num is None else num
    if num < 2:
        raise ValueError(f"a covariance needs at least 2 pictures, not {num}")
    classes, counts = net.config.classes, None
    if labels == "data":
        counts = dataset.describe()["label_counts"]
        if len(counts) != classes:
            raise ValueError(f"{dataset.name} has {len(counts)} classes, the network {classes}: labels "
                             "cannot follow the data, choose balanced or random")
    # Real pictures go through the uint8 rule of the generated ones: a range of 0 .. 16 becomes 0 .. 255.
    rows = range(0, len(dataset), batch)
    real = (data.to_uint8(dataset.pictures(slice(i, i + batch))) for i in rows)
    real = statistics(real, features, len(dataset), "reference")
    y = sample.make_labels(labels, num, classes, seed, counts)                              # (num,)
    made = sample.generate(net, decode, y, grid, sampler=sampler, seed=seed, batch=batch)
    made = statistics(made, features, num, "generated")
    value = frechet_distance(made.mean, made.cov(), real.mean, real.cov())
    return dict(metric=TITLES[features], value=value, features=features, dim=real.dim, generated=made.n,
                reference=dataset.name, reference_count=real.n, divisor="N - 1", nfe=len(grid) - 1,
                grid=[float(t) for t in grid], sampler=sampler, labels=labels, seed=seed)


def report(result):
    """The lines to print, from evaluate's dict plus "checkpoint", "step" and "weights"."""
    return """\
{metric}: {value:.4f}
  generated   {generated} pictures, NFE {nfe} (times {times}), sampler {sampler}, seed {seed}
  labels      {labels}
  weights     {weights} of {checkpoint}, step {step}
  reference   {reference}, all {reference_count} pictures
  features    {features}, {dim} numbers a picture
  covariance  divisor {divisor}""".format(times=" > ".join(f"{t:g}" for t in result["grid"]), **result)


# ------------------------------------------------------------------ command line


def flags():
    parser = data.Parser(description="The distance between a checkpoint's pictures and real ones.")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="what draws pictures")
    group.add_argument("--ref", metavar="NAME|DIR",
                       help="real pictures; if not given, those the checkpoint was trained on")
    group.add_argument("--features", choices=list(FEATURES), default="pixels", help="what is measured")
    group = parser.add_argument_group("how pictures are drawn")
    times = group.add_mutually_exclusive_group()
    times.add_argument("--nfe", type=int, help="network evaluations, equally spaced; if not given, 1")
    times.add_argument("--grid", metavar="T,T,...", help="the times themselves, e.g. 1,0.55,0")
    group.add_argument("--sampler", choices=["ode", "consistency"], default="ode",
                       help="how to get from one time to the next")
    group.add_argument("--num", type=int, help="pictures to draw; if not given, as many as are real")
    group.add_argument("--labels", choices=["data", "balanced", "random"], default="data",
                       help="classes: as often as in the reference, equally often, or by chance")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--ema", dest="weights", action="store_const", const="ema",
                         help="averaged weights, the default")
    weights.add_argument("--raw", dest="weights", action="store_const", const="raw",
                         help="weights as they were trained")
    parser.set_defaults(weights="ema")
    group.add_argument("--seed", type=int, default=0, help="picture k depends on this and k alone")
    group = parser.add_argument_group("where it runs and what it writes")
    group.add_argument("--batch", type=int, default=256, help="pictures at a time; changes no picture")
    group.add_argument("--device", help="cuda, mps or cpu; if not given, the first of these there is")
    group.add_argument("--json", type=Path, metavar="FILE", help="write value and protocol here as well")
    return parser.parse_args()


def reference(ckpt, shape, name=None):
    """The Dataset `name`, or the one the checkpoint was trained on.

    UserError if it is missing, its pictures are not of `shape` (C, H, W), or it has changed since then.
    """
    about = ckpt.get("data") or {}
    own = ckpt["config"].get("recipe", {}).get("data") or about.get("name")      # as typed to train.py
    if name is None and own is None:
        raise data.UserError("the checkpoint names no training data: name real pictures with --ref")
    try:
        dataset = data.load(own if name is None else name)
    except data.UserError as error:
        raise data.UserError(f"{error}{'' if name else ', or name real pictures with --ref'}") from None
    if tuple(dataset.shape) != tuple(shape):
        raise data.UserError(f"the checkpoint draws {list(shape)} pictures, {dataset.name} has "
                             f"{list(dataset.shape)}: choose another --ref")
    # A name may lead to other pictures by now, and then "its own training data" would be untrue.
    if name is None and dataset.describe()["label_counts"] != about.get("label_counts"):
        raise data.UserError(f"{dataset.name} is not what this checkpoint was trained on any more: "
                             f"if it is meant all the same, add --ref {own}")
    return dataset


def main():
    args = flags()
    # All that can be wrong is looked at before the first picture is drawn.
    nfe = 1 if args.nfe is None else args.nfe
    grid = sample.uniform_grid(nfe) if args.grid is None else sample.check_grid(args.grid.split(","))
    for ok, line in [
        (grid[0] == 1, f"--grid {args.grid}: pictures start from noise, so the first time must be 1"),
        (args.batch >= 1, f"--batch {args.batch}: give 1 or more"),
        (0 <= args.seed < 2**64, f"--seed {args.seed}: give 0 to 2**64 - 1"),
        (args.num is None or args.num >= 2, f"--num {args.num}: give 2 or more, one has no spread"),
        (not args.json or args.json.absolute().parent.is_dir() and not args.json.is_dir(),
         f"--json {args.json}: give a file in a folder that is there"),
        (os.environ.get("WORLD_SIZE", "1") == "1", "fid.py is one process: start it without torchrun"),
    ]:
        if not ok:
            raise data.UserError(line)
    device = sample.pick_device(args.device)
    ckpt = sample.read(args.ckpt)
    net, decode = sample.load(args.ckpt, args.weights, device)
    z = torch.zeros(1, net.config.channels, net.config.size, net.config.size, device=device)
    dataset = reference(ckpt, decode(z).shape[1:], args.ref)
    result = dict(checkpoint=str(args.ckpt), step=ckpt.get("step"), weights=args.weights)
    result |= evaluate(net, decode, dataset, grid, sampler=args.sampler, num=args.num,
                       labels=args.labels, seed=args.seed, batch=args.batch, features=args.features)
    if (few := min(result["generated"], result["reference_count"])) <= result["dim"]:
        print(f"fid.py: warning: {few} pictures do not fill {result['dim']} dimensions, which raises "
              "the value: draw more", file=sys.stderr)
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    data.run(main)
