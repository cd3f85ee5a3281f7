"""How far are generated pictures from real ones? Numbers, and beside them all that they depend on.

    python fid.py --ckpt out/digits/ckpt.pt --nfe 1              # against the checkpoint's own training data
    python fid.py --ckpt CKPT --nfe 2 --num 50000 --ref imagenet256 --features inception,dinov2,clip
    python fid.py --pictures samples.npz --ref VIRTUAL_imagenet256_labeled.npz --prdc --json result.json
    python fid.py --pictures my_pictures --save-stats mine.npz   # mu and sigma, for this and other tools
    torchrun --nproc_per_node=8 -- fid.py --ckpt CKPT --nfe 2 --num 50000 --ref imagenet256

Both sets of pictures become rows of numbers (features). Each set of rows is summarised by its mean μ and
covariance Σ, and the distance is that of the two normal distributions which have them:

    d² = |μ1 - μ2|² + tr(Σ1 + Σ2 - 2·(Σ1·Σ2)^½)

The features decide what it means: Inception-v3 gives the FID of the papers, DINOv2 FDD, CLIP FCD, and
bare pixels a thermometer for tiny pictures, which is never an FID. In order below: distances, statistics
batch by batch, the three networks, pictures from anywhere, references, the command line.
"""
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import sample
from data import UserError, cache_folder

# ------------------------------------------------------------------ distances between two sets of rows


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
    root = np.linalg.svd(A1.T @ A2, compute_uv=False).sum()              # (rank 1, rank 2)
    distance = ((mu1 - mu2) ** 2).sum() + (trace1 + trace2 - 2 * root)
    return max(0.0, float(distance))            # d² >= 0, but rounding can take it below, by 1e-16·tr Σ


