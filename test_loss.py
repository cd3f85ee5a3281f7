"""α-Flow in facts. Each test is one of them, with its equation; together they are the method.

    python -m pytest test_loss.py

Letters as in loss.py: x data, e noise, z = (1-t)·x + t·e, v = e - x, Δ = t - r, and u(z, t, r, y) the
average velocity of the jump from t down to r. Unless a test says otherwise, the network is a tiny DiT
with random float64 weights and the batch is the one below, in which rows with r = t (3 of 8) and r < t
stand in no particular order.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import loss as L
import sample
from loss import (alpha_at, alpha_flow_loss, du_dt, gradient_conflict, guided_velocity, sample_times,
                  u_target)
from model import DiT, DiTConfig

NULL = 3                                                    # three classes, 0 to 2, then the null label
ALPHAS = [1.0, 0.5, 0.01, 0.0]

x, e = torch.randn(2, 8, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
t = torch.tensor([0.9, 0.3, 0.6, 0.8, 0.25, 0.75, 0.5, 1.0], dtype=torch.float64)
r = torch.tensor([0.2, 0.3, 0.1, 0.8, 0.00, 0.50, 0.5, 0.0], dtype=torch.float64)
y = torch.tensor([0, 1, 2, 0, 1, 2, NULL, 1])
jump = t != r
column = lambda a: a.view(-1, 1, 1, 1)                      # (B,) as (B, 1, 1, 1)
z, v, delta = (1 - column(t)) * x + column(t) * e, e - x, column(t - r)


def dit(seed=1):
    net = DiT(DiTConfig(size=4, channels=2, patch=2, dim=16, depth=1, heads=2, classes=3)).double()
    torch.manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return net


class Spy:
    """A network that remembers how many rows each of its calls had, and their labels."""

    def __init__(self, net):
        self.net, self.rows, self.labels = net, [], []

    def __call__(self, z, t, r, y):
        self.rows.append(len(z))
        self.labels.append(y)
        return self.net(z, t, r, y)


def same(a, b, tolerance=1e-12):
    """Equal up to `tolerance` of the largest entry (or of 1)."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# ---- the target and its limits ---------------------------------------------------------------------

def test_alpha_1_is_flow_matching():
    """u_target = clip(v, ±4) at r < t: v is regressed on as it is, and no network is asked for it."""
    target = u_target(None, z, t, r, 3 * v, y, alpha=1)
    same(target[jump], (3 * v)[jump].clamp(-4, 4))
    assert (target[jump].abs() == 4).any()


def test_alpha_half_is_a_shortcut_step():
    """u_target = ½·v + ½·u(z_mid, mid, r): one jump equals two half jumps,
    z - Δ·u_target = z_mid - ½Δ·u_mid."""
    net, mid = dit(), (t + r) / 2
    z_mid = z - delta / 2 * v                               # the first half follows the velocity v ...
    u_mid = net(z_mid, mid, r, y)                           # ... and the second the network's own jump
    target = u_target(net, z, t, r, v, y, alpha=0.5, clip=math.inf)
    same(target[jump], (v / 2 + u_mid / 2)[jump])
    same((z - delta * target)[jump], (z_mid - delta / 2 * u_mid)[jump])


def test_alpha_to_0_is_meanflow():
    """(u_target(α) - u) / α  →  v - Δ·du/dt - u, the MeanFlow residual,
    with an error O(α): half α, half the error."""
    net = dit()
    u = net(z, t, r, y).detach()
    meanflow = (u_target(net, z, t, r, v, y, alpha=0) - u)[jump]
    error = [
        ((u_target(net, z, t, r, v, y, alpha, clip=math.inf) - u)[jump] / alpha - meanflow).abs().max()
        for alpha in (8e-4, 4e-4, 2e-4, 1e-4)]
    assert error[-1] < 0.01 * meanflow.abs().max()
    for coarse, fine in zip(error, error[1:]):
        assert coarse / fine == pytest.approx(2, rel=0.05)


