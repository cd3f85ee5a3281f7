"""fid.py: exact distances, statistics that forget how rows arrived, pictures from anywhere, the command.

    python -m pytest -q tests/test_fid.py

golden/frechet.npz: pairs of distributions and their distance in 40-digit arithmetic; golden/scores.npz:
Inception Scores. A tiny network stands for Inception-v3, see test_networks.py. Nothing is downloaded.
"""
import json
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE / "golden")]
import data  # noqa: E402
import fid  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
from fid import RunningStats, frechet_distance  # noqa: E402
from synthetic import synthetic_state  # noqa: E402
from test_sample import ENV, write_checkpoint  # noqa: E402

FRECHET, SCORES, VIT = (dict(np.load(HERE / "golden" / f"{k}.npz")) for k in ("frechet", "scores", "vit"))


# ---- the distance ----------------------------------------------------------------------------------

def golden(case):
    """-> mu1, cov1, mu2, cov2, the exact distance."""
    if case == "rank256":                               # 100 and 80 rows: most eigenvalues are 0
        x1, x2 = (FRECHET[f"rank256_x{i}"].astype(np.float64) for i in (1, 2))
        four = x1.mean(0), np.cov(x1.T), x2.mean(0), np.cov(x2.T)
    else:
        four = [FRECHET[f"{case}_{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    return *four, float(FRECHET[f"{case}_fid"])


@pytest.mark.parametrize("case", ["well64", "rank256", "ill48", "near64", "same64", "diag8", "closed2"])
def test_the_distance_is_the_exact_one_in_both_orders(case):
    mu1, cov1, mu2, cov2, exact = golden(case)
    near = approx(exact, rel=1e-11, abs=1e-12 if exact < 1e-6 else 0)   # that of two equal ones is 0
    assert frechet_distance(mu1, cov1, mu2, cov2) == near
    assert frechet_distance(mu2, cov2, mu1, cov1) == near
    assert frechet_distance(*map(torch.tensor, (mu1, cov1, mu2, cov2))) == near
    d = np.random.default_rng(0).normal(size=len(mu1))  # moved by d: d·d; not moved: 0
    assert frechet_distance(mu1, cov1, mu1 + d, cov1) == approx(d @ d, rel=1e-11)
    assert 0 <= frechet_distance(mu1, cov1, mu1, cov1) < 1e-11 * np.trace(cov1)


@pytest.mark.parametrize("said, mu, cov", [
    ("3 and of 2", np.zeros(3), np.eye(3)), ("fit", np.zeros(3), np.eye(2)),
    ("finite", np.array([0, np.nan]), np.eye(2)), ("finite", np.zeros(2), np.full((2, 2), np.inf)),
    ("negative", np.zeros(2), -np.eye(2)), ("negative", np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]])),
    ("fit", np.zeros(2), np.ones((2, 3))), ("symmetric", np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))])
def test_what_is_no_pair_of_distributions_is_refused(said, mu, cov):
    with pytest.raises(ValueError, match=said):
        frechet_distance(mu, cov, np.zeros(2), np.eye(2))


# ---- statistics batch by batch ---------------------------------------------------------------------

def agrees(stats, x):
    cov = np.cov(x.T)
    return (stats.n == len(x) and np.abs(stats.mean.numpy() / x.mean(0) - 1).max() < 1e-14
            and np.abs(stats.cov().numpy() - cov).max() < 1e-10 * np.abs(cov).max())


@pytest.mark.parametrize("cuts", [range(1, 500), range(3, 500, 3), (), (0, 499), (17, 400)])
def test_any_split_and_any_order_of_merging_equals_numpy_at_once(cuts):
    rng = np.random.default_rng(0)                      # correlated rows, far from 0 beside their spread
    x = rng.normal(size=(500, 7)) @ rng.normal(size=(7, 7)) + 1e4 * (1 + np.arange(7))
    pieces = np.split(x, list(cuts))                    # the first one may be empty
    running = RunningStats(7)
    for piece in pieces:
        running.update(torch.from_numpy(piece))
    assert agrees(running, x)
    parts = [RunningStats(7).update(piece) for piece in pieces]
    for order in (parts, parts[::-1]):
        merged = RunningStats(7)
        for part in order:
            merged.merge(part)
        assert agrees(merged, x)
    assert [part.n for part in parts] == [len(piece) for piece in pieces]       # merging left them alone
    assert agrees(running.all_merge(), x)               # alone, there is nobody to ask


