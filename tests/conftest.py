"""What all tests share: the repository on the path, one thread, small images in place of MNIST, scripts run in this process."""

import importlib
import os
import shutil
import signal
import sys
import threading

REAL_DATA = os.environ.get("IAI_DATA", "data")
os.environ["OMP_NUM_THREADS"] = "1"  # sizes here are tiny, and subprocesses must add up in the same order as we do
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "results")]
REAL_DATA = os.path.join(ROOT, REAL_DATA)  # a relative folder is meant from the root

import matplotlib
import numpy as np
import pytest
import torch
from torchvision import datasets
from tqdm import tqdm

import common

tqdm.set_lock(threading.RLock())  # its own is shared with forks, and one that is killed while it holds it stops all later ones

matplotlib.use("Agg")
torch.set_num_threads(1)

# A run that takes a fraction of a second; any flag may be given again, the last one counts.
TINY = {
    "linreg": "--dim 3 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --iters 3 --eval-tasks 4 --steps 2 --device cpu",
    "mnist": "--dim 4 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --iters 3 --eval-tasks 4 --steps 2 --device cpu",
    "imagenet": "--dim 4 --ways 3 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --iters 3 --eval-tasks 4 --steps 2 --device cpu",
    "toposort": "--nodes 4 --eval-nodes 5 --context 5 --tasks 4 --width 8 --depth 1 --heads 2 --iters 3 --eval-tasks 4 --steps 2 --device cpu",
}
SCRIPTS = list(TINY)  # with an error a query; flows, which are measured by the points that they make, have tests of their own, too
TINY["mog_flow"] = TINY["alphabets"] = "--iters 2 --eval-tasks 3 --points 8 --ode-steps 2 --steps 1 --context 6 --queries 5 --tasks 2 --width 8 --depth 1 --device cpu"
SAVE_FIGURE = common.save_figure
IMPLICIT = ("toposort",)  # scripts with one regime, one mask and one state


def accepts(script, flags):
    """Whether a script has what the flags ask for."""
    return script not in IMPLICIT or not any(word in flags for word in ("parametric", "explicit", "causal", "latent", "solve"))


def call(script, *flags, tiny=True):
    """call("linreg", "--steps 3", "--out", folder) is `python linreg.py` with tiny sizes and these flags."""
    words = TINY[script].split() if tiny else []
    for flag in flags:
        words += flag.split() if isinstance(flag, str) else [os.fspath(flag)]
    importlib.import_module(script).main(words)


def sketch(fig, path, dpi=160):
    """In place of common.save_figure: all that is drawn has been made, but is not laid out, which would take most of a tiny run."""
    common.replace_file(path, lambda f: f.write(b"\x89PNG\r\n\x1a\n"))


def write_idx(path, array):
    """The IDX format: two zeros, 8 for unsigned bytes, the number of dimensions, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes())


def write_dataset(folder, seed, train=60, test=30):
    """A small MNIST: ten random patterns with noise, all ten labels in both parts."""
    random = np.random.default_rng(seed)
    patterns = random.integers(0, 200, (10, 28, 28))
    for part, size in (("train", train), ("t10k", test)):
        labels = random.permutation(np.arange(size) % 10)
        write_idx(folder / f"{part}-images-idx3-ubyte", patterns[labels] + random.integers(0, 56, (size, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)


def write_features(path, classes, seed, dim=6, train=8, test=4):
    """Small features in the format of the stand-in: int8 numbers around a mean for each class, times a scale; shuffled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random, arrays = np.random.default_rng(seed), {}
    means = random.integers(-60, 60, (classes, dim))
    for split, n in (("train", train), ("test", test)):
        y = random.permutation(np.arange(classes * n) % classes)
        arrays |= {f"x_{split}": (means[y] + random.integers(-30, 30, (len(y), dim))).astype(np.int8), f"y_{split}": y.astype(np.int16)}
    np.savez(path, scale=np.full(dim, 0.125, np.float32), **arrays)


def pytest_collection_modifyitems(items):
    """Tests that fork come first, and those for a GPU last: a process that took gradients there, or on a fake one, cannot take any after a fork."""
    items.sort(key=lambda item: {"test_ranks": 0, "test_runs": 0, "test_gpu": 2}.get(item.module.__name__, 1))


@pytest.fixture(scope="session", autouse=True)
def small_data(tmp_path_factory):
    """What IAI_DATA points to: MNIST, FashionMNIST and features at toy size. And no mirror to download from."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "MNIST" / "raw", 0)
    write_dataset(folder / "FashionMNIST" / "raw", 1)
    for seed, (name, classes) in enumerate((("tiny_imagenet", 7), ("cifar10", 2), ("cifar100", 5))):
        write_features(folder / "features" / f"{name}.npz", classes, seed)
    os.environ["IAI_DATA"] = str(folder)
    datasets.MNIST.mirrors = datasets.FashionMNIST.mirrors = ["http://127.0.0.1:9/"]
    return folder


@pytest.fixture(autouse=True)
def elsewhere(request, tmp_path, monkeypatch):
    """Every test works in an empty folder of its own, without a GPU unless it is about one, and draws the same numbers whichever tests ran before."""
    monkeypatch.chdir(tmp_path)
    if request.module.__name__ != "test_gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(common, "save_figure", sketch)
    torch.manual_seed(0)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # which common.run and get_args take over


@pytest.fixture
def pictures():
    """For tests that need figures as they are: without it only `finished` has them."""


@pytest.fixture(scope="session")
def finished(small_data, tmp_path_factory):
    """finished("linreg") is a folder with a finished tiny run, made once. Copy it before changing it."""
    made = {}

    def get(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp(script) / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(common, "save_figure", SAVE_FIGURE)
                call(script, "--out", made[script])
        return made[script]

    return get


@pytest.fixture
def finished_copy(finished, tmp_path):
    return lambda script: shutil.copytree(finished(script), tmp_path / f"{script}-run")