def test_meanflow_target():
    """u_target = v - Δ·du/dt at α = 0, with d/dt = v·∂_z + ∂_t while r stands still. Not clipped."""
    net, h = dit(), 1e-5
    ahead, behind = (net(z + s * v, t + s, r, y) for s in (h, -h))
    same(du_dt(net, z, t, r, v, y), (ahead - behind) / (2 * h), 1e-6)   # against finite differences
    target = u_target(net, z, t, r, 9 * v, y, alpha=0)
    same(target[jump], (9 * v - delta * du_dt(net, z, t, r, 9 * v, y))[jump])
    assert target[jump].abs().max() > 4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_with_r_equal_t_learn_the_velocity(alpha):
    """u_target = v at r = t for every α, and not clipped there."""
    target = u_target(dit(), z, t, r, 9 * v, y, alpha)
    assert torch.equal(target[~jump], 9 * v[~jump]) and target[~jump].abs().max() > 4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_order_of_rows_does_not_matter(alpha):
    """Rows in another order: targets in that order, the same loss, the same gradient."""
    net, order = dit(), torch.tensor([6, 2, 7, 1, 0, 4, 3, 5])
    shuffled = [a[order] for a in (z, t, r, v, y)]
    same(u_target(net, *shuffled, alpha), u_target(net, z, t, r, v, y, alpha)[order])
    guided = dict(omega=0.2, kappa=0.92, t_max=0.75, null=NULL)
    one, _ = alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r, **guided)
    other, _ = alpha_flow_loss(net, x[order], y[order], alpha,
                               e=e[order], t=t[order], r=r[order], **guided)
    same(one, other)
    same(gradient(one, net), gradient(other, net))


def test_near_ties_keep_their_digits():
    """α·v + (1-α)·u_next at t - r = 1e-7 in float32;
    (αΔ·v + (t-αΔ-r)·u_next)/Δ is the same on paper, not in float32."""
    alpha, t32 = 0.3, t.float().clamp(max=0.9)
    r32 = t32 - 1e-7
    z32, v32, net = z.float(), v.float(), dit()
    exact = u_target(net, z32.double(), t32.double(), r32.double(), v32.double(), y, alpha)
    target = u_target(net.float(), z32, t32, r32, v32, y, alpha)
    same(target.double(), exact, 1e-5)

    step = alpha * (t32 - r32)
    u_next = net(z32 - column(step) * v32, t32 - step, r32, y).detach()
    textbook = (column(step) * v32 + column(t32 - step - r32) * u_next) / column(t32 - r32)
    assert (textbook.double() - exact).abs().max() > 0.1


# ---- networks known in closed form -----------------------------------------------------------------

def gaussian(z, t, r, y, s=0.5):
    """The perfect u for data N(0, s²): z_t ~ N(0, σ_t²) with σ_t² = (1-t)²s² + t², so a path is
    z_r = z_t·σ_r/σ_t and

        u = (z_t - z_r)/(t - r) = z·(1 - σ_r/σ_t)/(t - r)          at r = t:  v(z, t) = z·σ_t'/σ_t

    written without the division by t - r: σ_t² - σ_r² = (t - r)·(t + r - s²·(2 - t - r)).
    """
    sigma_t, sigma_r = (((1 - a) ** 2 * s**2 + a**2).sqrt() for a in (t, r))
    return z * column((t + r - s**2 * (2 - t - r)) / ((sigma_t + sigma_r) * sigma_t))


def test_meanflow_identity():
    """u = v(z, t) - Δ·du/dt: the perfect network is its own MeanFlow target, at r = t as well."""
    same(u_target(gaussian, z, t, r, gaussian(z, t, t, y), y, alpha=0), gaussian(z, t, r, y))


def test_one_jump_of_a_perfect_network_equals_many():
    """z_0 = e - u(e, 1, 0) = e·σ_0/σ_1 = s·e, in one jump, in two, in fifty."""
    for grid in ([1, 0], [1, 0.55, 0], [i / 50 for i in range(50, -1, -1)]):
        same(sample.ode(gaussian, e, y, grid), 0.5 * e)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_on_straight_paths_every_alpha_agrees(alpha):
    """One data point x: every path is a line, u(z, t, r) = v = (z - x)/t for all r,
    and u_target = u whatever α is."""
    line = lambda z, t, r, y: (z - 0.3) / column(t)
    z = (1 - column(t)) * 0.3 + column(t) * e
    same(u_target(line, z, t, r, e - 0.3, y, alpha), line(z, t, r, y))


