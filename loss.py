"""The α-Flow objective.

Zhang et al., "AlphaFlow: Understanding and Improving MeanFlow Models", arXiv 2510.20771 (ICLR 2026).

A network u(z, t, r, y) learns the *average velocity* of the jump from time t down to time r, so that
one or two jumps take noise (t = 1) to data (t = 0). With x data, e noise and Δ = t - r,

    z = (1-t)·x + t·e        v = e - x        z_r ≈ z - Δ·u(z, t, r, y)

and the regression target is, for a number α in (0, 1],

    u_target = α·v + (1-α)·u(z - αΔ·v, t - αΔ, r, y)

that is: walk the share α of the jump along v, then let the network jump the rest. α = 1 is trajectory
flow matching, α = 1/2 the Shortcut model, and α → 0 tends to MeanFlow, u_target = v - Δ·du/dt. A
curriculum anneals α from 1 to 0. Rows with r = t learn v itself, which is plain flow matching.

The functions stand in the order in which a training step uses them, and take any callable
net(z, t, r, y) -> u. Letters are the paper's. Images are (B, C, H, W), times and labels (B,).
Times and labels are best left on the CPU: which rows need which network pass is then known without
making a GPU wait, and only the sums run on the device.

    python loss.py --ckpt out/digits/ckpt.pt      # do the two halves of the objective pull apart?
"""
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- 1. the curriculum: which α at which step ------------------------------------------------------

SCHEDULES = ("constant", "step", "linear", "log", "exponential", "sigmoid", "cosine")


