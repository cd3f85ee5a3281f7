"""The network of model.py: sizes, shapes, layouts, precisions, and the forward-mode rule of its Linear.

    python -m pytest tests/test_model.py

Parity with numbers made elsewhere is in test_golden.py, the reading of files in test_files.py.
"""
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loss import alpha_flow_loss, du_dt  # noqa: E402
from model import SIZES, DiT, DiTConfig, build, position_table  # noqa: E402

NULL = 5
SMALL = dict(size=8, channels=3, patch=2, dim=32, depth=2, heads=4, classes=5)


def random_net(std=0.15, **changes):
    """Every weight random: in a fresh net, u = 0 and nothing matters."""
    net = DiT(DiTConfig(**{**SMALL, **changes}))
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def inputs(dtype=torch.float32, n=6):
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, n, 3, 8, 8, generator=g, dtype=dtype)
    t, r = torch.rand(2, n, generator=g, dtype=dtype).sort(dim=0, descending=True).values
    return z, t, r, torch.arange(n) % (NULL + 1), v


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)


# ---- sizes and shapes ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, parameters", [
    ("XL/2", 676_735_504), ("L/2", 459_399_184), ("B/2", 131_288_080)])
def test_parameter_counts(name, parameters):
    with torch.device("meta"):                              # shapes without memory
        net = build(name, size=32, channels=4, classes=1000)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert (net.config.depth, net.config.dim, net.config.heads) == SIZES[name.split("/")[0]]


def test_a_fresh_net_is_exactly_0_and_learns():
    net, (z, t, r, y, v) = DiT(DiTConfig(**SMALL)), inputs()
    assert torch.equal(net(z, t, r, y), torch.zeros_like(z))
    opt = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(3):                                      # the zero layers open one after another
        loss = (net(z, t, r, y) - v).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert all(p.grad.abs().max() > 0 for p in net.final_layer.parameters())


def test_initialisation():
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=8, channels=4, patch=2, dim=256, depth=2, heads=4, classes=999))
    for name, p in net.named_parameters():
        if name == "pos_embed":
            assert torch.equal(p, position_table(4, 256))
        elif name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert (p == 0).all(), name
        elif "embedding_table" in name or "noise_labels" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
        else:                                               # Xavier: uniform on ±sqrt(6 / (in + out))
            bound = (6 / (p[0].numel() + len(p))) ** 0.5
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name


def test_rows_do_not_see_each_other():
    net, (z, t, r, y, _) = random_net().double(), inputs(torch.float64)
    order = torch.tensor([3, 0, 5])
    close(net(z[order], t[order], r[order], y[order]), net(z, t, r, y)[order])
    close(net(*(a[:0] for a in (z, t, r, y))), z[:0])       # and none at all is a batch, too


def test_output_tokens_hold_row_column_channel():
    net, (z, t, r, y, _) = DiT(DiTConfig(**SMALL)), inputs()
    with torch.no_grad():
        net.final_layer.linear.bias.copy_(torch.arange(12.))    # the same 2·2·3 numbers in every token
    u = net(z, t, r, y)
    for row in range(8):
        for col in range(8):
            expected = ((row % 2) * 2 + col % 2) * 3 + torch.arange(3.)
            assert torch.equal(u[0, :, row, col], expected)


# ---- precisions ------------------------------------------------------------------------------------

def record_dtypes(net):
    """dtypes of every float that enters or leaves a module, by its name; filled as the network runs."""
    seen = {}
    for name, module in net.named_modules():
        def hook(_, args, out, name=name):
            seen[name] = [a.dtype for a in (*args, out) if a.is_floating_point()]
        module.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_keeps_the_stream_and_the_times_in_float32(grad):
    net, (z, t, r, y, _) = random_net(), inputs()
    exact = net(z, t, r, y)
    seen = record_dtypes(net)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        u = net(z, t, r, y)
    assert u.dtype == torch.float32 and cosine(u, exact) > 0.999
    assert 1e-4 < (u - exact).norm() / exact.norm() < 0.05  # bf16 was used, and only cost its digits
    for name in ("blocks.0", "blocks.1", "noise_labels_embedder", "noise_labels_embedder.mlp.2",
                 "noise_labels_next_embedder", "noise_labels_next_embedder.mlp.0"):
        assert set(seen[name]) == {torch.float32}, name
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "final_layer.linear"):
        assert seen[name][-1] == torch.bfloat16, name


