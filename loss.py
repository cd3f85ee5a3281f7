"""The α-Flow objective (Zhang et al., "AlphaFlow", ICLR 2026, arXiv 2510.20771).

A network u(z, t, r, y) learns the *average velocity* of the jump from time t down to time r, so that
one or two jumps take noise (t = 1) to data (t = 0). With x data, e noise and Δ = t - r,

    z = (1-t)·x + t·e        v = e - x        z_r ≈ z - Δ·u(z, t, r, y)
    u_target = α·v + (1-α)·u(z - αΔ·v, t - αΔ, r, y)                                     0 < α <= 1

that is: walk the share α of the jump along v, then let the network jump the rest. α = 1 is trajectory
flow matching, α = 1/2 has the step length of the Shortcut model, and α → 0 tends to MeanFlow's target,
v - Δ·du/dt. A curriculum anneals α from 1 to 0. Rows with r = t learn v itself: plain flow matching.

The functions stand in the order of a training step and take any callable net(z, t, r, y) -> u. Leave
times and labels on the CPU: which rows need which pass is then known without waiting for a GPU.
"""
import math
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- 1. the curriculum and the times ---------------------------------------------------------------

SCHEDULES = ("constant", "step", "linear", "log", "exponential", "sigmoid", "cosine")


def alpha_at(step, steps, schedule, window=(0.0, 1.0), start=1.0, end=0.0, gamma=25.0, clamp=0.005):
    """α, a float in [0, 1], at `step` = 0, 1, ... of `steps` (α-Flow §4 and appendix; `cosine` is ours).

    window: α moves from start to end between these two fractions of the run; `constant` stays at start,
    `step` jumps where the window begins. gamma: the steepness of sigmoid and exponential. clamp: η; an α
    that moves snaps to 0 below η and to 1 above 1-η. ValueError for settings out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown alpha schedule {schedule!r}: give one of {', '.join(SCHEDULES)}")
    if not (0 <= start <= 1 and 0 <= end <= 1 and 0 <= clamp < 0.5 and 0 < gamma < math.inf):
        raise ValueError("alpha's start and end must lie in [0, 1], clamp in [0, 0.5), gamma above 0")
    moves = schedule not in ("constant", "step")
    if not 0 <= window[0] <= window[1] <= 1 or moves and window[0] == window[1]:
        raise ValueError(f"alpha moves in a window of two fractions of the run, like 0,0.5; got {window}")
    if schedule == "exponential" and not (start > 0 and end > 0):
        raise ValueError(f"an exponential cannot reach 0, got start {start} and end {end}")

    # Rounded because 0.07 · 100 is 7.000000000000001, and step 7 is inside that window.
    first, last = (round(fraction * steps, 6) for fraction in window)
    if schedule == "constant":
        return float(start)
    if step < first:
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


def sample_times(n, fm_ratio, mean=-0.4, std=1.0, generator=None):
    """Times for n rows: t, r with r <= t, both (n,) float32 on the CPU (α-Flow §5.1).

    The first int(n·fm_ratio) rows have r = t, logit-normal: sigmoid(N(mean, std²)). The others draw two
    such times, t is the later one. ValueError if fm_ratio is outside [0, 1] or std is not positive.
    """
    if not 0 <= fm_ratio <= 1 or not std > 0:
        raise ValueError(f"fm_ratio must lie in [0, 1] and the times' std above 0, got {fm_ratio}, {std}")
    a, b = torch.sigmoid(mean + std * torch.randn(2, n, generator=generator))
    fm = int(n * fm_ratio)
    b[:fm] = a[:fm]
    return torch.maximum(a, b), torch.minimum(a, b)


# ---- 2. the target, from a guided velocity ---------------------------------------------------------

@torch.no_grad()
def guided_velocity(net, z, t, v, y, omega, kappa, t_min, t_max, null, r=None, u=None):
    """Classifier-free guidance trained into the target (MeanFlow §4.2), for rows with t_min < t < t_max:

        v_guided = ω·v + κ·u(z, t, t, y) + (1-ω-κ)·u(z, t, t, null)

    Rows outside keep v. z, v: (B, C, H, W). t, y: (B,). r, u: optional, the prediction u(z, t, r, y), which
    saves a pass where r = t. Returns (B, C, H, W), without gradient. ValueError if null is missing.
    """
    if omega == 1 and kappa == 0:
        return v.detach()
    if null is None:
        raise ValueError("guidance needs null, the index of the null label")
    guided = (t_min < t) & (t < t_max)                                              # strict, as published
    unknown = guided if u is None else guided & (t != r)    # rows whose u(z, t, t, y) is not known yet
    guided, unknown, t, y = on(z, guided.nonzero().squeeze(1), unknown.nonzero().squeeze(1), t, y)
    if not len(guided):
        return v.detach()
    both = torch.cat([unknown, guided])                 # one call of the network for both branches
    labels = torch.cat([y[unknown], torch.full_like(guided, null)])
    out = net(z[both], t[both], t[both], labels).to(v.dtype)
    u_y, u_null = out[:len(unknown)], out[len(unknown):]
    if u is not None:
        u_y = u.detach().to(v.dtype).index_copy(0, unknown, u_y)[guided]
    return v.index_copy(0, guided, omega * v[guided] + kappa * u_y + (1 - omega - kappa) * u_null)


def du_dt(net, z, t, r, v, y):
    """The total derivative of u along the trajectory at fixed r, ∂u/∂z·v + ∂u/∂t (MeanFlow eq. 8).

    z, v: (B, C, H, W). t, r, y: (B,). Returns (B, C, H, W), from one forward-mode product. Attention runs
    as plain matrix products here: PyTorch's fused kernels have no forward-mode rule.
    """
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch 2.14's own rules of jvp call what it has deprecated.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        _, derivative = torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r),
                                       (v, torch.ones_like(t), torch.zeros_like(r)))
    return derivative


@torch.no_grad()
def u_target(net, z, t, r, v, y, alpha, clip=4.0, derivative=du_dt):
    """What u(z, t, r, y) should have been: (B, C, H, W), without gradient (α-Flow eq. 9 and appendix).

        r = t               v
        r < t, α > 0        clip( α·v + (1-α)·u(z - αΔ·v, t - αΔ, r, y), ±clip )       Δ = t - r
        r < t, α = 0        v - Δ·du/dt                                                (not clipped)

    z, v: (B, C, H, W). t, r, y: (B,), rows in any order. ValueError if alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    v, t, r = v.detach(), t.to(z.dtype), r.to(z.dtype)
    rows, t, r, y = on(z, (t != r).nonzero().squeeze(1), t, r, y)                   # the rows that jump
    if not len(rows):
        return v
    z_j, t_j, r_j, v_j, y_j = z[rows], t[rows], r[rows], v[rows], y[rows]
    delta = rowwise(t_j - r_j, v)
    if alpha == 0:
        target = v_j - delta * derivative(net, z_j, t_j, r_j, v_j, y_j)
    elif alpha == 1:
        target = v_j.clamp(-clip, clip)
    else:
        u_next = net(z_j - alpha * delta * v_j, t_j - alpha * (t_j - r_j), r_j, y_j)
        # Not (αΔ·v + (t-αΔ-r)·u_next)/Δ, the same on paper: it loses its digits near r = t.
        target = (alpha * v_j + (1 - alpha) * u_next).clamp(-clip, clip)
    return v.index_copy(0, rows, target.to(v.dtype))    # the other rows keep v


