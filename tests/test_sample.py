"""
sample.py: samplers against golden numbers and closed forms, checkpoints good and bad, real files,
real processes.

    python -m pytest -q tests/test_sample.py

golden/sampler.npz and golden/sit_small.npz hold numbers only: random weights, inputs, and what the
α-Flow sampler made of them in float64 (states_f64, denoised_f64, result_f64) and with a float32 network
(result_f32).
"""
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402
import sample  # noqa: E402
from model import DiT, DiTConfig  # noqa: E402
from test_train import Lab, contents, free_port  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(size=8, channels=1, patch=4, dim=16, depth=1, heads=2, classes=10)
COUNTS = [5, 1, 0, 2, 2, 2, 2, 2, 2, 2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def tiny_net(seed, **changes):
    """A small DiT whose every weight is random, so that times, labels and pictures all matter."""
    torch.manual_seed(seed)
    net = DiT(DiTConfig(**{**TINY, **changes}))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def write_checkpoint(path, **changes):
    config = {**TINY, **changes}
    about = dict(name="toy", shape=[config["channels"], config["size"], config["size"]], classes=10,
                 names=[f"class {c}" for c in range(10)], range=[0, 255], source="toy",
                 count=sum(COUNTS), label_counts=COUNTS)
    torch.save({"format": "alphaflow-1", "net": tiny_net(0, **changes).state_dict(),
                "ema": tiny_net(1, **changes).state_dict(), "optimizer": {}, "step": 7,
                "config": {"model": config, "recipe": {"lr": 1e-3}}, "data": about}, path)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "ckpt.pt")


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: (exit status, stdout, stderr). Real processes come below."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, argv)])
        try:
            data.run(sample.main)
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        return status, out, err
    return call


def constant(value):
    return lambda z, t, r, y: torch.full_like(z, value)


# ------------------------------------------------------------------ golden numbers


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "sampler.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def golden_net():
    net = DiT(DiTConfig(8, 4, 2, 64, 3, 4, 10))
    with np.load(GOLDEN / "sit_small.npz") as file:
        weights = [name for name in file.files if name.startswith("sd/")]
        net.load_state_dict({name[3:]: torch.from_numpy(file[name]) for name in weights})
    return net.eval()


def off(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / max(1, expected.abs().max()))


def run_case(case, net, golden, dtype, callback=None):
    z, grid = golden["noise"].to(dtype), golden[f"{case}/t_grid"].tolist()
    if case.startswith("cons"):
        noise = golden["step_noise"].to(dtype)
        return sample.consistency(net, z, golden["y"], grid, noise=noise, callback=callback)
    if case == "fm4":                              # u at r = t is the velocity: the ordinary Euler walk
        def euler(z, t, r, y):
            return net(z.to(net.pos_embed), t.to(net.pos_embed), t.to(net.pos_embed), y)
        return sample.ode(euler, z, golden["y"], grid, callback=callback)
    return sample.ode(net, z, golden["y"], grid, callback=callback)


CASES = ["ode1", "ode2", "ode4", "ode_custom", "ode2_open", "cons1", "cons2", "cons_custom", "fm4"]


@pytest.mark.parametrize("case", CASES)
def test_samplers_give_the_golden_states_and_pictures(case, golden, golden_net):
    steps, net = [], golden_net.double()
    result = run_case(case, net, golden, torch.float64, lambda *step: steps.append(step))
    assert off(result, golden[f"{case}/result_f64"]) < 1e-11
    assert off(torch.stack([z for *_, z, _ in steps]), golden[f"{case}/states_f64"]) < 1e-11
    assert off(torch.stack([x_hat for *_, x_hat in steps]), golden[f"{case}/denoised_f64"]) < 1e-11
    times = golden[f"{case}/t_grid"].tolist()
    assert [step[:3] for step in steps] == [(i, t, s) for i, (t, s) in enumerate(zip(times, times[1:]))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_a_float32_network_gives_the_golden_pictures_too(case, state, golden, golden_net):
    result = run_case(case, golden_net.float(), golden, state)
    assert result.dtype == state and off(result, golden[f"{case}/result_f32"]) < 2e-5


# ------------------------------------------------------------------ facts about the samplers


Z = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 1, 2, 2)
Y = torch.tensor([0, 1, 2])


def test_one_jump_subtracts_u_and_a_constant_u_needs_no_second():
    for grid in ([1, 0], [1, 0.3, 0], sample.uniform_grid(7)):
        torch.testing.assert_close(sample.ode(constant(0.25), Z, Y, grid), Z - 0.25)


def test_both_samplers_are_the_same_single_jump_at_one_evaluation():
    def u(z, t, r, y):
        assert t.shape == r.shape == (3,) and (t == 1).all() and (r == 0).all()
        return z.sin() + y.view(-1, 1, 1, 1)
    x = sample.ode(u, Z, Y, [1, 0])
    assert torch.equal(x, sample.consistency(u, Z, Y, [1, 0]))
    assert torch.equal(x, Z - u(Z, torch.ones(3), torch.zeros(3), Y))


def test_a_perfect_network_lands_in_the_same_place_by_any_grid():
    # data N(0, s²): z_r = z_t·σ_r/σ_t with σ_t² = (1-t)²s² + t², so u = z·(1 - σ_r/σ_t)/(t - r)
    def sigma(t):
        return ((1 - t) ** 2 * 0.49 + t ** 2).sqrt()

    def u(z, t, r, y):
        return z * ((1 - sigma(r) / sigma(t)) / (t - r)).view(-1, 1, 1, 1)
    for grid in ([1, 0], [1, 0.55, 0], sample.uniform_grid(5)):
        torch.testing.assert_close(sample.ode(u, Z, Y, grid), 0.7 * Z, rtol=1e-12, atol=1e-12)