def alpha_at(step, steps, schedule, window=(0.0, 1.0), start=1.0, end=0.0, gamma=25.0, clamp=0.005):
    """α for step `step` = 0, 1, ... of `steps` (α-Flow §4 and appendix; `cosine` is ours).

    window: where α moves, as fractions of the run (0, 1), so that a shorter run still goes through it.
    Before it α = start, after it α = end; `constant` stays at start, `step` jumps from start to end
    where the window begins. gamma: the steepness of sigmoid and exponential. clamp: η; α < η snaps
    to 0 and α > 1-η to 1. Returns a float in [0, 1]. ValueError for what describes no schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown alpha schedule {schedule!r}: give one of {', '.join(SCHEDULES)}")
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"alpha must stay in [0, 1], got start {start} and end {end}")
    if not 0 <= clamp < 0.5:
        raise ValueError(f"the snap at the ends needs 0 <= clamp < 0.5, got {clamp}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if steps < 1 or len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
        raise ValueError(f"the alpha window is two fractions of the run, 0 <= first <= second <= 1, "
                         f"got {window} of {steps} steps")
    if schedule not in ("constant", "step") and window[0] == window[1]:
        raise ValueError(f"the alpha window {window} is empty: {schedule} has no time to move in it")
    if schedule == "exponential" and not (start > 0 and end > 0):
        raise ValueError(f"an exponential cannot reach 0: start and end must be positive, got {start} "
                         f"and {end}")

    # Rounded because 0.07 · 100 is 7.000000000000001, and step 7 is inside that window.
    first, last = (round(fraction * steps, 6) for fraction in window)
    if schedule == "constant" or step < first:
        alpha = start
    elif schedule == "step" or step > last:
        alpha = end
    else:
        p = (step - first) / (last - first)
        alpha = {
            "linear": lambda: start + (end - start) * p,
            "log": lambda: start + (end - start) * math.log10(1 + 9 * p),
            "exponential": lambda: start * (end / start) ** (p ** gamma),
            "sigmoid": lambda: start + (end - start) * (1 + math.tanh(gamma * (p - 0.5) / 2)) / 2,
            "cosine": lambda: end + (start - end) * (1 + math.cos(math.pi * p)) / 2,
        }[schedule]()
    return 0.0 if alpha < clamp else 1.0 if alpha > 1 - clamp else float(alpha)


# ---- 2. times and labels ---------------------------------------------------------------------------

def sample_times(n, fm_ratio, mean=-0.4, std=1.0, generator=None):
    """Times for n rows: t, r with r <= t, both (n,) float32 on the CPU (α-Flow §5.1).

    The first int(n·fm_ratio) rows have r = t, logit-normal: sigmoid(N(mean, std²)). The others draw two
    such times, t is the later one. ValueError if fm_ratio is outside [0, 1] or std is not positive.
    """
    if not 0 <= fm_ratio <= 1:
        raise ValueError(f"fm_ratio, the share of rows with r = t, must lie in [0, 1], got {fm_ratio}")
    if not std > 0:
        raise ValueError(f"the times' std must be positive, got {std}")
    a, b = torch.sigmoid(mean + std * torch.randn(2, n, generator=generator))
    fm = int(n * fm_ratio)
    b[:fm] = a[:fm]
    return torch.maximum(a, b), torch.minimum(a, b)


def drop_labels(y, t, drop, null, t_min=0.0, t_max=1.0):
    """Labels with the null label in rows where `drop` holds and t_min < t < t_max (α-Flow: only there).

    y: (B,) int64, left as it is: a new tensor is returned. t: (B,). drop: (B,) bool.
    """
    return torch.where(drop & inside(t, t_min, t_max).to(drop.device), null, y)


def inside(t, t_min, t_max):
    return (t_min < t) & (t < t_max)                                                # strict, as published


# ---- 3. the velocity, guided -----------------------------------------------------------------------

@torch.no_grad()
def guided_velocity(net, z, t, v, y, omega, kappa, t_min, t_max, null, r=None, u=None):
    """Classifier-free guidance trained into the target (MeanFlow §4.2), for rows with t_min < t < t_max:

        v_guided = ω·v + κ·u(z, t, t, y) + (1-ω-κ)·u(z, t, t, null)

    Rows outside keep v. z, v: (B, C, H, W). t, y: (B,). null: the index of the null label.
    r, u: the end times and the prediction u(z, t, r, y), given together if at hand; rows with r = t
    are then not run again. Returns (B, C, H, W), without gradient.

    Only rows that need it go through the network, all in one call. A row is ω·v + k_y·u_y + k_null·u_null
    below; for one without a label (y = null) the two passes are the same, and k_y = 1-ω takes both.
    ValueError if null is missing, or u given without r.
    """
    if omega == 1 and kappa == 0:
        return v.detach()
    if null is None or (u is None) != (r is None):
        raise ValueError("guidance needs null, the index of the null label; r and u go together")
    guided, unlabelled = inside(t, t_min, t_max).cpu(), (y == null).cpu()         # plans are made on the host
    known = torch.zeros_like(guided) if u is None else (r == t).cpu()
    rest = 1 - omega - kappa                            # the null branch's share; 0.7 + 0.3 is 1
    rest = 0.0 if abs(rest) < 1e-6 else rest            # only up to rounding
    k_y = kappa + rest * unlabelled.double()            # (B,) coefficient of u(z, t, t, y) ...
    k_null = rest * (~unlabelled).double()              # (B,) ... and of u(z, t, t, null)

    rows_y = (guided & ~known & (k_y != 0)).nonzero().squeeze(1)
    rows_null = (guided & (k_null != 0)).nonzero().squeeze(1)
    u_y = torch.zeros_like(v) if u is None else u.detach().to(v.dtype, copy=True)
    u_null = torch.zeros_like(v)
    if len(rows_y) + len(rows_null):
        labels = torch.cat([y.cpu()[rows_y], torch.full_like(rows_null, null)])
        rows, labels = on(z, torch.cat([rows_y, rows_null]), labels)
        t_rows = on(z, t)[rows]
        out = net(z[rows], t_rows, t_rows, labels).to(v.dtype)
        u_y.index_copy_(0, rows[:len(rows_y)], out[:len(rows_y)])                   # for r < t, u was another
        u_null.index_copy_(0, rows[len(rows_y):], out[len(rows_y):])

    guided, k_y, k_null = on(z, guided, k_y, k_null)
    mixed = omega * v + rowwise(k_y, v) * u_y + rowwise(k_null, v) * u_null
    return torch.where(rowwise(guided, v), mixed, v)


# ---- 4. the target ---------------------------------------------------------------------------------

def du_dt(net, z, t, r, v, y):
    """The total derivative of u along the trajectory at fixed r, ∂u/∂z·v + ∂u/∂t (MeanFlow eq. 8).

    z, v: (B, C, H, W). t, r, y: (B,). Returns (B, C, H, W), from one forward-mode product. PyTorch has
    no forward-mode rule for its fused attention kernels, so attention runs as plain matrix products
    here, and only here.
    """
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r),
                                       (v, torch.ones_like(t), torch.zeros_like(r)))
    return derivative


@torch.no_grad()
def u_target(net, z, t, r, v, y, alpha, clip=4.0, derivative=du_dt):
    """What u(z, t, r, y) should have been: (B, C, H, W), without gradient (α-Flow eq. 9 and appendix).

        r = t               v
        r < t, α > 0        clip( α·v + (1-α)·u(z - αΔ·v, t - αΔ, r, y), ±clip )       Δ = t - r
        r < t, α = 0        v - Δ·du/dt                                                (not clipped)

    z, v: (B, C, H, W), v guided or not. t, r, y: (B,); rows of both kinds in any mixture and order.
    derivative: how to compute du/dt, for one that is compiled or rounded differently.
    ValueError if alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    v, t, r = v.detach(), t.to(z.dtype), r.to(z.dtype)
    rows = (t != r).cpu().nonzero().squeeze(1)          # the rows that jump, picked on the host
    if not len(rows):
        return v
    rows, t, r, y = on(z, rows, t, r, y)
    z_j, t_j, r_j, v_j, y_j = z[rows], t[rows], r[rows], v[rows], y[rows]
    delta = t_j - r_j
    if alpha == 0:
        target = v_j - rowwise(delta, v) * derivative(net, z_j, t_j, r_j, v_j, y_j)
    else:
        target = alpha * v_j
        if alpha < 1:
            walk = alpha * delta
            u_next = net(z_j - rowwise(walk, v) * v_j, t_j - walk, r_j, y_j)
            # Not (αΔ·v + (t-αΔ-r)·u_next)/Δ, the same on paper: it loses its digits near r = t.
            target = target + (1 - alpha) * u_next
        target = target.clamp(-clip, clip)
    return v.index_copy(0, rows, target.to(v.dtype))    # the other rows keep v


