"""Facts about fid.py: the distance is exact, statistics forget how rows arrived, nothing goes unsaid.

    python -m pytest tests/test_fid.py

golden/frechet.npz holds pairs of distributions with their distance from 40-digit arithmetic (of the rank
deficient pair, the features themselves), and to compare, what the usual matrix square root makes of it.
"""
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import fid  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
from fid import RunningStats, frechet_distance  # noqa: E402

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "frechet.npz"))


def golden(case):
    """-> mu1, cov1, mu2, cov2, exact distance."""
    if case == "rank256":  # 100 and 80 rows of 256 numbers: more than half of all eigenvalues are 0
        x1, x2 = (GOLDEN[f"rank256_x{i}"].astype(np.float64) for i in (1, 2))
        four = x1.mean(0), np.cov(x1, rowvar=False), x2.mean(0), np.cov(x2, rowvar=False)
    else:
        four = [GOLDEN[f"{case}_{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    return *four, float(GOLDEN[f"{case}_fid"])


# ------------------------------------------------------------------ the distance


@pytest.mark.parametrize("case, rel", [
    ("well64", 1e-12), ("rank256", 1e-11), ("ill48", 1e-12), ("near64", 1e-12), ("same64", 1e-12),
    ("diag8", 1e-13), ("closed2", 1e-13)])
def test_the_distance_is_the_exact_one(case, rel):
    # Absolute for the two that are nearly or exactly 0: their traces are 130, whose last digit is 3e-14.
    *four, exact = golden(case)
    assert frechet_distance(*four) == approx(exact, rel=rel, abs=1e-13 if exact < 1e-6 else 0)


def test_where_the_matrix_square_root_fails_we_do_not():
    *four, exact = golden("rank256")
    usual = float(GOLDEN["rank256_fid_pytorch_fid"])
    assert abs(usual - exact) > 5e-5 and abs(frechet_distance(*four) - exact) < 1e-9


@pytest.mark.parametrize("case", ["well64", "rank256", "ill48"])
def test_the_order_of_the_two_does_not_matter(case):
    mu1, cov1, mu2, cov2, _ = golden(case)
    assert frechet_distance(mu1, cov1, mu2, cov2) == approx(
        frechet_distance(mu2, cov2, mu1, cov1), rel=1e-12)


@pytest.mark.parametrize("case", ["well64", "rank256", "ill48", "same64"])
def test_a_shift_by_d_costs_d_squared_and_no_shift_nothing(case):
    mu, cov = golden(case)[:2]
    d = np.random.default_rng(0).normal(size=len(mu))
    assert frechet_distance(mu, cov, mu + d, cov) == approx(d @ d, rel=1e-11)
    assert 0 <= frechet_distance(mu, cov, mu, cov) < 1e-11 * np.trace(cov)


@pytest.mark.parametrize("smallest", [1e-2, 1e-5])     # by Cholesky, and where an axis is near 0 by eigh
def test_a_known_root(smallest):
    # With Σ2 = T·Σ1·T, T symmetric and positive, the root of Σ1·Σ2 has the trace of T·Σ1.
    rng, d = np.random.default_rng(0), 200
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    cov1, T = np.diag(np.geomspace(smallest**2, 4, d)), (q * np.linspace(0.5, 2, d)) @ q.T
    cov2 = T @ cov1 @ T
    exact = np.trace(cov1) + np.trace(cov2) - 2 * np.trace(T @ cov1)
    assert frechet_distance(np.zeros(d), cov1, np.zeros(d), (cov2 + cov2.T) / 2) == approx(exact, rel=1e-11)


def test_closed_forms():
    # Diagonal: every axis for itself, Σ (√a - √b)². An axis without any spread is allowed.
    a, b = np.array([4.0, 9.0, 0.0, 1e-3]), np.array([1.0, 0.0, 0.0, 1e3])
    expected, o = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), np.zeros(4)
    assert frechet_distance(o, np.diag(a), o, np.diag(b)) == approx(expected, rel=1e-13)
    # One dimension, also as bare numbers: (μ1 - μ2)² + (σ1 - σ2)².
    assert frechet_distance(1.0, 4.0, -2.0, 25.0) == approx(9 + 9)
    assert frechet_distance([1.0], [[4.0]], torch.tensor([-2.0]), torch.tensor(25.0)) == approx(18)
    # A point and a distribution: nothing but the trace is left of the second term.
    assert frechet_distance(np.zeros(2), np.zeros((2, 2)), np.ones(2), np.eye(2)) == approx(2 + 2)


def test_the_distance_takes_torch_and_numpy():
    *four, exact = golden("well64")
    assert frechet_distance(*map(torch.tensor, four)) == frechet_distance(*four)
    assert frechet_distance(*(torch.tensor(x).float() for x in four)) == approx(exact, rel=1e-5)


@pytest.mark.parametrize("what, bad", [
    ("the second 2", (np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))),
    ("covariance shape", (np.zeros(3), np.eye(2), np.zeros(3), np.eye(3))),
    ("covariance shape", (np.zeros(2), np.ones((2, 3)), np.zeros(2), np.eye(2))),
    ("covariance shape", (np.zeros(0), np.ones((0, 0)), np.zeros(0), np.ones((0, 0)))),
    ("NaN", (np.zeros(2), np.eye(2), np.array([0, np.nan]), np.eye(2))),
    ("infinity", (np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), np.eye(2))),
    ("negative", (np.zeros(2), np.eye(2), np.zeros(2), -np.eye(2))),
    ("negative", (np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros(2), np.eye(2))),
    ("symmetric", (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), np.eye(2)))])
