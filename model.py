"""The network u(z, t, r, y): a plain DiT (Peebles & Xie 2023) that is told two times instead of one.

    net = build("XL/2", size=32, channels=4, classes=1000)
    u = net(z, t, r, y)                     # the average velocity of the jump from time t down to time r

t = 1 is noise, t = 0 is data, and z_r ≈ z_t - (t - r)·u. At r = t, u is the ordinary velocity of flow
matching. Parameter names and layouts are those of the released α-Flow checkpoints, so that their weights
load as they are. Below the network: weights from files, without running what is in them.
"""
import json
import math
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.utils.checkpoint import checkpoint

# name: (depth, dim, heads). S to XL are the DiT paper's, Na and Ti are for a laptop, Mi for a small GPU.
SIZES = {
    "Na": (4, 64, 2),
    "Ti": (4, 128, 4),
    "Mi": (8, 256, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT; a checkpoint stores it, and it alone rebuilds the network.

    size: height = width of z in pixels (or latent cells), patch: the side of one token in the same unit.
    classes: the real ones; the label table has one row more, the null label of that index. ValueError
    unless all are positive whole numbers, patch divides size, and heads and 4 (position table) divide dim.
    """
    size: int
    channels: int
    patch: int
    dim: int
    depth: int
    heads: int
    classes: int

    def __post_init__(self):
        if not all(isinstance(value, int) and value > 0 for value in vars(self).values()):
            raise ValueError(f"not the sizes of a network: {self}")
        if self.size % self.patch or self.dim % self.heads or self.dim % 4:
            raise ValueError(f"size {self.size} must be divisible by patch {self.patch}, and dim {self.dim} "
                             f"by heads {self.heads} and by 4")


def build(name, size, channels, classes):
    """A freshly initialised DiT from a name like "XL/2", size and patch; the rest as in DiTConfig.
    ValueError for an unknown name or sizes that do not fit together.
    """
    width, _, patch = name.partition("/")
    if width not in SIZES or not patch.isdecimal():
        raise ValueError(f"unknown model {name!r}: give one of {', '.join(SIZES)} and a patch, like B/2")
    depth, dim, heads = SIZES[width]
    return DiT(DiTConfig(size, channels, int(patch), dim, depth, heads, classes))


# ---- the pieces, and the network -------------------------------------------------------------------

class Linear(nn.Linear):
    """nn.Linear with a cheaper rule for du/dt, in which the weights stand still.

    PyTorch's rule, ẋWᵀ + xẆᵀ, multiplies by Ẇ even when it is all zeros: 3 forward passes, not 2.
    """

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():    # not where du/dt is taken
            return super().forward(x)
        x, tangent = unpack_dual(x)                       # x and ẋ, which is None outside torch.func.jvp
        assert unpack_dual(self.weight).tangent is None, "a derivative by the weights needs gradients enabled"
        y = F.linear(x, self.weight, self.bias)
        return y if tangent is None else make_dual(y, F.linear(tangent, self.weight))


class TimeEmbedder(nn.Module):
    """A time in [0, 1] as 128 cosines and 128 sines, then a small MLP; never in bf16."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * 128, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t):
        # bf16 keeps 8 bits: it cannot tell t = 0.999 from 1. So autocast stops here.
        with torch.autocast(t.device.type, enabled=False):
            k = torch.arange(128, device=t.device, dtype=t.dtype)
            angle = t[:, None] * torch.exp(-math.log(10000) * k / 128)                  # (B, 128)
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))               # (B, D)


class PatchEmbedder(nn.Module):
    """Non-overlapping patches, each through the same linear map; a convolution, as checkpoints have it."""

    def __init__(self, channels, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, z):
        return self.proj(z).flatten(2).transpose(1, 2)                                  # (B, T, D), by rows


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, h):
        qkv = self.qkv(h).unflatten(2, (3, self.heads, -1))                             # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # each (B, H, T, D/H)
        # Under autocast q, k and v are bf16 already. It stops here because it would round the scores, too,
        # in the plain attention of du/dt: fused kernels keep them in float32.
        with torch.autocast(h.device.type, enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)                                 # (B, H, T, D/H)
        return self.proj(h.transpose(1, 2).flatten(2))