# ---- 5. the loss -----------------------------------------------------------------------------------

def adaptive_weight(err, alpha=0.0, jump=None, c=1e-3, shrink_c=False):
    """The weight of each row's error: (B,), without gradient (MeanFlow §4.3 with p = 1; α-Flow eq. 11).

        1 / (err + c)          rows with r = t, and all rows at α = 0
        α / (err + c)          rows with r < t at α > 0

    err: (B,) mean squared errors. jump: (B,) bool, True where r < t; None means nowhere.
    shrink_c uses c·α² in the second line. Near the end of the curriculum err ~ α² there, and a fixed c
    starves these rows: their gradient falls to 0.22 of MeanFlow's at α = 0.01, then jumps back to 1 when
    α snaps to 0. With c·α² it stays within 0.5 % of 1 for α <= 1/2. The published rule is the default.
    """
    err = err.detach()
    weight = 1 / (err + c)
    if jump is None or alpha == 0:
        return weight
    return torch.where(jump, alpha / (err + c * (alpha**2 if shrink_c else 1)), weight)


def alpha_flow_loss(net, x, y, alpha, *, e=None, t=None, r=None, drop=None, generator=None,
                    fm_ratio=0.5, mean=-0.4, std=1.0,
                    omega=1.0, kappa=0.0, t_min=0.0, t_max=1.0, label_drop=0.0, null=None,
                    clip=4.0, c=1e-3, shrink_c=False, target_net=None, derivative=du_dt):
    """The training loss of a batch: (loss, stats), loss a scalar to call backward() on (α-Flow §4).

    x: (B, C, H, W) data, about unit scale. y: (B,) int64 labels, never changed. alpha: see alpha_at.
    e (B, C, H, W), t, r, drop (B,): the noise, the times and the uniform numbers that drop labels;
    drawn from `generator`, one on the CPU, where not given. fm_ratio, mean, std: see sample_times.
    omega, kappa, t_min, t_max: see guided_velocity. label_drop: probability of the null label inside
    that interval. null: its index, needed by both. clip, derivative: see u_target. c, shrink_c: see
    adaptive_weight.
    net makes the prediction; under DDP the wrapped model, or gradients are never averaged. target_net,
    by default the same, makes the targets; under DDP the bare model, for no gradient flows there.

    stats: detached scalars for the log, means over the batch, so that they average over micro-batches
    and processes:
      err              mean squared error, = L_TFM + L_TC + a constant
      loss_fm, loss_jump   the parts of the loss from rows with r = t and r < t; they add up to it
      L_TFM, L_TC      trajectory flow matching |u - v|², consistency 2·(v - u_target)·u (α-Flow eq. 7)
      clipped          share of the target's entries at the clip
      tangent          mean |Δ·du/dt|: exact at α = 0, 0 at α = 1, between them a finite difference along
                       αΔ, which under bf16 is mostly rounding when α is small
    ValueError for an alpha outside [0, 1], a missing null, or only one of t and r.
    """
    if not 0 <= label_drop <= 1 or label_drop > 0 and null is None:
        raise ValueError(f"label_drop is a probability and needs null, the index of the null label; got "
                         f"{label_drop} and {null}")
    if (t is None) != (r is None):
        raise ValueError("give both t and r, or neither")
    target_net = net if target_net is None else target_net
    e = noise_like(x, generator) if e is None else e
    if t is None:
        t, r = sample_times(len(x), fm_ratio, mean, std, generator)
    if label_drop > 0:
        drop = torch.rand(len(x), generator=generator) if drop is None else drop
        y = drop_labels(y, t, drop.to(y.device) < label_drop, null, t_min, t_max)

    t_x, r_x, y_x = on(x, t, r, y)
    z = rowwise(1 - t_x, x) * x + rowwise(t_x, x) * e                                 # (B, C, H, W)
    u = net(z, t_x, r_x, y_x)                                                       # (B, C, H, W)
    v = guided_velocity(target_net, z, t, e - x, y, omega, kappa, t_min, t_max, null, r, u)
    target = u_target(target_net, z, t, r, v, y, alpha, clip, derivative)

    jump = t_x != r_x
    err = (u - target).square().flatten(1).mean(1)                                  # (B,)
    parts = adaptive_weight(err, alpha, jump, c, shrink_c) * err                    # (B,)
    stats = statistics(u.detach(), v, target, err.detach(), parts.detach(), alpha, jump, clip)
    return parts.mean(), stats


