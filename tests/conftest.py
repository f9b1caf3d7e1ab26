"""What all tests share: the repository on the path, one thread, a way to run a script in this process."""

import importlib
import os
import shutil
import signal
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # sizes here are tiny, and subprocesses must add up in the same order as we do
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)

# A run that takes a fraction of a second; any flag may be given again, the last one counts.
TINY = {
    "linreg": "--dim 3 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --iters 3 --eval-tasks 4 --steps 2 --device cpu",
}


def call(script, *flags, tiny=True):
    """call("linreg", "--steps 3", "--out", folder) is `python linreg.py` with tiny sizes and these flags."""
    words = TINY[script].split() if tiny else []
    for flag in flags:
        words += flag.split() if isinstance(flag, str) else [os.fspath(flag)]
    module, argv, handler = importlib.import_module(script), sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [f"{script}.py"]
    try:
        module.main(words)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished("linreg") is a folder with a finished tiny run, made once. Copy it before changing it."""
    made = {}

    def get(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp(script) / "run"
            call(script, "--out", made[script])
        return made[script]

    return get


@pytest.fixture
def finished_copy(finished, tmp_path):
    return lambda script: shutil.copytree(finished(script), tmp_path / f"{script}-run")