def _gaussian(mu, cov, which):
    """-> mu (d,), A (d, rank) with A·Aᵀ = cov, and tr cov; numpy, float64."""
    mu, cov = _float64(mu).numpy().reshape(-1), _float64(cov).numpy()
    d = len(mu)
    cov = cov.reshape(1, 1) if d == cov.size == 1 else cov      # numpy gives a bare number for d = 1
    if d == 0 or cov.shape != (d, d):
        raise ValueError(f"the {which} mean has {d} dimensions, its covariance shape {cov.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        raise ValueError(f"the {which} mean or covariance holds NaN or infinity")
    if abs(cov - cov.T).max() > 1e-5 * abs(cov).max():         # eigh reads one half and never tells
        raise ValueError(f"the {which} covariance is not symmetric")
    with contextlib.suppress(np.linalg.LinAlgError):           # quick, and as exact where no axis is near 0
        A = np.linalg.cholesky(cov)
        if A.diagonal().min() ** 2 > 1e-8 * cov.diagonal().max():
            return mu, A, cov.trace()
    w, v = np.linalg.eigh(cov)                                                            # (d,), (d, d)
    if w[0] < -1e-5 * abs(w).max():                             # more than rounding, even in float32
        raise ValueError(f"the {which} covariance has negative eigenvalues, so it is none")
    # Eigenvalues that ought to be 0 come out as ± rounding errors, and the root makes 1e-8 of 1e-16.
    # With fewer pictures than features there are many of those, and their sum would show.
    large = w >= d * 2.2e-16 * w.max()
    return mu, v[:, large] * np.sqrt(w[large]), cov.trace()


def _float64(x, device="cpu"):
    x = x.detach() if torch.is_tensor(x) else torch.tensor(np.asarray(x, dtype=np.float64))
    return x.to(device).double()                  # moved first: not every device has float64


def kernel_distance(x, y, subsets=100, size=1000, seed=0):
    """KID: (mean, standard deviation) over random subsets of the unbiased squared MMD; can be negative.

    x (N, d), y (M, d): features. Kernel (a·b/d + 1)³, subsets of min(size, N, M) rows drawn without
    replacement. Unlike d² its expectation does not depend on N. Binkowski et al. 2018, section 4.
    ValueError for fewer than 2 rows or another width.
    """
    m, d = min(size, len(x), len(y)), x.shape[1]
    if m < 2 or y.shape[1] != d:
        raise ValueError("KID needs two sets of 2 or more rows of one width, got "
                         f"{tuple(x.shape)} and {tuple(y.shape)}")
    draw, values = data.generator(seed, m), []
    subsets = 1 if m == len(x) == len(y) else subsets           # each would be everything

    def some(rows):
        return rows[torch.randperm(len(rows), generator=draw)[:m].to(rows.device)].double()          # (m, d)

    def kernel(a, b):
        return (a @ b.T / d + 1) ** 3                                                     # (m, m)

    for _ in range(subsets):
        a, b = some(x), some(y)
        aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
        # A row is not compared with itself: that is what makes the estimate unbiased.
        same = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (m * (m - 1))
        values.append((same - 2 * ab.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def neighbour_metrics(real, made, k=3, k_density=5):
    """Precision, recall, density and coverage by nearest neighbours, as a dict of floats.

    real (N, d), made (M, d): features. Each row has a ball that reaches to its k-th neighbour in its own
    set. Precision: share of `made` inside a ball of `real`; recall: the converse (k = 3, Kynkäänniemi et
    al. 2019). Density: balls of `real` that hold a row of `made`, on average, over k; coverage: share of
    the balls of `real` that hold a row of `made` (k = 5, Naeem et al. 2020).
    ValueError unless N and M exceed both k.
    """
    if min(len(real), len(made)) <= max(k, k_density) or real.shape[1:] != made.shape[1:]:
        raise ValueError(f"neighbours need more than {max(k, k_density)} rows of one width in each set, got "
                         f"{tuple(real.shape)} and {tuple(made.shape)}")
    centre = real.double().mean(0)                    # far from 0, |a|² + |b|² - 2·a·b would cancel
    real, made = real.double() - centre, made.double() - centre
    (around_real, wide), (around_made,) = _radii(real, k, k_density), _radii(made, k)     # (N,), (N,), (M,)
    precise = torch.zeros(len(made), dtype=torch.bool, device=made.device)
    recalled = inside = covered = 0
    for rows, d2 in _squared_distances(real, made):                                       # d2 (rows, M)
        precise |= (d2 <= around_real[rows, None]).any(0)
        recalled += (d2 <= around_made).any(1).sum().item()
        dense = d2 < wide[rows, None]              # < as published: density 1 for identical sets
        inside += dense.sum().item()
        covered += dense.any(1).sum().item()
    return {"precision": precise.double().mean().item(), "recall": recalled / len(real),
            "density": inside / (k_density * len(made)), "coverage": covered / len(real)}


def _radii(x, *ks):
    """For each k the squared distances of all rows to their k-th neighbours, (N,)."""
    # The row itself is the nearest, at distance 0: hence k + 1.
    near = [d2.topk(max(ks) + 1, largest=False).values for _, d2 in _squared_distances(x, x)]
    return torch.cat(near)[:, ks].unbind(1)


def _squared_distances(x, y, cells=2**25):
    """Yield (slice of rows of x, their squared distances to all of y), `cells` numbers at a time."""
    x2, y2 = (x * x).sum(1), (y * y).sum(1)
    step = max(1, cells // len(y))
    for i in range(0, len(x), step):
        own = x2[i:i + step, None]                                                        # (rows, 1)
        d2 = torch.addmm(y2, x[i:i + step], y.T, alpha=-2).add_(own)                      # (rows, M)
        yield slice(i, i + step), d2.masked_fill_(d2 < 1e-12 * own, 0)      # rounding left it of equal rows


def inception_score(logits, splits=10, order="shuffled"):
    """Inception Score, (mean, population standard deviation) over splits; see RunningScore.

    logits (N, classes), float; order, splits: as in split_numbers. Salimans et al. 2016.
    """
    splits = split_numbers(len(logits), splits, order)
    return RunningScore(int(splits.max()) + 1, logits.shape[1]).update(logits, splits).value()


def split_numbers(n, splits=10, order="shuffled"):
    """Which split of the Inception Score each of n pictures belongs to, int64 (n,).

    "shuffled": `splits` equal parts after a fixed permutation (torch-fidelity's, seed 2020), because
    pictures may come sorted by class; "plain": equal parts as they come; "chunks": `splits` pictures each,
    the last part shorter (ADM: 5,000). ValueError for another order, or fewer than 1 picture or split.
    """
    if order not in ("shuffled", "plain", "chunks") or n < 1 or splits < 1:
        raise ValueError(f"{n} pictures, {splits} splits, order {order!r}: give 1 or more, and shuffled, "
                         "plain or chunks")
    if order == "chunks":
        return torch.arange(n) // splits
    splits = min(splits, n)
    sizes = np.diff([n * i // splits for i in range(splits + 1)])
    numbers = np.repeat(np.arange(splits), sizes)
    if order == "shuffled":
        numbers[np.random.RandomState(2020).permutation(n)] = numbers.copy()
    return torch.from_numpy(numbers)


# ------------------------------------------------------------------ statistics, batch by batch


def all_ranks(tensor):
    """The tensors that all torch.distributed ranks hold here, in their order; all must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [tensor]
    mine = tensor.contiguous().to("cuda" if dist.get_backend() == "nccl" else "cpu")
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    return [one.to(tensor.device) for one in all_of_them]


def rank_zero(tensor):
    """The tensors of all ranks, on rank 0 alone; None elsewhere. All must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [tensor]
    mine = tensor.contiguous().to("cuda" if dist.get_backend() == "nccl" else "cpu")
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(mine, parts)
    return parts


class RunningStats:
    """.n, .mean (dim,) and .cov() (dim, dim) of rows that are never in memory together, float64.

    E[x²] - E[x]² would cancel where the mean is large beside the spread. Kept instead is the scatter
    about the mean so far, Σ (x - mean)(x - mean)ᵀ, corrected when the mean moves (Chan et al. 1983).
    """

    def __init__(self, dim, device="cpu"):
        self.dim, self.n = int(dim), 0
        self.mean = torch.zeros(self.dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Add rows (n, dim), n >= 0, torch or numpy. ValueError for another width, NaN or infinity."""
        x = _float64(features, self.mean.device)
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
            self.scatter.add_(scatter).addr_(move, move, alpha=self.n * n / total)
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

    def all_merge(self):
        """A new RunningStats of the rows of all torch.distributed ranks, the same bits on each."""
        everyone = RunningStats(self.dim, self.mean.device)
        for state in all_ranks(self.state()):               # in the order of ranks: all round alike
            n, mean, scatter = state.split([1, self.dim, self.dim ** 2])
            everyone._add(int(n), mean, scatter.view(self.dim, self.dim))
        return everyone


class RunningScore:
    """Inception Score of logits that are never in memory together: exp(mean of KL(p(y|x) | p(y))) a split.

    The mean of KL is the mean of Σ p·log p less Σ q·log q with q the mean of p, so a split needs
    one row: [Σ p (classes numbers), Σ p·log p, n]. Rows of several processes just add up.
    """

    def __init__(self, splits, classes=1008):
        self.table = torch.zeros(splits, classes + 2, dtype=torch.float64)

    def update(self, logits, split):
        """Add logits (n, classes), of pictures in the splits `split`, int64 (n,)."""
        log_p = _float64(logits).log_softmax(1)                                           # (n, classes)
        p = log_p.exp()
        row = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones(len(p), 1, dtype=p.dtype)], 1)
        self.table.index_add_(0, split, row)
        return self

    def all_merge(self):
        """A new RunningScore of the pictures of all torch.distributed ranks."""
        everyone = RunningScore(1)
        everyone.table = torch.stack(all_ranks(self.table)).sum(0)
        return everyone

    def value(self):
        """(mean, population standard deviation) over the splits."""
        q, p_log_p = self.table[:, :-2] / self.table[:, -1:], self.table[:, -2] / self.table[:, -1]
        scores = (p_log_p - torch.xlogy(q, q).sum(1)).exp()                               # (splits,)
        return scores.mean().item(), scores.std(correction=0).item()


# ------------------------------------------------------------------ Inception-v3

# A line is a branch, ">" leads on, "|" forks, and all ends of a block are joined along the channels.
# "NAME 96 3x3" is convolution + BatchNorm + ReLU with 96 channels out, 1x1 if no kernel is given; pools
# are 3x3. What has a stride ("3x3/2", "max/2") has no padding, what has none keeps the size.
FIVE = """\
branch1x1 64
branch5x5_1 48 > branch5x5_2 64 5x5
branch3x3dbl_1 64 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3
average > branch_pool {pool}"""
SIX = """\
branch1x1 192
branch7x7_1 {c} > branch7x7_2 {c} 1x7 > branch7x7_3 192 7x1
branch7x7dbl_1 {c} > branch7x7dbl_2 {c} 7x1 > branch7x7dbl_3 {c} 1x7 > branch7x7dbl_4 {c} 7x1 > \
branch7x7dbl_5 192 1x7
average > branch_pool 192"""
SEVEN = """\
branch1x1 320
branch3x3_1 384 > branch3x3_2a 384 1x3 | branch3x3_2b 384 3x1
branch3x3dbl_1 448 > branch3x3dbl_2 384 3x3 > branch3x3dbl_3a 384 1x3 | branch3x3dbl_3b 384 3x1
{pool} > branch_pool 192"""
INCEPTION = {
    "": """\
Conv2d_1a_3x3 32 3x3/2 > Conv2d_2a_3x3 32 3x3/1 > Conv2d_2b_3x3 64 3x3 > max/2 > \
Conv2d_3b_1x1 80 > Conv2d_4a_3x3 192 3x3/1 > max/2""",
    "Mixed_5b": FIVE.format(pool=32),
    "Mixed_5c": FIVE.format(pool=64),
    "Mixed_5d": FIVE.format(pool=64),
    "Mixed_6a": """\
branch3x3 384 3x3/2
branch3x3dbl_1 64 > branch3x3dbl_2 96 3x3 > branch3x3dbl_3 96 3x3/2
max/2""",
    "Mixed_6b": SIX.format(c=128),
    "Mixed_6c": SIX.format(c=160),
    "Mixed_6d": SIX.format(c=160),
    "Mixed_6e": SIX.format(c=192),
    "Mixed_7a": """\
branch3x3_1 192 > branch3x3_2 320 3x3/2
branch7x7x3_1 192 > branch7x7x3_2 192 1x7 > branch7x7x3_3 192 7x1 > branch7x7x3_4 192 3x3/2
max/2""",
    "Mixed_7b": SEVEN.format(pool="average"),
    "Mixed_7c": SEVEN.format(pool="max"),                        # in torchvision's an average here too
}
POOLS = {
    "max/2": lambda x: F.max_pool2d(x, 3, stride=2),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    # The mean of the pixels that are there. torchvision's counts the zeros around them as well.
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
}


def _walk(table, x, step, join):
    """Lead x through the table: step(words, x) for each entry, join([...]) where ways meet."""
    ends = []
    for line in table.split("\n"):
        y = x
        for stage in line.split(" > "):
            y = join([step(fork.split(), y) for fork in stage.split(" | ")])
        ends.append(y)
    return join(ends)


def _add_layer(block, words, channels):
    """Give the module `block` the layer of one entry -> how many channels it puts out."""
    if words[0] in POOLS:
        return channels
    name, width, kernel = (words + ["1x1"])[:3]
    kernel, _, stride = kernel.partition("/")
    width, kernel = int(width), [int(k) for k in kernel.split("x")]                       # height, width
    padding = 0 if stride else [k // 2 for k in kernel]
    conv = nn.Conv2d(channels, width, kernel, int(stride or 1), padding, bias=False)
    norm = nn.BatchNorm2d(width, eps=1e-3)                               # not PyTorch's 1e-5
    block.add_module(name, nn.ModuleDict(dict(conv=conv, bn=norm)))
    return width


def _run_layer(block, words, x):
    if words[0] in POOLS:
        return POOLS[words[0]](x)
    layer = block.get_submodule(words[0])
    return F.relu(layer.bn(layer.conv(x)), inplace=True)


def _cat(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Inception(nn.Module):
    """The Inception-v3 of the FID (TensorFlow's of 2015-12-05), under the usual names of its weights.

    x (n, 3, 299, 299) from prepare_tf or prepare_pytorch_fid -> pool (n, 2048) for the FID, spatial
    (n, 2023) for the sFID, logits (n, 1008) for the Inception Score. ValueError for another size of x.
    1008 classes, no auxiliary head. Source: Szegedy et al. 2015.
    """

    def __init__(self):
        super().__init__()
        channels = 3
        for name, table in INCEPTION.items():
            if name:                                      # the first layers are in no block: "" is self
                self.add_module(name, nn.Module())
            block = self.get_submodule(name)
            channels = _walk(table, channels, lambda words, c: _add_layer(block, words, c), sum)
        self.dim = channels                                               # of pool, 2048
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x):
        if x.shape[1:] != (3, 299, 299):
            raise ValueError(f"Inception takes (n, 3, 299, 299), not {tuple(x.shape)}")
        for name, table in INCEPTION.items():
            block = self.get_submodule(name)
            x = _walk(table, x, lambda words, y: _run_layer(block, words, y), _cat)
            if name == "Mixed_6d":                                        # 7 channels of its branch1x1
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                         # (n, 17·17·7)
        pool = x.mean((2, 3))                                                             # (n, 2048)
        return pool, spatial, F.linear(pool, self.fc.weight)              # the Score leaves the bias out


# ------------------------------------------------------------------ DINOv2 and CLIP


class Scale(nn.Module):
    """x·γ, a number a channel: DINOv2's LayerScale."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    """Attention and MLP, each on what the norm makes of x and added to x, (n, T, dim) -> (n, T, dim)."""

    def __init__(self, dim, heads, clip):
        super().__init__()
        eps = 1e-5 if clip else 1e-6
        self.heads, self.clip = heads, clip
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.ls1 = nn.Identity() if clip else Scale(dim)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = nn.Identity() if clip else Scale(dim)

    def forward(self, x):
        qkv = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))            # (n, T, 3, h, d)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))                   # (n, h, T, d)
        x = x + self.ls1(self.attn.proj(y.transpose(1, 2).flatten(2)))
        y = self.mlp.fc1(self.norm2(x))                                                   # (n, T, 4·dim)
        y = y * torch.sigmoid(1.702 * y) if self.clip else F.gelu(y)                    # exact, not tanh
        return x + self.ls2(self.mlp.fc2(y))


class ViT(nn.Module):
    """A vision transformer: DINOv2, or with `out` the image half of CLIP. Names as in DINOv2's weights.

    x (n, 3, H, W) -> (n, dim), DINOv2's class token after the last norm, or (n, out), CLIP's feature,
    not yet scaled to length 1. grid: patches a side of the position table. ValueError unless H and W
    are multiples of `patch`; CLIP takes grid·patch alone.
    Sources: Dosovitskiy et al. 2021, Oquab et al. 2023, Radford et al. 2021.
    """

    def __init__(self, dim, depth, heads, patch, grid, out=None):
        super().__init__()
        clip = out is not None
        ones = () if clip else (1,)                                       # CLIP's have no batch axis
        self.patch, self.grid, self.clip, self.dim = patch, grid, clip, out or dim
        self.cls_token = nn.Parameter(torch.zeros(*ones, *ones, dim))
        self.pos_embed = nn.Parameter(torch.zeros(*ones, 1 + grid ** 2, dim))
        self.mask_token = None if clip else nn.Parameter(torch.zeros(1, dim))             # of training
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch, patch, bias=not clip)))
        self.norm_pre = nn.LayerNorm(dim) if clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(dim, heads, clip) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5 if clip else 1e-6)
        self.proj = nn.Parameter(torch.zeros(dim, out)) if clip else None

    def positions(self, height, width):
        """The position table (1, 1 + T, dim) for a picture of height x width pixels."""
        if self.clip and (height, width) != (self.grid * self.patch,) * 2:
            raise ValueError(f"CLIP takes {self.grid * self.patch}x{self.grid * self.patch} pictures, "
                             f"not {height}x{width}")
        if height % self.patch or width % self.patch:
            raise ValueError(f"{height}x{width} pixels are no whole number of patches of {self.patch}")
        h, w = height // self.patch, width // self.patch
        if height == width and h * w == self.grid ** 2:
            return self.pos_embed
        # As in the original: in float32 whatever x is, no antialias, and by scale factors, 0.1 of a
        # patch too large against rounding down. They set the sampling points: size= is something else.
        table = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = (h + 0.1) / self.grid, (w + 0.1) / self.grid
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")                 # (1, dim, h, w)
        table = table.flatten(2).mT.to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], table], dim=1)           # the class token has no place

    def forward(self, x):
        table = self.positions(*x.shape[2:])                                            # (1, 1 + T, dim)
        x = self.patch_embed.proj(x).flatten(2).mT                                        # (n, T, dim)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + table
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, 0])                                                            # (n, dim)
        return x @ self.proj if self.clip else x


