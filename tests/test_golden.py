"""Parity: the network, its derivatives, the α-Flow target, weight, loss, gradients, and the schedules;
at the end how loss.py is called, and what it refuses.

    python -m pytest tests/test_golden.py

golden/ holds numbers only; golden/README.md says what they are and where they come from. Everything is
compared in float64 to 1e-11 and in float32 to 2e-5, of the largest entry (or of 1). The samplers'
numbers are in test_sample.py. The method itself, fact by fact, is in ../test_loss.py.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loss as L  # noqa: E402
from model import DiT, DiTConfig  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
NET, LOSS, SCHEDULES = (dict(np.load(GOLDEN / f"{name}.npz"))
                         for name in ("sit_small", "losses", "schedules"))
NULL = 10
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
SUFFIX = {torch.float64: "f64", torch.float32: "f32"}


def tensors(arrays, names, dtype):
    """The named arrays, floats as `dtype`."""
    found = [torch.from_numpy(arrays[name]) for name in names]
    return [a.to(dtype) if a.is_floating_point() else a for a in found]


def golden_net(dtype):
    net = DiT(DiTConfig(size=8, channels=4, patch=2, dim=64, depth=3, heads=4, classes=10))
    weights = {name[3:]: torch.from_numpy(NET[name]) for name in NET if name.startswith("sd/")}
    net.load_state_dict(weights)                            # strict: the released names and shapes
    assert sum(p.numel() for p in net.parameters()) == 277_456
    return net.to(dtype)


def check(got, expected, dtype):
    got, expected = torch.as_tensor(got).detach().double(), torch.as_tensor(expected).double()
    assert got.shape == expected.shape
    off = ((got - expected).abs().max() / max(1, expected.abs().max())).item()
    assert off < TOLERANCE[dtype]


# ---- network ---------------------------------------------------------------------------------------

@DTYPES
@pytest.mark.parametrize("grad", [True, False])             # without gradients Linear has its own rule
def test_network(dtype, grad):
    net, (z, t, r, y) = golden_net(dtype), tensors(NET, "xtry", dtype)
    with torch.set_grad_enabled(grad):
        check(net(z, t, r, y), NET[f"u_{SUFFIX[dtype]}"], dtype)
        check(net(z, t, r, torch.full_like(y, NULL)), NET[f"u_null_{SUFFIX[dtype]}"], dtype)
        check(net(z, t, t, y), NET[f"u_inst_{SUFFIX[dtype]}"], dtype)


def test_activations():
    net, (z, t, r, y) = golden_net(torch.float64), tensors(NET, "xtry", torch.float64)
    modules = {"patch_embed": net.x_embedder, "emb_t": net.noise_labels_embedder,
               "emb_y": net.y_embedder, "emb_delta": net.noise_labels_next_embedder,
               "final_tokens": net.final_layer,
               **{f"block{i}": block for i, block in enumerate(net.blocks)}}
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    net(z, t, r, y)
    assert {f"dbg/{name}" for name in seen} == {name for name in NET if name.startswith("dbg/")}
    for name, out in seen.items():
        check(out, NET[f"dbg/{name}"], torch.float64)


@DTYPES
@pytest.mark.parametrize("grad", [True, False])
def test_derivative_along_the_trajectory(dtype, grad):
    net, (z, v, t, r, y) = golden_net(dtype), tensors(NET, "xvtry", dtype)
    with torch.set_grad_enabled(grad):
        check(L.du_dt(net, z, t, r, v, y), NET[f"dudt_{SUFFIX[dtype]}"], dtype)


@pytest.mark.parametrize("along", "xtr")
@pytest.mark.parametrize("grad", [True, False])
def test_derivatives_along_each_argument(along, grad):
    net, (z, v, t, r, y) = golden_net(torch.float64), tensors(NET, "xvtry", torch.float64)
    tangents = {"x": v, "t": torch.ones_like(t), "r": torch.ones_like(r)}
    direction = tuple(tangents[name] * (name == along) for name in "xtr")
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), direction)
    check(derivative, NET[f"jvp_{along}_f64"], torch.float64)


def test_position_table():
    net = DiT(DiTConfig(size=8, channels=4, patch=2, dim=64, depth=1, heads=4, classes=10))
    check(net.pos_embed, NET["sd/pos_embed"], torch.float32)


# ---- loss ------------------------------------------------------------------------------------------

CASES = sorted({name.split("/")[0] for name in LOSS if "/" in name})
ORDERS = pytest.mark.parametrize("order", [list(range(8)), [5, 0, 7, 2, 1, 6, 3, 4]], ids=["", "shuffled"])


def setting(case, order, dtype):
    """net, the batch x, e, t, r, y of a case, rows in this order, v = e - x, z, α and the guidance."""
    x, e, t, r, y = (a[order] for a in tensors(LOSS, (f"x_{batch(case)}", "noise", "t", "r", "y"), dtype))
    alpha, omega, kappa, t_min, t_max = LOSS[f"{case}/settings"].tolist()
    z = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * e
    return golden_net(dtype), (x, e, t, r, y), e - x, z, alpha, (omega, kappa, t_min, t_max, NULL)


def batch(case):
    return "clamp" if case.startswith("clamp") else "plain"


@DTYPES
@ORDERS
@pytest.mark.parametrize("case", CASES)
def test_velocity_target_and_weight(case, order, dtype):
    net, (x, e, t, r, y), v, z, alpha, guidance = setting(case, order, dtype)
    u = net(z, t, r, y)
    check(u, LOSS[f"pred_{batch(case)}"][order], dtype)

    guided = L.guided_velocity(net, z, t, v, y, *guidance)
    known = LOSS["v_cfg_cfg"][order] if case.startswith("cfg") else v         # unguided it stays e - x
    check(guided, known, dtype)
    check(L.guided_velocity(net, z, t, v, y, *guidance, r, u), known, dtype)  # the cheap form

    target = L.u_target(net, z, t, r, guided, y, alpha)
    check(target, LOSS[f"{case}/u_tgt"][order], dtype)
    clipped = ((target.abs() == 4).flatten(1).any(1) & (t != r)).sum()
    assert (clipped > 0) == (case in ("clamp_a0.5", "nocfg_a1"))

    err = (u - target).square().mean((1, 2, 3))
    weight = L.adaptive_weight(err, alpha, t != r)
    suffix = "" if dtype == torch.float64 else "_f32"
    for got, name in ((err, "mse"), (weight, "weight"), (weight * err, "loss")):
        check(got, LOSS[f"{case}/{name}{suffix}"][order], dtype)
    check((u - guided).square().mean((1, 2, 3)), LOSS[f"{case}/loss_tfm"][order], dtype)
    check((2 * (guided - target) * u).mean((1, 2, 3)), LOSS[f"{case}/loss_tcc"][order], dtype)


@DTYPES
@ORDERS
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case, order, dtype):
    net, (x, e, t, r, y), _, _, alpha, (omega, kappa, t_min, t_max, null) = setting(case, order, dtype)
    loss, stats = L.alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r, omega=omega, kappa=kappa,
                                    t_min=t_min, t_max=t_max, null=null)
    loss.backward()
    check(loss, LOSS[f"{case}/loss"].mean(), dtype)
    if dtype == torch.float32:
        check(loss, LOSS[f"{case}/loss_mean_f32"], dtype)
    for name, part in (("err", "mse"), ("L_TFM", "loss_tfm"), ("L_TC", "loss_tcc")):
        check(stats[name], LOSS[f"{case}/{part}"].mean(), dtype)
    jump = LOSS["r"] < LOSS["t"]
    check(stats["loss_fm"], (LOSS[f"{case}/loss"] * ~jump).mean(), dtype)
    check(stats["loss_jump"], (LOSS[f"{case}/loss"] * jump).mean(), dtype)
    clipped = (np.abs(LOSS[f"{case}/u_tgt"][jump]) == 4).sum() / x.numel() if alpha else 0
    check(stats["clipped"], clipped, dtype)

    grads = {name: p.grad for name, p in net.named_parameters()}
    assert sorted(grads) == sorted(LOSS["param_names"])
    norms = torch.stack([grads[name].double().norm() for name in LOSS["param_names"]])
    check(norms, LOSS[f"{case}/gradnorm"], dtype)
    if dtype == torch.float32:
        check(norms, LOSS[f"{case}/gradnorm_f32"], dtype)
    for name in LOSS:
        if name.startswith(f"{case}/grad/"):
            check(grads[name.split("/")[-1]], LOSS[name], dtype)


# ---- schedules -------------------------------------------------------------------------------------

SETTINGS = json.loads(str(SCHEDULES["settings_json"]))


def expressible(s):
    """Two of the 61 keep α at the snap instead of 0 (`discrete_training`), one has a second threshold
    for the snap to 1 (`up_clamp_value`), and one is an exponential that ends at 0, which is 0 from its
    second step on: an error here."""
    return not (s.get("discrete_training") or s["up_clamp_value"]
                or (s["scheduler"] == "exponential" and s["end_value"] == 0))


def test_schedules():
    assert sum(map(expressible, SETTINGS)) == 57 and len(SETTINGS) == 61
    for s, values in zip(SETTINGS, SCHEDULES["values"]):
        if expressible(s):
            window = (s["change_init_steps"] / 1000, s["change_end_steps"] / 1000)
            for step, value in zip(SCHEDULES["steps"].tolist(), values):
                alpha = L.alpha_at(step, 1000, s["scheduler"], window,
                                   s["initial_value"], s["end_value"], s["gamma"], s["clamp_value"])
                assert isinstance(alpha, float) and alpha == pytest.approx(value, abs=1e-14), (s, step)


# ---- how loss.py is called -------------------------------------------------------------------------

def test_target_net_makes_the_targets():
    """net predicts and learns; target_net runs the guidance and u_next: under DDP the bare model."""
    net, (x, e, t, r, y), _, _, alpha, (omega, kappa, t_min, t_max, null) = setting(
        "cfg_a0.5", list(range(8)), torch.float64)
    calls = []

    def spy(name):
        def call(z, t, r, y):
            calls.append((name, len(z), torch.is_grad_enabled()))
            return net(z, t, r, y)
        return call

    loss, _ = L.alpha_flow_loss(spy("net"), x, y, alpha, e=e, t=t, r=r, target_net=spy("target"),
                                omega=omega, kappa=kappa, t_min=t_min, t_max=t_max, null=null)
    check(loss, LOSS["cfg_a0.5/loss"].mean(), torch.float64)
    assert calls[0] == ("net", 8, True) and calls[-1] == ("target", 5, False) and len(calls) == 3
    assert calls[1][::2] == ("target", False)


@pytest.mark.parametrize("wrong", [
    dict(schedule="sigmoidal"), dict(start=1.5), dict(end=-0.1), dict(end=math.nan), dict(clamp=0.5),
    dict(clamp=-0.1), dict(gamma=0), dict(gamma=math.nan), dict(window=(-0.1, 1)), dict(window=(0, 1.1)),
    dict(window=(0.8, 0.2)), dict(window=(0.5, 0.5)), dict(schedule="exponential"),
    dict(schedule="exponential", start=0, end=0.5)], ids=str)
def test_a_curriculum_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\A.+\Z"):        # one line
        L.alpha_at(**{**dict(step=0, steps=100, schedule="sigmoid"), **wrong})


X, T, Y = torch.zeros(2, 4, 8, 8), torch.tensor([0.5, 1.0]), torch.tensor([0, 1])


@pytest.mark.parametrize("words, call", [
    ("fm_ratio", lambda: L.sample_times(8, 1.1)), ("std", lambda: L.sample_times(8, 0.5, std=0)),
    ("alpha", lambda: L.u_target(None, X, T, T, X, Y, 1.1)),
    ("alpha", lambda: L.alpha_flow_loss(golden_net(torch.float32), X, Y, -0.1)),
    ("null", lambda: L.alpha_flow_loss(golden_net(torch.float32), X, Y, 0, omega=2.0)),
    ("null", lambda: L.alpha_flow_loss(None, X, Y, 0, label_drop=0.1)),
    ("together", lambda: L.alpha_flow_loss(None, X, Y, 0, t=T))])
def test_so_is_an_objective(words, call):
    with pytest.raises(ValueError, match=rf"\A.*{words}.*\Z"):
        call()