def statistics(u, v, target, err, parts, alpha, jump, clip):
    """The `stats` of alpha_flow_loss, from what it has at hand: no further pass through the network."""
    at_clip = (target.abs() >= clip) & rowwise(jump & (alpha > 0), u)
    if alpha == 1:
        rate = torch.zeros_like(u)                      # the target holds no trace of du/dt
    elif alpha == 0:
        rate = v - target
    else:                                               # u_target solved for (u - u_next)/α
        rate = ((1 - alpha) * u + alpha * v - target) / (alpha * (1 - alpha))
    return {"err": err.mean(), "loss_fm": (parts * ~jump).mean(), "loss_jump": (parts * jump).mean(),
            "L_TFM": (u - v).square().mean(), "L_TC": (2 * (v - target) * u).mean(),
            "clipped": at_clip.to(u.dtype).mean(), "tangent": (rate.abs() * rowwise(jump, u)).mean()}


# ---- 6. do the two halves pull against each other? -------------------------------------------------

def gradient_conflict(net, x, y, alpha=0.0, *, e=None, t=None, r=None, generator=None, mean=-0.4,
                      std=1.0, omega=1.0, kappa=0.0, t_min=0.0, t_max=1.0, null=None, clip=4.0):
    """Cosines between the gradients of the objective's parts on one batch: a dict of floats (α-Flow §3).

    The squared error splits exactly into L_TFM + L_TC + const, with L_TFM = |u - v|² and
    L_TC = 2·(v - u_target)·u. L_FM' is flow matching at the same z and t with r = t. One forward pass
    gives all three gradients:
        cos_tfm_tc     the conflict: strongly negative in MeanFlow training
        cos_fm_tc      that of L_FM', much weaker, which is why rows with r = t help
        cos_tfm_fm
    Read with care: where the sum is stationary its two gradients cancel, so cos_tfm_tc = -1 there,
    whatever the method. At α = 1 the target is v, so L_TC and its cosines are 0.
    net: a torch.nn.Module. x: (B, C, H, W). y: (B,). By default all rows have r < t. The rest is as in
    alpha_flow_loss.
    """
    e = noise_like(x, generator) if e is None else e
    if t is None:
        t, r = sample_times(len(x), 0.0, mean, std, generator)
    t_x, r_x, y_x = on(x, t, r, y)
    z = rowwise(1 - t_x, x) * x + rowwise(t_x, x) * e                                 # (B, C, H, W)
    twice = torch.cat([z, z]), torch.cat([t_x, t_x]), torch.cat([r_x, t_x]), torch.cat([y_x, y_x])
    u, u_fm = net(*twice).chunk(2)
    v = guided_velocity(net, z, t, e - x, y, omega, kappa, t_min, t_max, null)
    target = u_target(net, z, t, r, v, y, alpha, clip)
    losses = {"tfm": (u - v).square().mean(), "tc": (2 * (v - target) * u).mean(),
              "fm": (u_fm - v).square().mean()}

    parameters = [p for p in net.parameters() if p.requires_grad]
    gradient = {}
    for name, loss in losses.items():
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        exact = torch.float32 if x.device.type == "mps" else torch.float64          # which mps does not have
        gradient[name] = torch.cat([g.flatten().to(exact) for g in parts])
    return {f"cos_{a}_{b}": torch.cosine_similarity(gradient[a], gradient[b], dim=0).item()
            for a, b in (("tfm", "tc"), ("fm", "tc"), ("tfm", "fm"))}