# ------------------------------------------------------------------ a network from published weights

NETWORKS = {"inception": "Inception-v3 (FID)", "dinov2": "DINOv2", "clip": "CLIP"}
CLIP_NAMES = {                                      # in our names: in CLIP's, which begin with "visual."
    "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj.": "conv1.",
    "norm_pre.": "ln_pre.", "norm.": "ln_post.", "blocks.": "transformer.resblocks.",
    "norm1.": "ln_1.", "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.",
    "norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
}


def build_network(kind, state, heads=None, dtype=torch.float32):
    """The network whose published weights `state` holds, frozen and in eval mode.

    kind: "inception", "dinov2" or "clip". state: {name: tensor}, of CLIP with or without the text half.
    heads: of a ViT, as no weight tells; if not given, dim // 64, which all published ones have.
    ValueError, one line, for another kind, or if names and shapes are not those of such a network.
    """
    if kind not in NETWORKS:
        raise ValueError(f"unknown network {kind!r}: give one of {', '.join(NETWORKS)}")
    state = {str(k): v for k, v in state.items()}
    prefix = "visual." if kind == "clip" and any(k.startswith("visual.") for k in state) else ""

    def published(name):
        for part, theirs in CLIP_NAMES.items() if kind == "clip" else ():
            name = name.replace(part, theirs)
        return prefix + name

    # num_batches_tracked counts steps of training. Some published files have it, nothing here reads it.
    state = {k: v for k, v in state.items() if k.startswith(prefix) and not k.endswith("_tracked")}
    with torch.device("meta"):                                            # no memory, no initial values
        net = Inception() if kind == "inception" else _empty_vit(state, published, heads, kind == "clip")
    ours = [k for k in net.state_dict() if not k.endswith("_tracked")]
    want = {published(k): net.state_dict()[k].shape for k in ours}
    have = {k: getattr(v, "shape", None) for k, v in state.items()}
    wrong = {"missing": [k for k in want if k not in have],
             "unexpected": [k for k in have if k not in want],
             "of another shape": [k for k in want if k in have and want[k] != have[k]]}
    if any(wrong.values()):
        raise ValueError(f"not the weights of {NETWORKS[kind]}: " + "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})"
            for what, keys in wrong.items() if keys))
    weights = {k: state[published(k)].detach().to(dtype) for k in ours}
    counters = {k: torch.tensor(0) for k in net.state_dict() if k.endswith("_tracked")}
    net.load_state_dict(weights | counters, assign=True)
    return net.requires_grad_(False).eval()


