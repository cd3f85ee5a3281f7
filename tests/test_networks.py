"""Facts about the networks of fid.py: Inception-v3, DINOv2 and CLIP compute what the published ones do.

    python -m pytest tests/test_networks.py

golden/inception.npz and golden/vit.npz hold their results on weights and pictures that
golden/synthetic.py makes again from names and sizes, so nothing is downloaded. Most checks are in
float64 and to nine digits: float32 could not tell one epsilon of a norm from another.
"""
import hashlib
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "golden")]

import fid  # noqa: E402
from synthetic import synthetic_images, synthetic_state  # noqa: E402

INCEPTION = dict(np.load(HERE / "golden" / "inception.npz"))
VIT = dict(np.load(HERE / "golden" / "vit.npz"))
CASES = {                                           # name: synthetic_images(name, count, height, ...)
    "inception_299": (2, 299, 299), "inception_256": (2, 256, 256), "inception_64": (3, 64, 64),
    "inception_32": (4, 32, 32), "inception_28": (4, 28, 28, 1), "inception_rect": (2, 48, 80),
    "inception_big": (1, 330, 400), "dino_224": (2, 224, 224, 3, 16), "dino_rect": (1, 112, 84),
    "fd_64": (2, 64, 64), "fd_256": (1, 256, 256, 3, 16), "clip_224": (2, 224, 224, 3, 16),
    "clip_64": (1, 64, 64), "clip_rect": (1, 300, 260, 3, 16),
}
PREPARE = {"tf": fid.prepare_tf, "pf": fid.prepare_pytorch_fid, "torch": fid.prepare_dinov2,
           "pil": fid.prepare_dinov2_pil, "clip": fid.prepare_clip}
F64, F32 = torch.float64, torch.float32


def pictures(name, count=None):
    """uint8 (count, C, H, W); for Inception only the first (of 64, two), the others cost time."""
    default = {"inception_64": 2}.get(name, 1) if name.startswith("inception") else None
    return torch.from_numpy(synthetic_images(name, *CASES[name])).permute(0, 3, 1, 2)[:count or default]


def shapes(kind):
    golden, key = {"inception": (INCEPTION, "keys_json"), "dinov2": (VIT, "dino_keys_json"),
                   "dinov2 L/14": (VIT, "dino_vitl14_keys_json"), "clip": (VIT, "clip_keys_json"),
                   "clip B/32": (VIT, "clip_vitb32_keys_json")}[kind]
    return json.loads(str(golden[key]))


@cache
def weights(kind):
    return {k: torch.from_numpy(v) for k, v in synthetic_state(shapes(kind)).items()}


@cache
def network(kind, dtype=F64):
    return fid.build_network(kind, weights(kind), heads=4 if kind == "dinov2" else None, dtype=dtype)


@cache
def inception(way, case, dtype=F64):
    """-> pool, spatial, logits, and the means over pixels in three places of the middle."""
    net, means, hooks = network("inception", dtype), [], []
    for layer in (net.Conv2d_3b_1x1, net.Mixed_5b.branch1x1, net.Mixed_7a.branch3x3_1):
        hooks.append(layer.conv.register_forward_pre_hook(lambda _, x: means.append(x[0].mean((2, 3)))))
    result = net(PREPARE[way](pictures(f"inception_{case}"), dtype))
    for hook in hooks:
        hook.remove()
    return *result, *means


def close(got, golden, rel):
    """Is |got - golden| below rel·|golden|, in the Euclidean norm?"""
    got = got.double().numpy() if torch.is_tensor(got) else got
    assert got.shape == golden.shape and got.size
    error = np.linalg.norm(got - golden) / np.linalg.norm(golden)
    assert error < rel, f"relative error {error:.1e}"


# ------------------------------------------------------------------ Inception-v3


@pytest.mark.parametrize("kind, name", [
    ("inception", "weights_sha256"), ("dinov2", "dino_weights_sha256"), ("clip", "clip_weights_sha256")])
def test_the_weights_are_those_of_the_golden_results(kind, name):
    # If this one fails, numpy's random numbers have changed, and the other failures mean nothing.
    tensors = [v.numpy().tobytes() for k, v in weights(kind).items() if "_tracked" not in k]
    assert hashlib.sha256(b"".join(tensors)).hexdigest() == str((INCEPTION | VIT)[name])


