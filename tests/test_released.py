"""
Released α-Flow checkpoints, and networks of other projects to start from: read, never executed.

    python -m pytest -q tests/test_released.py

The files are written here, in the layout of the released ones and with golden weights; the classes that
are pickled inside are gone when they are read.
"""
import argparse
import dataclasses
import json
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "golden")]
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import DiT, DiTConfig, build  # noqa: E402
from synthetic import synthetic_state  # noqa: E402
from test_sample import Calls, cli  # noqa: E402, F401 (a fixture)

CONFIG = DiTConfig(size=8, channels=4, patch=2, dim=64, depth=3, heads=4, classes=10)
TABLE = "y_embedder.embedding_table.weight"


def arrays(name):
    with np.load(HERE / "golden" / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fi"}


SIT, SAMPLER, VAE = arrays("sit_small.npz"), arrays("sampler.npz"), arrays("vae.npz")
WEIGHTS = {name[3:]: w for name, w in SIT.items() if name.startswith("sd/")}


def vae_state():
    with np.load(HERE / "golden" / "vae.npz") as file:
        shapes = json.loads(str(file["small_keys_json"]))
    return {name: torch.from_numpy(w) for name, w in synthetic_state(shapes).items()}


def statistics():
    g = torch.Generator().manual_seed(1)
    return (torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64),
            torch.rand(1, 4, 8, 8, generator=g, dtype=torch.float64) * 30 + 1)


def state_of(weights=WEIGHTS, vae=None, **changes):
    """What such a file has for net or ema; the order and the names are theirs."""
    mean, var = statistics()
    state = OrderedDict(autoencoder_mean=mean, autoencoder_var=var, are_ldm_stats_inited=torch.ones(()))
    state.update({f"autoencoder.model.model.{name}": w for name, w in (vae or {}).items()})
    state.update({f"model.{name}": w for name, w in weights.items()})
    state.update(changes)
    return state


RAW = {name: w + 1 for name, w in WEIGHTS.items()}