def _empty_vit(state, published, heads, clip):
    """A ViT of the weights' sizes. What they lack gets any size: comparing names will tell of it."""
    def shape(name, default):
        found = getattr(state.get(published(name)), "shape", ())
        return found if len(found) == len(default) and min(found) > 0 else default

    dim, _, patch, _ = shape("patch_embed.proj.weight", (64, 3, 14, 14))
    rows = shape("pos_embed", (50, dim) if clip else (1, 50, dim))[-2]
    depth = len([k for k in state if k.endswith(published("norm1.weight").removeprefix("visual."))])
    heads = heads or max(1, dim // 64)
    if dim % heads:
        raise ValueError(f"a width of {dim} cannot be divided among {heads} heads")
    out = shape("proj", (dim, dim))[1] if clip else None
    return ViT(dim, depth, heads, patch, math.isqrt(rows - 1), out)


# ------------------------------------------------------------------ from uint8 pictures to their inputs


def _rgb(u):
    """uint8 (n, 1 or 3, H, W) -> (n, 3, H, W), grey three times. ValueError for anything else."""
    if u.dtype != torch.uint8 or u.ndim != 4 or u.shape[1] not in (1, 3):
        raise ValueError(f"expected uint8 (n, 1 or 3, H, W), got {u.dtype} {tuple(u.shape)}")
    return u.expand(-1, 3, -1, -1)


def prepare_tf(u, dtype=torch.float32):
    """For Inception, the original way: uint8 (n, 1 or 3, H, W) -> (n, 3, 299, 299) in [-1, 0.9922].

    TensorFlow 1 samples at i·in/out, half a pixel off, and blends in float32, across first, then down.
    """
    x = _rgb(u).float()
    for axis in (3, 2):
        size = x.shape[axis]
        if size != 299:
            scale = torch.tensor(size / 299, dtype=torch.float32, device=u.device)
            at = torch.arange(299, device=u.device) * scale                               # (299,)
            low = at.long()
            a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
            d = at - low
            x = a + (b - a) * (d if axis == 3 else d[:, None])
    return (x.to(dtype) - 128) / 128


def prepare_pytorch_fid(u, dtype=torch.float32):
    """For Inception, pytorch-fid's way: uint8 (n, 1 or 3, H, W) -> (n, 3, 299, 299) in [-1, 1]."""
    x = _rgb(u).to(dtype) / 255
    if x.shape[2:] != (299, 299):
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)            # no antialias
    return 2 * x - 1


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                   # mean, spread of R, G, B
CLIP_RGB = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _normalise(x, mean_std, dtype):
    """x (n, 3, H, W) in 0 .. 255 -> (x/255 - mean)/std, channel by channel."""
    mean, std = (torch.tensor(v, dtype=dtype, device=x.device).view(3, 1, 1) for v in mean_std)
    return (x.to(dtype) / 255 - mean) / std


