"""How fast fid.py is, each figure as a ratio to something known. Run by hand, on a quiet machine:

    python tests/bench_fid.py                      # about 3 minutes on 2 CPU cores
    python tests/bench_fid.py --device cuda --pictures 4096 --batch 128

1. Features and statistics of PNG files with Inception-v3, against bare forwards of the same network on
   one prepared batch. 2. The distance in 2048 dimensions, against scipy's matrix square root.
3. What 50,000 pictures need: time and peak memory of statistics, and with --neighbours of KID,
   precision, recall, density and coverage (20 minutes on 2 CPU cores).
The weights are random: speed does not depend on them.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid  # noqa: E402
from train import memory_mb  # noqa: E402


def seconds(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def features(args, device):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(fid.Inception().state_dict(), Path(folder) / "random.pth")
        extractor = fid.Extractor("inception", Path(folder) / "random.pth", device)
        for k in range(args.pictures):
            picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            picture.save(Path(folder) / f"{k:06d}.png")
        pictures = fid.from_folder(folder)
        size = 16 if device.type == "cpu" else args.batch           # the fastest there, see Extractor
        x = fid.prepare_tf(pictures.read(range(size)).to(device))

        @torch.no_grad()
        def bare():
            for _ in range(args.pictures // size):
                extractor.net(x)

        def whole():
            fid.measure(pictures, [extractor], batch=args.batch)

        bare(), whole()
        ratios, speed = [], []
        for _ in range(args.rounds):
            plain, all_of_it = seconds(bare, device), seconds(whole, device)
            ratios.append(all_of_it / plain)
            speed.append(args.pictures / all_of_it)
    print(f"features: {statistics.median(speed):.1f} pictures/s, time over that of bare forwards "
          f"{statistics.median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)})")


def distance(args):
    rng = np.random.default_rng(0)
    for n in (10_000, 1000):
        x, y = rng.normal(size=(2, n, 2048))
        y = y * np.linspace(0.5, 1.5, 2048)
        (mu1, cov1), (mu2, cov2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
        ours = [seconds(lambda: fid.frechet_distance(mu1, cov1, mu2, cov2), torch.device("cpu"))
                for _ in range(args.rounds)]
        theirs = seconds(lambda: scipy.linalg.sqrtm(cov1 @ cov2), torch.device("cpu"))
        print(f"distance of two sets of {n} rows of 2048: {statistics.median(ours):.2f} s, "
              f"scipy's sqrtm {theirs:.2f} s")


class Numbers:
    """In place of an Extractor: rows of 2048 random numbers a picture, so that only the rest is measured."""
    name, metric, network, net = "numbers", "fid", None, None
    device = stats_device = torch.device("cpu")

    def dims(self, shape):
        return {"features": 2048}

    def __call__(self, pictures):
        return {"features": torch.randn(len(pictures), 2048)}


def fifty_thousand(args):
    with tempfile.TemporaryDirectory() as folder:
        path, N = Path(folder) / "pictures.npz", 50_000
        np.savez(path, arr_0=np.zeros((N, 64, 64, 3), np.uint8))
        pictures, before = fid.from_npz(path), memory_mb(torch.device("cpu"))
        took = seconds(lambda: fid.measure(pictures, [Numbers()], batch=256), torch.device("cpu"))
        print(f"statistics of {N} pictures without a network: {took:.0f} s, peak memory "
              f"{memory_mb(torch.device('cpu')):.0f} MB, before {before:.0f} MB")
    if args.neighbours:
        real, made = torch.randn(N, 2048), torch.randn(N, 2048)
        for name, work in {"KID": lambda: fid.kernel_distance(real, made),
                           "neighbours": lambda: fid.neighbour_metrics(real, made)}.items():
            took = seconds(work, torch.device("cpu"))
            print(f"{name} of {N} against {N} rows of 2048: {took:.0f} s, peak memory "
                  f"{memory_mb(torch.device('cpu')):.0f} MB (the rows are {2 * real.nbytes / 2**20:.0f} MB)")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--pictures", type=int, default=256)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--neighbours", action="store_true", help="also KID and neighbours of 50,000 rows")
    args = p.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}{load}")
    fifty_thousand(args)            # first, while nothing else has raised the peak
    features(args, device)
    distance(args)


if __name__ == "__main__":
    main()