def released(path, **changes):
    """Write a file in the released layout, with foreign classes; what is to be None is left out."""
    code = """
class EasyDict(dict):
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name)
    def __setattr__(self, name, value): self[name] = value
class TensorGroup(EasyDict):
    def __len__(self): return 2
"""
    src, structs = types.ModuleType("src"), types.ModuleType("src.structs")
    exec(code, vars(structs))
    for kind in (structs.EasyDict, structs.TensorGroup):
        kind.__module__ = "src.structs"
    sys.modules.update({"src": src, "src.structs": structs})
    try:
        whole = dict(net=state_of(RAW), ema=state_of(), optimizer={"state": {0: torch.ones(500)}},
                     lr_scheduler=None, cfg=structs.EasyDict(model=structs.EasyDict(use_ema=True)),
                     vis=structs.EasyDict(x=structs.TensorGroup(video=torch.zeros(2, 3))),
                     stats=dict(cur_step=1_200_000, cur_nimg=307_200_000))
        whole = {name: part for name, part in {**whole, **changes}.items() if part is not None}
        torch.save(structs.EasyDict(whole), path)
    finally:
        del sys.modules["src"], sys.modules["src.structs"]
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return released(tmp_path_factory.mktemp("released") / "alphaflow-B-2.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """With a small VAE inside, under the name of the best of them."""
    path = tmp_path_factory.mktemp("whole") / "alphaflow-XL-2-plus-cfg.pt"
    return released(path, ema=state_of(vae=vae_state()))


def off(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / max(1, expected.abs().max()))


def u(net, dtype=torch.float32):
    with torch.no_grad():
        return net.to(dtype)(*(SIT[name].to(dtype) for name in "xtr"), SIT["y"])


def one_line(path, *words, call=sample.read):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(data.UserError) as caught:
            call(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500 and all(word in line for word in words), line


# ------------------------------------------------------------------ what is read


def test_a_released_file_gives_the_golden_velocity(path):
    with pytest.raises(pickle.UnpicklingError):                      # torch's careful reader refuses it
        torch.load(path, weights_only=True)
    net, _ = sample.load(path)
    assert net.config == CONFIG and not net.training
    assert off(u(net), SIT["u_f32"]) < 2e-5
    assert off(u(net, torch.float64), SIT["u_f64"]) < 1e-11


@pytest.mark.parametrize("case", ["ode1", "ode2", "ode4", "ode_custom", "cons1", "cons2", "cons_custom"])
def test_samplers_give_the_golden_pictures(path, case):
    net, grid = sample.load(path)[0].double(), SAMPLER[f"{case}/t_grid"].tolist()
    z, y, noise = SAMPLER["noise"].double(), SAMPLER["y"], SAMPLER["step_noise"].double()
    x = (sample.consistency(net, z, y, grid, noise=noise) if case.startswith("cons")
         else sample.ode(net, z, y, grid))
    assert off(x, SAMPLER[f"{case}/result_f64"]) < 1e-11


def test_it_comes_in_the_layout_of_our_own_checkpoints(path):
    ckpt, (mean, var) = sample.read(path), statistics()
    assert ckpt["format"] == sample.FORMAT and ckpt["step"] == 1_200_000 and "vae" not in ckpt
    assert ckpt["config"] == {"model": dataclasses.asdict(CONFIG), "recipe": {}}
    assert ckpt["data"] == dict(name=None, classes=10, shape=[4, 8, 8], label_counts=None)
    assert ckpt["ema"].keys() == ckpt["net"].keys() == DiT(CONFIG).state_dict().keys()
    assert all(torch.equal(w, WEIGHTS[name]) for name, w in ckpt["ema"].items())
    assert all(torch.equal(w, WEIGHTS[name] + 1) for name, w in ckpt["net"].items())
    for name, expected in (("mean", mean), ("std", var.sqrt())):
        got = ckpt["latents"][name]
        assert got.shape == (4, 8, 8) and got.dtype == torch.float32 and off(got, expected[0]) < 1e-6


def test_ema_and_raw_weights_are_not_mixed_up(path, tmp_path):
    assert torch.equal(sample.load(path, "raw")[0].pos_embed, WEIGHTS["pos_embed"] + 1)
    assert torch.equal(sample.load(path, "ema")[0].pos_embed, WEIGHTS["pos_embed"])
    alone = tmp_path / "alone.pt"
    torch.save({"ema": state_of()}, alone)     # saved anew: no foreign class, no raw weights
    ckpt = sample.read(alone)
    assert ckpt["net"] == {} and ckpt["step"] is None
    assert off(u(sample.load(alone)[0]), SIT["u_f32"]) < 2e-5
    one_line(alone, "raw weights", call=lambda path: sample.load(path, "raw"))


@pytest.mark.parametrize("rows", [1000, 1001])
def test_a_table_without_a_null_label_gets_a_row_of_zeros(tmp_path, rows):
    table = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    table[:10] = WEIGHTS[TABLE][:10]
    ckpt = sample.read(released(tmp_path / "a.pt", ema=state_of({**WEIGHTS, TABLE: table}),
                                net=state_of({**RAW, TABLE: table})))
    assert ckpt["config"]["model"]["classes"] == 1000 and ckpt["data"]["name"] == "imagenet256"
    for part in ("net", "ema"):
        got = ckpt[part][TABLE]
        assert got.shape == (1001, 64) and torch.equal(got[:rows], table)
        assert got[1000].any() == (rows == 1001)
    known = SIT["y"] < 10
    got = sample.load(tmp_path / "a.pt")[0](*(SIT[name][known] for name in "xtry"))
    assert off(got, SIT["u_f32"][known]) < 2e-5


def test_statistics_of_whole_channels_are_spread_over_the_positions(tmp_path):
    state = state_of(autoencoder_mean=torch.arange(4.).view(1, 4, 1, 1),
                     autoencoder_var=torch.full((1, 4, 1, 1), 9.))
    latents = sample.read(released(tmp_path / "a.pt", ema=state))["latents"]
    assert latents["mean"].shape == (4, 8, 8) and (latents["std"] == 3).all()
    assert latents["mean"][:, 5, 2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name, parameters", [("B/2", None), ("XL/2", 676_735_504)])
def test_the_published_sizes_are_known_by_their_shapes(tmp_path, name, parameters):
    with torch.device("meta"):
        net = build(name, 32, 4, 1000)
    shapes = {name: w.shape for name, w in net.state_dict().items()}
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}     # four bytes each
    stats = torch.ones((), dtype=torch.float64).expand(1, 4, 32, 32)
    state = state_of(zeros, autoencoder_mean=stats, autoencoder_var=stats)
    path = released(tmp_path / "alphaflow-XL-2-cfg.pt", ema=state, net=state)
    assert path.stat().st_size < 1e6
    ckpt = sample.read(path)
    assert ckpt["config"]["model"] == dataclasses.asdict(net.config)
    assert {name: w.shape for name, w in ckpt["ema"].items()} == shapes
    assert parameters in (None, sum(w.numel() for w in ckpt["ema"].values()))
    assert ckpt["data"]["shape"] == [4, 32, 32] and ckpt["latents"]["mean"].shape == (4, 32, 32)


# ------------------------------------------------------------------ how it is read


def rewrite(path, change, **how):
    """Write the archive anew, as zipfile does: change(name, bytes) -> bytes, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        files = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, raw in files:
            if raw is not None:
                archive.writestr(name, raw)


def test_the_weights_stay_in_the_file_and_the_rest_is_not_even_looked_at(tmp_path):
    path = released(tmp_path / "a.pt")
    before = path.read_bytes()
    ckpt = sample.read(path)
    assert "optimizer" not in ckpt and "cfg" not in ckpt
    parts = [ckpt["ema"]["pos_embed"], ckpt["ema"]["blocks.0.attn.qkv.weight"]]
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [[int(end, 16) for end in line.split()[0].split("-")]
                 for line in maps.read_text().splitlines() if line.endswith("/a.pt")]
        assert all(any(a <= w.data_ptr() < b for a, b in spans) for w in parts)
    parts[0].fill_(7)                                               # a change never reaches the file
    assert path.read_bytes() == before and not (sample.read(path)["ema"]["pos_embed"] == 7).any()
    numbers = torch.ones(500).numpy().tobytes()
    rewrite(path, lambda name, raw: None if raw == numbers else raw)
    assert len(path.read_bytes()) < len(before)
    assert off(u(sample.load(path)[0]), SIT["u_f32"]) < 2e-5         # without the optimizer's tensor


@pytest.mark.parametrize("how", [{}, {"compression": zipfile.ZIP_DEFLATED}])
def test_other_archives_of_the_same_are_read_too(tmp_path, how):
    path = released(tmp_path / "a.pt")
    rewrite(path, lambda name, raw: raw, **how)                     # not aligned, or not to be mapped
    ckpt = sample.read(path)
    assert all(torch.equal(w, WEIGHTS[name]) for name, w in ckpt["ema"].items())


def test_a_hostile_file_in_this_layout_runs_nothing(tmp_path):
    marker, path = tmp_path / "owned", tmp_path / "hostile.pt"
    for evil in (Calls(os.system, f"touch {marker}"), Calls(eval, f"open({str(marker)!r}, 'w')"),
                 Calls(open, str(marker), "w")):
        for changes in (dict(optimizer=evil), dict(cfg=evil), dict(vis={"x": [evil]})):
            released(path, **changes)                               # where nobody looks
            for reader in (sample.read, sample.load, sample.starting_weights):
                reader(path)
        for changes in (dict(stats=evil), dict(stats={"cur_step": evil}), dict(step=evil, stats=None)):
            assert sample.read(released(path, **changes))["step"] is None
        states = [state_of(**{name: evil}) for name in (
            "model.pos_embed", "model.x_embedder.proj.weight", "autoencoder_mean",
            "are_ldm_stats_inited", "autoencoder.model.model.encoder.conv_in.weight")]
        for changes in (dict(ema=evil), dict(net=state_of(a=evil, **{"model.a": evil})),
                        *(dict(ema=state) for state in states)):
            released(path, **changes)
            for reader in (sample.read, sample.load, sample.starting_weights):
                one_line(path, "expected", "nothing in it was run", call=reader)
        assert not marker.exists(), evil.call
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()                                          # where it is let, it does run


def test_damaged_and_incomplete_files_get_one_line(tmp_path, path):
    raw, bad = path.read_bytes(), tmp_path / "bad.pt"
    for n in (1000, len(raw) // 2, len(raw) - 100, len(raw) - 1):
        bad.write_bytes(raw[:n])
        one_line(bad, "expected", "nothing in it was run")
    for k in [*range(0, 40_000, 997), *range(len(raw) - 12_000, len(raw), 997)]:
        bad.write_bytes(raw[:k] + bytes([raw[k] ^ 0x55]) + raw[k + 1:])
        try:
            sample.load(bad)
        except data.UserError as error:                             # any byte: an answer or one line
            assert "\n" not in str(error)

    def lacking(name):
        return {key: w for key, w in state_of().items() if key != name}
    for lost in ("model.pos_embed", "autoencoder_mean", "autoencoder_var", f"model.{TABLE}"):
        one_line(released(bad, ema=lacking(lost)), "expected", lost.removeprefix("model."))
    one_line(released(bad, ema=None), "no 'ema'")
    for changes in (dict(are_ldm_stats_inited=torch.zeros(())), dict(autoencoder_var=-statistics()[1]),
                    dict(autoencoder_mean=torch.zeros(1, 3, 8, 8)), {"model.pos_embed": torch.zeros(3)},
                    {"model.x_embedder.proj.weight": torch.zeros(64, 4)},
                    {f"model.{TABLE}": torch.zeros(())}):
        one_line(released(bad, ema=state_of(**changes)), "expected")
    for changes in ({"model.extra": torch.zeros(2)}, {"model.blocks.9.mlp.fc1.bias": torch.zeros(2)},
                    {"model.pos_embed": torch.zeros(1, 25, 64)}):
        one_line(released(bad, ema=state_of(**changes)), "expected", call=sample.load)
    one_line(released(bad, net=None, ema={"weights": torch.zeros(2)}), "expected")


# ------------------------------------------------------------------ how to sample from it


@pytest.mark.parametrize("name, sampler, two", [
    ("meanflow-B-2", "ode", 0.5), ("alphaflow-B-2", "ode", 0.5), ("meanflow-B-2-cfg", "ode", 0.5),
    ("alphaflow-B-2-cfg", "ode", 0.5), ("meanflow-XL-2-cfg", "ode", 0.5),
    ("alphaflow-XL-2-cfg", "consistency", 0.55), ("alphaflow-XL-2-plus-cfg", "consistency", 0.5)])
def test_the_published_way_is_taken_where_nothing_else_is_asked_for(name, sampler, two):
    plan, file = sample.sampling_plan, f"/anywhere/{name}.pt"
    said = f"published sampler for {name}: {sampler}, times"
    assert plan(file) == plan(Path(file), 1) == ([1, 0], sampler, f"{said} 1 > 0")
    assert plan(file, 2) == ([1, two, 0], sampler, f"{said} 1 > {two} > 0")
    times, which, note = plan(file, 4)
    assert (times, which) == ([1, 0.75, 0.5, 0.25, 0], sampler) and "none published" in note
    assert plan(file, 2, sampler="ode") == ([1, 0.5, 0], "ode", "")
    assert plan(file, 2, sampler="consistency") == ([1, 0.5, 0], "consistency", "")
    assert plan(file, None, "1,0.3,0") == ([1, 0.3, 0], "ode", "")
    assert plan(file, None, "1,0.3,0", "consistency") == ([1, 0.3, 0], "consistency", "")
    with pytest.raises(ValueError, match="whole number"):
        plan(file, 0)


def test_other_files_are_sampled_as_ever():
    for file in ("out/digits/ckpt.pt", "alphaflow-XL-2-cfg-2.pt", "alphaflow-XL-2-cfg/ckpt.pt"):
        assert sample.sampling_plan(file, 2) == ([1, 0.5, 0], "ode", "")
        assert sample.sampling_plan(file, 2, None, "consistency") == ([1, 0.5, 0], "consistency", "")
    with pytest.raises(ValueError, match="falling"):
        sample.sampling_plan("ckpt.pt", grid="1,2")


# ------------------------------------------------------------------ from latents to pictures


def decoded(x):
    """What `whole` should make of samples x, float32 (B, 3, 64, 64)."""
    mean, var = statistics()
    with torch.no_grad():
        return data.build_vae(vae_state()).decode((x.double() * var.sqrt() + mean).float())


def test_samples_are_denormalised_and_decoded(whole):
    _, decode = sample.load(whole)
    mean, var = statistics()
    x = (VAE["z"].double() - mean) / var.sqrt()                     # so that the VAE sees the golden z
    got = decode(x.float())
    assert got.shape == (2, 3, 64, 64) and got.dtype == torch.uint8
    expected = data.to_uint8(VAE["small32_decoded"])
    assert (got[:, :, ::5, ::5].int() - expected.int()).abs().max() <= 1
    assert torch.equal(decode(x), got)                              # float64 samples, too
    many = torch.randn(19, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (decode(many).int() - data.to_uint8(decoded(many)).int()).abs().max() <= 1


def test_the_vae_sees_eight_at_a_time_and_only_when_pictures_are_wanted(whole, monkeypatch):
    sizes, real = [], data.build_vae

    def spy(state):
        vae = real(state)
        sizes.append("built")
        decode = vae.decode
        vae.decode = lambda z: sizes.append(len(z)) or decode(z)
        return vae
    monkeypatch.setattr(data, "build_vae", spy)
    _, decode = sample.load(whole, precision="fp32")
    assert sizes == []
    decode(torch.zeros(17, 4, 8, 8))
    assert sizes == ["built", 8, 8, 1]
    with pytest.raises(ValueError, match="'bf16' or 'fp32'"):
        sample.load(whole, precision="fp16")


def test_our_own_checkpoints_of_latents_find_the_vae_elsewhere(tmp_path, path, monkeypatch):
    ckpt, mine = sample.read(path), tmp_path / "ckpt.pt"
    kept = ("format", "net", "ema", "config", "data", "latents", "step")
    torch.save({key: ckpt[key] for key in kept}, mine)
    monkeypatch.setattr(data, "find_vae", lambda name, device, sha256: data.build_vae(vae_state()).to(device))
    x = torch.randn(2, 4, 8, 8)
    for file in (mine, path):
        assert (sample.load(file)[1](x).int() - data.to_uint8(decoded(x)).int()).abs().max() <= 1
    torch.save({**torch.load(mine), "latents": {"mean": torch.zeros(1, 5, 8)}}, mine)
    one_line(mine, "latents", call=sample.load)


def test_a_vae_that_is_none_gets_one_line(tmp_path):
    state = vae_state()
    state.pop("decoder.conv_in.weight")
    path = released(tmp_path / "a.pt", ema=state_of(vae=state))
    one_line(path, "a.pt", "not the weights of a VAE",
             call=lambda path: sample.load(path)[1](torch.zeros(1, 4, 8, 8)))


# ------------------------------------------------------------------ the command line


def test_the_command_line_draws_pictures_as_published(cli, whole):
    assert cli("--ckpt", whole, "--nfe", 2, "--num", 4, "--classes", "3,1")[0] == 0
    with Image.open(whole.parent / "grid_consistency_nfe2_ema.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 2 * 64 and sheet.height > 2 * 64
    status, out, err = cli("--ckpt", whole, "--nfe", 2, "--num", 3, "--out", whole.parent / "a.npz")
    assert status == 0 and out.splitlines()[0] == ("published sampler for alphaflow-XL-2-plus-cfg: "
                                                   "consistency, times 1 > 0.5 > 0")
    assert "step 1200000" in out and "consistency, grid 1,0.5,0" in out
    with np.load(whole.parent / "a.npz") as file:
        got, y = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["arr_1"])
    net, _ = sample.load(whole)
    z, fresh = (sample.noise_for(range(3), (4, 8, 8), 0, step) for step in (None, 1))
    with torch.no_grad():                                           # the two evaluations by hand
        x = z - net(z, torch.ones(3), torch.zeros(3), y)
        z = 0.5 * x + 0.5 * fresh
        x = z - 0.5 * net(z, torch.full((3,), 0.5), torch.zeros(3), y)
    assert (got.int() - data.to_uint8(decoded(x)).int()).abs().max() <= 1


def test_the_command_line_does_what_it_is_told_instead(cli, whole):
    args = ("--ckpt", whole, "--num", 2, "--out", whole.parent / "b.npz")
    for asked, said in (("--sampler ode --nfe 2", "1,0.5,0"), ("--grid 1,0.3,0", "1,0.3,0")):
        status, out, _ = cli(*args, *asked.split())
        assert status == 0 and f"ode, grid {said}" in out and "published" not in out
    status, out, err = cli(*args, "--classes", "data")
    assert status == 2 and err.count("\n") == 1 and "pictures per class" in err


# ------------------------------------------------------------------ where training starts from


def started(path):
    """(network, what was said) of a golden-size network that starts from `path`."""
    torch.manual_seed(0)
    net, said = DiT(CONFIG), []
    train.init_from(net, str(path), said.append)
    return net, said


def test_training_starts_from_a_released_file(path):
    net, said = started(path)
    assert all(torch.equal(w, WEIGHTS[name]) for name, w in net.state_dict().items())
    assert said[0].endswith("46 of 46 tensors; new here: none; left over there: none")
    assert len(said) == 2 and "another mean and std" in said[1]


def test_a_row_without_training_is_named(tmp_path):
    table = torch.ones(1000, 64)
    file = released(tmp_path / "a.pt", ema=state_of({**WEIGHTS, TABLE: table}))
    _, said = started(file)
    assert "45 of 46" in said[0] and f"new here: {TABLE}; left over there: {TABLE}" in said[0]
    assert "null label" in said[2]


def as_dit(channels=2):
    """The golden weights as a DiT with one time and channels x 4 outputs has them."""
    state = {name.replace("noise_labels_embedder", "t_embedder"): w for name, w in WEIGHTS.items()
             if not name.startswith("noise_labels_next_embedder")}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        wide = WEIGHTS[name].view(4, 4, -1)                         # (row and column, channel, ...)
        wide = torch.cat([wide] + [wide + 9] * (channels - 1), dim=1)
        state[name] = wide.reshape(16 * channels, *WEIGHTS[name].shape[1:])
    return state


def foreign_forms():
    dit, other = as_dit(), {name: w * 0 for name, w in as_dit().items()}
    yield dit
    yield {"state_dict": {f"module.{name}": w for name, w in dit.items()}, "epoch": 3}
    yield {"model": other, "ema": dit, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    yield as_dit(channels=1)


@pytest.mark.parametrize("form", range(4))
def test_training_starts_from_a_network_with_one_time(tmp_path, form):
    torch.save(list(foreign_forms())[form], tmp_path / "DiT.pt")
    net, said = started(tmp_path / "DiT.pt")
    new = [name for name in WEIGHTS if name.startswith("noise_labels_next_embedder")]
    for name, w in net.state_dict().items():
        assert torch.equal(w, WEIGHTS[name]) == (name not in new), name
    assert said[0].endswith(f"{46 - len(new)} of 46 tensors; new here: {', '.join(sorted(new))}; "
                            "left over there: none")
    assert "does not carry over" in said[1] and "0.18215" in said[2]
    assert ["4 of its 8 channels" in line for line in said[3:]] == [True] * (2 if form < 3 else 0)
    net.load_state_dict({name: WEIGHTS[name] for name in new}, strict=False)
    assert off(u(net.eval()), SIT["u_f32"]) < 2e-5                  # the halves were told apart rightly


def test_what_is_no_network_to_start_from_gets_one_line(tmp_path):
    odd = {"x_embedder.proj.weight": torch.zeros(3)}
    torch.save(odd, tmp_path / "a.pt")
    torch.save({"t_embedder.mlp.0.weight": torch.zeros(3), **odd}, tmp_path / "d.pt")
    (tmp_path / "b.pt").write_text("no network\n" * 100)
    said = dict(a="other torch file", b="cannot be read", c="no checkpoint at", d="other torch file")
    for name, words in said.items():
        one_line(tmp_path / f"{name}.pt", words, call=started)
    marker = tmp_path / "owned"
    torch.save({**as_dit(), "args": Calls(os.system, f"touch {marker}")}, tmp_path / "evil.pt")
    started(tmp_path / "evil.pt")
    assert not marker.exists()