def _pil_resize(u, height, width):
    """uint8 (n, 3, H, W) -> uint8 (n, 3, height, width), Pillow's bicubic: antialias, then rounded."""
    if u.shape[2:] == (height, width):
        return u
    pictures = (Image.fromarray(p) for p in u.permute(0, 2, 3, 1).cpu().contiguous().numpy())
    rows = [np.asarray(p.resize((width, height), Image.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).to(u.device)


def prepare_dinov2(u, dtype=torch.float32):
    """For DINOv2 as EDM2 and α-Flow do: uint8 (n, 1 or 3, H, W) -> (n, 3, 224, 224), normalised.

    Bicubic with antialias, in float32; overshoot beyond 0 .. 255 stays.
    """
    x = _rgb(u).float()
    if x.shape[2:] != (224, 224):
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
    return _normalise(x, IMAGENET, dtype)


def prepare_dinov2_pil(u, dtype=torch.float32):
    """For DINOv2 as dgm-eval does: the same with Pillow's resize, which rounds to 0, 1, .. 255."""
    return _normalise(_pil_resize(_rgb(u), 224, 224), IMAGENET, dtype)


def prepare_clip(u, dtype=torch.float32):
    """For CLIP: uint8 (n, 1 or 3, H, W) -> (n, 3, 224, 224), the short side resized, the centre cut."""
    u = _rgb(u)
    height, width = (int(224 * side / min(u.shape[2:])) for side in u.shape[2:])
    u = _pil_resize(u, height, width)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    return _normalise(u[:, :, top:top + 224, left:left + 224], CLIP_RGB, dtype)


# ------------------------------------------------------------------ features by name


def pixels(pictures):
    """uint8 (n, C, H, W) -> the pixels themselves, u/127.5 - 1 in [-1, 1], float64 (n, C·H·W).

    ValueError above 3,072 numbers a picture (3x32x32): there the covariance outgrows its use.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4:
        raise ValueError(f"expected uint8 (n, C, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
    if (dim := math.prod(pictures.shape[1:])) > 3072:
        raise ValueError(f"the distance on pixels is for tiny pictures: at most 3072 numbers, not "
                         f"{dim}; take the features of a network")
    return pictures.flatten(1).double() / 127.5 - 1


# name: its Fréchet distance, its network, how pictures are prepared for it, and the same in words
FEATURES = {
    "pixels": ("pixels", None, None, "u/127.5 - 1"),
    "inception": ("fid", "inception", prepare_tf,
                  "TF1's bilinear to 299x299 (source at i*in/out), no antialias, (u - 128)/128"),
    "inception-pytorch-fid": ("fid", "inception", prepare_pytorch_fid,
                              "bilinear to 299x299 (half-pixel centres), no antialias, u/127.5 - 1"),
    "dinov2": ("fdd", "dinov2", prepare_dinov2,
               "bicubic to 224x224, antialias, not rounded, ImageNet mean and std"),
    "dinov2-pil": ("fdd", "dinov2", prepare_dinov2_pil,
                   "PIL's bicubic to 224x224, rounded to uint8, ImageNet mean and std"),
    "clip": ("fcd", "clip", prepare_clip,
             "PIL's bicubic, short side 224, centre crop, CLIP's mean and std"),
}

TITLES = {      # what each number may be called
    "pixels": "Fréchet distance on pixels", "fid": "FID", "sfid": "sFID", "fdd": "FDD", "fcd": "FCD",
    "inception_score": "Inception Score", "kid": "KID", "precision": "precision", "recall": "recall",
    "density": "density", "coverage": "coverage",
}

WEIGHTS = {     # network: file, its sha256, where it is published
    "inception": ("pt_inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                  ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth",
                   "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                   "weights-inception-2015-12-05-6726825d.pth"]),
    "dinov2": ("dinov2_vitl14_pretrain.pth",
               "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
               ["https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"]),
    "clip": ("ViT-B-32.pt",
             "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
             ["https://openaipublic.azureedge.net/clip/models/"
              "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"]),
}


def find_weights(network, given=None):
    """(path, sha256) of a network's weights: `given` (a file, or a folder that holds it), cache, download.

    A given file may be any: its hash goes into every protocol. UserError if there is none to be had.
    """
    name, published, addresses = WEIGHTS[network]
    if given is not None:
        given = Path(given)
        if not given.exists():
            raise UserError(f"--weights {given} does not exist: give a folder that holds {name}, or the file")
        if given.is_file() or (given / name).is_file():
            path = given if given.is_file() else given / name
            return path, data.checksum_of(path)
    path = cache_folder() / name
    if not path.is_file():
        data.fetch(name, published, addresses, path.parent,
                   f"get {addresses[0]} in another way and put it at {path}, or name it with --weights FILE")
    elif data.checksum_of(path) != published:
        raise UserError(f"{path} is not the published file: delete it, or name it with --weights")
    return path, published


class Extractor:
    """From pictures to features: uint8 (n, C, H, W) -> {part: rows (n, dim)} on the CPU or `device`.

    name: one of FEATURES. Parts: "features", and of Inception also "spatial" (for sFID) and "logits".
    .protocol: what must be said beside every number. Loads the network; UserError as in find_weights, or
    if the file holds another network.
    """

    def __init__(self, name, weights=None, device="cpu"):
        if name not in FEATURES:
            raise UserError(f"unknown features {name!r}: give some of {', '.join(FEATURES)}")
        self.name, self.device, self.net = name, torch.device(device), None
        self.stats_device = torch.device("cpu") if self.device.type == "mps" else self.device   # no float64
        self.metric, self.network, self.prepare, how = FEATURES[name]
        self.protocol = {"features": name, "preprocessing": how}
        if self.network:
            path, sha256 = find_weights(self.network, weights)
            try:
                self.net = build_network(self.network, sample.read_tensors(path)).to(self.device)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
            if self.device.type == "cpu":
                self.net.to(memory_format=torch.channels_last)      # a third less time there
            published = sha256 == WEIGHTS[self.network][1]
            self.protocol |= {"weights": path.name, "weights_sha256": sha256, "published_weights": published}
        self.protocol["dtype"] = "float32 network, float64 statistics" if self.net else "float64"

    def dims(self, shape):
        """{part: dim} of the parts that get a mean and a covariance, for pictures of `shape` (C, H, W)."""
        if not self.net:
            return {"features": pixels(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]}
        return {"features": self.net.dim} | ({"spatial": 2023} if self.network == "inception" else {})

    @torch.no_grad()
    def __call__(self, pictures):
        if not self.net:
            return {"features": pixels(pictures)}
        # On a CPU 16 at a time: with 64 no layer finds what the last one wrote in a cache, at 1.3 the time.
        pieces, found = pictures.split(16 if self.device.type == "cpu" else len(pictures)), []
        with exact_float32():
            for piece in pieces:
                x = self.prepare(piece.to(self.device, non_blocking=True), next(self.net.parameters()).dtype)
                rows = self.net(x)
                found.append(rows if isinstance(rows, tuple) else (rows,))
        return dict(zip(("features", "spatial", "logits"), map(torch.cat, zip(*found))))


@contextlib.contextmanager
def exact_float32():
    """No TF32 inside: its 10 bits move features by 1e-3, more than some methods differ."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


# ------------------------------------------------------------------ pictures from anywhere


@dataclasses.dataclass
class Pictures:
    """A set of pictures that is read piece by piece: read([3, 5]) -> uint8 (2, C, H, W), on the CPU."""
    name: str
    count: int
    shape: tuple                                                # (C, H, W)
    read: callable
    protocol: dict = dataclasses.field(default_factory=dict)    # what made them
    ahead: bool = True              # whether a thread may read on while the feature network computes
    label_counts: list | None = None                            # pictures per class, if they have classes
    file: str | None = None                 # images.npy (moments.npy) of a prepared data set

    @property
    def size(self):
        return "x".join(map(str, self.shape))


def from_dataset(dataset):
    """Pictures of a data.Dataset, by the uint8 rule of drawn ones: a range of 0..16 becomes 0..255.

    Of latents they are the real pictures that the VAE saw; UserError if those have gone.
    """
    if isinstance(dataset, data.Latents):
        protocol = {"resized": "{crop} crop to {size}x{size}".format(**dataset.origin)}
        dataset.files                       # looks whether they are still there
    else:
        protocol = {"range": list(dataset.range)}
    return Pictures(dataset.name, len(dataset), tuple(dataset.picture_shape),
                    lambda rows: data.to_uint8(dataset.pictures(list(rows))), protocol,
                    label_counts=dataset.describe()["label_counts"],
                    file=getattr(dataset.images, "filename", None))


def from_network(net, decode, num, labels, grid, sampler="ode", seed=0, label_counts=None):
    """`num` pictures that are drawn when they are read and never written. Arguments as in sample.py.

    ValueError for num < 1, another label protocol, or a grid that does not start at 1.
    """
    y = sample.make_labels(labels, num, net.config.classes, seed, label_counts)           # (num,)
    if (grid := sample.check_grid(grid))[0] != 1:
        raise ValueError(f"the grid starts at {grid[0]:g}, but pictures start as pure noise, at 1")
    z = torch.zeros(1, net.config.channels, net.config.size, net.config.size)
    shape = tuple(decode(z.to(next(net.parameters()).device)).shape[1:])

    def read(indices):
        with exact_float32():       # also in the midst of a training run, which may have TF32 on
            return next(sample.generate(net, decode, y, grid, sampler, seed, len(indices), indices))

    return Pictures("drawn", num, shape, read, ahead=False, protocol=dict(
        nfe=len(grid) - 1, grid=grid, sampler=sampler, labels=labels, seed=seed))


def from_folder(folder, size=None):
    """Pictures in a folder and below it; `size`: centre-cropped to a square and resized (data.picture).

    UserError if there are none, one cannot be read, or, without `size`, they are not all equally large.
    """
    files, _, _ = data.listing(Path(folder))
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def read_one(file):
        try:
            return data.picture(file, size)
        except Exception as error:          # decoders raise nearly anything on damaged files
            reason = " ".join(str(error).split())
            raise UserError(f"{file} cannot be read ({reason}): mend or remove it") from None

    first = read_one(files[0])                                                            # (3, H, W)

    def read(indices):
        pictures = list(pool.map(read_one, [files[k] for k in indices]))
        for k, picture in zip(indices, pictures):
            if picture.shape != first.shape:
                raise UserError(f"{files[k]} is {picture.shape[2]}x{picture.shape[1]}, {files[0].name} "
                                f"{first.shape[2]}x{first.shape[1]}: crop and resize all with --size PIXELS")
        return torch.from_numpy(np.stack(pictures))

    how = {"resized": f"centre crop, Lanczos to {size}x{size}"} if size else {}
    return Pictures(str(folder), len(files), first.shape, read, how)


def from_npz(path):
    """Pictures in `arr_0`, uint8 (N, H, W, C), of an .npz file; UserError if it holds none.

    They are read in turn straight from the archive: 50,000 of 256x256 would take 10 GB of memory.
    """
    try:
        file = zipfile.ZipFile(path).open("arr_0.npy")
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                       (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read_header(file)
        N, H, W, C = shape if len(shape) == 4 else [*shape, 0, 0, 0, 0][:4]
    except Exception as error:              # a damaged archive raises nearly anything, too
        raise UserError(f"{path} holds no readable arr_0 of pictures (N, H, W, C): "
                        f"{' '.join(str(error).split()) or type(error).__name__}") from None
    if by_columns or dtype != np.uint8 or C not in (1, 3):
        raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, C) with C 1 or 3 and in C order, it is "
                        f"{dtype} {shape}{', in Fortran order' if by_columns else ''}")
    start, size = file.tell(), H * W * C

    def read(indices):
        pictures = bytearray()
        try:
            for k in indices:
                file.seek(start + k * size)     # forwards: what lies between is read and let go
                pictures += file.read(size)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if len(pictures) < len(indices) * size:
            raise UserError(f"{path} is cut short")
        return torch.frombuffer(pictures, dtype=torch.uint8).view(-1, H, W, C).permute(0, 3, 1, 2)

    return Pictures(str(path), N, (C, H, W), read)


def open_pictures(name, size=None):
    """Pictures in an .npz or a folder, or those of a prepared data set, by its name or folder."""
    path = Path(name)
    if path.is_file() and path.suffix == ".npz":
        return from_npz(path)
    if path.is_file() or path.suffix in (".npz", ".pt", ".pth"):
        raise UserError(f"{name} is {'a file' if path.is_file() else 'not there'}: pictures come from a "
                        "folder, an .npz with arr_0, or a data set; a checkpoint draws them with --ckpt")
    known = name == "digits" or any((p / "meta.json").is_file() for p in (path, Path("data") / name))
    return from_folder(path, size) if path.is_dir() and not known else from_dataset(data.load(name))


def evenly(pictures, num):
    """`num` of `pictures`, evenly spaced: the first ones could be all of one class."""
    if num is None or num == pictures.count:
        return pictures
    if num > pictures.count:
        raise UserError(f"--num {num}: {pictures.name} has {pictures.count} pictures")
    some = {"chosen": f"{num} of {pictures.count}, evenly spaced"}
    return dataclasses.replace(pictures, count=num, protocol=pictures.protocol | some,
                               read=lambda rows: pictures.read([k * pictures.count // num for k in rows]))


def without_colour(pictures):
    """`pictures` with one channel if they look grey: those of folders are RGB whatever the files hold."""
    if pictures.shape[0] == 1:
        return pictures

    def one_channel(indices):
        u = pictures.read(indices)
        if (u != u[:, :1]).any():
            raise UserError(f"{pictures.name} holds grey and coloured pictures, the other side grey ones")
        return u[:, :1]

    first = pictures.read(range(min(16, pictures.count)))
    if (first != first[:, :1]).any():
        return pictures
    return dataclasses.replace(pictures, shape=(1, *pictures.shape[1:]), read=one_channel)


# ------------------------------------------------------------------ measuring


@dataclasses.dataclass
class Measured:
    """What is known of a set of pictures through one Extractor."""
    gaussians: dict                         # {part: (mean (dim,), covariance (dim, dim))}
    score: tuple | None = None              # Inception Score and its deviation
    rows: torch.Tensor | None = None        # features (N, dim) float32, if they were kept


class Collected:
    """What one Extractor has found so far, in one of several processes."""

    def __init__(self, extractor, pictures, keep, world):
        self.extractor, self.N, dims = extractor, pictures.count, extractor.dims(pictures.shape)
        self.stats = {part: RunningStats(dim, extractor.stats_device) for part, dim in dims.items()}
        self.score = RunningScore(min(10, self.N)) if extractor.network == "inception" else None
        self.rows = torch.zeros(-(-self.N // world), dims["features"]) if keep else None

    def add(self, pictures, split, here):
        """Pictures uint8 (b, C, H, W) of the splits (b,), the rows `here` of this process."""
        found = self.extractor(pictures)                                                  # {part: (b, dim)}
        for part, stats in self.stats.items():
            stats.update(found[part])
        if self.score:
            self.score.update(found["logits"], split)
        if self.rows is not None:
            self.rows[here] = found["features"]

    def measured(self, ddof):
        """Measured of the pictures of all processes; the rows on rank 0 alone."""
        stats = {part: stats.all_merge() for part, stats in self.stats.items()}
        score = self.score.all_merge().value() if self.score else None
        parts = None if self.rows is None else rank_zero(self.rows)
        # picture k is row k // world of process k % world
        rows = None if parts is None else torch.stack(parts, 1).flatten(0, 1)[:self.N]
        return Measured({part: (s.mean, s.cov(ddof)) for part, s in stats.items()}, score, rows)


def measure(pictures, extractors, batch=64, divisor="N-1", keep=False, rank=0, world=1, what="pictures"):
    """{name of extractor: Measured}; each picture is looked at once and let go.

    Process `rank` of `world` looks at every world-th picture; all get the result of all. divisor: of the
    covariances, "N-1" or "N". keep: also the rows themselves, for KID and neighbours, on rank 0. what: for
    the bar. ValueError for fewer than 2 pictures.
    """
    N, mine = pictures.count, range(rank, pictures.count, world)
    if N < 2:
        raise ValueError(f"{pictures.name}: a covariance needs at least 2 pictures, not {N}")
    collected = [Collected(e, pictures, keep, world) for e in extractors]
    split, done = split_numbers(N), 0
    batches = (pictures.read(mine[i:i + batch]) for i in range(0, len(mine), batch))
    if any(e.device.type == "cuda" for e in extractors):
        batches = (u.pin_memory() for u in batches)
    with tqdm(total=len(mine), desc=what, unit="img", disable=True if rank else None, leave=False) as bar:
        for u in data.prefetch(batches) if pictures.ahead else batches:                   # (b, C, H, W)
            here = slice(done, done + len(u))
            for one in collected:
                one.add(u, split[list(mine[here])], here)
            done += len(u)
            bar.update(len(u))
    return {one.extractor.name: one.measured({"N-1": 1, "N": 0}[divisor]) for one in collected}


def compare(extractor, made, real=None, kid=False, prdc=False):
    """{name in TITLES, or name_std: value} of two Measured; of `made` alone if `real` is None.

    kid, prdc: also KID; precision, recall, density and coverage, which need the rows of both.
    """
    result = {}
    for part, prefix in (("features", ""), ("spatial", "s")):
        if real and part in made.gaussians and part in real.gaussians:
            result[prefix + extractor.metric] = frechet_distance(*made.gaussians[part], *real.gaussians[part])
    if made.score:
        result["inception_score"], result["inception_score_std"] = made.score
    if real and (kid or prdc):
        ours, theirs = (side.rows.to(extractor.stats_device) for side in (made, real))
        if kid:
            result["kid"], result["kid_std"] = kernel_distance(ours, theirs)
        if prdc:
            result |= neighbour_metrics(theirs, ours)
    return result


# ------------------------------------------------------------------ statistics in files


def save_stats(path, measured, protocol):
    """Write mu and sigma (of Inception also mu_s, sigma_s) under the names of pytorch-fid and ADM.

    pytorch-fid reads it as it is; ADM's evaluator asks for pictures in `arr_0` as well.
    """
    arrays = {"protocol": np.array(json.dumps(protocol))}
    for part, suffix in (("features", ""), ("spatial", "_s")):
        if part in measured.gaussians:
            mu, sigma = measured.gaussians[part]
            arrays |= {"mu" + suffix: mu.cpu().numpy(), "sigma" + suffix: sigma.cpu().numpy()}
    with data.replacing(path) as file:
        np.savez(file, **arrays)


def read_stats(path):
    """(Measured, protocol) of an .npz with mu and sigma (or ref_mu, ref_sigma), perhaps mu_s and sigma_s.

    protocol: {} but for files that save_stats wrote. None if the file holds no statistics; UserError if it
    is damaged. Nothing in it is executed.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ref = "ref_" if "ref_mu" in file else ""
            names = {"features": (ref + "mu", ref + "sigma"), "spatial": ("mu_s", "sigma_s")}
            gaussians = {part: (file[mu].astype(np.float64, casting="safe"),
                                file[sigma].astype(np.float64, casting="safe"))
                         for part, (mu, sigma) in names.items() if mu in file}
            protocol = json.loads(str(file["protocol"])) if "protocol" in file else {}
        if not isinstance(protocol, dict):
            raise ValueError("its protocol is no object")
        for mu, sigma in gaussians.values():
            if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not np.isfinite(sigma.sum() + mu.sum()):
                raise ValueError(f"mean {mu.shape} and covariance {sigma.shape} do not fit or are not finite")
            if abs(sigma - sigma.T).max() > 1e-5 * abs(sigma).max() or sigma.diagonal().min() < 0:
                raise ValueError("its covariance is none: not symmetric, or with a negative variance")
        return (Measured(gaussians), protocol) if "features" in gaussians else None
    except Exception as error:              # as above
        raise UserError(f"{path} cannot be read as statistics: {' '.join(str(error).split())}") from None


def measure_reference(pictures, extractors, divisor="N-1", keep=False, rank=0, **options):
    """As measure(); what is found of a prepared data set is remembered in its folder.

    The name of the file holds a hash of the pictures and of all that the numbers depend on.
    """
    found, files = {}, {}
    networks = [e for e in extractors if e.net]                     # pixels are quicker than any file
    if pictures.file and networks:
        # Of 21 GB of latents one process alone makes the checksum.
        box = [data.checksum_of(pictures.file) if rank == 0 else None]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(box)
        about = {"pictures": box[0], "count": pictures.count, "divisor": divisor,
                 **pictures.protocol}
        for e in networks:
            protocol = about | {key: value for key, value in e.protocol.items() if key != "weights"}
            key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
            files[e.name] = path, _ = Path(pictures.file).parent / f"fid-{e.name}-{key}.npz", protocol
            if path.is_file() and not keep:
                with contextlib.suppress(UserError, TypeError):     # a damaged or hollow one is made again
                    found[e.name] = read_stats(path)[0]
        # Disks may differ. What one process has to measure, all must: measure() waits for everybody.
        here = torch.tensor([float(e.name in found) for e in networks])
        everywhere = torch.stack(all_ranks(here)).amin(0).tolist()
        found = {e.name: found[e.name] for e, known in zip(networks, everywhere) if known}
    missing = [e for e in extractors if e.name not in found]
    if missing:
        found |= measure(pictures, missing, divisor=divisor, keep=keep, rank=rank, what="reference",
                         **options)
    for name in [e.name for e in missing if e.name in files and rank == 0]:
        try:
            save_stats(files[name][0], found[name], files[name][1])
        except OSError as error:
            print(f"fid.py: reference statistics are not kept: {error}", file=sys.stderr)
    return found


# ------------------------------------------------------------------ command line


def flags():
    parser = data.Parser(description="How far pictures are from real ones.")
    group = parser.add_argument_group("what is compared")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", type=Path, metavar="FILE", help="what draws pictures")
    what.add_argument("--pictures", metavar="DIR|NPZ|NAME",
                      help="pictures that are there: a folder, arr_0 of an .npz, or a prepared data set")
    group.add_argument("--ref", metavar="DIR|NPZ|NAME|CKPT",
                       help="real pictures: as --pictures; or an .npz of statistics, mu and sigma; or "
                       "another checkpoint, which draws in the same way from the next seed (default: those "
                       "the checkpoint was trained on)")
    group.add_argument("--size", type=int, metavar="PIXELS",
                       help="of the pictures in folders: centre-crop and resize them")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--features", metavar="NAME,...",
                       help=f"some of {', '.join(FEATURES)} (default: inception; pixels for grey pictures "
                       "up to 32x32)")
    group.add_argument("--kid", action="store_true", help="also KID; keeps all features in memory")
    group.add_argument("--prdc", action="store_true",
                       help="also precision, recall, density and coverage; keeps all features in memory")
    group.add_argument("--weights", type=Path, metavar="DIR|FILE",
                       help="the feature networks (default: from the cache folder, else downloaded)")
    group.add_argument("--divisor", choices=["N-1", "N"], default="N-1",
                       help="of covariances; N is what the released α-Flow code takes")
    group = parser.add_argument_group("how pictures are drawn")
    times = group.add_mutually_exclusive_group()
    times.add_argument("--nfe", type=int, help="network evaluations, equally spaced (default: 1)")
    times.add_argument("--grid", metavar="T,T,...", help="the times themselves, e.g. 1,0.55,0")
    group.add_argument("--sampler", choices=["ode", "consistency"],
                       help="how to get from one time to the next (default: ode)")
    group.add_argument("--num", type=int,
                       help="pictures (default: as many as there are in --pictures or --ref; drawn ones "
                       "50,000 at most)")
    group.add_argument("--labels", choices=["data", "balanced", "random"],
                       help="classes: as often as in the data, equally often, or by chance (default: data "
                       "where that is known, else random)")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--ema", dest="raw", action="store_false", help="averaged weights, the default")
    weights.add_argument("--raw", action="store_true", help="weights as they were trained")
    parser.set_defaults(raw=False)
    group.add_argument("--precision", choices=["bf16", "fp32"], default="bf16",
                       help="of the VAE on CUDA, for checkpoints of latents")
    group.add_argument("--seed", type=int, help="picture k depends on this and k alone (default: 0)")
    group = parser.add_argument_group("where it runs and what it writes")
    group.add_argument("--batch", type=int, default=64, help="pictures at a time; changes no picture")
    group.add_argument("--device", help="cuda, mps or cpu (default: the first of these there is)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write values and protocol here as well")
    group.add_argument("--save-stats", type=Path, metavar="FILE.npz",
                       help="write mu and sigma of the pictures; may stand without --ref")
    group.add_argument("--save-pictures", metavar="FOLDER/", help="write the drawn pictures as PNGs, too")
    return parser.parse_args()


def drawn(path, args, device, num, seed, label_counts=None):
    """Pictures that the checkpoint at `path` draws as `args` say."""
    ckpt, weights = sample.read(path), "raw" if args.raw else "ema"
    net, decode = sample.load(path, weights, device, args.precision)
    known = [label_counts, (ckpt.get("data") or {}).get("label_counts")]        # the reference's, its own
    counts = next((c for c in known if c and len(c) == net.config.classes), None)
    if args.labels == "data" and not counts:
        raise UserError(f"--labels data: how often the {net.config.classes} classes of {path} occur is not "
                        "known: give balanced or random")
    labels = args.labels or ("data" if counts else "random")
    grid, sampler, note = sample.sampling_plan(path, args.nfe, args.grid, args.sampler)
    if note:
        print(note, file=sys.stderr)
    pictures = from_network(net, decode, num, labels, grid, sampler, seed, counts)
    about = {"checkpoint": str(path), "step": ckpt.get("step"), "weights": weights}
    if ckpt.get("latents"):
        vae = "in the checkpoint" if ckpt.get("vae") else ckpt["latents"].get("vae") or "ema"
        about |= {"vae": vae, "vae_precision": args.precision if device.type == "cuda" else "fp32"}
    return dataclasses.replace(pictures, protocol=about | pictures.protocol)


def training_data(path):
    """The Pictures that a checkpoint was trained on; UserError if they are missing or have changed since."""
    ckpt = sample.read(path)
    about = ckpt.get("data") or {}
    own = ckpt["config"].get("recipe", {}).get("data") or about.get("name")      # as typed to train.py
    if own is None:
        raise UserError("the checkpoint names no training data: name real pictures with --ref")
    try:
        pictures = from_dataset(data.load(own))
    except UserError as error:
        raise UserError(f"{error}; --ref can name other real pictures") from None
    # A name may lead to other pictures by now, and then "its own training data" would be untrue.
    if pictures.label_counts != (about.get("label_counts") or pictures.label_counts):
        raise UserError(f"{pictures.name} is not what this checkpoint was trained on any more: "
                        f"if it is meant all the same, add --ref {own}")
    return pictures


def is_checkpoint(name):
    return bool(name) and Path(name).suffix != ".npz" and zipfile.is_zipfile(name)


def open_sides(args, device):
    """(Pictures that are judged, real Pictures or None, what read_stats finds in the reference or None)."""
    ref, real, stats = args.ref, None, None
    how = (args.nfe, args.grid, args.labels, args.sampler, args.seed, args.raw or None)
    if not (args.ckpt or is_checkpoint(ref)) and how != (None,) * 6:
        raise UserError("--nfe, --grid, --labels, --sampler, --seed, --raw are for checkpoints: none is here")
    seed = args.seed or 0
    if is_checkpoint(ref):                              # another seed: from equal noise come similar pictures
        real = drawn(ref, args, device, args.num or 50_000, (seed + 1) % 2**64)
    elif ref and Path(ref).is_file() and Path(ref).suffix == ".npz":
        stats = read_stats(ref)
        if stats is None or args.kid or args.prdc:      # ADM's files: statistics of all, and some pictures
            try:
                real = from_npz(ref)
            except UserError as error:
                only = "; --kid and --prdc need pictures, not statistics alone" if stats else ""
                raise UserError(f"{error}{only}") from None
    elif ref:
        real = open_pictures(ref, args.size)
    elif args.ckpt:
        try:
            real = training_data(args.ckpt)
        except UserError as error:
            if not args.save_stats:
                raise
            print(f"fid.py: statistics only, no distance: {error}", file=sys.stderr)
    if args.ckpt:
        num = args.num or min(50_000, real.count if real and not stats else 50_000)
        made = drawn(args.ckpt, args, device, num, seed, real and real.label_counts)
    else:
        made = evenly(open_pictures(args.pictures, args.size), args.num)
    if (args.kid or args.prdc) and not real:
        raise UserError("--kid and --prdc compare with real pictures: give --ref")
    if args.size and not any("resized" in side.protocol for side in (made, real) if side):
        raise UserError("--size crops and resizes pictures in folders, and there is none here")
    return made, real, stats


def check_sides(args, made, real, stats, extractors):
    """UserError, before the work starts, if the two sides cannot be compared."""
    for e in extractors:
        dims = e.dims(made.shape)
        for part, (mu, _) in stats[0].gaussians.items() if stats else ():
            if len(mu) != dims.get(part, len(mu)):
                raise UserError(f"--ref {args.ref} has {len(mu)} dimensions, {e.name} {dims[part]}: they are "
                                "statistics of other features")
        for key, ours in (e.protocol | {"divisor": args.divisor}).items() if stats else ():
            theirs = stats[1].get(key, ours)                        # only our own files say what they hold
            if key != "weights" and theirs != ours:                 # a name; the hash counts
                raise UserError(f"--ref {args.ref}: its {key} is {theirs}, here it is {ours}")
        if real and e.dims(real.shape) != dims:
            raise UserError(f"the pictures are {made.size}, the reference {real.size}: choose another --ref")
    if not (real or stats or args.save_stats or any(e.network == "inception" for e in extractors)):
        raise UserError("nothing to compare with: give --ref, or --save-stats FILE.npz")
    few = 6 if args.prdc else 2                                     # more than neighbours; a spread at all
    for side in (made, real):
        if side and side.count < few:
            raise UserError(f"{side.name} has {side.count} pictures, {few} or more are needed")
    if args.weights and not any(e.net for e in extractors):
        raise UserError("--weights is for feature networks, and pixels need none")


def warnings_of(made, real, stats, extractors):
    """What keeps somebody from quoting a number that is worth less than it looks."""
    few = min(made.count, real.count if real else made.count, (stats and stats[1].get("count")) or made.count)
    for e in extractors:
        dim = e.dims(made.shape)["features"]
        if e.net and few < 10_000:
            yield f"{few} pictures: below 10,000 distances are too high, scores too low; 50,000 are usual"
        elif few <= dim:
            yield f"{few} pictures do not fill {dim} dimensions, which raises the value: more are needed"
        if e.net and not e.protocol["published_weights"]:
            yield f"{e.protocol['weights']} is not the published file: comparable with no other numbers"
    if real and real.shape[1:] != made.shape[1:]:
        yield f"the pictures are {made.size}, the reference {real.size}: resized, they differ in sharpness"


def describe(args, made, real, stats, extractors, metrics):
    """The values and all that they depend on, as a dict of plain values."""
    result = {"metrics": metrics, "reference": None, "divisor": args.divisor,
              "pictures": {"name": made.name, "count": made.count, "shape": made.size, **made.protocol},
              "features": {e.name: e.protocol for e in extractors}}
    if stats:
        result["reference"] = {"count": "unknown", **stats[1], "name": args.ref,
                               "statistics_sha256": data.checksum_of(args.ref),
                               "pictures_for_kid_and_neighbours": real and real.count}
    elif real:
        result["reference"] = {"name": real.name, "count": real.count, "shape": real.size, **real.protocol}
    if any("inception_score" in values for values in metrics.values()):
        result["score"] = (f"{min(10, made.count)} splits after a fixed shuffle, logits without bias, "
                           "1008 classes")
    if args.kid:
        size = min(1000, made.count, real.count)
        subsets = "one subset" if size == made.count == real.count else "100 random subsets"
        result["kid"] = f"{subsets} of {size}, cubic kernel, unbiased"
    if args.prdc:
        result["neighbours"] = "k = 3 for precision and recall, 5 for density and coverage"
    return result


def report(result):
    """The lines to print of what goes into the JSON file."""
    lines = []
    for name, values in result["metrics"].items():
        for key in filter(TITLES.get, values):
            digits = 6 if key == "kid" else 4                       # KIDs are small
            # of a single subset or split there is none
            spread = f" ± {values[key + '_std']:.{digits}f}" if values.get(key + "_std") else ""
            lines.append(f"{TITLES[key]}: {values[key]:.{digits}f}{spread}"
                         + f"  [{name}]" * (name != "pixels"))

    def plain(value):
        return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value

    about = [(side, result[side]) for side in ("pictures", "reference") if result[side]]
    about += [("features", protocol) for protocol in result["features"].values()]
    lines += [f"  {title:11s} " + ", ".join(f"{key} {plain(value)}" for key, value in protocol.items()
                                            if value is not None) for title, protocol in about]
    lines += [f"  {key:11s} {result[key]}" for key in ("divisor", "score", "kid", "neighbours")
              if key in result]
    return "\n".join(lines)


def also_saved(made, folder, world):
    """`made`; its pictures are written to `folder` as well, 000000.png and so on, when they are read."""
    path, _ = sample.place(folder.rstrip("/") + "/", None, world, made.count, flag="--save-pictures")
    sample.as_image(torch.zeros(made.shape, dtype=torch.uint8))     # says so now if this is no picture

    def read(indices):
        pictures = made.read(indices)
        for k, picture in zip(indices, pictures):
            sample.write_png(path / f"{k:06d}.png", picture)
        return pictures
    return dataclasses.replace(made, read=read)


def check_flags(args):
    for ok, line in [
        (args.batch >= 1, f"--batch {args.batch}: give 1 or more"),
        (0 <= (args.seed or 0) < 2**64, f"--seed {args.seed}: give 0 to 2**64 - 1"),
        (args.num is None or 2 <= args.num <= 10**8, f"--num {args.num}: give 2 (1 has no spread) to 10**8"),
        (args.nfe is None or 1 <= args.nfe <= 10_000, f"--nfe {args.nfe}: give 1 to 10000"),
        ("" not in (args.ref, args.pictures, args.features, args.save_pictures), "an empty name: omit it"),
        (args.size is None or 4 <= args.size <= 4096, f"--size {args.size}: give 4 to 4096"),
        (args.ckpt or not args.save_pictures, "--save-pictures is for pictures that --ckpt draws"),
        *[(not path or os.access(path.absolute().parent, os.W_OK) and not path.is_dir(),
           f"{flag} {path}: give a file in a folder that is there and may be written")
          for flag, path in (("--json", args.json), ("--save-stats", args.save_stats))],
        (not args.save_stats or args.save_stats.suffix == ".npz",
         f"--save-stats {args.save_stats}: give FILE.npz"),
        (not args.save_stats or "," not in (args.features or ""),
         "--save-stats holds the statistics of one network: give one of --features"),
    ]:
        if not ok:
            raise UserError(line)


def main():
    args = flags()
    # All that can be wrong is looked at before the first picture is drawn.
    check_flags(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = sample.pick_device(args.device)
    made, real, stats = open_sides(args, device)
    tiny = math.prod(made.shape[1:]) <= 1024 and 1 in (made.shape[0], real.shape[0] if real else 3)
    names = [name.strip() for name in (args.features or ("pixels" if tiny else "inception")).split(",")]
    if unknown := [name for name in names if name not in FEATURES]:
        raise UserError(f"--features {unknown[0]}: give some of {', '.join(FEATURES)}")
    if real and "pixels" in names and real.shape[0] != made.shape[0]:
        made, real = without_colour(made), without_colour(real)
    extractors = [Extractor(name, args.weights, device) for name in dict.fromkeys(names)]
    check_sides(args, made, real, stats, extractors)
    if args.save_pictures:
        made = also_saved(made, args.save_pictures, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:                               # gloo is enough, also between GPUs, for results at the end
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))    # shares may differ by hours
        dist.barrier()                          # nobody draws before all have found that they can

    options = dict(batch=args.batch, divisor=args.divisor, keep=args.kid or args.prdc, rank=rank, world=world)
    theirs = measure_reference(real, extractors, **options) if real else {}
    if stats:                                   # of all pictures, where `real` are some of them
        theirs = {e.name: dataclasses.replace(stats[0], rows=real and theirs[e.name].rows)
                  for e in extractors}
    ours = measure(made, extractors, what=made.name, **options)
    if rank == 0:
        metrics = {e.name: compare(e, ours[e.name], theirs.get(e.name), args.kid, args.prdc)
                   for e in extractors}
        result = describe(args, made, real, stats, extractors, metrics)
        for line in dict.fromkeys(warnings_of(made, real, stats, extractors)):
            print(f"fid.py: warning: {line}", file=sys.stderr)
        print(report(result))
        if args.json:
            with data.replacing(args.json) as file:
                file.write((json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
        if args.save_stats:
            protocol = {"of": result["pictures"], "count": made.count, "divisor": args.divisor}
            save_stats(args.save_stats, ours[extractors[0].name], protocol | extractors[0].protocol)
            print(f"wrote {args.save_stats}")
    if world > 1:
        dist.destroy_process_group()            # rank 0 may still count neighbours, the others are done


if __name__ == "__main__":
    data.run(main)
