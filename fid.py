"""How far are generated pictures from real ones? Numbers, and beside them all that they depend on.

    python fid.py --ckpt out/digits/ckpt.pt --nfe 1              # against the checkpoint's own training data
    python fid.py --pictures samples.npz --ref VIRTUAL_imagenet256_labeled.npz --json result.json
    python fid.py --pictures /path/to/train --size 256 --save-stats imagenet256.npz
    torchrun --nproc_per_node=8 fid.py --ckpt CKPT --nfe 2 --samples 50000 --ref imagenet256.npz

Both sets of pictures become rows of numbers (features). Each set of rows is summarised by its mean μ and
covariance Σ, and the distance is that of the two normal distributions which have them:

    d² = |μ1 - μ2|² + tr(Σ1 + Σ2 - 2·(Σ1·Σ2)^½)

The features decide what it means: Inception-v3 gives the FID of the papers, DINOv2 FDD, CLIP FCD, and
bare pixels a quick check for tiny pictures, which is never an FID. Few pictures make any of them too
high: compare numbers of equal counts, by custom 50,000.
"""
import json
import math
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import sample
from model import fill, read_checkpoint, read_tensors

# ---- distances between two sets of rows ------------------------------------------------------------

def frechet_distance(mu1, cov1, mu2, cov2):
    """The d² above, a float >= 0 in the features' unit squared (Heusel et al. 2017, eq. 6).

    mu (d,), cov (d, d), numpy or torch, computed in float64; d = 1 may come as plain numbers.
    ValueError if the dimensions disagree, or a covariance is not symmetric, finite and positive.
    """
    (mu1, A1, trace1), (mu2, A2, trace2) = gaussian(mu1, cov1), gaussian(mu2, cov2)
    if len(mu1) != len(mu2):
        raise ValueError(f"features of {len(mu1)} and of {len(mu2)} dimensions cannot be compared")
    # With Σ1 = A1·A1ᵀ and Σ2 = A2·A2ᵀ, the eigenvalues of Σ1·Σ2 are the squared singular values of
    # A1ᵀ·A2, so the trace of its root is their plain sum. No root of a non-symmetric matrix is taken:
    # nothing turns complex, the diagonal needs no ridge, and fewer pictures than dimensions do no harm.
    root = scipy.linalg.svdvals(A1.T @ A2).sum()                                        # (rank 1, rank 2)
    distance = ((mu1 - mu2) ** 2).sum() + (trace1 + trace2 - 2 * root)
    return max(0.0, float(distance))                    # d² >= 0, but rounding can take it below


def gaussian(mu, cov):
    """-> mu (d,), A (d, rank) with A·Aᵀ = cov, and tr cov; numpy, float64."""
    mu, cov = (torch.as_tensor(a).double().cpu().numpy() for a in (mu, cov))
    mu, cov = np.atleast_1d(mu), np.atleast_2d(cov)     # of one dimension they may be plain numbers
    if cov.shape != mu.shape * 2 or not np.isfinite(cov).all() or not np.isfinite(mu).all():
        raise ValueError(f"mean {mu.shape} and covariance {cov.shape} do not fit or are not finite")
    w, v = scipy.linalg.eigh(cov)                                                       # (d,), (d, d)
    if abs(cov - cov.T).max() > 1e-5 * abs(cov).max() or w[0] < -1e-5 * abs(w).max():
        raise ValueError("a covariance must be symmetric and have no negative eigenvalue")
    # Eigenvalues that ought to be 0 come out as ± 1e-16, of which the root would make 1e-8.
    # With fewer pictures than features there are many of those, and their sum would show.
    large = w >= len(mu) * 2.2e-16 * w.max()
    return mu, v[:, large] * np.sqrt(w[large]), cov.trace()


