"""One thread a process, set before torch is imported. The tests start many small processes, and OpenMP
threads that outnumber the free cores make each other wait many times longer than the work takes."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    # PyTorch's own, from its rules of torch.func.jvp.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script`:DeprecationWarning")