# ---- 3. the loss -----------------------------------------------------------------------------------

def adaptive_weight(err, alpha=0.0, jump=None, c=1e-3, shrink_c=False):
    """The weight of each row's error: (B,), without gradient (MeanFlow §4.3 with p = 1; α-Flow eq. 11).

        1 / (err + c)          rows with r = t, and all rows at α = 0
        α / (err + c)          rows with r < t at α > 0

    err: (B,) mean squared errors. jump: (B,) bool, True where r < t; None means nowhere.
    shrink_c, not published: c·α² in the second line. A fixed c starves these rows near the end of the
    curriculum, where err ~ α²: in test_loss.py their gradient falls to 0.22 of MeanFlow's at α = 0.01,
    then jumps back to 1 when α snaps to 0. With c·α² it stays within 0.5 % of 1 for α <= 1/2.
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
    """The training loss of a batch: (loss, stats), a scalar and a dict, see statistics (α-Flow §4).

    x: (B, C, H, W) data, about unit scale. y: (B,) int64 labels, never changed. e (B, C, H, W), t, r, drop
    (B,): the noise, the times and the uniform numbers that drop labels; drawn from `generator`, one on the
    CPU, where not given. label_drop: probability of the null label inside (t_min, t_max). null: its index.
    net predicts: under DDP the wrapped model, or gradients are never averaged. target_net, by default net,
    makes the targets: under DDP the bare model, for no gradient flows there. The other arguments belong to
    the functions above. ValueError if null is missing, or one of t and r alone is given.
    """
    if label_drop > 0 and null is None or (t is None) != (r is None):
        raise ValueError("label_drop needs null, the index of the null label; t and r go together")
    target_net = net if target_net is None else target_net
    z, e, t, r = noised(x, e, t, r, fm_ratio, mean, std, generator)
    if label_drop > 0:                                  # α-Flow drops labels only inside the interval
        drop = torch.rand(len(x), generator=generator) if drop is None else drop
        y = torch.where(((drop < label_drop) & (t_min < t) & (t < t_max)).to(y.device), null, y)

    t_x, r_x, y_x = on(x, t, r, y)
    u = net(z, t_x, r_x, y_x)                                                       # (B, C, H, W)
    v = guided_velocity(target_net, z, t, e - x, y, omega, kappa, t_min, t_max, null, r, u)
    target = u_target(target_net, z, t, r, v, y, alpha, clip, derivative)

    jump = t_x != r_x
    err = (u - target).square().flatten(1).mean(1)                                  # (B,)
    parts = adaptive_weight(err, alpha, jump, c, shrink_c) * err                    # (B,)
    return parts.mean(), statistics(u.detach(), v, target, err.detach(), parts.detach(), alpha, jump, clip)


def noised(x, e, t, r, fm_ratio, mean, std, generator):
    """z at the times t, and e, t, r, drawn where they are None."""
    if e is None:
        e = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if t is None:
        t, r = sample_times(len(x), fm_ratio, mean, std, generator)
    t_x = rowwise(*on(x, t), x)
    return (1 - t_x) * x + t_x * e, e, t, r                                         # (B, C, H, W), ..., (B,)


def statistics(u, v, target, err, parts, alpha, jump, clip):
    """Means for the log, without a further pass; they average over micro-batches and processes:

      err, err_fm, err_jump   mean squared error, = L_TFM + L_TC + a constant; its parts at r = t and r < t
      loss_fm, loss_jump      the same parts of the loss
      L_TFM, L_TC             trajectory flow matching |u - v|², consistency 2·(v - u_target)·u (eq. 7)
      clipped                 share of the target's entries at the clip
      tangent                 |Δ·du/dt|: exact at α = 0, else a finite difference, too small where clipped
    """
    at_clip = (target.abs() >= clip) & rowwise(jump & (alpha > 0), u)
    if alpha == 1:
        rate = torch.zeros_like(u)                      # the target holds no trace of du/dt
    elif alpha == 0:
        rate = v - target
    else:               # (u - u_next)/α, with u_next = (u_target - α·v)/(1-α) from the target's formula
        rate = ((1 - alpha) * u + alpha * v - target) / (alpha * (1 - alpha))
    return {"err": err.mean(), "err_fm": (err * ~jump).mean(), "err_jump": (err * jump).mean(),
            "loss_fm": (parts * ~jump).mean(), "loss_jump": (parts * jump).mean(),
            "L_TFM": (u - v).square().mean(), "L_TC": (2 * (v - target) * u).mean(),
            "clipped": at_clip.to(u.dtype).mean(), "tangent": (rate.abs() * rowwise(jump, u)).mean()}


# ---- 4. do the two halves pull against each other? -------------------------------------------------

def gradient_conflict(net, x, y, alpha=0.0, *, e=None, t=None, r=None, generator=None, mean=-0.4,
                      std=1.0, omega=1.0, kappa=0.0, t_min=0.0, t_max=1.0, null=None):
    """How the gradients of the objective's parts agree on one batch: a dict of floats (α-Flow §3).

    L_TFM, L_TC: see statistics, with an unclipped target. L_FM: flow matching, r = t at the same z and t.
        cos_tfm_tc                 the conflict: strongly negative in MeanFlow training
        cos_fm_tc, cos_tfm_fm      much weaker, which is why rows with r = t help
        cancelled                  1 - |∇L_TFM + ∇L_TC| / (|∇L_TFM| + |∇L_TC|), the share that is lost
    Read with care: where L_TFM + L_TC is stationary the gradients cancel: cos_tfm_tc = -1 for any method.
    At α = 1 L_TC and its cosines are 0. net: an nn.Module. Drawn times: r < t. Rest as in alpha_flow_loss.
    """
    z, e, t, r = noised(x, e, t, r, 0.0, mean, std, generator)
    t_x, r_x, y_x = on(x, t, r, y)
    u, u_fm = net(z, t_x, r_x, y_x), net(z, t_x, t_x, y_x)
    v = guided_velocity(net, z, t, e - x, y, omega, kappa, t_min, t_max, null)
    target = u_target(net, z, t, r, v, y, alpha, clip=math.inf)
    losses = (u - v).square().mean(), (2 * (v - target) * u).mean(), (u_fm - v).square().mean()
    parameters, gradients = [p for p in net.parameters() if p.requires_grad], []
    for loss in losses:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten().double() for g in parts]))
    tfm, tc, fm = gradients

    def cosine(a, b):
        return torch.cosine_similarity(a, b, dim=0).item()
    return {"cos_tfm_tc": cosine(tfm, tc), "cos_fm_tc": cosine(fm, tc), "cos_tfm_fm": cosine(tfm, fm),
            "cancelled": 1 - ((tfm + tc).norm() / (tfm.norm() + tc.norm())).item()}


def rowwise(a, like):
    """(B,) as (B, 1, 1, 1), to multiply images row by row."""
    return a.view(-1, *[1] * (like.dim() - 1))


def on(z, *small):
    """Small host tensors on z's device, floats in its dtype; pinned, so that nobody waits for the copy."""
    small = [a.pin_memory() if z.is_cuda and not a.is_cuda else a for a in small]
    return [a.to(z.device, z.dtype if a.is_floating_point() else a.dtype, non_blocking=True) for a in small]