def precision_recall(real, made, k=3):
    """(precision, recall) of the features `made` (M, d) against `real` (N, d), by nearest neighbours.

    Each row has a ball that reaches to its k-th neighbour in its own set. Precision: share of `made` inside
    a ball of `real`; recall: the converse (Kynkäänniemi et al. 2019). ValueError unless N and M exceed k.
    """
    if min(len(real), len(made)) <= k:
        raise ValueError(f"precision and recall need more than {k} pictures on each side")
    centre = real.double().mean(0)                      # far from 0, |a|² + |b|² - 2·a·b would cancel
    real, made = real.double() - centre, made.double() - centre

    def share_inside(x, balls):                         # 512 rows at a time, to save memory
        # The row itself is the nearest of its neighbours: hence k + 1.
        radius = torch.cat([torch.cdist(part, balls).kthvalue(k + 1).values for part in balls.split(512)])
        inside = torch.cat([(torch.cdist(part, balls) <= radius).any(1) for part in x.split(512)])
        return inside.double().mean().item()
    return share_inside(made, real), share_inside(real, made)


# ---- statistics, batch by batch --------------------------------------------------------------------

def of_all(tensor):
    """The tensors that the processes hold here, in their order, on the device of this one's."""
    if not dist.is_initialized():
        return [tensor]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, tensor.cpu())
    return [one.to(tensor.device) for one in everyones]


class RunningStats:
    """.n, .mean (dim,) and .cov() (dim, dim) of rows that are never in memory together, float64.

    E[x²] - E[x]² would cancel where the mean is large beside the spread. Kept instead is the scatter
    about the mean so far, Σ (x - mean)(x - mean)ᵀ, corrected when the mean moves (Chan et al. 1983).
    """

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Add rows (n, dim), torch or numpy. ValueError for another width, NaN or infinity."""
        x = torch.as_tensor(features).to(self.mean)     # as float64, on its device
        if x.shape[1:] != self.mean.shape or not x.isfinite().all():
            raise ValueError(f"expected finite features (n, {len(self.mean)}), got {tuple(x.shape)}, or NaN")
        centre = x.mean(0)
        return self.add(len(x), centre, (x - centre).T @ (x - centre))

    def merge(self, other):
        """Add all rows that another RunningStats has seen."""
        return self.add(other.n, other.mean, other.scatter)

    def add(self, n, mean, scatter):
        if n:                                           # the mean of no rows is NaN
            total, move = self.n + n, mean - self.mean
            self.scatter.add_(scatter).addr_(move, move, alpha=self.n * n / total)
            self.mean, self.n = self.mean + move * (n / total), total
        return self

    def cov(self):
        """The covariance with divisor n - 1. ValueError for fewer than 2 rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.n}")
        return self.scatter / (self.n - 1)

    def all_merge(self):
        """A new RunningStats of the rows of all processes, the same bits on each."""
        everyone = RunningStats(len(self.mean), self.mean.device)
        parts = self.mean.new_tensor(self.n), self.mean, self.scatter
        for n, mean, scatter in zip(*map(of_all, parts)):       # in the order of ranks: all round alike
            everyone.add(int(n), mean, scatter)
        return everyone


def score_sums(logits, split):
    """For the Inception Score: of each split 0 .. 9 the sums of p and p·log p, which add up over calls."""
    log_p = logits.cpu().double().log_softmax(1)                                        # (n, classes)
    p = log_p.exp()
    return F.one_hot(split, 10).double().T @ torch.cat([p, p * log_p], dim=1)           # (10, 2·classes)


def inception_score(sums):
    """(mean, population standard deviation) over the splits of exp(mean of KL(p(y|x) | p(y))), from all sums.

    The mean of KL is the mean of Σ p·log p less Σ q·log q with q the mean of p. Salimans et al. 2016.
    """
    p, p_log_p = sums[sums.any(1)].chunk(2, dim=1)      # each (splits, classes); without empty splits
    n = p.sum(1, keepdim=True)                          # pictures, for the p of each add up to 1
    q = p / n
    scores = (p_log_p / n - torch.xlogy(q, q)).sum(1).exp()                             # (splits,)
    return scores.mean().item(), scores.std(correction=0).item()


