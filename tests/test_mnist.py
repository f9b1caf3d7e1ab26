"""MNIST: tasks, data files and rivals, on images whose every number is known; and on the real files where they lie."""

import argparse
import gzip
import http.client
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torchvision import datasets

import common
import mnist
from conftest import REAL_DATA, call, write_idx
from test_wrong_use import files, refused, truncate


def settings(**changes):
    args = argparse.Namespace(dim=5, context=20, queries=20, steps=2, eval_tasks=40, images="centred", device="cpu", data_dir=os.environ["IAI_DATA"])
    vars(args).update(changes)
    return args


def marked(train, test):
    """Images that are unit vectors: image n is a one in pixel n, so that after a projection it can be told which it was."""
    pixels = torch.eye(784)
    return {"train": (pixels[:train], torch.arange(train) % 10), "test": (pixels[train : train + test], torch.arange(test) % 10)}


# ---------------------------------------------------------------- the task


def test_relabelling_merges_and_never_splits(monkeypatch):
    """The true class travels in x, by a projection that keeps the first pixels: per task, label is a function of class."""
    images = {split: (F.pad(pixels, (10, 0))[:, :784] * 0, labels) for split, (pixels, labels) in marked(100, 100).items()}
    for pixels, labels in images.values():
        pixels[:, :10] = F.one_hot(labels, 10)
    monkeypatch.setattr(torch, "randn", lambda B, rows, dim, device=None: torch.eye(rows, dim).expand(B, -1, -1))
    task = mnist.sample_tasks(images, 400, 3, settings(dim=10))
    x = torch.cat([task.query_x, *task.context_x], 1).argmax(-1)  # (B, n) the true class
    y = torch.cat([task.query_y, *task.context_y], 1)
    assert y.shape == (400, 80, 10) and (y.sum(-1) == 1).all() and y.unique().tolist() == [0, 1]
    seen, kept = [], []
    for classes, labels in zip(x.tolist(), y.argmax(-1).tolist()):
        pairs = set(zip(classes, labels))
        assert len(pairs) == len(set(classes)), "one class has two labels"
        seen += [label for _, label in pairs]
        kept.append(len(set(labels)) / len(set(classes)))
    shares = np.bincount(seen, minlength=10) / len(seen)
    assert abs(shares - 0.1).max() < 0.02, "all labels occur equally often"
    assert np.mean(kept) == pytest.approx(1 - 0.9**10, abs=0.03), "as many labels are left as under a random function"