# ---- loss, weight, gradient ------------------------------------------------------------------------

@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_flows_through_the_prediction_alone(alpha):
    """loss = mean sg[weight]·|u - sg[u_target]|²,
    with weight α/(err + c) at r < t and α > 0, else 1/(err + c); c = 1e-3."""
    net = dit()
    u = net(z, t, r, y)
    guided = guided_velocity(net, z, t, v, y, 0.2, 0.5, 0, 1, NULL)
    target = u_target(net, z, t, r, guided, y, alpha)
    err = (u - target).square().mean((1, 2, 3))
    weight = L.adaptive_weight(err, alpha, jump)
    assert not (guided.requires_grad or target.requires_grad or weight.requires_grad)

    share = torch.where(jump, alpha or 1.0, torch.ones_like(err))
    same(weight, (share / (err + 1e-3)).detach())
    loss, _ = alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r, omega=0.2, kappa=0.5, null=NULL)
    same(loss, (weight * err).mean())
    same(gradient(loss, net), gradient((weight * err).mean(), net))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_decomposition(alpha):
    """|u - u_target|² = L_TFM + L_TC + (|u_target|² - |v|²),
    with L_TFM = |u - v|² and L_TC = 2·(v - u_target)·u."""
    net = dit()
    loss, stats = alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r)
    target = u_target(net, z, t, r, v, y, alpha)
    same(stats["err"], stats["L_TFM"] + stats["L_TC"] + (target**2 - v**2).mean())
    same(stats["L_TFM"], (net(z, t, r, y) - v).square().mean().detach())
    same(stats["loss_fm"] + stats["loss_jump"], loss.detach())
    same(stats["err_fm"] + stats["err_jump"], stats["err"])
    clipped = (target[jump].abs() >= 4).sum().item() / z.numel() if alpha else 0
    assert stats["clipped"].item() == pytest.approx(clipped)


def test_tangent_norm_costs_no_extra_pass():
    """stats["tangent"] = mean |Δ·du/dt|: exact at α = 0, and (u - u_next)/α = Δ·du/dt + O(α) above."""
    net = dit()
    expected = (delta * du_dt(net, z, t, r, v, y)).abs().mean().item()          # 0 where r = t
    tangent = {
        alpha: alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r, clip=math.inf)[1]["tangent"].item()
        for alpha in (0, 1e-5, 0.5, 1)}
    assert tangent[0] == pytest.approx(expected, rel=1e-12)
    assert tangent[1e-5] == pytest.approx(expected, rel=1e-3)
    u_mid = net(z - delta / 2 * v, (t + r) / 2, r, y)
    assert tangent[0.5] == pytest.approx(
        ((net(z, t, r, y) - u_mid)[jump].abs().sum() / z.numel() / 0.5).item())
    assert tangent[1] == 0


def test_a_fixed_c_starves_the_jumps_near_the_end_of_the_curriculum():
    """∇loss ~ α·αδ/(α²δ² + c) at r < t.

    With c fixed it dies as α² and jumps to 1 at α = 0; with c·α² it stays near 1.
    Gradient norms relative to α = 0, for the network and batch of tests/golden.
    """
    folder = Path(__file__).parent / "tests" / "golden"
    weights, g = np.load(folder / "sit_small.npz"), np.load(folder / "losses.npz")
    net = DiT(DiTConfig(size=8, channels=4, patch=2, dim=64, depth=3, heads=4, classes=10))
    net.load_state_dict({k[3:]: torch.from_numpy(weights[k])
                         for k in weights.files if k.startswith("sd/")})
    x, e, t, r, y = (torch.from_numpy(g[k]) for k in ("x_plain", "noise", "t", "r", "y"))
    rows = t != r

    def norm(alpha, shrink_c):
        loss, _ = alpha_flow_loss(net.double(), x[rows].double(), y[rows], alpha, e=e[rows].double(),
                                  t=t[rows].double(), r=r[rows].double(), shrink_c=shrink_c)
        return gradient(loss, net).norm().item()

    for alpha, published in ((0.1, 0.97), (0.02, 0.53), (0.01, 0.22), (0.005, 0.067)):
        assert norm(alpha, False) / norm(0, False) == pytest.approx(published, abs=0.005)
    for alpha in (0.5, 0.1, 0.02, 0.005):
        assert norm(alpha, True) / norm(0, True) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("alpha, target_rows", [(1.0, []), (0.5, [5]), (0.01, [5]), (0.0, [5])])