def norm(h, shift, scale):
    """LayerNorm of h (B, T, D) whose shift and scale, each (B, D), come from the condition; in float32."""
    h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
    return h + h * scale[:, None] + shift[:, None]              # not h·(1 + scale): bf16 would round the sum


class Block(nn.Module):
    """A transformer block whose norms and residual gates are steered by the condition c (adaLN-zero)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=Linear(dim, 4 * dim), gelu=nn.GELU(approximate="tanh"), fc2=Linear(4 * dim, dim)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, h, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = h + gate1[:, None] * self.attn(norm(h, shift1, scale1))
        return h + gate2[:, None] * self.mlp(norm(h, shift2, scale2))


class FinalLayer(nn.Module):
    """(B, T, D), (B, D) -> (B, T, out): what each token says about its patch."""

    def __init__(self, dim, out):
        super().__init__()
        self.linear = Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(norm(h, shift, scale))


class DiT(nn.Module):
    """u(z, t, r, y), the average velocity of a jump (α-Flow §2; the network: DiT §3, adaLN-zero)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, p, C = config.dim, config.patch, config.channels
        self.x_embedder = PatchEmbedder(C, p, D)
        self.pos_embed = nn.Parameter(position_table(config.size // p, D))              # (1, T, D)
        self.noise_labels_embedder = TimeEmbedder(D)                                    # of t
        self.noise_labels_next_embedder = TimeEmbedder(D)                               # of t - r
        # one learned row a class, and a last one for "no label"
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(config.classes + 1, D)))
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, p * p * C)
        self.recompute = False      # True: backward computes each block again instead of keeping its inside

        for module in self.modules():                     # every linear map: Xavier, zero bias
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))                 # a linear map, too
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.noise_labels_embedder, self.noise_labels_next_embedder):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for module in (*self.blocks, self.final_layer):   # adaLN-zero: every block starts as the identity
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)    # and the network as u = 0

    def forward(self, z, t, r, y):
        """The average velocity of the jump from t down to r.

        z: (B, C, H, W), H = W = config.size. t, r: (B,) floats in [0, 1], r ≤ t. y: (B,) int64 labels in
        [0, classes], the last one the null label. -> u (B, C, H, W) in z's dtype; ValueError for other z.
        """
        C, S, p = self.config.channels, self.config.size, self.config.patch
        if z.shape[1:] != (C, S, S):
            raise ValueError(f"z is {tuple(z.shape)}, but this network takes (B, {C}, {S}, {S})")

        h = self.x_embedder(z) + self.pos_embed           # (B, T, D), float32 also under autocast
        # t and the length t - r, not t and r: what a jump needs most is how far it goes, and r = t, plain
        # flow matching, is the one value 0. Unscaled, where DiT has t·1000: du/dt is then of u's own size.
        c = self.noise_labels_embedder(t) + self.noise_labels_next_embedder(t - r) + self.y_embedder(y)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                h = block(h, c)                                                         # (B, T, D), (B, D)
        h = self.final_layer(h, c)                                                      # (B, T, p·p·C)

        h = h.view(-1, S // p, S // p, p, p, C)           # a token: (row, column, channel) of its patch
        return h.permute(0, 5, 1, 3, 2, 4).reshape(z.shape).to(z.dtype)                 # (B, C, H, W)


def position_table(grid, dim):
    """What the learned position table starts as, (1, grid², dim): the column in the first half of the
    channels, the row in the second, each as [sin | cos] of dim/4 frequencies.
    """
    k = torch.arange(dim // 4, dtype=torch.float64)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * 10000 ** (-k / (dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # (grid, dim/2)
    column, row = axis.expand(grid, grid, -1), axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, dim).float()


# ---- weights from files, without running anything in them ------------------------------------------

class Inert:
    """Placeholder for a class or function that a file names. Nothing runs: it is an empty dict, which
    torch.load fills, or where arguments are given an object without content."""

    def __new__(cls, *args):
        return super().__new__(cls) if args else OrderedDict()

    def __setstate__(self, state):
        pass


def read_torch(path):
    """What torch.save wrote, tensors on the CPU and mapped to the file, classes of others as inert dicts.

    ValueError, in one line, for any other file; OSError if it is missing.
    """
    open(path, "rb").close()                              # the system says best what is wrong with a path
    try:
        zipped, known = zipfile.is_zipfile(path), torch.serialization               # before PyTorch 1.6 none
        foreign = known.get_unsafe_globals_in_checkpoint(str(path)) if zipped else []
        with known.safe_globals([(Inert, name) for name in foreign]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:                            # damage can raise nearly anything
        raise ValueError(f"{path} cannot be read: cut short, damaged or no file of torch.save "
                         f"({type(error).__name__}; nothing in it was run)") from None


FORMAT = "alphaflow-1"                                    # what train.py writes into its checkpoints
SAFE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool}


def read_tensors(path):
    """-> {name: tensor on the CPU} from a .safetensors file or a state dict of torch.save; errors as above.

    A .safetensors file: length of the header (8 bytes, little endian), the header (JSON), the numbers.
    """
    if not str(path).endswith(".safetensors"):
        state = read_torch(path)
        return state if isinstance(state, dict) else {}
    try:
        raw, tensors = np.memmap(path, np.uint8, mode="r"), {}                          # (bytes,)
        first = 8 + int.from_bytes(raw[:8].tobytes(), "little")                         # of the numbers
        for name, entry in json.loads(raw[8:first].tobytes()).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                numbers = torch.tensor(raw[first + start:first + end])                  # a copy
                tensors[name] = numbers.view(SAFE[entry["dtype"]]).view(entry["shape"])
        return tensors
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no .safetensors file ({type(error).__name__})") from None


def fill(net, state, what):
    """`net`, built on the meta device, with the tensors of `state`, frozen. ValueError if they do not fit."""
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"not the weights of {what}: {' '.join(str(error).split())[:200]}") from None
    return net.requires_grad_(False).eval()