def test_an_open_grid_returns_the_picture_pointed_at_and_not_the_state():
    states = []
    x = sample.ode(constant(0.5), Z, Y, [1, 0.4], callback=lambda i, t, s, z, x_hat: states.append(z))
    torch.testing.assert_close(states[-1], Z - 0.3)
    torch.testing.assert_close(x, Z - 0.5)


def test_consistency_noise_comes_from_the_generator_unless_given():
    def go(**kwargs):
        return sample.consistency(lambda z, t, r, y: 0.5 * z, Z, Y, [1, 0.6, 0.3, 0], **kwargs)
    draws = [go(generator=data.generator(key)) for key in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(go(noise=torch.ones(2, *Z.shape)), go(noise=[torch.ones(Z.shape)] * 5))
    for bad in (torch.ones(1, *Z.shape), torch.ones(2, 1, 1, 2, 2)):
        with pytest.raises(ValueError, match="2 draws"):
            go(noise=bad)


def test_samplers_record_no_gradient():
    net = tiny_net(0)
    assert not sample.ode(net, torch.zeros(3, 1, 8, 8), Y, [1, 0]).requires_grad


def test_grids():
    assert sample.uniform_grid(1) == [1.0, 0.0] and sample.uniform_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sample.uniform_grid(3) == [3 / 3, 2 / 3, 1 / 3, 0.0]
    assert sample.check_grid(["1", "0.55", "0"]) == [1.0, 0.55, 0.0] == sample.check_grid(torch.tensor(
        [1, 0.55, 0], dtype=torch.float64))
    for nfe in (0, -1, 1.5):
        with pytest.raises(ValueError, match="whole number"):
            sample.uniform_grid(nfe)
    nan = float("nan")
    for grid in ([], [1], [1, 1], [0, 1], [1, 0.5, 0.6], [1.2, 0], [1, -0.1], [1, nan],
                 [nan, 0], ["1", "x"], [0]):
        with pytest.raises(ValueError, match="falling times") as caught:
            sample.check_grid(grid)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ which picture is which


def test_noise_of_picture_k_depends_on_seed_and_k_alone():
    shape = (2, 4, 4)
    together = sample.noise_for(range(6), shape, seed=3)
    assert together.shape == (6, 2, 4, 4) and together.dtype == torch.float32
    assert torch.equal(together[[4, 1]], sample.noise_for([4, 1], shape, 3))
    others = [sample.noise_for([4], shape, 4), sample.noise_for([5], shape, 3),
              sample.noise_for([4], shape, 3, step=1)]
    assert all(not torch.equal(together[4:5], other) for other in others)
    many = sample.noise_for(range(400), shape, 0)
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


@pytest.mark.parametrize("sampler, grid", [("ode", [1, 0]), ("ode", [1, 0.5, 0]),
                                           ("consistency", [1, 0.6, 0.3, 0])])
def test_picture_k_is_the_same_whatever_the_batch_and_the_processes(ckpt, sampler, grid):
    net, decode = sample.load(ckpt)
    labels = sample.make_labels("random", 11, 10, seed=5)

    def pictures(**kwargs):
        batches = sample.generate(net, decode, labels, grid, sampler, seed=5, **kwargs)
        return torch.cat(list(batches)).int()
    whole = pictures()
    assert whole.shape == (11, 1, 8, 8) and whole.float().std() > 10
    assert (pictures(batch=4) - whole).abs().max() <= 1 and (pictures(batch=1) - whole).abs().max() <= 1
    for rank in range(3):
        assert (pictures(indices=range(rank, 11, 3), batch=2) - whole[rank::3]).abs().max() <= 1


def test_generate_says_what_is_wrong_and_reports_progress(ckpt):
    net, decode = sample.load(ckpt)
    labels, seen = torch.arange(5), []
    batches = list(sample.generate(net, decode, labels, [1, 0], batch=2, progress=seen.append))
    assert [len(b) for b in batches] == seen == [2, 2, 1]
    assert all(b.dtype == torch.uint8 for b in batches)
    for wrong in (dict(sampler="euler"), dict(batch=0), dict(grid=[0.5, 0]), dict(grid=[1, 1])):
        with pytest.raises(ValueError):
            list(sample.generate(net, decode, labels, **{"grid": [1, 0], **wrong}))


def test_labels():
    make = sample.make_labels
    random = make("random", 500, 10, seed=1)
    assert random.dtype == torch.int64 and random.shape == (500,)
    assert set(random.tolist()) == set(range(10))
    assert torch.equal(random[:7], make("random", 7, 10, seed=1))       # label k does not depend on num
    assert not torch.equal(random, make("random", 500, 10, seed=2))
    assert make("balanced", 5, 3, 0).tolist() == [0, 1, 2, 0, 1]
    assert make("3,1,4", 5, 10, 0).tolist() == [3, 1, 4, 3, 1]
    counts = torch.tensor(COUNTS)
    assert torch.equal(make("data", 20, 10, 0, COUNTS).bincount(minlength=10), counts)
    assert torch.equal(make("data", 60, 10, 0, COUNTS).bincount(minlength=10), 3 * counts)
    for num in (1, 7, 13, 99):
        got = make("data", num, 10, 0, COUNTS).bincount(minlength=10)
        assert got.sum() == num and ((got - counts * num / 20).abs() < 1).all()
    for wrong in ("12", "-1", "10", "cats", "", "1,,2", "data"):
        with pytest.raises(ValueError) as caught:
            make(wrong, 5, 10, 0)
        assert "\n" not in str(caught.value)
    for wrong in (("data", 5, 10, 0, [1, 2]), ("data", 5, 2, 0, [0, 0]), ("balanced", 0, 10, 0)):
        with pytest.raises(ValueError):
            make(*wrong)


# ------------------------------------------------------------------ checkpoints


def test_load_gives_what_was_saved_and_ema_is_not_raw(ckpt):
    z, t, r, y = torch.randn(3, 1, 8, 8), torch.ones(3), torch.zeros(3), torch.tensor([0, 5, 9])
    for weights, seed in (("raw", 0), ("ema", 1)):
        net, decode = sample.load(ckpt, weights)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        expected = tiny_net(seed).state_dict()
        assert net.state_dict().keys() == expected.keys()
        assert all(torch.equal(w, expected[name]) for name, w in net.state_dict().items())
        with torch.no_grad():
            assert torch.equal(net(z, t, r, y), tiny_net(seed)(z, t, r, y))
    x = torch.tensor([-1., 0, 0.3, 1])
    assert torch.equal(decode(x), data.to_uint8(x))
    with pytest.raises(ValueError, match="'ema' or 'raw'"):
        sample.load(ckpt, "best")
    assert sample.read(ckpt)["step"] == 7


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_nothing_in_a_hostile_file_is_executed(tmp_path, ckpt):
    marker, path = tmp_path / "owned", tmp_path / "hostile.pt"
    good = sample.read(ckpt)
    for save in (lambda thing: torch.save(thing, path),
                 lambda thing: torch.save(thing, path, _use_new_zipfile_serialization=False),
                 lambda thing: path.write_bytes(pickle.dumps(thing))):
        for thing in (Hostile(marker), {**good, "config": Hostile(marker)}):
            save(thing)
            for reader in (sample.read, sample.load):
                with pytest.raises(data.UserError, match="nothing in it was run") as caught:
                    reader(path)
                assert "\n" not in str(caught.value) and not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()                                   # the same bytes do run where they are let


def test_damaged_and_foreign_files_get_one_line(tmp_path, ckpt):
    whole, path = ckpt.read_bytes(), tmp_path / "bad.pt"
    end = len(whole)
    contents = [whole[:n] for n in (0, 1, 10, 100, 1000, end // 2, end - 100, end - 1)]
    contents += [b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(64), (GOLDEN / "sampler.npz").read_bytes()]
    for content in contents:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(data.UserError, match="expected") as caught:
                sample.load(path)
        assert "\n" not in str(caught.value)
    good = sample.read(ckpt)
    for thing in (torch.zeros(3), {"format": torch.zeros(3)}, {"net": {}}, {"format": "alphaflow-9"},
                  [1], {"format": "alphaflow-1"}, {**good, "ema": None}, {**good, "config": {}},
                  {**good, "config": {"model": {**TINY, "depth": 2}}},
                  {**good, "config": {"model": [1]}},
                  {**good, "config": {"model": {**TINY, "dim": 10**9}}}, {**good, "ema": {"a": 3}},
                  {**good, "ema": {**good["ema"], "extra": torch.zeros(2)}}):
        torch.save(thing, path)
        with pytest.raises(data.UserError, match="expected") as caught:
            sample.load(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(data.UserError, match="no checkpoint at"):
        sample.load(tmp_path / "missing.pt")
    with pytest.raises(data.UserError, match="no checkpoint at"):
        sample.load(tmp_path)


def test_devices():
    assert sample.pick_device("cpu") == torch.device("cpu")
    assert sample.pick_device().type in ("cuda", "mps", "cpu")
    for name in ("banana", "meta", "cuda:99", "", "cpu:x"):
        with pytest.raises(data.UserError, match="cpu"):
            sample.pick_device(name)


# ------------------------------------------------------------------ tensors from other people's files


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3).half()
        self.layers = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        self.tied = torch.nn.Linear(4, 2)
        self.tied.weight = self.layers[1].weight
        self.register_buffer("turned", torch.arange(6).view(2, 3).t())
        self.sizes, self.note = [7, 8], "hello"

    def forward(self, x):
        return self.layers(x)


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.scale = Block(), torch.nn.Parameter(torch.tensor(2.5).double())

    def forward(self, x):
        return self.visual(x) * self.scale


def same(got, expected):
    """The same names, numbers and types, on the CPU, without gradients."""
    assert list(map(str, sorted(got))) == sorted(expected)
    for name, w in expected.items():
        assert got[name].dtype == w.dtype and torch.equal(got[name], w), name
        assert got[name].device.type == "cpu" and not got[name].requires_grad, name


def rewrite(path, change):
    """Write the zip archive `path` anew: change(name, bytes) -> bytes, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        files = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in files:
            if raw is not None:
                archive.writestr(name, raw)


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_tensors_of_a_torchscript_archive(tmp_path, kind):
    net, path = Tower(), tmp_path / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(net) if kind == "script" else torch.jit.trace(net, torch.zeros(1, 4))
        made.save(str(path), _extra_files={"data.pkl": b"not the pickle"})
    # what the reader must not need: the code of the classes
    rewrite(path, lambda name, raw: None if "/code/" in name else raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = sample.read_tensors(path)
    same(got, net.state_dict())
    assert got["visual.conv1.weight"].dtype == torch.float16 and got["scale"].shape == ()
    assert got["visual.turned"].stride() == (1, 3)
    assert got["visual.tied.weight"].data_ptr() == got["visual.layers.1.weight"].data_ptr()
    if kind == "script":  # a traced module keeps its tensors alone
        visual = sample.read_foreign(path)["visual"]
        assert (visual["sizes"], visual["note"], visual["training"]) == ([7, 8], "hello", True)


def test_tensors_of_plain_files_old_and_new(tmp_path):
    state, path = Tower().state_dict(), tmp_path / "net.pt"
    nested = {"state_dict": state, "steps": 3, "more": [torch.ones(2), (torch.zeros(1),)]}
    for zipped in (True, False):
        torch.save(nested, path, _use_new_zipfile_serialization=zipped)
        same(sample.read_tensors(path), {**{f"state_dict.{name}": w for name, w in state.items()},
                                         "more.0": torch.ones(2), "more.1.0": torch.zeros(1)})
    torch.save(state, path)
    same(sample.read_tensors(str(path)), state)
    assert list(sample.read_foreign(path)) == list(state)         # the order, and no _metadata


@pytest.fixture
def foreign():
    """A module that is there while a file is written and gone when it is read."""
    module = types.ModuleType("lab")
    exec("""
import torch
class Net(torch.nn.Module): pass
class Config: pass
class Table(dict): pass
class Row(list): pass
class Slots: __slots__ = ("a", "b")
class Own:
    def __getstate__(self): return [1, torch.ones(1)]
    def __setstate__(self, state): raise SystemExit("run")
def make(*args): raise SystemExit("run")
class Made:
    def __reduce__(self): return make, (1, {"w": torch.full((2,), 9.)})
""", vars(module))
    sys.modules["lab"] = module
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) == "builtins":
            thing.__module__ = "lab"
    yield module
    sys.modules.pop("lab", None)


def test_foreign_classes_become_plain_objects(tmp_path, foreign):
    net, config, slots, path = foreign.Net(), foreign.Config(), foreign.Slots(), tmp_path / "lab.pt"
    net.inner, net.steps = torch.nn.Linear(2, 2), torch.nn.ParameterList([torch.ones(3)])
    net.register_buffer("mean", torch.arange(4.))
    config.lr, config.itself, slots.a = 0.1, config, torch.ones(2)
    table, row = foreign.Table(x=1), foreign.Row([1, torch.zeros(2)])
    everything = {"ema": net, "net": net.state_dict(), "config": config, "slots": slots, "table": table,
                  "row": row, "own": foreign.Own(), "made": foreign.Made(), "class": foreign.Net,
                  "dtype": torch.bfloat16, "size": torch.Size([2, 3]), "set": {5}, 7: (None, True, b"x"),
                  "path": Path("a/b")}
    torch.save(everything, path)
    del sys.modules["lab"]
    got = sample.read_foreign(path)
    assert type(got) is dict and list(got) == list(everything)
    assert got["config"]["lr"] == 0.1 and got["config"]["itself"] is got["config"]
    assert got["table"] == {"x": 1} and got["row"]["items"][0] == 1 and list(got["slots"]) == ["a"]
    assert got["own"]["state"][0] == got["made"]["args"][0] == 1
    assert (got["class"], got["dtype"], got["size"]) == ("lab.Net", "torch.bfloat16", [2, 3])
    assert (got["set"], got[7]) == ([5], [None, True, b"x"]) and got["path"]["args"] == ["a", "b"]
    state = net.state_dict()
    tensors = {f"{place}.{name}": w for place in ("ema", "net") for name, w in state.items()}
    same(sample.read_tensors(path), {**tensors, "slots.a": torch.ones(2), "row.items.1": torch.zeros(2),
                                     "own.state.1": torch.ones(1),
                                     "made.args.1.w": torch.full((2,), 9.)})

    def plain(x, seen):
        if id(x) in seen:
            return True
        parts = [*x, *x.values()] if type(x) is dict else x if type(x) is list else []
        known = (dict, list, str, int, float, bool, bytes, type(None), torch.Tensor)
        return type(x) in known and all(plain(part, {*seen, id(x)}) for part in parts)
    assert plain(got, set())


def test_views_types_and_empty_tensors_come_back_as_they_were(tmp_path, foreign):
    base = torch.arange(24, dtype=torch.float32)
    things = dict(base=base, rows=base[4:20].view(4, 4).t(), every=base[1::5],
                  wide=base[:3].expand(2, 3), none=torch.zeros(0, 3, dtype=torch.int16),
                  scalar=torch.tensor(3), flags=base > 9)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.complex64, torch.complex128, torch.uint16):
        things[str(dtype)[6:]] = base[3:9].to(dtype)
    things["float8"] = base[:5].to(torch.float8_e4m3fn).view(torch.uint8)
    path = tmp_path / "views.pt"
    for extra in ({}, {"foreign": foreign.Config()}):             # torch's reader, ours
        torch.save({**things, **extra}, path)
        got = sample.read_tensors(path)
        same(got, things)
        for name, w in things.items():
            assert w.numel() == 0 or got[name].stride() == w.stride(), name
        got["base"][5] = 99.                                      # [5] is in `rows` and not in `wide`
        assert got["rows"][1, 0] == 99 and got["wide"].max() == 2
        got["base"][1] = -7.
        assert got["every"][0] == got["wide"][1, 1] == -7
    reach = sample.read_foreign(path)["rows"]                     # a tensor cannot reach out of its file
    assert reach.untyped_storage().nbytes() == 24 * 4
    rewrite(path, lambda name, raw: raw[:-1] if name.endswith("/data/0") else raw)
    with pytest.raises(data.UserError, match="nothing in it was run"):
        sample.read_tensors(path)
    torch.save(base.to(torch.complex64).conj(), path)             # a note beside the numbers
    with pytest.raises(data.UserError, match="conjugated"):
        sample.read_foreign(path)


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_hostile_archive_runs_nothing(tmp_path):
    marker, path = tmp_path / "owned", tmp_path / "hostile.pt"
    write, w = f"open({str(marker)!r}, 'w')", torch.ones(2)
    inner = Calls(eval, write)
    for evil in (Calls(os.system, f"touch {marker}"), inner, Calls(exec, write),
                 Calls(getattr, inner, "x"), Calls(open, str(marker), "w"),
                 Calls(torch.load, str(path), None, inner),
                 Calls(torch._utils._rebuild_parameter, inner, True, None),
                 Calls(torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (write,), {})):
        for thing, tensors in ((evil, {}), ({"w": w, "state_dict": {"evil": [evil]}}, {"w": w}),
                               ({"a": {"b": (evil, w)}}, {"a.b.1": w})):
            torch.save(thing, path)
            same(sample.read_tensors(path), tensors)
            assert isinstance(sample.read_foreign(path), dict) and not marker.exists(), evil.call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Tower()).save(str(path))
    for raw in (b"cposix\nsystem\n(S'touch %s'\ntR.", b"cbuiltins\neval\n(S'open(\"%s\", \"w\")'\ntR.",
                b"(cos\nsystem\nS'touch %s'\no.", b"(S'touch %s'\nios\nsystem\n.",
                b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'touch %s'\ntR.",
                b"ctorch._utils\n_rebuild_tensor_v2\n}S'__code__'\nS'touch %s'\nsb."):
        raw = raw % os.fsencode(marker)
        rewrite(path, lambda name, old: raw if name.endswith("/data.pkl") else old)
        try:
            assert sample.read_tensors(path) == {}
        except data.UserError as error:
            assert "\n" not in str(error)
        assert not marker.exists(), raw
    pickle.loads(b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(marker))
    assert marker.exists()                                   # where they are let, they do run


def test_foreign_files_that_are_no_archive_get_one_line(tmp_path, foreign):
    path = tmp_path / "net.pt"
    torch.save({"a": torch.arange(2000.), "config": foreign.Config()}, path)
    whole = path.read_bytes()
    assert len(sample.read_tensors(path)) == 1
    end = len(whole)
    contents = [whole[:n] for n in (0, 1, 10, 100, 1000, end // 2, end - 30, end - 1)]
    contents += [b"hello\n", bytes(5000), b"\x89PNG\r\n\x1a\n", pickle.dumps(foreign.Config),
                 (GOLDEN / "sampler.npz").read_bytes()]
    at = whole.index(np.float32(1000).tobytes())
    contents.append(whole[:at] + b"\x01" + whole[at + 1:])       # one bit of one weight
    for content in contents:
        path.write_bytes(content)
        for reader in (sample.read_tensors, sample.read_foreign):
            with pytest.raises(data.UserError, match="nothing in it was run") as caught:
                reader(path)
            assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    for k in range(0, end, 97):                                   # any byte: an answer or that line
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 0x55]) + whole[k + 1:])
        try:
            sample.read_tensors(path)
        except data.UserError as error:
            assert "\n" not in str(error)
    for place in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(OSError):
            sample.read_tensors(place)


# ------------------------------------------------------------------ pictures of pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_puts_every_pixel_in_its_place(channels):
    pictures = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    sheet = sample.contact_sheet(pictures, columns=3)
    assert sheet.mode == {1: "L", 3: "RGB"}[channels]
    assert sheet.size == (2 + 3 * 58, 2 + 2 * 58)                      # a cell is 8·7 = 56 wide, a gap 2
    pixels = np.asarray(sheet).reshape(sheet.height, sheet.width, channels)
    for k in range(5):
        left, top = 2 + k % 3 * 58, 2 + k // 3 * 58
        small = pixels[top:top + 56, left:left + 56][3::7, 3::7]
        assert (small == pictures[k].permute(1, 2, 0).numpy()).all()
    assert (pixels[60:, 118:] == 255).all()                            # no sixth picture
    captioned = sample.contact_sheet(pictures, 3, scale=2, captions=["seven", "日本"])
    assert captioned.height == 2 + 2 * 18 and captioned.width > 2 + 3 * 18
    assert (np.asarray(captioned)[:, :20] < 128).any()                 # there is ink


def test_contact_sheet_wants_one_or_three_channels():
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            sample.contact_sheet(torch.zeros(1, channels, 8, 8, dtype=torch.uint8), 1)


def test_trajectory_goes_from_the_noise_to_the_picture(ckpt, tmp_path):
    net, decode = sample.load(ckpt)
    labels, path = torch.tensor([1, 2]), tmp_path / "t.gif"
    for sampler in ("ode", "consistency"):
        sample.trajectory(net, decode, labels, sampler, 0, path, steps=5)
        x, = sample.generate(net, decode, labels, sample.uniform_grid(5), sampler, seed=0)
        noise = decode(sample.noise_for(range(2), (1, 8, 8), 0))
        with Image.open(path) as gif:
            assert gif.n_frames == 6 and gif.info["loop"] == 0
            for number, tiles in ((0, noise), (5, torch.cat([x, x]))):
                gif.seek(number)
                frame = np.asarray(gif.convert("L"))
                left = frame.shape[1] - 2 * 58
                for k, tile in enumerate(tiles):
                    top = 2 + k // 2 * 58
                    shown = frame[top:top + 56, left + k % 2 * 58:][3::7, 3:56:7]
                    assert (shown == tile[0].numpy()).all()
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------ the command line


def test_the_grid_is_written_beside_the_checkpoint(ckpt, cli):
    status, out, err = cli("--ckpt", ckpt, "--nfe", 2)
    assert (status, err) == (0, "")
    path = ckpt.parent / "grid_ode_nfe2_ema.png"
    assert out == (f"wrote {path}: 100 pictures, ema weights of step 7, 2 NFE, ode, grid 1,0.5,0, "
                   "labels balanced, seed 0\n")
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.height == 2 + 10 * 58 and sheet.width > 2 + 10 * 58       # wider: captions


def test_npz_png_and_folder_show_the_same_pictures(ckpt, cli, tmp_path):
    common = ("--ckpt", ckpt, "--grid", "1,0.55,0", "--sampler", "consistency", "--num", 12, "--seed", 3)
    assert cli(*common, "--classes", "data", "--out", tmp_path / "a.npz", "--batch", 5)[0] == 0
    assert cli(*common, "--classes", "data", "--out", f"{tmp_path}/new/pngs/")[0] == 0
    with np.load(tmp_path / "a.npz") as file:
        pictures, labels = file["arr_0"], file["arr_1"]
    assert pictures.shape == (12, 8, 8, 1) and pictures.dtype == np.uint8 and labels.dtype == np.int64
    assert (labels == sample.make_labels("data", 12, 10, 3, COUNTS).numpy()).all()
    files = sorted((tmp_path / "new/pngs").iterdir())
    assert [f.name for f in files] == [f"{k:06d}.png" for k in range(12)]
    for picture, file in zip(pictures, files):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - picture[..., 0]).max() <= 1
    net, decode = sample.load(ckpt)
    drawn, = sample.generate(net, decode, torch.from_numpy(labels), [1, 0.55, 0], "consistency", seed=3)
    assert np.abs(drawn.permute(0, 2, 3, 1).numpy().astype(int) - pictures).max() <= 1
    assert cli(*common, "--raw", "--out", tmp_path / "b.npz")[0] == 0
    with np.load(tmp_path / "b.npz") as file:
        assert (file["arr_0"] != pictures).any()


def test_an_old_file_stays_until_the_new_one_is_whole(ckpt, cli, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        yield torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        raise OSError("the disk is on fire")
    monkeypatch.setattr(sample, "generate", broken)
    for name in ("old.npz", "old.png"):
        (tmp_path / name).write_text("precious")
        assert cli("--ckpt", ckpt, "--out", tmp_path / name)[0] == 2
        assert (tmp_path / name).read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"old.npz", "old.npz.parts", "old.png"}
    monkeypatch.undo()                                      # nothing was drawn yet: other flags are fine
    assert cli("--ckpt", ckpt, "--num", 3, "--out", tmp_path / "old.npz")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"old.npz", "old.png"}


def test_more_channels_than_a_picture_has_fit_in_npz_only(cli, tmp_path):
    four = write_checkpoint(tmp_path / "four.pt", channels=4)
    status, _, err = cli("--ckpt", four, "--out", tmp_path / "a.png")
    assert status == 2 and "4 channels" in err and err.count("\n") == 1
    assert cli("--ckpt", four, "--num", 2, "--out", tmp_path / "a.npz")[0] == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 4)


# ------------------------------------------------------------------ many pictures, many processes


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


MANY = ["--device", "cpu", "--num", "22", "--batch", "4", "--classes", "random", "--grid", "1,0.55,0",
        "--sampler", "consistency"]


@pytest.fixture
def many(lab, ckpt):
    """Draw 22 pictures in batches of 4 on `world` processes: what each of them said."""
    def call(out, *flags, world=1, hook=""):
        ranks = lab.start_ranks("--ckpt", ckpt, *MANY, "--out", out, *flags, world=world,
                                program="sample.py", hook=hook)
        return [lab.finish(rank) for rank in ranks]
    return call


@pytest.fixture(scope="module")
def whole(lab, ckpt, tmp_path_factory):
    """The same pictures from one process that nobody disturbed: a.npz and the folder pngs."""
    folder = tmp_path_factory.mktemp("whole")
    for out in ("a.npz", "pngs/"):
        many.__wrapped__(lab, ckpt)(f"{folder}/{out}")[0].ok()
    return folder


def test_one_two_and_three_processes_write_the_same_npz(many, whole, ckpt, tmp_path):
    for world in (2, 3):
        first, *others = many(tmp_path / "a.npz", world=world)
        assert first.ok().out.count("\n") == 1 and all(other.ok().out == "" for other in others)
        assert contents(tmp_path) == {Path("a.npz"): (whole / "a.npz").read_bytes()}
    net, decode = sample.load(ckpt)
    labels = sample.make_labels("random", 22, 10, 0)
    drawn = list(sample.generate(net, decode, labels, [1, 0.55, 0], "consistency", batch=4))
    with np.load(whole / "a.npz") as file:
        assert (file["arr_0"] == torch.cat(drawn).permute(0, 2, 3, 1).numpy()).all()
        assert (file["arr_1"] == labels.numpy()).all() and file["arr_1"].dtype == np.int64


def test_two_processes_make_the_folder_that_one_makes(many, whole, tmp_path):
    first, second = many(f"{tmp_path}/pngs/", "--trajectory", tmp_path / "t.gif", world=2)
    assert first.ok().out.count("\n") == 1 and second.ok().out == ""
    assert (tmp_path / "t.gif").exists()
    assert len(contents(whole / "pngs")) == 22
    assert contents(tmp_path / "pngs") == contents(whole / "pngs")


def test_torchrun_ends_when_one_process_fails_and_its_pictures_are_not_lost(many, whole, ckpt, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport data, sample\n"
                      "def generate(*args, drawn=sample.generate):\n"
                      "    if os.environ['RANK'] == '1': raise OSError('the disk is on fire')\n"
                      "    return drawn(*args)\n"
                      "sample.generate = generate\ndata.run(sample.main)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                f"--master-port={free_port()}", "--", str(driver)]
    ran = subprocess.run([*torchrun, "--ckpt", str(ckpt), *MANY, "--out", "a.npz"], cwd=tmp_path,
                         env=ENV, capture_output=True, text=True, timeout=60)
    assert ran.returncode and "the disk is on fire" in ran.stderr and not (tmp_path / "a.npz").exists()
    assert re.search("going on: [123] of 6 batches are there", many(tmp_path / "a.npz")[0].ok().out)
    assert (tmp_path / "a.npz").read_bytes() == (whole / "a.npz").read_bytes()


KILL = """
import contextlib, os, signal, data
safely = data.replacing
@contextlib.contextmanager
def replacing(path, sync=True):
    with safely(path, sync) as file:
        yield file
        if path.name == NAME:                               # half of it is written
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
data.replacing = replacing
"""


@pytest.mark.parametrize("out, moments, then", [
    ("a.npz", [("000004.raw", 1), ("000020.raw", 2), ("a.npz", 1)], 2),    # while drawing, and joining
    ("pngs/", [("000005.png", 1), ("000018.png", 2)], 3),
])
def test_killed_and_started_again_it_ends_with_the_same_bytes(many, whole, tmp_path, out, moments, then):
    folder = tmp_path / ("pngs" if out == "pngs/" else "a.npz.parts")
    for name, world in moments:
        killed = many(f"{tmp_path}/{out}", world=world, hook=KILL.replace("NAME", repr(name)))
        assert -9 in [rank.status for rank in killed], killed
        assert not (tmp_path / "a.npz").exists() and (folder / sample.RECORD).exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("000000.*")}
    assert len(before) == 1
    first, *others = many(f"{tmp_path}/{out}", world=then)
    assert "going on: " in first.ok().out and all(other.ok() for other in others)
    assert contents(tmp_path) == {k: v for k, v in contents(whole).items() if str(k).startswith(out)}
    if out == "pngs/":
        assert before == {path: path.stat().st_mtime_ns for path in before}    # kept, not drawn again


def test_only_the_same_run_goes_on(many, ckpt, cli, tmp_path):
    for out, left in (("a.npz", "a.npz.parts"), ("pngs/", "pngs")):
        name = "000008.raw" if out == "a.npz" else "000008.png"
        assert many(f"{tmp_path}/{out}", hook=KILL.replace("NAME", repr(name)))[0].status == -9
        before = contents(tmp_path)
        flags = ["--ckpt", ckpt, *MANY, "--out", f"{tmp_path}/{out}"]
        for other, named in ((["--seed", 1], "--seed"), (["--num", 23], "--num"), (["--raw"], "--raw"),
                             (["--grid", "1,0.5,0"], "times"), (["--sampler", "ode"], "--sampler"),
                             (["--classes", "balanced"], "--classes"), (["--batch", 5], "--batch")):
            status, said, err = cli(*flags, *other)
            assert (status, said, err.count("\n")) == (2, "", 1) and named in err and left in err, err
        again = ckpt.with_name("again.pt")
        again.write_bytes(ckpt.read_bytes())
        assert "with other --ckpt:" in cli(*flags, "--ckpt", again)[2]
        (tmp_path / left / "notes.txt").write_text("mine")
        assert "not empty" in cli(*flags)[2]
        (tmp_path / left / "notes.txt").unlink()
        with sample.holding(tmp_path / left):
            assert "another run is still writing" in cli(*flags)[2]
        with pytest.raises(data.UserError, match="not empty"):               # as fid.py calls it
            sample.place(f"{tmp_path / left}/", None, 1, 22, flag="--save-pictures")
        assert contents(tmp_path) == before
        if out == "pngs/":                          # a power cut may have taken the end of a file
            (tmp_path / "pngs" / "000001.png").write_bytes(b"")
        assert cli(*flags)[0] == 0 and not list(tmp_path.rglob(".*"))
    with np.load(tmp_path / "a.npz") as file:
        for k, picture in enumerate(file["arr_0"]):
            assert (np.asarray(Image.open(tmp_path / "pngs" / f"{k:06d}.png")) == picture[..., 0]).all()


def test_a_full_disk_is_seen_before_the_first_picture(ckpt, cli, tmp_path, monkeypatch):
    free = 2 * 22 * 64                              # bytes: 22 grey pictures of 8x8, once more as the .npz
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=free - 1))
    status, said, err = cli("--ckpt", ckpt, *MANY, "--out", tmp_path / "a.npz")
    assert (status, said, err.count("\n")) == (2, "", 1) and "GB are free" in err, err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=free))
    assert cli("--ckpt", ckpt, *MANY, "--out", tmp_path / "a.npz")[0] == 0


def test_memory_holds_two_batches_and_not_all(cli, tmp_path, monkeypatch):
    def generate(net, decode, labels, grid, sampler, seed, batch, indices, progress):
        yield torch.from_numpy(np.full((len(indices), 4, 8, 8), indices[0] % 251, np.uint8))
    monkeypatch.setattr(sample, "generate", generate)
    four = write_checkpoint(tmp_path / "four.pt", channels=4)
    tracemalloc.start()                             # counts the arrays of numpy, and all are here
    assert cli("--ckpt", four, "--num", 40_000, "--batch", 1000, "--out", tmp_path / "a.npz")[0] == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 * 256_000 < peak < 2_500_000                    # a batch is 256 kB, all pictures are 10 MB
    with np.load(tmp_path / "a.npz") as file:
        assert (file["arr_0"][:, 0, 0, 0] == np.arange(40_000) // 1000 * 1000 % 251).all()


# Each wrong call is a process of its own, forked from one that has loaded torch: loading takes longer.
FORKS = """
import json, os, runpy, sys, traceback, sample
sample.load(sys.argv[1])
for argv, env in json.load(sys.stdin):
    (out, out_w), (err, err_w) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(out_w, 1), os.dup2(err_w, 2)
        os.environ.update(env)
        for fd in (out, out_w, err, err_w): os.close(fd)
        sys.argv = ["sample.py", *argv]
        status = 0
        try:
            runpy.run_path(sample.__file__, run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)                       # at once: taking torch down costs most of a second
    os.close(out_w), os.close(err_w)
    texts = [open(fd).read() for fd in (out, err)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *texts]), flush=True)
"""


def test_every_wrong_call_ends_in_one_line_and_status_2(ckpt, tmp_path):
    cut, hostile, full, taken = (tmp_path / n for n in ("cut.pt", "hostile.pt", "full", "dir.png"))
    cut.write_bytes(ckpt.read_bytes()[:5000])
    torch.save(Hostile(tmp_path / "owned"), hostile)
    for folder in (full, taken):
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    good = ["--ckpt", str(ckpt), "--device", "cpu", "--out", str(tmp_path / "never.png")]
    wrong = [
        (["--nfe", "1"], "--ckpt"),
        (["--ckpt", str(tmp_path / "missing.pt")], "no checkpoint at"),
        (["--ckpt", str(tmp_path)], "no checkpoint at"),
        (["--ckpt", str(cut)], "cut short"),
        (["--ckpt", str(hostile)], "nothing in it was run"),
        (["--ckpt", str(GOLDEN / "sampler.npz")], "expected"),
        ([*good, "--nfe", "0"], "whole number"),
        ([*good, "--nfe", "-3"], "whole number"),
        ([*good, "--nfe", "many"], "invalid int"),
        ([*good, "--grid", "1,1,0"], "falling"),
        ([*good, "--grid", "1,x,0"], "falling"),
        ([*good, "--grid", "1,nan"], "falling"),
        ([*good, "--grid", ""], "falling"),
        ([*good, "--grid", "0.8,0"], "starts at 0.8"),
        ([*good, "--nfe", "1", "--grid", "1,0"], "not allowed with"),
        ([*good, "--ema", "--raw"], "not allowed with"),
        ([*good, "--sampler", "euler"], "invalid choice"),
        ([*good, "--classes", "10"], "label 10 is out of range"),
        ([*good, "--classes", "1,cat"], "random, balanced, data"),
        ([*good, "--classes", ""], "random, balanced, data"),
        ([*good, "--num", "0"], "1 or more"),
        ([*good, "--num", "5000"], "4096"),
        ([*good, "--batch", "0"], "1 or more"),
        ([*good, "--seed", "-1"], "seeds"),
        ([*good, "--device", "banana"], "device 'banana'"),
        ([*good, "--devise", "cpu"], "unrecognized"),
        ([*good, "--trajectory", str(tmp_path / "t.mp4")], "FILE.gif"),
        ([*good, "--trajectory", "/dev/null/t.gif"], "cannot write"),
        ([*good, "--out", str(tmp_path / "a.jpg")], "FILE.png"),
        ([*good, "--out", "/dev/null/x/grid.png"], "cannot write"),
        ([*good, "--out", f"{cut}/"], "cannot write"),
        ([*good, "--out", str(full)], "not empty"),
        ([*good, "--out", str(taken)], "not empty"),
    ]
    calls = [(argv, {}) for argv, _ in wrong] + [(good, {"WORLD_SIZE": "2", "RANK": "0"})]
    wrong.append((good, "FOLDER/"))
    ran = subprocess.run([sys.executable, "-c", FORKS, str(ckpt)], input=json.dumps(calls), text=True,
                         cwd=ROOT, env=ENV, capture_output=True, timeout=100)
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(results) == len(wrong), ran.stderr
    for (argv, expected), (status, out, err) in zip(wrong, results):
        assert (status, out) == (2, "") and err.count("\n") == 1, (argv, status, out, err)
        assert expected in err and err.startswith("sample.py: error: "), (argv, err)
    assert sorted(tmp_path.rglob("*")) == before            # nothing made, nothing lost, nothing run
    assert not [f for f in ROOT.iterdir() if f.name.startswith("grid_")]