def test_network_rows_per_step(alpha, target_rows):
    """B rows to predict; the target adds none at α = 1, else the r < t rows once (a jvp at α = 0)."""
    net, derivatives = Spy(dit()), []

    def derivative(net, z, *rest):
        derivatives.append(len(z))
        return du_dt(net, z, *rest)

    alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r, derivative=derivative)
    assert net.rows == [8] + target_rows
    assert derivatives == (target_rows if alpha == 0 else [])


# ---- guidance and labels ---------------------------------------------------------------------------

GUIDED = dict(
    t=torch.tensor([0.5, 0.25, 0.60, 0.75, 0.5, 0.60, 0.80, 0.90], dtype=torch.float64),
    r=torch.tensor([0.5, 0.25, 0.10, 0.10, 0.5, 0.20, 0.80, 0.30], dtype=torch.float64),
    y=torch.tensor([0, 1, 2, 0, NULL, NULL, NULL, 1]))      # only rows 0, 2, 4, 5 have 0.25 < t < 0.75


@pytest.mark.parametrize("omega, kappa, cheap, plain", [
    (0.2, 0.92, 6, 8),      # the null label on rows 0, 2, 4, 5; their own on rows 2 and 5, where r < t;
    (2.5, 0.00, 6, 8),      # without r and u, rows 0 and 4 run with their own label, too
    (1.0, 0.00, 0, 0)])     # no guidance, no pass
def test_guidance_runs_only_the_rows_it_needs(omega, kappa, cheap, plain):
    """v_guided = ω·v + κ·u(z, t, t, y) + (1-ω-κ)·u(z, t, t, null) where t_min < t < t_max, else v.

    The bounds are strict. One pass makes both branches; rows outside take no part in it, and where
    r = t the prediction is u(z, t, t, y) already.
    """
    net, (t, r, y) = Spy(dit()), GUIDED.values()
    inside = column((t > 0.25) & (t < 0.75))
    u_y, u_null = net.net(z, t, t, y), net.net(z, t, t, torch.full_like(y, NULL))
    expected = torch.where(inside, omega * v + kappa * u_y + (1 - omega - kappa) * u_null, v).detach()

    u = net.net(z, t, r, y)
    same(guided_velocity(net, z, t, v, y, omega, kappa, 0.25, 0.75, NULL, r, u), expected)
    same(guided_velocity(net, z, t, v, y, omega, kappa, 0.25, 0.75, NULL), expected)
    assert net.rows == [rows for rows in (cheap, plain) if rows]


def test_a_dropped_row_bootstraps_from_itself():
    """y = null inside the interval: v_guided = ω·v + (1-ω)·u(z, t, t, null)."""
    net, null = dit(), torch.full_like(y, NULL)
    guided = guided_velocity(net, z, t, v, null, 0.2, 0.92, 0, 2, NULL)
    same(guided, (0.2 * v + 0.8 * net(z, t, t, null)).detach())


@pytest.mark.parametrize("omega, kappa, scale", [(1.0, 0.5, 2.0), (0.2, 0.92, 2.5)])
def test_effective_guidance_scale(omega, kappa, scale):
    """The u that reproduces its own guided velocity is u_null + ω/(1-κ)·(v - u_null):
    guidance at scale ω/(1-κ)."""
    u, u_null = torch.zeros_like(v), e
    net = lambda z, t, r, y: torch.where(column(y == NULL), u_null[:len(z)], u[:len(z)])
    label = torch.zeros_like(y)
    for _ in range(400):
        u = guided_velocity(net, z, t, v, label, omega, kappa, 0, 2, NULL, t, u)
    same(u, u_null + scale * (v - u_null), 1e-9)