def read_checkpoint(path):
    """A checkpoint of train.py, or a released α-Flow file in the same layout; told apart by content.

    A dict with net, ema, step, config, data; of latents their mean and std. Errors as in read_torch.
    """
    ckpt = read_torch(path)
    try:
        return ckpt if ckpt.get("format") == FORMAT else from_released(ckpt)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of train.py and no whole released α-Flow file "
                         f"({' '.join(str(error).split())[:100]}; nothing in it was run)") from None


def from_released(theirs):
    """A released α-Flow checkpoint in our layout; the shapes of its tensors tell the sizes."""
    def below(prefix, state):
        return {k.removeprefix(prefix): w for k, w in state.items() if k.startswith(prefix)}

    state, label = theirs["ema"], "y_embedder.embedding_table.weight"
    ema, net = below("model.", state), below("model.", theirs.get("net") or {})
    for weights in (ema, net):
        if len(weights.get(label, ())) == 1000:           # trained without guidance: there is no null label
            weights[label] = torch.cat([weights[label], torch.zeros_like(weights[label][:1])])
    dim, channels, patch, _ = ema["x_embedder.proj.weight"].shape
    size = patch * math.isqrt(ema["pos_embed"].shape[1])
    depth = len({k.split(".")[0] for k in below("blocks.", ema)})
    heads = 16 if dim == 1152 else max(4, dim // 64)      # no shape tells it; XL's are 72 wide
    config = DiTConfig(size, channels, patch, dim, depth, heads, len(ema[label]) - 1)
    mean, var = (state[f"autoencoder_{k}"][0].double().expand(channels, size, size) for k in ("mean", "var"))
    std = (var + 1e-16).sqrt()
    if not (mean + std).isfinite().all() or not state.get("are_ldm_stats_inited", torch.ones(1)).all():
        raise ValueError("the statistics of its latents were never measured")
    return {"format": FORMAT, "net": net, "ema": ema, "step": (theirs.get("stats") or {}).get("cur_step"),
            "config": {"model": asdict(config), "recipe": {}}, "data": {"classes": config.classes},
            "latents": {"mean": mean.float(), "std": std.float()},
            "vae": below("autoencoder.model.model.", state)}