def split_numbers(n):
    """Which split of the Inception Score each of n pictures belongs to, int64 (n,): ten equal parts after
    a fixed permutation (torch-fidelity's, seed 2020), because pictures may come sorted by class."""
    place = np.random.RandomState(2020).permutation(n).argsort()
    return torch.from_numpy(((place + 1) * 10 - 1) // n)        # split i begins at place i·n // 10


# ---- Inception-v3 ----------------------------------------------------------------------------------

def conv(a, b, kernel=1, stride=None):
    """Convolution, BatchNorm, ReLU. Without a stride the picture keeps its size."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(a, b, kernel, stride or 1, 0 if stride else "same", bias=False),
        bn=nn.BatchNorm2d(b, eps=1e-3),                 # not PyTorch's 1e-5
        relu=nn.ReLU(inplace=True)))


POOLS = {
    "max/2": nn.MaxPool2d(3, stride=2),
    "max": nn.MaxPool2d(3, stride=1, padding=1),
    # The mean of the pixels that are there. torchvision's counts the zeros around them as well.
    "average": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
}


class Mixed(nn.ModuleDict):
    """Branches side by side, joined along the channels; a is the number of channels that come in.

    A branch is a line of layers with ">" between them: "branch5x5_1 48 1 1 > branch5x5_2 64 5 5" is a 1x1
    convolution to 48 channels, then one of 5x5 to 64. A fourth number is a stride, a name alone a pool. Two
    branches may begin with the same layer.
    """

    def __init__(self, a, *branches):
        super().__init__()
        self.branches = [[layer.split() for layer in line.split(" > ")] for line in branches]
        for branch in self.branches:
            channels = a
            for name, *numbers in branch:
                if numbers:
                    b, height, width, *stride = map(int, numbers)
                    self[name], channels = conv(channels, b, (height, width), *stride), b
                else:
                    self[name] = POOLS[name]

    def forward(self, x):
        ends, known = [], {}
        for branch in self.branches:
            y = x
            for name, *_ in branch:
                if name not in known:
                    known[name] = self[name](y)
                y = known[name]
            ends.append(y)
        return torch.cat(ends, dim=1)


class Inception(nn.Module):
    """The Inception-v3 of the FID (TensorFlow's of 2015-12-05), under the usual names of its weights.

    x (n, 3, 299, 299) from prepare_inception -> features (n, 2048) for the FID, logits (n, 1008), without
    the bias, for the Inception Score. No auxiliary head. Source: Szegedy et al. 2015.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = conv(3, 32, 3, 2), conv(32, 32, 3, 1)
        self.Conv2d_2b_3x3, self.pool_1 = conv(32, 64, 3), nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = conv(64, 80), conv(80, 192, 3, 1)
        self.pool_2 = nn.MaxPool2d(3, stride=2)
        for name, a, pool in ("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64):
            self.add_module(name, Mixed(
                a, "branch1x1 64 1 1", "branch5x5_1 48 1 1 > branch5x5_2 64 5 5",
                "branch3x3dbl_1 64 1 1 > branch3x3dbl_2 96 3 3 > branch3x3dbl_3 96 3 3",
                f"average > branch_pool {pool} 1 1"))
        self.Mixed_6a = Mixed(
            288, "branch3x3 384 3 3 2",
            "branch3x3dbl_1 64 1 1 > branch3x3dbl_2 96 3 3 > branch3x3dbl_3 96 3 3 2", "max/2")
        for name, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
            self.add_module(name, Mixed(
                768, "branch1x1 192 1 1",
                f"branch7x7_1 {c} 1 1 > branch7x7_2 {c} 1 7 > branch7x7_3 192 7 1",
                f"branch7x7dbl_1 {c} 1 1 > branch7x7dbl_2 {c} 7 1 > branch7x7dbl_3 {c} 1 7"
                f" > branch7x7dbl_4 {c} 7 1 > branch7x7dbl_5 192 1 7", "average > branch_pool 192 1 1"))
        self.Mixed_7a = Mixed(
            768, "branch3x3_1 192 1 1 > branch3x3_2 320 3 3 2",
            "branch7x7x3_1 192 1 1 > branch7x7x3_2 192 1 7 > branch7x7x3_3 192 7 1"
            " > branch7x7x3_4 192 3 3 2", "max/2")
        # In torchvision the pool of the last one is an average, too.
        for name, a, pool in ("Mixed_7b", 1280, "average"), ("Mixed_7c", 2048, "max"):
            self.add_module(name, Mixed(
                a, "branch1x1 320 1 1", "branch3x3_1 384 1 1 > branch3x3_2a 384 1 3",
                "branch3x3_1 384 1 1 > branch3x3_2b 384 3 1",
                "branch3x3dbl_1 448 1 1 > branch3x3dbl_2 384 3 3 > branch3x3dbl_3a 384 1 3",
                "branch3x3dbl_1 448 1 1 > branch3x3dbl_2 384 3 3 > branch3x3dbl_3b 384 3 1",
                f"{pool} > branch_pool 192 1 1"))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        *layers, fc = self.children()                       # in the order in which they stand above
        for layer in layers:
            x = layer(x)
        x = x.mean((2, 3))                                                              # (n, 2048)
        return x, F.linear(x, fc.weight)


# ---- DINOv2 and CLIP, and any network from published weights ---------------------------------------

class ViT(nn.Module):
    """DINOv2 (Oquab et al. 2023), or with `out` the image half of CLIP (Radford et al. 2021).

    x (n, 3, H, W) -> (n, dim), DINOv2's class token after the last norm, or (n, out), CLIP's feature.
    grid: patches a side of the position table; `patch` divides H and W.
    """

    def __init__(self, dim, depth, heads, patch, grid, out=None):
        super().__init__()
        self.grid, clip = grid, out is not None
        if clip:
            eps, activation = 1e-5, lambda x: x * torch.sigmoid(1.702 * x)
        else:       # for F.gelu itself PyTorch's layer has a kernel of its own, on CUDA of the tanh kind
            eps, activation = 1e-6, lambda x: F.gelu(x)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid ** 2, dim))
        self.patch_embed = nn.Conv2d(3, dim, patch, patch, bias=not clip)
        self.norm_pre = nn.LayerNorm(dim) if clip else nn.Identity()
        self.blocks = nn.Sequential(*(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, activation, eps, batch_first=True,
                                       norm_first=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps)
        self.proj = nn.Linear(dim, out, bias=False) if clip else nn.Identity()

    def forward(self, x):
        patches = self.patch_embed(x)                                                   # (n, dim, h, w)
        h, w = patches.shape[2:]
        grid, positions = self.grid, self.pos_embed                                     # (1, 1 + grid², dim)
        if not h == w == grid:
            # As in the original: in float32 whatever x is, no antialias, and by scale factors with 0.1 added,
            # so that rounding never loses a row. They set the sampling points: size= would give others.
            table = positions[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
            scale = (h + 0.1) / grid, (w + 0.1) / grid
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")            # (1, dim, h, w)
            positions = torch.cat([positions[:, :1], table.flatten(2).mT.to(positions.dtype)], dim=1)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), patches.flatten(2).mT], dim=1)
        x = self.norm_pre(x + positions)                                                # (n, 1 + h·w, dim)
        return self.proj(self.norm(self.blocks(x)[:, 0]))                               # (n, dim or out)