class Products(TorchDispatchMode):
    """Notes the type of what goes into batched products, which attention's are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.seen = getattr(self, "seen", set()) | {args[0].dtype}
        return func(*args, **(kwargs or {}))


def test_scores_of_du_dt_are_not_rounded_to_bf16():
    net, t = build("Ti/4", 8, 1, 10), torch.full((2,), 0.7)
    z, r, y = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Products() as products:
        du_dt(net, z, t, r, z, y)
    assert products.seen == {torch.float32}


def test_autocast_tells_close_times_apart():
    """0.9990 and 0.9985 are both 1 in bf16, but their embeddings are float32's, bit for bit."""
    net, t = random_net(), torch.tensor([0.9990, 0.9985])
    exact = net.noise_labels_embedder(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.noise_labels_embedder(t), exact)
    assert not torch.equal(exact[0], exact[1])


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_under_autocast_reach_every_parameter(alpha, steps):
    """Autocast caches bf16 copies of the weights: those made without gradient must not cut others off.

    With 2 steps, two micro-batches share one autocast region.
    """
    (x, t, r, y, e), nets, losses = inputs(), [random_net(), random_net()], []
    for net, autocast in zip(nets, (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(steps):
                loss, stats = alpha_flow_loss(net, x, y, alpha, e=e, t=t, r=r * (y != 3) + t * (y == 3),
                                              omega=0.2, kappa=0.5, t_max=0.75, null=NULL)
                loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32 and all(value.isfinite() for value in stats.values())
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    exact, rounded = nets
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters()):
        assert q.grad is not None and q.grad.dtype == torch.float32 and q.grad.abs().max() > 0, name
        assert cosine(p.grad, q.grad) > 0.95, name
    one, other = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in nets)
    assert cosine(one, other) > 0.99


# ---- the forward-mode rule of Linear ---------------------------------------------------------------

@pytest.mark.parametrize("autocast", [False, True])
def test_the_rule_agrees_with_pytorchs_own(autocast):
    dtype = torch.float32 if autocast else torch.float64
    net, (z, t, r, y, v) = random_net().to(dtype), inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        u, own = net(z, t, r, y), du_dt(net, z, t, r, v, y)     # gradients enabled: nn.Linear as it is
        with torch.no_grad():
            assert torch.equal(net(z, t, r, y), u)
            ours = du_dt(net, z, t, r, v, y)
    assert own.requires_grad and not ours.requires_grad
    close(ours, own, (0.02 if autocast else 1e-13) * own.abs().max().item())


def test_a_tangent_of_the_weights_is_refused_where_the_rule_would_drop_it():
    net, (z, t, r, y, _) = random_net().double(), inputs(torch.float64)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    u = lambda weights: torch.func.functional_call(net, weights, (z, t, r, y))
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), pytest.raises(AssertionError, match="needs gradients"):
            torch.func.jvp(u, (weights,), (tangents,))
        derivative = torch.func.jvp(u, (weights,), (tangents,))[1]      # and right with gradients
    ahead, behind = (u({name: w + h * tangents[name] for name, w in weights.items()}) for h in (1e-6, -1e-6))
    close(derivative, (ahead - behind) / 2e-6, 1e-6 * derivative.abs().max().item())


def test_recomputing_changes_no_gradient_and_keeps_less():
    net, (z, t, r, y, _) = random_net(), inputs()
    found, kept = {}, {}
    for net.recompute in (False, True):
        stored = {}                                         # the tensors that backward will need
        keep = lambda a: stored.setdefault(a.data_ptr(), a.numel()) and a
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
            u = net(z, t, r, y)
        found[net.recompute] = torch.autograd.grad(u.square().sum(), list(net.parameters()))
        kept[net.recompute] = sum(stored.values())
    assert all(map(torch.equal, found[False], found[True])) and kept[True] < kept[False] / 2


# ---- what is refused -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["XXL/2", "B", "B/", "B/-1", "B/x", "/2", "", "b/2", "B/2/2"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"\Aunknown model .+\Z"):
        build(name, size=32, channels=4, classes=1000)


@pytest.mark.parametrize("changes, words", [
    (dict(patch=3), "size 8 must be divisible by patch 3"), (dict(heads=5), "and dim 32 by heads 5"),
    (dict(dim=30, heads=3), "dim 30 .* by 4"), (dict(classes=0), "classes=0"), (dict(depth=-1), "depth=-1"),
    (dict(patch=0), "patch=0"), (dict(size=8.0), "size=8.0"), (dict(dim="32"), "dim='32'")])
def test_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=rf"\A.*{words}.*\Z"):
        DiTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("shape", [(6, 3, 8, 4), (6, 3, 16, 16), (6, 1, 8, 8), (6, 3, 8), (3, 8, 8)])
def test_wrong_z(shape):
    _, t, r, y, _ = inputs()
    with pytest.raises(ValueError, match=r"\Az is .+ takes \(B, 3, 8, 8\)\Z"):
        random_net()(torch.zeros(shape), t, r, y)
