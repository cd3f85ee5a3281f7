"""The network u(z, t, r, y): a plain DiT (Peebles & Xie 2023) that is told two times instead of one.

    net = build("XL/2", size=32, channels=4, classes=1000)
    u = net(z, t, r, y)                     # the average velocity of the jump from time t down to time r

t = 1 is noise, t = 0 is data, and z_r ≈ z_t - (t - r)·u. At r = t, u is the ordinary velocity of flow
matching.

Parameter names and layouts are those of the released α-Flow checkpoints, so that their weights load as
they are. That is why the embedder of t is called `noise_labels_embedder` and that of t - r
`noise_labels_next_embedder`.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# name: (depth, dim, heads). S to XL are the DiT paper's, Ti is for a laptop, Mi for a small GPU.
SIZES = {
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

    size is height = width of z in pixels (or latent cells), patch the side of one token in the same unit.
    classes counts the real classes: the label table has one row more, the null label of that index.
    ValueError if size is not divisible by patch, dim by heads, or dim by 4 (position table).
    """
    size: int
    channels: int
    patch: int
    dim: int
    depth: int
    heads: int
    classes: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not divisible by patch {self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is not divisible by 4, which the 2-D position table needs")


def build(name, size, channels, classes):
    """A freshly initialised DiT from a name like "XL/2" (size "XL", patch 2).

    size: height = width of z. channels: of z. classes: real classes, without the null label.
    Raises ValueError for an unknown name or sizes that do not fit together.
    """
    width, _, patch = name.partition("/")
    if width not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"unknown model {name!r}: give SIZE/PATCH, like B/2, with SIZE one of "
                         f"{', '.join(SIZES)}")
    depth, dim, heads = SIZES[width]
    return DiT(DiTConfig(size, channels, int(patch), dim, depth, heads, classes))


class Product(torch.autograd.Function):
    """x Wᵀ + b with a forward-mode rule of its own, used where no gradient is asked for.

    PyTorch's rule is ẋWᵀ + xẆᵀ, and it multiplies by Ẇ even when that is all zeros. In du/dt the
    weights stand still: without the second product the derivative costs about two forward passes, not three.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent):
        if weight_tangent is not None or bias_tangent is not None:
            raise NotImplementedError("forward mode along the weights: enable gradients for PyTorch's rule")
        return F.linear(x_tangent, *ctx.saved_tensors)


class Linear(nn.Linear):
    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():    # the compiler has its own rules
            return super().forward(x)
        return Product.apply(x, self.weight, self.bias)


class TimeEmbedder(nn.Module):
    """A time in [0, 1] (not ×1000) as 128 cosines and 128 sines, then a small MLP; never in bf16."""

    def __init__(self, dim, frequencies=128):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * frequencies, dim), nn.SiLU(), Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, t):
        # bf16 keeps 8 bits: it could not tell t = 0.99 from 1. So autocast stops here.
        with torch.autocast(t.device.type, enabled=False):
            k = torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
            angle = t[:, None] * torch.exp(-math.log(10000) * k / self.frequencies)    # (B, 128)
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))               # (B, D)


class LabelEmbedder(nn.Module):
    """One learned row a class, and a last one for "no label"."""

    def __init__(self, classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)                                                  # (B, D)


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
        B, T, D = h.shape
        qkv = self.qkv(h).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # each (B, H, T, D/H)
        h = F.scaled_dot_product_attention(q, k, v)                                     # (B, H, T, D/H)
        return self.proj(h.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """(B, T, D) -> (B, T, D), four times wider in between."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def norm(h, shift, scale):
    """LayerNorm of h (B, T, D) whose shift and scale, each (B, D), come from the condition; in float32."""
    h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
    return h + h * scale[:, None] + shift[:, None]              # not h·(1 + scale): bf16 would round the sum


class Block(nn.Module):
    """A transformer block whose norms and residual gates are steered by the condition c (adaLN-zero)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim)
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
        self.y_embedder = LabelEmbedder(config.classes, D)
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, p * p * C)
        self.recompute = False      # True: backward computes each block again instead of keeping its inside
        self.initialise()

    def initialise(self):
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
        for block in self.blocks:                         # adaLN-zero: every block starts as the identity
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)    # and the network as u = 0

    def forward(self, z, t, r, y):
        """The average velocity of the jump from t down to r.

        z: (B, C, H, W), H = W = config.size. t, r: (B,) floats in [0, 1], r ≤ t. y: (B,) int64 labels in
        [0, classes], `classes` being the null label. Returns u: (B, C, H, W) in z's dtype.
        r > t is not an error: it means the jump from t up to r, but nothing here trains that.
        ValueError if z has the wrong shape or, where looking is free (on the CPU), a label is out of range.
        """
        cfg = self.config
        if z.shape[1:] != (cfg.channels, cfg.size, cfg.size):
            raise ValueError(f"z is {tuple(z.shape)}, but this network takes "
                             f"(B, {cfg.channels}, {cfg.size}, {cfg.size})")
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():  # a GPU would sync
            if not 0 <= int(y.min()) <= int(y.max()) <= cfg.classes:
                raise ValueError(f"labels must lie in [0, {cfg.classes}], {cfg.classes} being the null "
                                 f"label; got {int(y.min())} to {int(y.max())}")

        h = self.x_embedder(z) + self.pos_embed           # (B, T, D), float32 also under autocast
        c = self.noise_labels_embedder(t) + self.noise_labels_next_embedder(t - r) + self.y_embedder(y)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)  # no dropout
            else:
                h = block(h, c)                                                         # (B, T, D), (B, D)
        h = self.final_layer(h, c)                                                      # (B, T, p·p·C)

        B, p, G = len(z), cfg.patch, cfg.size // cfg.patch
        h = h.view(B, G, G, p, p, cfg.channels)           # a token: (row, column, channel) of its patch
        return h.permute(0, 5, 1, 3, 2, 4).reshape(z.shape).to(z.dtype)                 # (B, C, H, W)


def position_table(grid, dim):
    """What the learned position table starts as: 2-D sin-cos, (1, grid², dim).

    The column is in the first half of the channels, the row in the second; each half is [sin | cos] of
    dim/4 frequencies 10000^(-k/(dim/4)).
    """
    k = torch.arange(dim // 4, dtype=torch.float64)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * 10000 ** (-k / (dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # (grid, dim/2)
    column = axis[None, :, :].expand(grid, grid, -1)
    row = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, dim).float()