def test_what_is_no_pair_of_distributions_is_refused(what, bad):
    with pytest.raises(ValueError, match=what):
        frechet_distance(*bad)


# ------------------------------------------------------------------ running statistics


def rows(n=500, dim=7, seed=0):
    """Correlated rows whose mean is 10,000 times their spread."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + 1e4 * (1 + np.arange(dim))


def agrees(stats, x, rel=1e-10):
    cov = np.cov(x, rowvar=False)
    return (stats.n == len(x) and np.abs(stats.mean.numpy() / x.mean(0) - 1).max() < 1e-14
            and np.abs(stats.cov().numpy() - cov).max() < rel * np.abs(cov).max())


@pytest.mark.parametrize("batch", [1, 3, 64, 500])
def test_batch_by_batch_equals_numpy_at_once_even_far_from_zero(batch):
    x, stats = rows(), RunningStats(7)
    for i in range(0, len(x), batch):
        stats.update(x[i:i + batch])
    assert agrees(stats, x)
    assert torch.allclose(stats.cov(ddof=0) * 500 / 499, stats.cov(), rtol=1e-15)


def test_any_split_and_any_order_of_merging_gives_the_same():
    x = rows()
    for cuts in [(1, 2), (17, 400), (0, 499), (250, 250)]:  # empty parts and single rows too
        parts = [RunningStats(7).update(part) for part in np.split(x, cuts)]
        for order in [(0, 1, 2), (2, 0, 1)]:
            together = RunningStats(7)
            for i in order:
                together.merge(parts[i])
            assert agrees(together, x)
        assert [p.n for p in parts] == [len(p) for p in np.split(x, cuts)]  # merging left them alone


def test_the_published_statistics_with_both_divisors():
    stats = RunningStats(12).update(torch.tensor(GOLDEN["stats_x"]))  # float32 in, float64 inside
    for ours, theirs in [(stats.mean, "mu"), (stats.cov(), "sigma"), (stats.cov(0), "sigma_biased")]:
        assert ours.numpy() == approx(GOLDEN[f"stats_{theirs}"], rel=1e-12, abs=1e-14)


def test_statistics_refuse_what_they_cannot_use():
    stats = RunningStats(3)
    nan, inf = torch.full((1, 3), torch.nan), np.full((1, 3), np.inf)
    for bad in (torch.zeros(2, 4), torch.zeros(3), nan, inf):
        with pytest.raises(ValueError, match="features"):
            stats.update(bad)
    assert stats.n == 0
    for n in (0, 1):
        with pytest.raises(ValueError, match="at least 2"):
            RunningStats(3).update(torch.zeros(n, 3)).cov()
    with pytest.raises(ValueError, match="merge"):
        stats.merge(RunningStats(4))


RANK = """
import sys, numpy as np, torch, torch.distributed as dist
from fid import RunningStats
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = np.load(f"{folder}/x.npy")
mine = RunningStats(7).update(x[:100] if rank == 0 else x[100:])
torch.save(mine.all_merge().state(), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    x = rows()
    np.save(tmp_path / "x.npy", x)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", RANK]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in (0, 1)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    alone = RunningStats(7).update(x).all_merge()  # without a process group there is nobody to ask
    assert agrees(alone, x) and torch.allclose(first, alone.state(), rtol=1e-10)


# ------------------------------------------------------------------ pixels


def test_pixels_are_the_picture_in_minus_one_to_one():
    u = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)
    x = fid.pixels(u)
    assert x.shape == (2, 128) and x.dtype == torch.float64 and (x.min(), x.max()) == (-1, 1)
    assert torch.equal(data.to_uint8(x.reshape(u.shape)), u)
    assert fid.pixels(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3072)
    for bad in (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), u[0]):
        with pytest.raises(ValueError):
            fid.pixels(bad)