# ---- small helpers ---------------------------------------------------------------------------------

def noise_like(x, generator=None):
    """N(0, 1) of x's shape; from the CPU's generator if one is given, then moved."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def rowwise(a, like):
    """(B,) as (B, 1, 1, 1), to multiply images row by row."""
    return a.view(-1, *[1] * (like.dim() - 1))


def on(z, *small):
    """Small host tensors on z's device, floats in its dtype."""
    moved = []
    for a in small:
        a = a.to(z.dtype) if a.is_floating_point() else a
        if z.is_cuda and not a.is_cuda:                 # pinned, or the copy would wait for the GPU's queue
            a = a.contiguous().pin_memory()
        moved.append(a.to(z.device, non_blocking=z.is_cuda))
    return moved[0] if len(moved) == 1 else moved


def main():
    """gradient_conflict over many batches of a checkpoint's own data, as a table and as JSON."""
    import json                                         # the command needs these; the objective does not

    import numpy as np
    from tqdm import tqdm

    import data
    import sample

    p = data.Parser(prog="loss.py", description="Cosines between the gradients of the objective's parts.")
    p.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
    p.add_argument("--alpha", type=float, default=0.0, help="α of the target; 0 is MeanFlow")
    p.add_argument("--batches", type=int, default=100, help="how many batches")
    p.add_argument("--batch", type=int, default=128, help="pictures a batch")
    p.add_argument("--ema", action="store_true", help="at the averaged weights, not the trained ones")
    p.add_argument("--seed", type=int, default=0, help="of batches, noise and times")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    p.add_argument("--out", help="JSON file (default: CKPT.conflict.json)")
    args = p.parse_args()
    if args.batches < 1 or args.batch < 1:
        raise ValueError(f"--batches and --batch must be at least 1, got {args.batches} and {args.batch}")

    ckpt, device = sample.read(args.ckpt), sample.pick_device(args.device)
    recipe, weights = ckpt["config"].get("recipe"), "ema" if args.ema else "raw"
    if not recipe:
        raise ValueError(f"{args.ckpt} does not say how it was trained: expected a checkpoint of train.py")
    dataset = data.load(recipe["data"], seed=args.seed)
    net, _ = sample.load(args.ckpt, weights, device)
    net.requires_grad_(True)
    guidance = {k: recipe[k] for k in ("omega", "kappa", "t_min", "t_max", "clip")}
    rows = []
    for k in tqdm(range(args.batches), disable=None):
        x, y = dataset.batch(k, batch_size=args.batch)
        x = dataset.sample(x, torch.randn(len(x), *dataset.shape, generator=data.generator(args.seed, k, 2)))
        e = torch.randn(x.shape, generator=data.generator(args.seed, k, 1)).to(device)
        t, r = sample_times(len(x), 0.0, recipe["time_mean"], recipe["time_std"],
                            data.generator(args.seed, k))
        rows.append(gradient_conflict(net, x.to(device), y, args.alpha, e=e, t=t, r=r,
                                      null=net.config.classes, **guidance))

    cosines = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        low, high = np.percentile(values, [5, 95])
        cosines[name] = {"mean": float(np.mean(values)), "p5": float(low), "p95": float(high)}
        print(f"{name:12s} mean {np.mean(values):+.3f}    5 % {low:+.3f}    95 % {high:+.3f}")
    out = args.out or f"{args.ckpt}.conflict.json"
    with open(out, "w") as file:
        json.dump({"ckpt": str(args.ckpt), "step": ckpt["step"], "weights": weights, "alpha": args.alpha,
                   "batches": args.batches, "batch": args.batch, "seed": args.seed, "cosines": cosines},
                  file, indent=1)
    print(f"{args.batches} batches of {args.batch}, alpha {args.alpha:g}, {weights} weights of step "
          f"{ckpt['step']}: written to {out}")


if __name__ == "__main__":
    import data
    data.run(main)
