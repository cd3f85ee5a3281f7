"""What a training step costs, relative to plain flow matching on the same network and batch. Run by hand:

    python tests/bench_step.py                     # Ti/2 on digits, the machine's default device
    python tests/bench_step.py --model XL/2 --size 32 --channels 4 --batch 2 --rounds 1     # 15 GB, 5 minutes
    python tests/bench_step.py --model B/2 --size 32 --channels 4 --batch 32 --device cuda

One round times every variant once, so that a busy machine disturbs all alike; the medians over rounds
are compared.
"""
import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from loss import alpha_flow_loss  # noqa: E402
from model import build  # noqa: E402

VARIANTS = {                # name: (alpha, share of rows with r = t, guidance)
    "flow matching": (1.0, 1.0, {}),
    "alpha = 1": (1.0, 0.5, {}),
    "alpha = 0.5": (0.5, 0.5, {}),
    "alpha = 0 (MeanFlow)": (0.0, 0.5, {}),
    "alpha = 0.5, guided": (0.5, 0.5, dict(omega=0.2, kappa=0.92, t_max=0.75, label_drop=0.1)),
    "alpha = 0, guided": (0.0, 0.5, dict(omega=0.2, kappa=0.92, t_max=0.75, label_drop=0.1)),
}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="Ti/2")
    p.add_argument("--size", type=int, default=8)
    p.add_argument("--channels", type=int, default=1)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()

    net = build(args.model, args.size, args.channels, 10).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x = torch.randn(args.batch, args.channels, args.size, args.size, device=args.device)
    y = torch.randint(0, 10, (args.batch,))

    def step(alpha, fm_ratio, guidance):
        start = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss, _ = alpha_flow_loss(net, x, y, alpha, fm_ratio=fm_ratio, null=10, **guidance)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds = {name: [] for name in VARIANTS}
    for _ in range(args.rounds + 2):
        for name, variant in VARIANTS.items():
            seconds[name].append(step(*variant))
    base = statistics.median(seconds["flow matching"][2:])
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    machine = torch.cuda.get_device_name() if x.is_cuda else cpu
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MB" if x.is_cuda else ""
    print(f"{args.model}, batch {args.batch}, torch {torch.__version__}, {machine}{memory}")
    for name, values in seconds.items():
        median = statistics.median(values[2:])
        print(f"{name:22s} {1000 * median:8.1f} ms   x {median / base:.2f}")


if __name__ == "__main__":
    main()
