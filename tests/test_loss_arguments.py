"""loss.py as it is called: the seed, the network of the targets, and the arguments it refuses.

    python -m pytest tests/test_loss_arguments.py

The method itself is in test_loss.py, whose network and batch these are.
"""
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loss import alpha_at, alpha_flow_loss, sample_times, u_target  # noqa: E402
from test_loss import NULL, Spy, dit, e, r, t, v, x, y, z  # noqa: E402


def test_target_net_makes_the_targets():
    """net predicts and learns, target_net supplies u_next: under DDP the wrapped and the bare model."""
    learner, teacher = Spy(dit(1)), Spy(dit(2))
    alpha_flow_loss(learner, x, y, 0.5, e=e, t=t, r=r, target_net=teacher,
                    omega=0.2, kappa=0.5, null=NULL)
    assert learner.rows == [8] and teacher.rows[-1] == 5


def test_a_seed_fixes_the_step():
    """Noise, times and dropped labels come from the generator alone."""
    net, generator = dit(), torch.Generator()
    one, again, other = (
        alpha_flow_loss(net, x, y, 0.5, generator=generator.manual_seed(seed), label_drop=0.5,
                        null=NULL)[0].item()
        for seed in (5, 5, 6))
    assert one == again != other


@pytest.mark.parametrize("wrong", [
    dict(schedule="sigmoidal"), dict(start=1.5), dict(end=-0.1), dict(end=math.nan), dict(clamp=0.5),
    dict(clamp=-0.1), dict(gamma=0), dict(gamma=math.nan), dict(steps=0), dict(window=(-0.1, 1)),
    dict(window=(0, 1.1)), dict(window=(0.8, 0.2)), dict(window=(0.5, 0.5)),
    dict(schedule="exponential"), dict(schedule="exponential", start=0, end=0.5)], ids=str)
def test_a_curriculum_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\A.+\Z"):        # one line
        alpha_at(**{**dict(step=0, steps=100, schedule="sigmoid"), **wrong})


@pytest.mark.parametrize("call", [
    lambda: sample_times(8, 1.1), lambda: sample_times(8, 0.5, std=0),
    lambda: u_target(None, z, t, r, v, y, 1.1), lambda: alpha_flow_loss(dit(), x, y, -0.1),
    lambda: alpha_flow_loss(dit(), x, y, 0, omega=2.0),
    lambda: alpha_flow_loss(dit(), x, y, 0, label_drop=0.1),
    lambda: alpha_flow_loss(dit(), x, y, 0, t=t)])
def test_so_is_an_objective(call):
    with pytest.raises(ValueError, match=r"\A.+\Z"):
        call()