# ------------------------------------------------------------------ Inception Score, KID, neighbours

SCORES = dict(np.load(Path(__file__).parent / "golden" / "scores.npz"))


@pytest.mark.parametrize("case, splits, order", [
    ("10_plain", 10, "plain"), ("10_shuffled", 10, "shuffled"), ("1", 1, "plain"), ("1", 1, "shuffled"),
    ("chunks_of_25", 25, "chunks")])
def test_the_inception_score_by_each_convention(case, splits, order):
    logits = torch.from_numpy(SCORES["logits"])
    assert fid.inception_score(logits, splits, order) == approx(SCORES[case], rel=1e-12)


def test_the_inception_score_at_its_ends():
    certain = 1e3 * torch.eye(8).repeat(5, 1)               # each picture one class, all equally often
    assert fid.inception_score(certain, 1) == approx((8, 0))
    assert fid.inception_score(torch.zeros(40, 8), 4) == approx((1, 0))             # all classes in all
    assert fid.inception_score(certain + 7, 1) == approx((8, 0))                    # a shift changes no p
    # Sorted by class, contiguous splits see one class each: hence the shuffle.
    ordered = certain[certain.argmax(1).argsort()]
    assert fid.inception_score(ordered, 8, "plain") == approx((1, 0))
    assert fid.inception_score(ordered, 4)[0] > 4


@pytest.mark.parametrize("n, splits", [(1, 10), (7, 10), (60, 10), (103, 10)])
def test_splits_are_equal_to_one_and_leave_nobody_out(n, splits):
    for order in ("plain", "shuffled"):
        sizes = fid.split_numbers(n, splits, order).bincount()
        assert sizes.sum() == n and len(sizes) == min(n, splits) and sizes.max() - sizes.min() <= 1
    for bad in [(0, 10, "plain"), (5, 0, "plain"), (5, 5, "sorted")]:
        with pytest.raises(ValueError, match="splits"):
            fid.split_numbers(*bad)


def test_kid_is_unbiased_and_exact():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=g), torch.randn(5, 3, generator=g)
    # One subset of everything, against the sum written out.
    k = lambda a, b: float(a.double() @ b.double() / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    rows = x[torch.randperm(6, generator=data.generator(0, 5))[:5]]
    expected = (np.mean([k(rows[i], rows[j]) + k(y[i], y[j]) for i, j in pairs])
                - 2 * np.mean([k(a, b) for a in rows for b in y]))
    assert fid.kernel_distance(x, y, subsets=1, size=5) == approx((expected, 0), rel=1e-12)
    assert fid.kernel_distance(x[:5], y) == fid.kernel_distance(x[:5], y, subsets=1)    # all would be equal
    # Equal distributions: 0 on average and below 0 half of the time, however small the subsets are.
    many, more = torch.randn(2, 4000, 8, generator=g)
    draws = [fid.kernel_distance(many, more, subsets=1, size=20, seed=s)[0] for s in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20 and 0.3 < np.mean(np.less(draws, 0)) < 0.8
    assert fid.kernel_distance(many, more + 1, subsets=10, size=50)[0] > 10 * np.std(draws)
    for bad in [(x[:1], y), (x, y[:, :2])]:
        with pytest.raises(ValueError, match="KID"):
            fid.kernel_distance(*bad)


def by_hand(real, made, k, k_density):
    """The four numbers as they are defined, with every distance at once."""
    rr, gg, rg = (np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)) for a, b in
                  [(real, real), (made, made), (real, made)])
    real_k, made_k, dense = (np.sort(d, 1)[:, n] for d, n in [(rr, k), (gg, k), (rr, k_density)])
    inside = rg < dense[:, None]
    return dict(precision=(rg <= real_k[:, None]).any(0).mean(), recall=(rg <= made_k).any(1).mean(),
                density=inside.sum() / k_density / len(made), coverage=inside.any(1).mean())