def test_labels_are_dropped_only_inside_the_interval_and_never_in_the_callers_tensor():
    """A share p of the rows with t_min < t < t_max takes the null label;
    the others, and the caller, keep theirs."""
    n, p = 40_000, 0.1
    many, times = torch.zeros(n, dtype=torch.int64), torch.linspace(0, 1, n)
    net = Spy(lambda z, t, r, y: z)                         # seen: the labels of the prediction
    alpha_flow_loss(net, torch.zeros(n, 1, 1, 1), many, 1, t=times, r=times, label_drop=p, null=NULL,
                    t_min=0.25, t_max=0.75, generator=torch.Generator().manual_seed(0))
    inside = (times > 0.25) & (times < 0.75)
    assert (net.labels[0][~inside] == 0).all() and (many == 0).all()
    share = (net.labels[0][inside] == NULL).double().mean().item()
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / (n / 2)))

    net, before, drop = Spy(dit()), y.clone(), torch.linspace(0.0, 0.9, 8)
    alpha_flow_loss(net, x, y, 0.5, e=e, t=t, r=r, drop=drop, label_drop=0.5, null=NULL, t_min=0.25,
                    t_max=0.75)
    assert torch.equal(y, before)
    dropped = (t > 0.25) & (t < 0.75) & (drop < 0.5)        # rows 1 and 2
    assert torch.equal(net.labels[0], torch.where(dropped, NULL, y))
    assert torch.equal(net.labels[1], net.labels[0][jump])  # and the target sees the same labels


# ---- times -----------------------------------------------------------------------------------------