VIT_NAMES = {       # of DINOv2, CLIP in transformers, CLIP by OpenAI: ours, PyTorch's; replaced in this order
    "vision_model.": "", "visual.": "", "visual_projection.": "proj.", "patch_embed.proj.": "patch_embed.",
    "embeddings.class_embedding": "cls_token", "class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed", "positional_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.", "conv1.": "patch_embed.",
    "pre_layrnorm.": "norm_pre.", "ln_pre.": "norm_pre.", "post_layernorm.": "norm.", "ln_post.": "norm.",
    "encoder.layers.": "blocks.", "transformer.resblocks.": "blocks.", "layer_norm": "norm", "ln_": "norm",
    "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.", "ls1.gamma": "attn.out_proj.gamma",
    "mlp.c_fc.": "linear1.", "mlp.c_proj.": "linear2.", "mlp.fc": "linear", "ls2.gamma": "linear2.gamma",
    ".attn.": ".self_attn.",
}


def vit_state(state):
    """A ViT's published weights in our names; of CLIP the image half alone."""
    image = {name: w for name, w in state.items() if name.startswith(("vision_model.", "visual"))}
    have = {}
    for name, w in (image or state).items():            # DINOv2 has no halves
        for theirs, ours in VIT_NAMES.items():
            name = name.replace(theirs, ours)
        if name == "proj":                              # OpenAI's is a plain matrix (dim, out)
            name, w = "proj.weight", w.mT
        have[name] = w.reshape(1, -1, w.shape[-1]) if name in ("cls_token", "pos_embed") else w
    for name in list(have):
        if name.endswith(("position_ids", "mask_token")):
            del have[name]
        elif ".q_proj." in name:
            parts = [have.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            have[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif name.endswith(".gamma"):
            # DINOv2 scales each channel of what a block adds: that goes into the linear map before it.
            layer, gamma = name.removesuffix("gamma"), have.pop(name)
            have[layer + "weight"] = have[layer + "weight"] * gamma[:, None]
            have[layer + "bias"] = have[layer + "bias"] * gamma
    return have


def build_network(kind, state, heads=None, dtype=torch.float32):
    """The network whose published weights `state` holds ({name: tensor}), frozen.

    kind: "inception", "dinov2" or "clip" (with or without its text half). heads: of a ViT, as no weight
    tells; by default dim // 64, which all published ones have. ValueError if they are of another network.
    """
    try:
        state = {name: w.detach().to(dtype) for name, w in state.items()}
        with torch.device("meta"):                      # no memory, no initial values
            if kind == "inception":
                net = Inception()
            else:
                state = vit_state(state)
                dim, _, patch, _ = state["patch_embed.weight"].shape
                grid = math.isqrt(state["pos_embed"].shape[1] - 1)
                depth = sum(name.endswith(".norm1.weight") for name in state)
                out = len(state["proj.weight"]) if kind == "clip" else None
                net = ViT(dim, depth, heads or dim // 64, patch, grid, out)
    except Exception as error:                          # other weights can raise nearly anything
        raise ValueError(f"not the weights of {kind}: {error!r}") from None
    return fill(net, state, kind)


# ---- from uint8 pictures to features ---------------------------------------------------------------

def prepare_inception(u, dtype=torch.float32):
    """The FID's original way: uint8 (n, 3, H, W) -> (n, 3, 299, 299) in [-1, 0.9922].

    TensorFlow 1 samples at i·in/out, half a pixel off, and blends in float32, across first, then down.
    """
    x = u.float()
    for _ in range(2):                                  # across; then, turned by .mT, down
        size = x.shape[3]
        at = torch.arange(299, device=u.device) * torch.tensor(size / 299, device=u.device)     # (299,)
        low = at.long()
        a, b = x[..., low], x[..., (low + 1).clamp(max=size - 1)]                       # (n, 3, ., 299)
        x = (a + (b - a) * (at - low)).mT
    return (x.to(dtype) - 128) / 128


def normalise(x, mean, std, dtype):
    """x (n, 3, H, W) in 0 .. 255 -> (x/255 - mean)/std, channel by channel."""
    mean, std = (torch.tensor(v, dtype=dtype, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x.to(dtype) / 255 - mean) / std


def prepare_dinov2(u, dtype=torch.float32):
    """As EDM2 and α-Flow do: uint8 (n, 3, H, W) -> (n, 3, 224, 224); overshoot beyond 0 .. 255 stays."""
    x = F.interpolate(u.float(), (224, 224), mode="bicubic", antialias=True)
    return normalise(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype)


def prepare_clip(u, dtype=torch.float32):
    """As OpenAI does: uint8 (n, 3, H, W) -> (n, 3, 224, 224), the short side resized, the centre cut."""
    height, width = (int(224 * side / min(u.shape[2:])) for side in u.shape[2:])
    pictures = [Image.fromarray(pixels).resize((width, height), Image.BICUBIC)
                for pixels in u.permute(0, 2, 3, 1).cpu().numpy()]                      # each (H, W, 3)
    u = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(u.device)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    return normalise(u[:, :, top:top + 224, left:left + 224], (0.48145466, 0.4578275, 0.40821073),
                     (0.26862954, 0.26130258, 0.27577711), dtype)


# features: what their distance is called, how pictures are prepared, the same in words
FEATURES = {
    "pixels": ("Fréchet distance on pixels", None, "u/127.5 - 1"),
    "inception": ("FID", prepare_inception, "TF1's bilinear to 299x299, no antialias, (u - 128)/128"),
    "dinov2": ("FDD", prepare_dinov2, "bicubic to 224x224, antialias, not rounded, ImageNet mean and std"),
    "clip": ("FCD", prepare_clip, "PIL's bicubic, short side 224, centre crop, CLIP's mean and std"),
}
WEIGHTS = {     # network: file, its sha256, where it is published
    "inception": ("pt_inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                  ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth"]),
    "dinov2": ("dinov2_vitl14_pretrain.pth",
               "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
               ["https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"]),
    "clip": ("clip-vit-base-patch32.bin",
             "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
             ["https://huggingface.co/openai/clip-vit-base-patch32/resolve/"
              "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268/pytorch_model.bin"]),
}


class Extractor:
    """From pictures to features: uint8 (n, 1 or 3, H, W) -> (features (n, dim), Inception's logits or None).

    name: one of FEATURES. weights: a file to take in place of the published one. .about: what must be
    said beside every number. ValueError for another network's weights.
    """

    def __init__(self, name, device="cpu", weights=None):
        if name not in FEATURES:
            raise ValueError(f"unknown features {name!r}: give some of {', '.join(FEATURES)}")
        self.name, self.device, self.net = name, torch.device(device), None
        self.title, self.prepare, how = FEATURES[name]
        self.about = {"features": name, "preprocessing": how}
        if name != "pixels":
            path = Path(weights) if weights else data.fetch(*WEIGHTS[name], data.cache_folder())
            self.net = build_network(name, read_tensors(path)).to(self.device)
            published = not weights or data.checksum_of(path) == WEIGHTS[name][1]
            self.about["weights"] = "published" if published else f"{path.name}, not the published ones"

    @torch.no_grad()
    def __call__(self, u):
        if not self.net:
            return u.flatten(1).double() / 127.5 - 1, None
        pieces = u.split(16 if self.device.type == "cpu" else len(u))               # a CPU's cache is small
        found = [self.net(self.prepare(piece.to(self.device).expand(-1, 3, -1, -1))) for piece in pieces]
        if self.name == "inception":
            return tuple(torch.cat(part) for part in zip(*found))
        return torch.cat(found), None


def extractors_for(names, shape, device, weights=None):
    """A list of Extractors by their names, like "inception,dinov2"; if None, the one that fits `shape`."""
    small = math.prod(shape) <= 3072
    names = (names or ("pixels" if small else "inception")).split(",")
    if "pixels" in names and not small:
        raise ValueError("the distance on pixels is for pictures up to 3x32x32: give other --features")
    return [Extractor(name, device, weights) for name in names]


# ---- pictures from anywhere ------------------------------------------------------------------------

class Pictures:
    """`count` pictures that are read piece by piece: read([3, 5]) -> uint8 (2, C, H, W), on the CPU."""

    def __init__(self, count, read, about):
        self.count, self.read, self.about = count, read, about          # about: what they are, a dict
        self.shape = tuple(read(range(1)).shape[1:])                    # (C, H, W)


def from_dataset(dataset):
    """The pictures of a data.Dataset, by the uint8 rule of drawn ones: a range of 0..16 becomes 0..255."""
    if isinstance(dataset, data.Latents):
        raise ValueError(f"{dataset.name} holds latents: give its pictures (with --size) or statistics")
    return Pictures(len(dataset), lambda rows: data.to_uint8(dataset.read(np.array(rows))),
                    {"pictures": dataset.name})


def from_network(net, decode, labels, grid, sampler, seed, about):
    """Pictures that are drawn when they are read and never written; arguments as in sample.draw."""
    def read(rows):
        return decode(sample.draw(net, labels, rows, grid, sampler, seed)).cpu()
    return Pictures(len(labels), read, about)


def from_folder(folder, size=None):
    """Pictures in a folder and below it; size: centre-cropped to a square and resized."""
    files, _, _ = data.listing(Path(folder))
    pool = ThreadPoolExecutor(8)

    def read(rows):
        found = list(pool.map(lambda k: data.attempt(files[k], size), rows))
        for k, u in zip(rows, found):
            if isinstance(u, str):
                raise ValueError(f"{files[k]} cannot be read ({u}): mend or remove it")
            if u.shape != found[0].shape:
                raise ValueError(f"{files[k]} has another size than others: give --size PIXELS")
        return torch.from_numpy(np.stack(found))
    return Pictures(len(files), read, {"pictures": str(folder), "resized by Lanczos to": size})


def from_npz(path):
    """Pictures in `arr_0`, uint8 (N, H, W, C), of an .npz, read in turn straight from the archive."""
    try:
        file = zipfile.ZipFile(path).open("arr_0.npy")
        np.lib.format.read_magic(file)
        (N, H, W, C), by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if by_columns or dtype != np.uint8 or C not in (1, 3):
            raise ValueError(f"{dtype} {(N, H, W, C)}")
    except Exception as error:                          # a damaged archive raises nearly anything
        raise ValueError(f"{path}: expected arr_0, uint8 (N, H, W, C) ({error})") from None
    start, size = file.tell(), H * W * C

    def read(rows):
        pictures = bytearray()
        try:
            for k in rows:
                file.seek(start + k * size)             # forwards: what lies between is read and let go
                pictures += file.read(size)
            return torch.frombuffer(pictures, dtype=torch.uint8).view(len(rows), H, W, C).permute(0, 3, 1, 2)
        except Exception as error:
            raise ValueError(f"{path} is damaged or cut short ({error})") from None
    return Pictures(N, read, {"pictures": str(path)})


def open_pictures(name, size=None):
    """Pictures in an .npz, in a folder, or of a prepared data set, by its name or folder."""
    path = Path(name)
    if path.suffix == ".npz":
        return from_npz(path)
    if path.is_dir() and not (path / "meta.json").exists():
        return from_folder(path, size)
    return from_dataset(data.load(name))


# ---- measuring -------------------------------------------------------------------------------------

@dataclass
class Measured:
    """What is known of a set of pictures through one Extractor."""
    mean: torch.Tensor                                  # (dim,)
    cov: torch.Tensor                                   # (dim, dim)
    about: dict                                         # what they are of
    score: tuple = None                                 # Inception Score and its deviation over splits
    rows: torch.Tensor = None                           # features (N, dim), process by process, if kept


def measure(pictures, extractors, batch=64, keep=False):
    """[Measured, one for each extractor]; each picture is looked at once and let go.

    Every process looks at every world-th picture; all get the result of all. keep: also the features,
    for precision and recall. ValueError for fewer than 2 pictures.
    """
    rank, world, _ = data.place("cpu")
    N, mine = pictures.count, range(rank, pictures.count, world)
    if N < max(2, world):
        raise ValueError(f"{N} pictures are too few: a covariance needs 2, a process 1")
    batches, split = [mine[i:i + batch] for i in range(0, len(mine), batch)], split_numbers(N)
    stats, kept, sums, result = {}, {}, 0, []
    bar = tqdm(batches, unit="batch", disable=True if rank else None, leave=False)
    for rows, u in zip(bar, data.prefetch(map(pictures.read, batches), 2)):             # u (b, C, H, W)
        for e in extractors:
            features, logits = e(u)                                                     # (b, dim)
            if e not in stats:
                stats[e], kept[e] = RunningStats(features.shape[1], features.device), []
            stats[e].update(features)
            if logits is not None:
                sums = sums + score_sums(logits, split[list(rows)])
            if keep:
                kept[e].append(features.float().cpu())
    for e in extractors:
        every, about = stats[e].all_merge(), {**e.about, **pictures.about, "count": N}
        score = inception_score(sum(of_all(sums))) if e.name == "inception" else None
        rows = torch.cat(of_all(torch.cat(kept[e]))) if keep else None
        result.append(Measured(every.mean, every.cov(), about, score, rows))
    return result


def compare(extractor, made, real=None):
    """{title: number or (number, deviation)} of two Measured; of `made` alone if `real` is None."""
    result = {"Inception Score": made.score} if made.score else {}
    if real:
        result[extractor.title] = frechet_distance(made.mean, made.cov, real.mean, real.cov)
        if made.rows is not None and real.rows is not None:
            result["precision"], result["recall"] = precision_recall(real.rows, made.rows)
    return result


def read_stats(path):
    """Measured from an .npz with mu and sigma (or ref_mu, ref_sigma); None if it holds no statistics."""
    try:
        with np.load(path) as file:                     # which unpickles nothing
            ref = "ref_" if "ref_mu" in file else ""
            if ref + "mu" not in file:
                return None
            about = json.loads(str(file["about"])) if "about" in file else {}
            mu, sigma = (torch.from_numpy(file[ref + name]).double() for name in ("mu", "sigma"))
        gaussian(mu, sigma)                             # whether they are what they seem
        return Measured(mu, sigma, about)
    except Exception as error:                          # a damaged archive raises nearly anything
        raise ValueError(f"{path} cannot be read as statistics: {error}") from None


# ---- command line ----------------------------------------------------------------------------------

def open_ref(ref, size=None, rows=False):
    """(real Pictures or None, Measured or None), by their name; `rows` takes pictures of files with both."""
    stats = read_stats(ref) if ref.endswith(".npz") and not rows else None
    return (None, stats) if stats else (open_pictures(ref, size), None)


def check_comparable(made, extractors, real, stats):
    """ValueError if pictures of other sizes, or statistics of other features, would be compared."""
    if real and real.shape != made.shape:
        raise ValueError(f"pictures of {made.shape}, real ones of {real.shape}: give another reference")
    if stats and any(stats.about.get(key, v) != v for e in extractors for key, v in e.about.items()):
        raise ValueError(f"the reference holds statistics of other features: {stats.about}")


def main():
    p = data.Parser(description="How far pictures are from real ones.")
    made = p.add_mutually_exclusive_group(required=True)
    made.add_argument("--ckpt", help="a checkpoint that draws the pictures")
    made.add_argument("--pictures", help="or pictures that are there: a folder, arr_0 of an .npz, a data set")
    p.add_argument("--ref", help="real ones: as --pictures, or an .npz with mu and sigma [the training data]")
    p.add_argument("--size", type=int, help="centre-crop and resize pictures in folders to so many pixels")
    p.add_argument("--features", help=f"some of {','.join(FEATURES)} [inception; pixels up to 3x32x32]")
    p.add_argument("--precision-recall", action="store_true", help="these, too; keeps all features in memory")
    p.add_argument("--weights", help="a file for the feature network [the published one, downloaded once]")
    p.add_argument("--json", metavar="FILE", help="write values and protocol here as well")
    p.add_argument("--save-stats", metavar="FILE.npz", help="write mu and sigma, by the first of --features")
    sample.drawing_flags(p)
    args = p.parse_args()
    rank, _, device = data.place(args.device)
    ref, keep = args.ref, args.precision_recall
    if args.ckpt and not ref:                           # a released file does not say what it was trained on
        ref = read_checkpoint(args.ckpt)["config"]["recipe"].get("data")
    if not (ref or args.save_stats):
        raise ValueError("nothing to compare with: give --ref, or --save-stats FILE.npz")
    real, stats = open_ref(ref, args.size, keep) if ref else (None, None)
    if args.pictures:
        made = open_pictures(args.pictures, args.size)
    else:
        what, words = sample.to_draw(args, device, min(50_000, real.count if real else 50_000))
        made = from_network(*what, args.seed, {"pictures": args.ckpt, **words})
    extractors = extractors_for(args.features, made.shape, device, args.weights)
    check_comparable(made, extractors, real, stats)
    data.meet()
    theirs = measure(real, extractors, args.batch, keep) if real else [stats] * len(extractors)
    ours = measure(made, extractors, args.batch, keep)
    if rank == 0:
        report(args, extractors, ours, theirs)


def report(args, extractors, ours, theirs):
    """Print the numbers and all that they depend on, and write them where the flags say."""
    result = []
    for e, one, other in zip(extractors, ours, theirs):
        values, about = compare(e, one, other), {"pictures": one.about, "reference": other and other.about}
        result.append(values | about)
        for title, v in values.items():
            print(f"{title}: {v:.4f}" if isinstance(v, float) else f"{title}: {v[0]:.4f} ± {v[1]:.4f}")
        for what, facts in about.items():
            print(f"  {what}: " + ", ".join(f"{k} {v}" for k, v in (facts or {}).items()))
    if args.json:
        with data.replacing(args.json) as file:
            file.write(json.dumps(result, indent=1, ensure_ascii=False).encode())
    if args.save_stats:                                 # under the names of pytorch-fid and ADM
        one = ours[0]
        with data.replacing(args.save_stats) as file:
            np.savez(file, mu=one.mean.cpu(), sigma=one.cov.cpu(), about=json.dumps(one.about))


if __name__ == "__main__":
    data.run(main)