@pytest.mark.parametrize("cells", [1, 500, 2**25])
def test_neighbours_in_blocks_equal_all_distances_at_once(cells, monkeypatch):
    monkeypatch.setattr(fid._squared_distances, "__defaults__", (cells,))
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(70, 4)) + 1e3, 0.8 * rng.normal(size=(53, 4)) + 1e3 + 0.5
    found = fid.neighbour_metrics(torch.from_numpy(real), torch.from_numpy(made), 3, 5)
    assert found == approx(by_hand(real, made, 3, 5), rel=1e-12)
    assert 0 < found["recall"] < found["precision"] < 1             # narrower: real-looking, less varied


def test_neighbours_at_their_ends():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    x[:10] = x[0]                                                   # more copies than neighbours
    same = fid.neighbour_metrics(x, x.flip(0))
    assert same["precision"] == same["recall"] == 1 and same["coverage"] == approx(1, abs=0.06)
    assert fid.neighbour_metrics(x[9:], x[9:]) == approx(
        dict(precision=1, recall=1, density=1, coverage=1))
    assert fid.neighbour_metrics(x, x + 100) == dict(precision=0, recall=0, density=0, coverage=0)
    for bad in [(x[:5], x), (x, x[:, :3])]:
        with pytest.raises(ValueError, match="neighbours"):
            fid.neighbour_metrics(*bad)


# ------------------------------------------------------------------ a checkpoint against its data


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint of an untrained network; raw and averaged weights differ."""
    path = tmp_path_factory.mktemp("ckpt") / "ckpt.pt"
    save(path)
    return path


def save(path, **describe):
    torch.manual_seed(0)
    net = model.build("Ti/2", 8, 1, 10)
    for p in net.parameters():  # the last layer starts at zero: wake it up
        p.data += 0.02 * torch.randn_like(p)
    raw, ema = net.state_dict(), {k: v * 0.9 for k, v in net.state_dict().items()}
    about = {**data.load("digits").describe(), **describe}
    config = dict(model=asdict(net.config), recipe=dict(data=about["name"]))
    torch.save(dict(format=sample.FORMAT, net=raw, ema=ema, step=7, config=config, data=about), path)


def fid_py(monkeypatch, capsys, *words):
    """Run the command line in this process -> exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, words)])
    try:
        data.run(fid.main)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def test_drawing_the_data_themselves_gives_zero(monkeypatch):
    digits = fid.from_dataset(data.load("digits"))
    net, seen = model.build("Ti/2", 8, 1, 10), {}

    def generate(net, decode, labels, grid, sampler, seed, batch, indices):
        seen.update(labels=labels, grid=grid, seed=seed)
        return iter([digits.read([1796 - k for k in indices])])     # another order

    monkeypatch.setattr(sample, "generate", generate)
    drawn = fid.from_network(net, data.to_uint8, 1797, "data", [1, 0.5, 0], seed=3,
                             label_counts=digits.label_counts)
    pixels = fid.Extractor("pixels")
    made, real = (fid.measure(side, [pixels])["pixels"] for side in (drawn, digits))
    assert 0 <= fid.compare(pixels, made, real)["pixels"] < 1e-9
    assert np.bincount(seen["labels"], minlength=10).tolist() == digits.label_counts
    assert seen["seed"] == drawn.protocol["seed"] == 3 and drawn.protocol["nfe"] == 2


def test_the_command_prints_the_value_with_its_protocol(ckpt, tmp_path, monkeypatch, capsys):
    file = tmp_path / "r.json"
    words = ["--ckpt", ckpt, "--num", 100, "--grid", "1,0.55,0", "--seed", 5, "--json", file]
    status, out, err = fid_py(monkeypatch, capsys, *words)
    assert (status, err) == (0, "")
    for said in ["Fréchet distance on pixels: ", "count 100", "nfe 2", "[1.0, 0.55, 0.0]", "sampler ode",
                 "seed 5", "labels data", "weights ema", "step 7", "name digits, count 1797",
                 "features pixels", "N-1"]:
        assert said in out, said
    text = file.read_text(encoding="utf-8")
    assert "FID" not in out + text  # the name belongs to Inception's features
    result = json.loads(text)
    value, made = result["metrics"]["pixels"]["pixels"], result["pictures"]
    assert f"{value:.4f}" in out and value > 1
    assert made["grid"] == [1, 0.55, 0] and made["weights"] == "ema" and made["count"] == 100
    # Pictures do not depend on the batch, so the value does not; it does on the weights.
    for more, same in [(["--batch", "33"], True), (["--raw"], False)]:
        assert fid_py(monkeypatch, capsys, *words, *more)[0] == 0
        again = json.loads(file.read_text(encoding="utf-8"))["metrics"]["pixels"]["pixels"]
        assert (again == approx(value, rel=1e-3)) == same