def test_times_are_logit_normal():
    """r = t: P(t < σ(q - 0.4)) = Φ(q). r < t: the later and earlier of two such, Φ² and 1 - (1-Φ)²."""
    n = 200_000
    t, r = sample_times(2 * n, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(t[:n], r[:n]) and (r <= t).all() and t.dtype == torch.float32
    for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        tolerance = 4 * math.sqrt(q * (1 - q) / n)
        for times, normal in ((t[:n], q), (t[n:], math.sqrt(q)), (r[n:], 1 - math.sqrt(1 - q))):
            quantile = torch.sigmoid(
                torch.special.ndtri(torch.tensor(normal, dtype=torch.float64)) - 0.4)
            assert (times < quantile).double().mean().item() == pytest.approx(q, abs=tolerance)


@pytest.mark.parametrize("n, fm_ratio, count", [
    (8, 0.5, 4), (1, 0.75, 0), (3, 0.75, 2), (100, 0.29, 28), (5, 1, 5)])
def test_share_of_rows_with_r_equal_t(n, fm_ratio, count):
    """The first int(B·fm_ratio) rows have r = t, rounded down."""
    t, r = sample_times(n, fm_ratio, generator=torch.Generator().manual_seed(0))
    assert (t[:count] == r[:count]).all() and (r[count:] < t[count:]).all()


# ---- the curriculum --------------------------------------------------------------------------------

def test_sigmoid_curriculum():
    """α = 1/(1 + exp(25·(p - ½))), p = k/K; snapped to 1 and 0 beyond η = 0.005,
    that is outside 0.288 < p < 0.712."""
    alpha = [alpha_at(k, 1000, "sigmoid") for k in range(1000)]
    assert alpha[500] == 0.5 and alpha[400] == pytest.approx(1 / (1 + math.exp(-2.5)), rel=1e-12)
    assert [k for k, a in enumerate(alpha) if 0 < a < 1] == list(range(289, 712))
    assert set(alpha[:289]) == {1.0} and set(alpha[712:]) == {0.0}
    assert alpha == sorted(alpha, reverse=True)


def test_the_other_curricula():
    """p from 0 to 1 over the window: 1 - p, 1 - log10(1 + 9p), 1·end^(p^γ), (1 + cos πp)/2;
    a step; a constant."""
    at = lambda schedule, p, **more: alpha_at(round(1000 * p), 1000, schedule, **more)
    for schedule in ("linear", "log", "cosine"):
        assert at(schedule, 0) == 1 and at(schedule, 1) == 0
    assert at("linear", 0.3) == pytest.approx(0.7)
    assert at("log", 0.3) == pytest.approx(1 - math.log10(3.7))
    assert at("cosine", 0.5) == pytest.approx(0.5)
    assert at("cosine", 0.25) == pytest.approx(0.5 + math.sqrt(0.125))
    assert at("exponential", 0.5, end=0.01, gamma=2) == pytest.approx(0.01**0.25)
    assert (at("step", 0.499, window=(0.5, 0.5)), at("step", 0.5, window=(0.5, 0.5))) == (1, 0)
    assert alpha_at(7, 100, "step", window=(0.07, 1)) == 0  # although 0.07 · 100 > 7 in floating point
    assert [at("constant", 0.9, start=a) for a in (0.5, 0.999, 0.001)] == [0.5, 0.999, 0.001]  # no snap


@pytest.mark.parametrize("schedule", [s for s in L.SCHEDULES if s != "exponential"])
def test_a_window_in_fractions_is_the_same_curve_whatever_the_length(schedule):
    """α(k, K) = α(1000·k, 1000·K), start before the window and end after it,
    so every run ends where it should."""
    for k in range(100):
        short, long = (alpha_at(k * m, 100 * m, schedule, window=(0.5, 0.8333)) for m in (1, 1000))
        assert short == pytest.approx(long, abs=1e-9)
        assert schedule == "constant" or (short == 1 if k < 50 else k <= 83 or short == 0)


# ---- the conflict of the two halves ----------------------------------------------------------------

class Plane(torch.nn.Module):
    """u = a·z + b·r. Every gradient fits on a line: ∂u/∂a = z, ∂u/∂b = r, du/dt = a·v."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in (a, b))

    def forward(self, z, t, r, y):
        return self.a * z + self.b * column(r)


def cosine(a, b):
    return sum(p * q for p, q in zip(a, b)) / math.hypot(*a) / math.hypot(*b) if any(a) and any(b) else 0


@pytest.mark.parametrize("scale", [0.5, 9])                 # 9: v reaches far beyond the clip of the loss
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_gradient_conflict(alpha, scale):
    """cos(∇L_TFM, ∇L_TC) with ∇L_TFM = 2·mean (u - v)·∇u,
    ∇L_TC = 2·mean (v - u_target)·∇u, u_target never clipped; likewise L_FM at r = t."""
    a, b = 0.3, -0.2
    x_, e_, t_, r_ = scale * x[jump], scale * e[jump], column(t[jump]), column(r[jump])
    z_, v_ = (1 - t_) * x_ + t_ * e_, e_ - x_
    assert (v_.abs().max() > 4) == (scale == 9)
    u, u_fm, step = a * z_ + b * r_, a * z_ + b * t_, alpha * (t_ - r_)
    target = (alpha * v_ + (1 - alpha) * (a * (z_ - step * v_) + b * r_) if alpha
              else v_ - (t_ - r_) * a * v_)
    along = lambda factor, time: [(factor * z_).mean().item(), (factor * time).mean().item()]
    tfm, tc, fm = along(u - v_, r_), along(v_ - target, r_), along(u_fm - v_, t_)

    lost = 1 - math.hypot(tfm[0] + tc[0], tfm[1] + tc[1]) / (math.hypot(*tfm) + math.hypot(*tc))

    got = gradient_conflict(Plane(a, b), x_, y[jump], alpha, e=e_, t=t[jump], r=r[jump])
    assert got == pytest.approx(dict(cos_tfm_tc=cosine(tfm, tc), cos_fm_tc=cosine(fm, tc),
                                     cos_tfm_fm=cosine(tfm, fm), cancelled=lost))
    assert all(-1 <= value <= 1 for value in got.values()) and (alpha < 1 or got["cos_tfm_tc"] == 0)


def test_at_a_stationary_point_the_conflict_is_total():
    """∇L_TFM + ∇L_TC = 0 means cos = -1, for any method: the cosine alone proves little.

    Here u - u_target = a·(z + Δ·v) + b·r - v is orthogonal to z and r: two linear equations for a and b.
    """
    features = [z[jump], column(r[jump]).expand_as(z[jump])]
    slopes = [(z + delta * v)[jump], features[1]]
    matrix = torch.tensor([[(f * s).mean() for s in slopes] for f in features], dtype=torch.float64)
    a, b = torch.linalg.solve(matrix, torch.stack([(f * v[jump]).mean() for f in features])).tolist()
    got = gradient_conflict(Plane(a, b), x[jump], y[jump], 0.0, e=e[jump], t=t[jump], r=r[jump])
    assert got["cos_tfm_tc"] == pytest.approx(-1, abs=1e-9)