@pytest.mark.parametrize("way", ["tf", "pf"])
@pytest.mark.parametrize("case", ["299", "256", "64", "32", "28", "rect", "big"])
def test_inception_agrees_in_float64(case, way):
    pool, _, logits, *_ = inception(way, case)
    close(pool[:, ::8], INCEPTION[f"{way}_pool_{case}"], 1e-9)
    close(logits[:, ::8], INCEPTION[f"{way}_logits_{case}"], 1e-9)


@pytest.mark.parametrize("way", ["tf", "pf"])
def test_inception_agrees_on_the_way(way):
    _, spatial, _, *means = inception(way, "64")
    for mean in means:
        close(mean[:, ::8], INCEPTION[f"{way}_mean{mean.shape[1]}_64"], 1e-9)
    assert [mean.shape[1] for mean in means] == [64, 192, 768] and spatial.shape == (2, 2023)
    if way == "tf":
        close(spatial[:, ::8], INCEPTION["tf_spatial_64"], 1e-9)


@pytest.mark.parametrize("way", ["tf", "pf"])
def test_inception_agrees_in_float32(way):
    pool, spatial, logits, *_ = inception(way, "64", F32)
    assert pool.dtype == F32
    close(pool[:, ::8], INCEPTION[f"{way}_pool_64"], 2e-6)
    close(logits[:, ::8], INCEPTION[f"{way}_logits_64"], 2e-6)
    if way == "tf":
        close(spatial[:, ::8], INCEPTION["tf_spatial_64"], 5e-6)


@pytest.mark.parametrize("case", ["256", "32", "rect", "big"])
def test_both_resizes_to_299_agree_pixel_by_pixel(case):
    rows = INCEPTION["rs_index"]
    for way, back in ("tf", lambda x: 128 * x + 128), ("pf", lambda x: 127.5 * (x + 1)):
        x = back(PREPARE[way](pictures(f"inception_{case}", 1), F64))
        x = x[:, :, rows][:, :, :, rows].permute(0, 2, 3, 1)
        close(x, INCEPTION[f"{way}_resized_{case}"], 1e-12)


def test_pictures_of_the_right_size_are_only_scaled():
    u = pictures("inception_299")
    assert torch.equal(fid.prepare_tf(u), (u.float() - 128) / 128)
    assert torch.allclose(fid.prepare_pytorch_fid(u), u / 127.5 - 1, atol=1e-6)
    u = pictures("dino_224")
    assert torch.equal(fid.prepare_dinov2(u), fid.prepare_dinov2_pil(u))


# ------------------------------------------------------------------ DINOv2 and CLIP


@pytest.mark.parametrize("dtype, rel", [(F64, 1e-9), (F32, 2e-6)])
def test_dinov2_agrees(dtype, rel):
    net = network("dinov2", dtype)
    for name in "224", "rect":
        x = fid._normalise(pictures(f"dino_{name}"), fid.IMAGENET, dtype)
        close(net(x), VIT[f"dino_cls_{name}"], rel)
    for size in "64", "256":
        for way in "torch", "pil":
            close(net(PREPARE[way](pictures(f"fd_{size}"), dtype)), VIT[f"fd_cls_{way}_{size}"], rel)


@pytest.mark.parametrize("size", ["64", "256"])
@pytest.mark.parametrize("way", ["torch", "pil"])
def test_both_resizes_to_224_agree_pixel_by_pixel(size, way):
    mean, std = (torch.tensor(v, dtype=F64).view(3, 1, 1) for v in fid.IMAGENET)
    x = 255 * (PREPARE[way](pictures(f"fd_{size}")[:1], F64) * std + mean)
    x = x[:, :, VIT["fd_index"]][:, :, :, VIT["fd_index"]].permute(0, 2, 3, 1)
    close(x, VIT[f"fd_resized_{way}_{size}"].astype(float), 1e-12)


def test_the_position_table_is_resized_in_float32_and_only_if_it_must():
    net = network("dinov2")
    table = net.positions(224, 224)
    assert table.dtype == F64
    close(table[:, :, ::8], VIT["dino_positions"], 1e-12)
    assert net.positions(37 * 14, 37 * 14) is net.pos_embed
    with pytest.raises(ValueError, match="patches of 14"):
        net(torch.zeros(1, 3, 224, 200, dtype=F64))