def test_too_few_pictures_are_warned_about(ckpt, monkeypatch, capsys):
    status, out, err = fid_py(monkeypatch, capsys, "--ckpt", ckpt, "--num", "64", "--labels", "balanced")
    assert status == 0 and "labels balanced" in out
    assert err.count("\n") == 1 and "64 pictures" in err


@pytest.mark.parametrize("words, said", [
    ([], "--ckpt"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt"),
    (["--ckpt", "GARBAGE"], "garbage.pt"),
    (["--ckpt", "CKPT", "--num", "1"], "--num 1"),
    (["--ckpt", "CKPT", "--batch", "0"], "--batch 0"),
    (["--ckpt", "CKPT", "--seed", "-1"], "--seed -1"),
    (["--ckpt", "CKPT", "--nfe", "0"], "0"),
    (["--ckpt", "CKPT", "--nfe", "two"], "two"),
    (["--ckpt", "CKPT", "--nfe", "1", "--grid", "1,0"], "--grid"),
    (["--ckpt", "CKPT", "--grid", "0,1"], "0,1"),
    (["--ckpt", "CKPT", "--grid", "0.9,0"], "starts at 0.9"),
    (["--ckpt", "CKPT", "--grid", "1,0.5,0.5,0"], "1,0.5,0.5,0"),
    (["--ckpt", "CKPT", "--grid", "1,half,0"], "1,half,0"),
    (["--ckpt", "CKPT", "--grid", ""], "grid"),
    (["--ckpt", "CKPT", "--sampler", "euler"], "euler"),
    (["--ckpt", "CKPT", "--features", "vgg"], "vgg"),
    (["--ckpt", "CKPT", "--labels", "list"], "list"),
    (["--ckpt", "CKPT", "--ema", "--raw"], "--raw"),
    (["--ckpt", "CKPT", "--ref", "nosuchset"], "nosuchset"),
    (["--ckpt", "CKPT", "--ref", "OTHER"], "1x8x12"),
    (["--ckpt", "MOVED"], "--ref"),
    (["--ckpt", "CHANGED"], "--ref digits"),
    (["--ckpt", "CKPT", "--device", "abacus"], "abacus"),
    (["--ckpt", "CKPT", "--json", "OTHER"], "--json"),
    (["--ckpt", "CKPT", "--json", "no/such/folder/r.json"], "--json no/such"),
])
def test_a_wrong_command_gets_one_line_and_status_2(words, said, ckpt, tmp_path, monkeypatch, capsys):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint")
    save(tmp_path / "moved.pt", name="nosuchset")
    save(tmp_path / "changed.pt", label_counts=[1797] + [0] * 9)
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "images.npy", np.zeros((4, 1, 8, 12), np.uint8))
    np.save(other / "labels.npy", np.zeros(4, np.int64))
    (other / "meta.json").write_text(json.dumps(dict(
        shape=[1, 8, 12], count=4, classes=1, names=["all"], range=[0, 255], source="a test")))
    known = {n.upper(): tmp_path / f"{n}.pt" for n in ("garbage", "moved", "changed")}
    known.update(CKPT=ckpt, OTHER=other)
    monkeypatch.chdir(tmp_path)
    status, out, err = fid_py(monkeypatch, capsys, *(known.get(word, word) for word in words))
    assert (status, out) == (2, "") and err.count("\n") == 1 and "error:" in err and said in err, err


def test_the_file_itself_runs_from_anywhere(ckpt, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([sys.executable, ROOT / "fid.py", "--ckpt", ckpt, "--nfe", "1", "--num", "80"],
                         cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and run.stdout.startswith("Fréchet distance on pixels: "), run.stderr


def test_the_yardstick_of_the_readme():
    """How far samples of the real digits are apart: random halves 0.30, a bootstrap 0.07 from all."""
    digits = data.load("digits")
    real = fid.pixels(data.to_uint8(digits.pictures(slice(None))))                   # (1797, 64)
    draw = np.random.default_rng(0)

    def distance(a, b):
        a, b = (RunningStats(64).update(real[torch.from_numpy(rows)]) for rows in (a, b))
        return frechet_distance(a.mean, a.cov(), b.mean, b.cov())

    everyone, halves, bootstrap = np.arange(len(real)), [], []
    for _ in range(20):
        order = draw.permutation(len(real))
        halves.append(distance(order[:898], order[898:]))
        bootstrap.append(distance(draw.integers(0, len(real), len(real)), everyone))
    assert round(np.mean(halves), 1) == 0.3 and round(np.mean(bootstrap), 2) == 0.07