def test_context_and_queries_come_from_disjoint_images_under_one_projection():
    """Unit images make the projection's rows visible: contexts only show rows of training images, queries the others."""
    images = marked(50, 30)
    torch.manual_seed(3)
    projection = torch.randn(6, 784, 5)  # sample_tasks draws it first
    torch.manual_seed(3)
    task = mnist.sample_tasks(images, 6, 4, settings())

    def image(x, b):
        distance, which = torch.cdist(x, projection[b], compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        assert distance.max() < 1e-5
        return set(which.tolist())

    for b in range(6):
        contexts = [image(x, b) for x in task.context_x[:, b]]
        assert set.union(*contexts) <= set(range(50)) and image(task.query_x[b], b) <= set(range(50, 80))
        assert len(set.union(*contexts)) > 30, "mini-batches are different draws"


def test_labels_belong_to_their_images():
    """Class and pixels come from the same row: with the relabelling undone, they agree for every observation."""
    images = marked(40, 40)
    images = {split: (F.one_hot(labels, 784).float(), labels) for split, (_, labels) in images.items()}
    task = mnist.sample_tasks(images, 50, 2, settings(dim=40))
    for x, y in ((task.query_x, task.query_y), *zip(task.context_x, task.context_y)):
        same_x = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") < 1e-4
        same_y = y @ y.mT > 0
        assert (same_y | ~same_x).all() and same_x.float().mean() == pytest.approx(0.1 + 0.9 / 20, abs=0.02)


def test_projections_are_unit_normal_and_fresh_for_every_task():
    images = {split: (torch.eye(784)[:1].expand(9, -1), torch.arange(9)) for split in ("train", "test")}
    x = mnist.sample_tasks(images, 2000, 1, settings(context=2, queries=2)).query_x  # every row is the projection's first
    assert (x == x[:, :1]).all()
    rows = x[:, 0]
    assert abs(rows.mean(0)).max() < 0.1 and abs(rows.T.cov() - torch.eye(5)).max() < 0.15
    assert len(rows.unique(dim=0)) == 2000


@pytest.mark.parametrize("centred", (True, False))
def test_scaled_images_project_to_unit_variance_with_one_scale_and_the_training_mean(centred, small_data):
    images = mnist.load_images("mnist", settings(images="centred" if centred else "raw"))
    raw = {part: torch.tensor(np.stack(datasets_read(small_data, part == "test")[0])).flatten(1).double() for part in ("train", "test")}
    mean = raw["train"].mean(0)
    scale = ((raw["train"] - mean) ** 2).sum(1).mean() ** 0.5
    for part in ("train", "test"):
        torch.testing.assert_close(images[part][0], ((raw[part] - centred * mean) / scale).float(), rtol=1e-4, atol=1e-6)
    task = mnist.sample_tasks(images, 300, 2, settings(context=50))
    assert (task.context_x - (not centred) * task.context_x.mean(2, keepdim=True)).var().item() == pytest.approx(1, rel=0.05)


def test_images_that_are_not_centred_are_named_so(small_data, capsys):
    call("mnist", "--images raw --out run")
    results = json.load(open("run/results.json"))
    assert [results["data"], *(m["data"] for m in results["metrics"].values())] == [f"{name}, not centred" for name in ("MNIST", "MNIST", "FashionMNIST")]
    assert "data MNIST, not centred:" in capsys.readouterr().out


def test_the_first_mini_batches_and_the_queries_of_the_evaluation_do_not_depend_on_k_or_seed():
    images = mnist.load_images("mnist", settings())

    def tasks(K, seed):
        common.seed_all(common.TRAINING, seed)
        return list(common.evaluation_tasks(lambda B: mnist.sample_tasks(images, B, K, settings()), 40, stream=3))

    for few, many in zip(tasks(2, 0), tasks(5, 1), strict=True):
        assert torch.equal(few.query_y, many.query_y) and torch.equal(few.context_y, many.context_y[:2])
        for a, b in ((few.query_x, many.query_x), (few.context_x, many.context_x[:2])):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # one larger product may round differently


def test_prediction_loss_and_error_one_number_at_a_time():
    torch.manual_seed(0)
    parameters, x, y = torch.randn(2, 3, 50), torch.randn(3, 6, 4), F.one_hot(torch.randint(10, (3, 6)), 10).float()
    logits = mnist.basis(x) @ parameters.unflatten(-1, (10, 5)).mT
    assert logits.shape == (2, 3, 6, 10)
    for t, b, q in np.ndindex(2, 3, 6):
        w = parameters[t, b].view(10, 5)
        expected = [(sum(w[c, d] * x[b, q, d] for d in range(4)) + w[c, 4]) / 2 for c in range(10)]
        torch.testing.assert_close(logits[t, b, q], torch.stack(expected), rtol=1e-4, atol=1e-4)
        label = int(y[b, q].argmax())
        torch.testing.assert_close(mnist.loss(logits, y)[t, b, q], F.cross_entropy(logits[t, b, q], torch.tensor(label)))
        assert mnist.error(logits, y)[t, b, q] == (0 if int(np.argmax(expected)) == label else 100)


# ---------------------------------------------------------------- rivals


@pytest.mark.parametrize("n,dim", ((30, 8), (64, 100)))
def test_logistic_regression_reaches_the_optimum_from_zero_and_from_fewer_data(n, dim):
    torch.manual_seed(0)
    prior, teacher = 0.1, torch.randn(2, dim, 10)
    x = torch.randn(2, n, dim)
    y = F.one_hot((x @ teacher + torch.randn(2, n, 10)).argmax(-1), 10).float()
    found = mnist.logistic_regression(x, y, torch.zeros(2, dim + 1, 10), prior).double()
    half = mnist.logistic_regression(x[:, : n // 2], y[:, : n // 2], torch.zeros(2, dim + 1, 10), prior)
    other = mnist.logistic_regression(x, y, half, prior).double()
    new = F.pad(torch.randn(2, 500, dim), (0, 1), value=1.0).double()
    for b in range(2):
        ones = F.pad(x[b], (0, 1), value=1.0).double()

        def objective(flat):
            w = torch.tensor(flat).view(dim + 1, 10).requires_grad_()
            value = F.cross_entropy(ones @ w, y[b].double()) + prior / n * w.square().sum() / 2
            value.backward()
            return value.item(), w.grad.flatten().numpy()

        best = minimize(objective, np.zeros((dim + 1) * 10), jac=True, method="L-BFGS-B", options=dict(maxiter=5000, ftol=1e-14, gtol=1e-8))
        for w in (found[b], other[b]):
            value, gradient = objective(w.flatten().numpy())
            assert value < best.fun * 1.01 and np.linalg.norm(gradient) < 3e-3
            answers = (new[b] @ w).argmax(-1), (new[b] @ torch.tensor(best.x).view(dim + 1, 10)).argmax(-1)
            assert (answers[0] == answers[1]).double().mean() > 0.97


def test_nearest_neighbour_equals_a_loop():
    torch.manual_seed(0)
    x, query_x, y = torch.randn(3, 40, 6), torch.randn(3, 15, 6), F.one_hot(torch.randint(10, (3, 40)), 10).float()
    found = mnist.nearest_neighbour(x, y, query_x)
    for b, q in np.ndindex(3, 15):
        distances = [sum((u - v) ** 2 for u, v in zip(query_x[b, q].tolist(), row)) for row in x[b].tolist()]
        assert torch.equal(found[b, q], y[b, int(np.argmin(distances))])


def test_kernel_ridge_is_a_gaussian_process():
    """By conditioning a joint Gaussian, one query at a time."""
    torch.manual_seed(0)
    x, query_x, y = torch.randn(3, 20, 6), torch.randn(3, 5, 6), F.one_hot(torch.randint(4, (3, 20)), 4).float()
    answer, variance = mnist.kernel_ridge(x, y, query_x, ridge=0.3)
    for b, q in np.ndindex(3, 5):
        points = np.concatenate([x[b].numpy(), query_x[b, q : q + 1].numpy()]).astype(np.float64)
        covariance = np.array([[np.exp(-((u - v) ** 2).sum() / 6) for v in points] for u in points]) + 0.3 * np.eye(21)
        given = np.linalg.inv(covariance[:20, :20])
        np.testing.assert_allclose(answer[b, q], covariance[20, :20] @ given @ (y[b].numpy() - 0.25), atol=1e-5)
        np.testing.assert_allclose(variance[b, q, 0], 1 - covariance[20, :20] @ given @ covariance[:20, 20], atol=1e-5)


def posterior(x, y, query):
    """Of a Gaussian process, as kernel_ridge defines it, at one query: x (n, dim), y (n, C) -> mean (C,), variance."""
    x, y, query = (a.double().numpy() for a in (x, y, query))
    covariance = np.exp(-((x[:, None] - x) ** 2).sum(-1) / len(query)) + 0.1 * np.eye(len(x))
    to_query = np.exp(-((x - query) ** 2).sum(-1) / len(query))
    weights = np.linalg.inv(covariance) @ to_query
    return weights @ (y - 1 / y.shape[1]), 1 - weights @ to_query


def test_rivals_are_given_exactly_the_data_that_the_model_has_seen(finished, small_data):
    """Recomputed in loops from the evaluation's own tasks."""
    results = json.load(open(finished("mnist") / "results.json"))
    args = settings(**{key: results["args"][key] for key in ("dim", "context", "queries")})
    for split, dataset in (("id", "mnist"), ("ood", "fmnist")):
        images = mnist.load_images(dataset, args)
        (task,) = common.evaluation_tasks(lambda B: mnist.sample_tasks(images, B, 4, args), 4, stream=list(mnist.NAMES).index(dataset))
        for k in range(1, 5):
            nearest = majority = kernel = product = 0
            for b, q in np.ndindex(4, 4):
                x, y = torch.cat(list(task.context_x[:k, b])), torch.cat(list(task.context_y[:k, b]))
                label = int(task.query_y[b, q].argmax())
                nearest += int(y[(x - task.query_x[b, q]).norm(dim=-1).argmin()].argmax()) != label
                majority += int(y.sum(0).argmax()) != label
                kernel += int(posterior(x, y, task.query_x[b, q])[0].argmax()) != label
                alone = [posterior(task.context_x[i, b], task.context_y[i, b], task.query_x[b, q]) for i in range(k)]
                product += int(sum(mean / variance for mean, variance in alone).argmax()) != label
            for name, wrong in (("nearest neighbour", nearest), ("majority label", majority), ("kernel ridge", kernel), ("kernel ridge, one a batch", product)):
                rival = results["baselines"][split][name]
                assert rival["mean"][rival["steps"].index(k)] == pytest.approx(100 * wrong / 16), (split, name, k)


# ---------------------------------------------------------------- the files


def datasets_read(folder, test):
    """The same files through torchvision: images and labels."""
    read = datasets.MNIST(folder, train=not test)
    return read.data.numpy(), read.targets.numpy()


def pack(folder, keep):
    for path in sorted(Path(folder).rglob("*-ubyte")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        if not keep:
            path.unlink()


def test_files_are_read_as_torchvision_reads_them_packed_or_not(small_data, tmp_path):
    expected = [*datasets_read(small_data, False), *datasets_read(small_data, True)]
    assert all(map(np.array_equal, mnist.load_mnist("mnist", small_data), expected))
    packed = shutil.copytree(small_data, tmp_path / "packed")
    pack(packed, keep=False)
    before = files(packed)
    assert all(map(np.array_equal, mnist.load_mnist("mnist", packed), expected))
    assert files(packed) == before, "reading leaves the folder alone"
    assert not np.array_equal(mnist.load_mnist("fmnist", small_data)[0], expected[0])


def flip(path, at, value):
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGE = {
    "empty": lambda raw: (raw / IMAGES).write_bytes(b""),
    "three bytes": lambda raw: (raw / LABELS).write_bytes(b"\0\0\x08"),
    "truncated": lambda raw: truncate(raw / IMAGES),
    "a byte too many": lambda raw: (raw / LABELS).write_bytes((raw / LABELS).read_bytes() + b"\0"),
    "a web page": lambda raw: (raw / IMAGES).write_text("<html>404 not found</html>\n" * 50),
    "other dimensions": lambda raw: flip(raw / IMAGES, 3, 2),
    "many dimensions": lambda raw: flip(raw / IMAGES, 3, 200),
    "not bytes": lambda raw: flip(raw / IMAGES, 2, 0x0D),
    "a negative size": lambda raw: flip(raw / LABELS, 4, 0xFF),
    "a label of 10": lambda raw: flip(raw / LABELS, 8, 10),
    "fewer labels than images": lambda raw: write_idx(raw / LABELS, np.zeros(29)),
    "no image": lambda raw: [write_idx(raw / IMAGES, np.zeros((0, 28, 28))), write_idx(raw / "train-labels-idx1-ubyte", np.zeros(0))],
    "images of another size": lambda raw: write_idx(raw / IMAGES, np.zeros((60, 32, 32))),
    "labels in place of images": lambda raw: shutil.copy(raw / "train-labels-idx1-ubyte", raw / IMAGES),
    "a single number": lambda raw: (raw / LABELS).write_bytes(b"\0\0\x08\0\x05"),
    "a folder": lambda raw: [(raw / IMAGES).unlink(), (raw / IMAGES).mkdir()],
    "packed: truncated": lambda raw: [pack(raw, keep=False), truncate(raw / f"{IMAGES}.gz")],
    "packed: no gzip": lambda raw: [pack(raw, keep=False), (raw / f"{IMAGES}.gz").write_bytes(b"garbage")],
    "packed: a flipped byte": lambda raw: [pack(raw, keep=False), flip(raw / f"{IMAGES}.gz", 3000, 0x55)],
}


@pytest.mark.parametrize("folder", ("MNIST", "FashionMNIST"))
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_before_any_training(damage, folder, small_data, monkeypatch, capsys):
    """Also those of the dataset that is only used after training; and `auto` does not paper over them."""
    shutil.copytree(small_data, "copy")
    DAMAGE[damage](Path("copy", folder, "raw"))
    monkeypatch.setattr(mnist, "train", None)
    refused(capsys, f"copy/{folder}/raw", "mnist", "--data-dir copy")


def test_damaged_files_do_not_cost_the_run_that_overwrite_would_replace(finished_copy, small_data, capsys):
    folder = finished_copy("mnist")
    shutil.copytree(small_data, "copy")
    DAMAGE["truncated"](Path("copy/MNIST/raw"))
    refused(capsys, "copy/MNIST", "mnist", "--data-dir copy --overwrite --out", folder)


@pytest.mark.parametrize("where", ("nothing", "no/such/folder", "afile", "one-missing"))
def test_mnist_that_cannot_be_had_is_refused_with_one_line(where, small_data, capsys):
    Path("afile").write_text("mine")
    shutil.copytree(small_data, "one-missing")
    Path("one-missing/MNIST/raw", LABELS).unlink()
    refused(capsys, where, "mnist", f"--dataset mnist --data-dir {where}")


class Download:
    """In place of torchvision's: writes what a mirror holds of MNIST, or breaks off in the middle."""

    __name__, broken = "MNIST", None

    def __init__(self, source):
        self.source = source

    def __call__(self, folder, download):
        raw = Path(folder, "MNIST/raw")
        raw.mkdir(parents=True)
        if self.broken:
            (raw / f"{LABELS}.gz").write_bytes(b"half")
            raise self.broken
        for file in self.source.iterdir():
            shutil.copy(file, raw)


@pytest.fixture
def download(small_data, monkeypatch):
    monkeypatch.setattr(datasets, "MNIST", Download(Path(small_data, "MNIST/raw")))
    return datasets.MNIST


@pytest.mark.parametrize("problem", (OSError, RuntimeError, http.client.InvalidURL, KeyboardInterrupt, SystemExit))
def test_half_a_download_leaves_nothing(problem, download, monkeypatch):
    monkeypatch.setattr(download, "broken", problem)
    Path("new/MNIST/raw").mkdir(parents=True)
    Path("new/MNIST/raw/mine").write_text("mine")
    for folder in ("none/yet", "new"):
        if issubclass(problem, Exception):
            assert mnist.load_mnist("mnist", folder) is None
        else:
            with pytest.raises(problem):
                mnist.load_mnist("mnist", folder)
    assert not os.path.exists("none") and os.listdir("new/MNIST/raw") == ["mine"]


def test_a_download_brings_what_is_missing_and_keeps_what_is_there(download, small_data):
    there = mnist.load_mnist("mnist", small_data)
    Path("new/MNIST/raw").mkdir(parents=True)
    mine = shutil.copy(Path(small_data, "MNIST/raw", LABELS), "new/MNIST/raw")
    before = os.stat(mine)
    for folder in ("none/yet", "new"):
        assert all(map(np.array_equal, mnist.load_mnist("mnist", folder), there))
    assert os.stat(mine) == before and sorted(os.listdir("new/MNIST/raw")) == sorted(os.listdir("none/yet/MNIST/raw"))


def test_a_download_that_finds_no_room_is_refused(download, capsys):
    Path("afile").write_text("mine")
    refused(capsys, "cannot write afile", "mnist", "--dataset mnist --data-dir afile")
    assert Path("afile").read_text() == "mine"


# ---------------------------------------------------------------- drawn digits


def test_drawn_characters_are_what_their_labels_say():
    """The mean training image of each label, as a classifier, knows the test images: digits and letters alike."""
    for characters in ("0123456789", "ABCDEFGHIJ"):
        images, labels = mnist.draw_glyphs(characters, 4000, seed=1)
        new, new_labels = mnist.draw_glyphs(characters, 1000, seed=2)
        assert images.shape == (4000, 28, 28) and images.dtype == labels.dtype == np.uint8
        assert np.bincount(labels, minlength=10).min() > 300 and images.max((1, 2)).min() > 60, "every label, and no blank image"
        means = np.stack([images[labels == c].mean(0) for c in range(10)])
        guesses = ((new[:, None].astype(float) - means) ** 2).sum((2, 3)).argmin(1)
        assert (guesses == new_labels).mean() > 0.6
        assert not {image.tobytes() for image in images} & {image.tobytes() for image in new}
    again, _ = mnist.draw_glyphs("ABCDEFGHIJ", 4000, seed=1)
    assert np.array_equal(images, again)


@pytest.fixture
def few_glyphs(monkeypatch):
    draw = mnist.draw_glyphs
    monkeypatch.setattr(mnist, "draw_glyphs", lambda characters, size, seed: draw(characters, size // 100, seed))


def test_auto_falls_back_to_drawn_digits_loudly_and_says_so_in_everything_it_writes(few_glyphs, capsys):
    call("mnist", "--data-dir nothing")
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "GLYPHS" in printed
    (folder,) = os.listdir("out")
    assert f"writes to out/{folder}\n" in printed
    results = json.load(open(f"out/{folder}/results.json"))
    assert "glyphs" in folder and "not MNIST" in results["data"] and results["args"]["dataset"] == "glyphs"
    assert "letters" in results["metrics"]["ood"]["data"] and "glyphs" in results["metrics"]["id"]["data"]
    assert not any(line.startswith(("id MNIST", "ood MNIST")) for line in printed.splitlines())
    assert os.listdir() == ["out"]


def test_a_run_on_drawn_digits_stays_on_them_when_mnist_turns_up(few_glyphs, small_data, capsys):
    call("mnist", "--data-dir nothing --out run")
    before = json.load(open("run/results.json"))
    call("mnist", "--eval run/checkpoint.pt --data-dir", small_data, tiny=False)
    call("mnist", "--resume run --data-dir", small_data, tiny=False)
    for path in ("run/eval/results.json", "run/results.json"):
        after = json.load(open(path))
        assert after["metrics"] == before["metrics"] and after["data"] == before["data"]


def test_auto_takes_mnist_where_it_lies(finished):
    results = json.load(open(finished("mnist") / "results.json"))
    assert results["data"] == "MNIST" and results["metrics"]["ood"]["data"] == "FashionMNIST"


def test_without_the_other_dataset_the_run_ends_well_and_says_what_it_left_out(small_data, capsys):
    shutil.copytree(small_data / "MNIST", "some/MNIST")
    call("mnist", "--data-dir some --out run")
    assert list(json.load(open("run/results.json"))["metrics"]) == ["id"]
    assert "ood not run: FashionMNIST" in capsys.readouterr().out


def test_no_drawn_training_image_is_a_test_image(few_glyphs):
    for dataset in ("glyphs", "letters"):
        images = mnist.load_images(dataset, settings())
        train, test = ({row.numpy().tobytes() for row in images[part][0]} for part in ("train", "test"))
        assert len(test) == 50 and not train & test


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize("dataset,folder", (("mnist", "MNIST"), ("fmnist", "FashionMNIST")))
def test_the_real_files(dataset, folder):
    if not (Path(REAL_DATA) / folder / "raw").exists():
        pytest.skip(f"{folder} is not in {REAL_DATA} (set IAI_DATA)")
    images, labels, test_images, test_labels = mnist.load_mnist(dataset, REAL_DATA)
    assert images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert np.bincount(labels).shape == np.bincount(test_labels).shape == (10,)
    train, test = ({image.tobytes() for image in part} for part in (images, test_images))
    if dataset == "mnist":  # FashionMNIST has a few products in both parts
        assert not train & test
    means = np.stack([images[labels == c].mean(0) for c in range(10)])
    guesses = ((test_images[:1000, None].astype(np.float32) - means) ** 2).sum((2, 3)).argmin(1)
    assert (guesses == test_labels[:1000]).mean() > 0.6, "labels belong to their images"
