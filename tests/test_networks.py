"""The networks of others: Inception-v3, DINOv2 and CLIP of fid.py and the autoencoder of Stable Diffusion
of data.py compute what the published ones do, from weights under the published names.

    python -m pytest tests/test_networks.py

golden/inception.npz, vit.npz and vae.npz hold results on weights and pictures that golden/synthetic.py
makes again from names and sizes, so nothing is downloaded. Most checks are in float64 and to nine digits:
float32 could not tell one epsilon of a norm from another.
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

import data  # noqa: E402
import fid  # noqa: E402
from synthetic import synthetic_images, synthetic_state  # noqa: E402

INCEPTION, VIT, VAE = (dict(np.load(HERE / "golden" / f"{name}.npz")) for name in ("inception", "vit", "vae"))
CASES = {                                           # name: synthetic_images(name, count, height, ...)
    "inception_299": (2, 299, 299), "inception_256": (2, 256, 256), "inception_64": (3, 64, 64),
    "inception_32": (4, 32, 32), "inception_28": (4, 28, 28, 1), "inception_rect": (2, 48, 80),
    "inception_big": (1, 330, 400), "dino_224": (2, 224, 224, 3, 16), "dino_rect": (1, 112, 84),
    "fd_64": (2, 64, 64), "fd_256": (1, 256, 256, 3, 16), "clip_224": (2, 224, 224, 3, 16),
    "clip_64": (1, 64, 64), "clip_rect": (1, 300, 260, 3, 16),
    "vae_image": (2, 64, 64), "vae_image_rect": (1, 32, 48),
}
SHAPES = {kind: json.loads(str(golden[f"{key}keys_json"])) for kind, golden, key in (
    ("inception", INCEPTION, ""), ("dinov2", VIT, "dino_"), ("dinov2 L/14", VIT, "dino_vitl14_"),
    ("clip", VIT, "clip_"), ("clip B/32", VIT, "clip_vitb32_"), ("vae", VAE, "small_"),
    ("vae full", VAE, "full_"))}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
F64, F32 = torch.float64, torch.float32


def pictures(name):
    """uint8 (count, C, H, W); for Inception only the first (of 64, two), the others cost time."""
    count = 2 if name == "inception_64" else 1 if name.startswith("inception") else None
    return torch.from_numpy(synthetic_images(name, *CASES[name])).permute(0, 3, 1, 2)[:count]


@cache
def weights(kind):
    return {k: torch.from_numpy(v) for k, v in synthetic_state(SHAPES[kind]).items()}


@cache
def network(kind, dtype=F64):
    return fid.build_network(kind, weights(kind), heads=4 if kind == "dinov2" else None, dtype=dtype)


@cache
def vae(tag, dtype=F64):
    kind, groups = {"small8": ("vae", 8), "small32": ("vae", 32), "full": ("vae full", 32)}[tag]
    return data.build_vae(weights(kind), groups, dtype)


def close(got, golden, rel):
    """Is |got - golden| below rel·|golden|, in the Euclidean norm?"""
    got = np.asarray(got, np.float64)
    assert got.shape == golden.shape and got.size
    error = np.linalg.norm(got - golden) / np.linalg.norm(golden)
    assert error < rel, f"relative error {error:.1e}"


@pytest.mark.parametrize("kind, golden, name", [
    ("inception", INCEPTION, "weights_sha256"), ("dinov2", VIT, "dino_weights_sha256"),
    ("clip", VIT, "clip_weights_sha256"), ("vae", VAE, "small_weights_sha256")])
def test_the_weights_are_those_of_the_golden_results(kind, golden, name):
    # If this one fails, numpy's random numbers have changed, and the other failures mean nothing.
    tensors = [v.numpy().tobytes() for k, v in weights(kind).items() if "_tracked" not in k]
    assert hashlib.sha256(b"".join(tensors)).hexdigest() == str(golden[name])


# ---- Inception-v3 ----------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["299", "64", "28", "rect", "big"])
def test_inception_agrees(case):
    u = pictures(f"inception_{case}").expand(-1, 3, -1, -1)
    features, logits = network("inception")(fid.prepare_inception(u, F64))
    assert features.shape == (len(u), 2048) and logits.shape == (len(u), 1008)
    close(features[:, ::8], INCEPTION[f"tf_pool_{case}"], 1e-9)
    close(logits[:, ::8], INCEPTION[f"tf_logits_{case}"], 1e-9)


MEAN, STD = (torch.tensor(v, dtype=F64).view(3, 1, 1) for v in IMAGENET)


@pytest.mark.parametrize("prepare, back, name, golden, at", [
    *[(fid.prepare_inception, lambda x: 128 * x + 128, f"inception_{case}", INCEPTION[f"tf_resized_{case}"],
       INCEPTION["rs_index"]) for case in ("256", "32", "rect", "big")],
    *[(fid.prepare_dinov2, lambda x: 255 * (x * STD + MEAN), f"fd_{size}",
       VIT[f"fd_resized_torch_{size}"], VIT["fd_index"]) for size in ("64", "256")]])
def test_resized_pictures_agree_pixel_by_pixel(prepare, back, name, golden, at):
    x = back(prepare(pictures(name)[:1], F64))
    close(x[:, :, at][:, :, :, at].permute(0, 2, 3, 1), golden, 1e-12)


# ---- DINOv2 and CLIP -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, rel", [(F64, 1e-9), (F32, 2e-6)])
def test_dinov2_agrees(dtype, rel):
    net = network("dinov2", dtype)
    for name in "224", "rect":
        close(net(fid.normalise(pictures(f"dino_{name}"), *IMAGENET, dtype)), VIT[f"dino_cls_{name}"], rel)
    for size in "64", "256":
        close(net(fid.prepare_dinov2(pictures(f"fd_{size}"), dtype)), VIT[f"fd_cls_torch_{size}"], rel)


def in_transformers_names(state):
    """OpenAI's state dict as the transformers package has it, with a text half and what else is there."""
    renamed = {"transformer.resblocks.": "encoder.layers.", "class_emb": "embeddings.class_emb", "conv1.":
               "embeddings.patch_embedding.", "positional_embedding": "embeddings.position_embedding.weight",
               "ln_pre.": "pre_layrnorm.", "ln_post.": "post_layernorm.", "ln_1.": "layer_norm1.", "ln_2.":
               "layer_norm2.", "attn.": "self_attn.", "c_fc.": "fc1.", "c_proj.": "fc2."}
    theirs = {"logit_scale": torch.ones(()), "vision_model.embeddings.position_ids": torch.arange(50)[None],
              "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}
    for name, w in state.items():
        name = name.replace("visual.", "vision_model.")
        for ours, other in renamed.items():
            name = name.replace(ours, other)
        if "in_proj_" in name:
            for part, w in zip("qkv", w.chunk(3)):
                theirs[name.replace("in_proj_", f"{part}_proj.")] = w
        elif name == "vision_model.proj":
            theirs["visual_projection.weight"] = w.T.contiguous()
        else:
            theirs[name] = w
    return theirs


@pytest.mark.parametrize("rename", [dict, in_transformers_names], ids=["openai", "transformers"])
@pytest.mark.parametrize("dtype, rel", [(F64, 1e-9), (F32, 5e-6)])
def test_clip_agrees_under_both_names(rename, dtype, rel):
    net = fid.build_network("clip", rename(weights("clip")), dtype=dtype)
    for name in "224", "64", "rect":
        close(net(fid.prepare_clip(pictures(f"clip_{name}"), dtype)), VIT[f"clip_feat_{name}"], rel)


# ---- weights as published --------------------------------------------------------------------------

@pytest.mark.parametrize("name, case", [("inception", "28"), ("inception", "64"), ("clip", "rect")])
def test_an_extractor_reads_them_from_a_file_and_works_in_float32(tmp_path, name, case):
    """Grey pictures are three times the same; the step counters of the norms may be missing."""
    torch.save({k: v for k, v in weights(name).items() if "_tracked" not in k}, tmp_path / "some.pth")
    extract = fid.Extractor(name, weights=tmp_path / "some.pth")
    features, logits = extract(pictures(f"{name}_{case}"))
    assert features.dtype == F32 and extract.about["weights"] == "some.pth, not the published ones"
    if name == "clip":
        assert logits is None
        return close(features, VIT[f"clip_feat_{case}"], 5e-6)
    close(features[:, ::8], INCEPTION[f"tf_pool_{case}"], 2e-6)
    close(logits[:, ::8], INCEPTION[f"tf_logits_{case}"], 2e-6)


def test_the_full_sizes_have_the_published_names_and_shapes():
    # On the meta device a tensor is a shape without numbers, so that ViT-L costs no 1.2 GB.
    for kind, parameters, heads in (("inception", None, None), ("dinov2 L/14", 304_318_464, 16),
                                    ("clip B/32", None, 12), ("vae full", 83_653_863, None)):
        state = {k: torch.empty(shape, device="meta") for k, shape in SHAPES[kind].items()}
        net = data.build_vae(state) if kind == "vae full" else fid.build_network(kind.split()[0], state)
        assert parameters in (None, sum(p.numel() for p in net.parameters()))
        # 0: no kernel for a whole layer, in which DINOv2's GELU is the tanh kind on CUDA
        assert heads is None or net.blocks[0].self_attn.num_heads == heads and all(
            block.activation_relu_or_gelu == 0 for block in net.blocks)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    for _, sha256, addresses in (*fid.WEIGHTS.values(), data.VAE_WEIGHTS):
        assert len(bytes.fromhex(sha256)) == 32 and all(a.startswith("https://") for a in addresses)


@pytest.mark.parametrize("kind, change", [
    *[(kind, change) for kind in ("inception", "dinov2", "clip", "vae")
      for change in ("missing", "unexpected", "another shape", "empty", "of another", {7: "text"})],
    ("dinov2", {"pos_embed": torch.ones(7)}), ("clip", {"visual.proj": torch.ones(7)}),
    ("clip", "no keys"), ("vae", {"quant_conv.bias": "text"})], ids=str)
def test_other_weights_are_refused_in_one_line(tmp_path, kind, change):
    good, path = weights(kind), tmp_path / "bad.pth"
    name = [k for k in good if "_tracked" not in k][-1]
    bad = good | change if isinstance(change, dict) else {
        "missing": good | {name: None}, "unexpected": good | {"visual.extra": torch.ones(1)},
        "another shape": good | {name: torch.ones(7)}, "empty": {},
        "no keys": {k: v for k, v in in_transformers_names(good).items() if "k_proj" not in k},
        "of another": weights("clip" if kind == "inception" else "inception")}[change]
    torch.save({k: v for k, v in bad.items() if v is not None}, path)
    with pytest.raises(ValueError, match=rf"\A.*(not the weights of|{path}).*\Z") as error:
        data.find_vae(str(path)) if kind == "vae" else fid.Extractor(kind, weights=path)
    assert len(str(error.value)) < 400


# ---- the autoencoder of Stable Diffusion -----------------------------------------------------------

def in_range(name, dtype):
    return pictures(name).to(dtype) / 127.5 - 1                             # (n, 3, H, W) in [-1, 1]


@pytest.mark.parametrize("tag, case, dtype, rel", [
    *[(tag, case, *exact) for tag in ("small8", "small32") for case in ("", "_rect")
      for exact in ((F64, 1e-9), (F32, 1e-5))], ("full", "_rect", F32, 1e-5)])
def test_the_vae_agrees(tag, case, dtype, rel):
    net, z = vae(tag, dtype), torch.from_numpy(VAE["z" + case]).to(dtype)
    mean, logvar = net.encode(in_range("vae_image" + case, dtype))
    close(mean, VAE[f"{tag}_mean{case}"], rel)
    close(logvar, VAE[f"{tag}_logvar{case}"], rel)
    close(net.decode(z)[:, :, ::5, ::5], VAE[f"{tag}_decoded{case}"], rel)


@pytest.mark.parametrize("tag, rel", [("small8", 1e-9), ("small32", 1e-6)])
def test_a_flat_picture_tells_the_epsilon_of_the_norms(tag, rel):
    # They have little but eps to divide by: every rounding error grows, and an eps of 1e-5 is off by 26 %.
    x = torch.full((1, 3, 32, 32), 128 / 127.5 - 1, dtype=F64)
    close(vae(tag).encode(x)[0], VAE[f"{tag}_mean_flat"], rel)


def test_older_names_are_the_same_vae():
    theirs = dict(zip(SHAPES["vae full"], json.loads(str(VAE["names_old_json"]))))
    old, x = {theirs[k]: v for k, v in weights("vae").items()}, in_range("vae_image_rect", F32)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    assert all(map(torch.equal, data.build_vae(old, 8).encode(x), vae("small8", F32).encode(x)))