def test_statistics_agree_with_the_golden_ones_and_refuse_what_they_cannot_use():
    stats = RunningStats(12).update(torch.tensor(FRECHET["stats_x"]))           # float32 in, float64 inside
    assert stats.mean.numpy() == approx(FRECHET["stats_mu"], rel=1e-12, abs=1e-14)
    assert stats.cov().numpy() == approx(FRECHET["stats_sigma"], rel=1e-12, abs=1e-14)
    for bad in (torch.zeros(2, 4), torch.zeros(12), np.full((1, 12), np.nan), np.full((1, 12), np.inf)):
        with pytest.raises(ValueError, match="features"):
            stats.update(bad)
    assert stats.n == 37
    for n in (0, 1):
        with pytest.raises(ValueError, match="at least 2"):
            RunningStats(3).update(torch.zeros(n, 3)).cov()


# ---- Inception Score -------------------------------------------------------------------------------

def inception_score(logits, split):
    """In three batches, by the split of each row."""
    split = torch.as_tensor(split)
    batches = torch.arange(len(logits)).split(25)
    return fid.inception_score(sum(fid.score_sums(logits[rows], split[rows]) for rows in batches))


@pytest.mark.parametrize("case, split", [
    ("10_plain", np.repeat(np.arange(10), 6)), ("10_shuffled", fid.split_numbers(60)),
    ("1", np.zeros(60, np.int64)), ("chunks_of_25", np.arange(60) // 25)])
def test_the_inception_score_by_each_convention(case, split):
    assert inception_score(torch.from_numpy(SCORES["logits"]), split) == approx(SCORES[case], rel=1e-12)


# ---- precision and recall --------------------------------------------------------------------------

def test_precision_and_recall_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(70, 4)) + 1e3, 0.8 * rng.normal(size=(53, 4)) + 1e3 + 0.5
    for k in (3, 5):
        rr, mm, rm = (np.sqrt(((a[:, None] - b) ** 2).sum(-1)) for a, b in
                      ((real, real), (made, made), (real, made)))
        precision = (rm <= np.sort(rr)[:, [k]]).any(0).mean()
        recall = (rm <= np.sort(mm)[:, k]).any(1).mean()
        found = fid.precision_recall(torch.from_numpy(real), torch.from_numpy(made), k)
        assert found == approx((precision, recall)) and 0 < recall < precision  # narrower: real, less varied
    x = torch.randn(200, 16, generator=data.generator(0))
    x[:10] = x[0]                                       # more copies than neighbours
    assert fid.precision_recall(x, x.flip(0)) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)
    for few in ((x[:3], x), (x, x[:3])):
        with pytest.raises(ValueError, match="more than 3"):
            fid.precision_recall(*few)


# ---- networks --------------------------------------------------------------------------------------

class Tiny(torch.nn.Module):
    """For Inception: 6 features and 1008 logits from 4x4 pixels of its input, in float64."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(48, 1014, generator=data.generator(5), dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x[:, :, 30:220:60, 30:220:60].flatten(1).double() @ self.w / 3).split([6, 1008], 1)


@pytest.fixture
def light(tmp_path, monkeypatch):
    """Tiny stands for every network -> a file of weights, which holds nothing."""
    monkeypatch.setattr(fid, "build_network", lambda kind, state: Tiny())
    torch.save({}, tmp_path / "net.pth")
    return tmp_path / "net.pth"


def pictures(n, h=9, w=7, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), np.uint8)


def chw(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("name, other", [("clip", "dinov2"), ("dinov2", "clip")])
def test_an_extractor_is_the_network_of_a_file_on_prepared_pictures(name, other, tmp_path, monkeypatch):
    for kind, key in (("dinov2", "dino_keys_json"), ("clip", "clip_keys_json")):
        state = synthetic_state(json.loads(str(VIT[key])))
        torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / f"{kind}.pth")
    path, u = tmp_path / f"{name}.pth", chw(pictures(18, 20, 24))
    extractor = fid.Extractor(name, "cpu", path)
    features, logits = extractor(u)
    assert features.shape == (18, 64) and logits is None and not features.requires_grad
    network = fid.build_network(name, model.read_tensors(path))
    prepare = {"clip": fid.prepare_clip, "dinov2": fid.prepare_dinov2}[name]
    assert torch.allclose(features, network(prepare(u)), rtol=1e-4, atol=1e-5)
    assert torch.equal(extractor(u[:2, :1])[0], extractor(u[:2, :1].expand(-1, 3, -1, -1))[0])      # grey
    # The published file, given or found in the cache, is told by its checksum.
    assert extractor.about == {"features": name, "preprocessing": fid.FEATURES[name][2],
                               "weights": f"{name}.pth, not the published ones"}
    monkeypatch.setenv("ALPHAFLOW_CACHE", str(tmp_path))
    monkeypatch.setitem(fid.WEIGHTS, name, (path.name, data.checksum_of(path), []))
    for published in (fid.Extractor(name), fid.Extractor(name, weights=path)):
        assert published.about["weights"] == "published" and torch.equal(published(u)[0], features)
    monkeypatch.setitem(fid.WEIGHTS, name, (path.name, "0" * 64, []))
    for wrong in (None, tmp_path / f"{other}.pth", __file__):
        with pytest.raises(ValueError) as caught:
            fid.Extractor(name, weights=wrong)
        assert "\n" not in str(caught.value)


# ---- pictures from anywhere ------------------------------------------------------------------------

def write(kind, path, array, **more):
    """The pictures `array` (n, h, w, c) as one of the sources that fid.py reads -> its name."""
    path, (n, h, w, c) = Path(path), array.shape
    if "npz" in kind:
        path = path.with_suffix(".npz")
        (np.savez_compressed if "compressed" in kind else np.savez)(path, arr_0=array, **more)
    elif kind == "data set":
        path.mkdir()
        np.save(path / "images.npy", chw(array))
        np.save(path / "labels.npy", np.arange(n) % 2)
        about = dict(shape=[c, h, w], classes=2, names=["a", "b"], range=[0, 255], source="a test")
        (path / "meta.json").write_text(json.dumps(about))
    else:
        for k, picture in enumerate(array):
            file = path / (f"{k // 4}/deep/{k}.png" if kind == "class folders" else f"{k:03d}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "class folders", "npz", "compressed npz", "data set"])
def test_every_source_gives_the_same_pictures_in_any_order_and_batch(kind, tmp_path):
    array = pictures(7)
    source, whole = fid.open_pictures(write(kind, tmp_path / "x", array)), chw(array)
    assert (source.count, source.shape) == (7, (3, 9, 7)) and source.read([0]).dtype == torch.uint8
    for rows in (range(7), [3], range(1, 7, 3), [6, 0, 3, 3]):
        assert torch.equal(source.read(rows), whole[list(rows)])


def test_digits_fill_the_range_of_a_byte_and_latents_are_no_pictures():
    digits = data.load("digits")                                                # 0 .. 16
    expected = torch.from_numpy(np.round(digits.images[:50] * (255 / 16)).astype(np.uint8))
    assert torch.equal(fid.open_pictures("digits").read(range(50)), expected) and expected.max() == 255
    latents = object.__new__(data.Latents)
    latents.name = "mine256"
    with pytest.raises(ValueError, match="mine256 holds latents"):
        fid.from_dataset(latents)


def test_folders_that_cannot_be_measured_are_refused(tmp_path):
    folder = Path(write("folder", tmp_path / "two", pictures(2)))
    Image.fromarray(pictures(1, 12, 8)[0]).save(folder / "999.png")
    with pytest.raises(ValueError, match="999.png has another size.*--size"):
        fid.from_folder(folder).read([0, 2])
    resized = fid.open_pictures(str(folder), 6)
    assert resized.read([2, 0]).shape == (2, 3, 6, 6) and 6 in resized.about.values()
    (folder / "500.png").write_bytes((folder / "999.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="500.png cannot be read"):
        fid.from_folder(folder, 6).read(range(3))


@pytest.mark.parametrize("what", ["float", "three axes", "four channels", "by columns", "objects", "no arr_0",
                                  "truncated", "no zip", "empty", "no end", "lacks a picture", "flipped"])
def test_npz_files_that_cannot_be_measured_are_refused(what, tmp_path):
    x, path = pictures(4, 90, 70), tmp_path / "x.npz"
    arrays = {"float": x.astype(np.float32), "three axes": x[..., 0], "objects": x.astype(object),
              "four channels": x[..., [0, 1, 2, 0]], "by columns": np.asfortranarray(x)}
    (np.savez_compressed if what == "flipped" else np.savez)(
        path, **{"images" if what == "no arr_0" else "arr_0": arrays.get(what, x)})
    if what in ("no end", "lacks a picture"):
        with zipfile.ZipFile(path) as file:
            whole = file.read("arr_0.npy")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("arr_0.npy", whole[:-200 if what == "no end" else -90 * 70 * 3])
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[:-100], "no zip": b"pictures", "empty": b"",
                      "flipped": raw[:40000] + bytes(20) + raw[40020:]}.get(what, raw))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        fid.open_pictures(str(path)).read(range(4))
    assert "\n" not in str(caught.value)


# ---- measuring -------------------------------------------------------------------------------------

def measure(array, extractor, **options):
    u = chw(array)
    source = fid.Pictures(len(u), lambda rows: u[list(rows)], {"pictures": "some"})
    return fid.measure(source, [extractor], **options)[0]


def test_what_is_measured_is_numpys_of_all_rows_whatever_batch_and_order(light):
    x, e = pictures(23), fid.Extractor("inception", weights=light)
    features, logits = e(chw(x))
    for order in (np.arange(23), np.random.default_rng(1).permutation(23)):
        score = inception_score(logits[order], fid.split_numbers(23))           # its splits follow the order
        for batch in (1, 4, 64):
            m = measure(x[order], e, batch=batch, keep=True)
            assert m.mean.numpy() == approx(features.mean(0).numpy(), rel=1e-12)
            assert m.cov.numpy() == approx(np.cov(features.T), rel=1e-9, abs=1e-12)
            assert m.score == approx(score, rel=1e-10) and score[0] > 1
            assert torch.equal(m.rows, features[order].float())
    assert m.about == {**e.about, "pictures": "some", "count": 23}
    assert measure(x, e).rows is None and measure(x, fid.Extractor("pixels")).score is None


# ---- the command -----------------------------------------------------------------------------------

@pytest.fixture
def ckpt(tmp_path):
    return str(write_checkpoint(tmp_path / "ckpt.pt", {"data": data.load("digits").describe()}))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line in this process -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fid.py", "--device", "cpu", *map(str, words)])
        try:
            data.run(fid.main)
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def values(command):
    """Run it -> what its JSON file holds of the first features, and what stderr said."""
    def call(*words):
        status, out, err = command(*words, "--json", "r.json")
        assert status == 0, err
        return json.loads(Path("r.json").read_text(encoding="utf-8"))[0], out, err
    return call


UTF8 = {**ENV, "PYTHONIOENCODING": "utf-8"}
PIXELS = "Fréchet distance on pixels"


def test_a_checkpoint_is_measured_against_its_own_data_and_the_protocol_stands_beside(ckpt, values):
    found, out, err = values("--ckpt", ckpt, "--samples", 100, "--grid", "1,0.55,0", "--seed", 5)
    assert err == "" and "FID" not in out               # that name belongs to Inception's features
    assert found["pictures"] == {
        "features": "pixels", "preprocessing": fid.FEATURES["pixels"][2], "pictures": ckpt, "step": 7,
        "weights": "ema", "nfe": 2, "times": [1, 0.55, 0], "sampler": "ode", "labels": "data", "seed": 5,
        "count": 100}
    assert found["reference"]["pictures"] == "digits" and found["reference"]["count"] == 1797
    assert found[PIXELS] > 1 and f"{PIXELS}: {found[PIXELS]:.4f}\n" in out
    assert all(said in out for said in ("count 100", "times [1.0, 0.55, 0.0]", "sampler ode", "labels data"))
    net, decode = sample.load(ckpt)                     # the same by hand
    labels = sample.make_labels("data", 100, 10, 5, data.load("digits").describe()["label_counts"])
    drawn = decode(sample.draw(net, labels, range(100), [1, 0.55, 0], "ode", 5))
    stats, real = (RunningStats(64).update(fid.Extractor("pixels")(u)[0])
                   for u in (drawn, fid.open_pictures("digits").read(range(1797))))
    by_hand = frechet_distance(stats.mean, stats.cov(), real.mean, real.cov())
    assert found[PIXELS] == approx(by_hand, rel=1e-3)


def test_the_distance_depends_on_what_was_drawn_and_not_on_the_batch(ckpt, values):
    words = ["--ckpt", ckpt, "--samples", 60]
    first = values(*words)[0][PIXELS]
    assert values(*words, "--batch", 7)[0][PIXELS] == approx(first, rel=1e-3)
    for more in ("--raw", "--seed 1", "--nfe 2", "--labels random", "--nfe 2 --sampler consistency"):
        assert values(*words, *more.split())[0][PIXELS] != approx(first, rel=1e-3), more


def test_without_flags_as_many_are_drawn_as_real_ones_with_random_labels(values, tmp_path):
    ckpt = write_checkpoint(tmp_path / "ckpt.pt", {"data": {}})
    found = values("--ckpt", ckpt, "--ref", write("npz", "real", pictures(30, 8, 8, 1)))[0]["pictures"]
    assert (found["labels"], found["count"], found["nfe"]) == ("random", 30, 1)


def test_statistics_that_were_saved_are_as_good_as_the_pictures(values, command, light):
    made, real = (write("npz", str(seed), pictures(40, seed=seed)) for seed in (1, 2))
    network = ["--features", "inception", "--weights", light]
    direct, out, err = values("--pictures", made, "--ref", real, *network, "--precision-recall")
    assert "FID: " in out and "Inception Score: " in out and " ± " in out and "precision: " in out
    assert err == ""
    e = fid.Extractor("inception", weights=light)
    a, b = (measure(pictures(40, seed=seed), e, keep=True) for seed in (1, 2))
    assert direct["FID"] == approx(frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-9)
    assert (direct["precision"], direct["recall"]) == fid.precision_recall(b.rows, a.rows)
    assert direct["Inception Score"] == approx(a.score)
    assert command("--pictures", real, "--save-stats", "s.npz", *network)[0] == 0       # needs no --ref
    saved = fid.read_stats("s.npz")
    assert torch.equal(saved.mean, b.mean) and torch.equal(saved.cov, b.cov) and fid.read_stats(made) is None
    found = values("--pictures", real, "--ref", "s.npz", *network)[0]
    assert found["FID"] < 1e-9 and found["reference"] == {**b.about, "pictures": real}
    # The same numbers in files of others: pytorch-fid's, MeanFlow's, and ADM's, which has pictures too.
    mu, sigma = saved.mean.numpy(), saved.cov.numpy()
    for arrays in (dict(mu=mu, sigma=sigma), dict(ref_mu=mu, ref_sigma=sigma),
                   dict(mu=mu, sigma=sigma, mu_s=mu, sigma_s=mu, arr_0=pictures(5))):
        np.savez("other.npz", **arrays)
        assert values("--pictures", made, "--ref", "other.npz", *network)[0]["FID"] == approx(direct["FID"])


@pytest.mark.parametrize("change", [
    dict(mu=np.array([None] * 6)), dict(sigma=None), dict(sigma=np.ones((6, 5))), dict(sigma=-np.eye(6)),
    dict(mu=np.full(6, np.nan)), dict(mu=np.zeros(5), sigma=np.eye(5)), dict(mu=None), "truncated",
    dict(features="dinov2"), dict(preprocessing="nearest"), dict(weights="published")])
def test_a_reference_that_does_not_fit_is_refused(change, light, command):
    arrays, about = dict(mu=np.zeros(6), sigma=np.eye(6)), fid.Extractor("inception", weights=light).about
    for key, value in () if change == "truncated" else change.items():
        (about if key in about else arrays)[key] = value
    np.savez("s.npz", about=json.dumps(about), **{k: v for k, v in arrays.items() if v is not None})
    if change == "truncated":
        Path("s.npz").write_bytes(Path("s.npz").read_bytes()[:-50])
    words = "--pictures", write("npz", "x", pictures(9)), "--ref", "s.npz", "--features", "inception"
    status, out, err = command(*words, "--weights", light)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("fid.py: error: "), err


TWO = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]
import data, fid, test_fid, torch
fid.build_network = lambda kind, state: test_fid.Tiny()
data.run(fid.main)
assert not torch.distributed.is_initialized(), "its threads may abort a process that ends with them running"
"""


def test_two_processes_measure_what_one_does(light, values, tmp_path):
    made, real = (write("npz", str(n), pictures(n, seed=n)) for n in (23, 30))          # 23 are 12 and 11
    words = ["--pictures", made, "--ref", real, "--features", "inception", "--weights", "net.pth", "--batch",
             "4", "--precision-recall", "--save-stats"]
    one, out, _ = values(*words, "one.npz")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    Path("two.py").write_text(TWO)
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    ran = subprocess.run([*two, "two.py", *words, "two.npz", "--json", "two.json", "--device", "cpu"],
                         env=UTF8, capture_output=True, encoding="utf-8", timeout=600)
    assert ran.returncode == 0 and ran.stdout == out.replace("one.npz", "two.npz"), ran.stderr
    two = json.loads(Path("two.json").read_text(encoding="utf-8"))[0]
    for title in ("Inception Score", "FID"):
        assert two.pop(title) == approx(one.pop(title), rel=1e-9)
    a, b = fid.read_stats("one.npz"), fid.read_stats("two.npz")
    assert torch.allclose(a.mean, b.mean, rtol=1e-12) and torch.allclose(a.cov, b.cov, rtol=1e-9, atol=1e-12)
    assert two == one


@pytest.mark.parametrize("words, said", [
    ("", "--ckpt --pictures"), ("--ckpt nowhere.pt", "nowhere.pt"), ("--ckpt garbage.pt", "garbage.pt"),
    ("CKPT --pictures digits", "not allowed"), ("--pictures digits", "--ref"),
    ("CKPT --samples 1", "too few"), ("CKPT --samples 0", "--samples 0"),
    ("CKPT --batch 0", "--batch"), ("CKPT --seed -1", "seeds"), ("CKPT --nfe 0", "--nfe 0"),
    ("CKPT --nfe two", "two"), ("CKPT --nfe 1 --grid 1,0", "not allowed"), ("CKPT --grid 0,1", "falling"),
    ("CKPT --grid 0.9,0", "starts at 0.9"), ("CKPT --grid 1,half,0", "half"), ("CKPT --labels list", "list"),
    ("CKPT --sampler euler", "euler"), ("CKPT --features vgg", "vgg"), ("CKPT --ref nosuchset", "nosuchset"),
    ("CKPT --ref wide", "(1, 8, 12)"), ("CKPT --ref nosuch.npz", "nosuch.npz"), ("--ckpt moved.pt", "gone"),
    ("CKPT --device abacus", "abacus"), ("CKPT --json garbage.pt/r.json", "garbage.pt"),
    ("CKPT --features clip --weights garbage.pt", "garbage.pt"),
    ("--pictures large --ref large --features pixels", "up to 3x32x32"),
    ("CKPT --features clip --weights none.pt", "none.pt")])
def test_a_wrong_command_ends_in_one_line_and_status_2(words, said, ckpt, command):
    Path("garbage.pt").write_bytes(b"not a checkpoint")
    moved = model.read_checkpoint(ckpt)
    torch.save({**moved, "config": {**moved["config"], "recipe": {"data": "gone"}}}, "moved.pt")
    write("data set", "wide", pictures(4, 8, 12, 1))
    write("data set", "large", pictures(4, 33, 32))
    status, out, err = command("--samples", 20, *words.replace("CKPT", f"--ckpt {ckpt}").split())
    assert (status, err.count("\n")) == (2, 1) and err.startswith("fid.py: error: ") and said in err, err