@pytest.mark.parametrize("dtype, rel", [(F64, 1e-9), (F32, 5e-6)])
def test_clip_agrees(dtype, rel):
    for name in "224", "64", "rect":
        feature = network("clip", dtype)(fid.prepare_clip(pictures(f"clip_{name}"), dtype))
        close(feature, VIT[f"clip_feat_{name}"], rel)


def test_clip_takes_one_size_only_and_says_so():
    with pytest.raises(ValueError, match="CLIP takes 224x224 pictures, not 256x256"):
        network("clip", F32)(torch.zeros(1, 3, 256, 256))
    with pytest.raises(ValueError, match="299"):
        network("inception")(torch.zeros(1, 3, 256, 256, dtype=F64))


# ------------------------------------------------------------------ weights as published


@pytest.mark.parametrize("kind, keys, parameters", [
    ("inception", 566, None), ("dinov2 L/14", 343, 304_368_640), ("clip B/32", 152, None)])
def test_the_full_sizes_have_the_published_names_and_shapes(kind, keys, parameters):
    # On the meta device a tensor is a shape without numbers, so that ViT-L costs no 1.2 GB.
    state = {k: torch.empty(shape, device="meta") for k, shape in shapes(kind).items()}
    net = fid.build_network(kind.split()[0], state)
    assert len(state) == len(net.state_dict()) == keys
    assert parameters in (None, sum(p.numel() for p in net.parameters()))
    assert kind == "inception" or net.blocks[0].heads == {"dinov2 L/14": 16, "clip B/32": 12}[kind]
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_step_counters_may_be_there_or_not():
    state = {k: v for k, v in weights("inception").items() if "_tracked" not in k}
    assert len(state) == 472
    net, with_counters = fid.build_network("inception", state), network("inception", F32)
    assert not any(v.is_meta for v in net.state_dict().values())
    assert all(torch.equal(v, with_counters.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_whole_clip_in_half_precision_gives_its_image_half():
    half = {k: v.half() for k, v in weights("clip").items()}
    whole = half | {"input_resolution": torch.tensor(224), "ln_final.bias": torch.ones(64),
                    "positional_embedding": torch.zeros(77, 64),
                    "transformer.resblocks.0.ln_1.weight": torch.ones(64)}
    x = fid.prepare_clip(pictures("clip_64"))
    feature = fid.build_network("clip", whole)(x)
    assert feature.dtype == F32
    close(feature, network("clip", F32)(x).double().numpy(), 2e-3)          # half keeps three digits
    bare = {k.removeprefix("visual."): v for k, v in half.items()}
    assert torch.equal(fid.build_network("clip", bare)(x), feature)


@pytest.mark.parametrize("kind", ["inception", "dinov2", "clip"])
@pytest.mark.parametrize("what", [
    "missing", "unexpected", "of another shape", "empty", "of another", "model"])
def test_other_weights_are_refused_in_one_line_that_names_them(kind, what):
    good = weights(kind)
    name = [k for k in good if "_tracked" not in k][-1]
    bad, match = {
        "missing": ({k: v for k, v in good.items() if k != name}, rf"1 missing \({name}\)"),
        "unexpected": (good | {"visual.extra": torch.ones(1)}, r"1 unexpected \(visual.extra\)"),
        "of another shape": (good | {name: torch.ones(7)}, rf"1 of another shape \({name}\)"),
        "empty": ({}, "missing"),
        "of another": (weights("clip" if kind == "inception" else "inception"), "missing"),
        "model": ({"model": dict(good), 0: None}, "missing")}[what]
    with pytest.raises(ValueError, match=match) as error:
        fid.build_network(kind, bad)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_unknown_networks_and_odd_heads_are_refused():
    with pytest.raises(ValueError, match="'vgg': give one of inception, dinov2, clip"):
        fid.build_network("vgg", {})
    with pytest.raises(ValueError, match="64 .* 5 heads"):
        fid.build_network("dinov2", weights("dinov2"), heads=5)


@pytest.mark.parametrize("way", PREPARE)
def test_pictures_must_be_uint8_grey_or_rgb_and_grey_is_three_times_the_same(way):
    for bad in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                torch.zeros(1, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            PREPARE[way](bad)
    grey = pictures("inception_28", 2)
    x = PREPARE[way](grey)
    assert x.dtype == F32 and x.shape == (2, 3, *[299 if way in ("tf", "pf") else 224] * 2)
    assert torch.equal(x, PREPARE[way](grey.repeat(1, 3, 1, 1)))
