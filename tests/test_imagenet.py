"""Features of images: tasks, files, rivals and the synthetic oracle on numbers that are known; extraction on images made here."""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import zlib
from math import erf
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import imagenet
import mnist
from conftest import REAL_DATA, call, write_features
from imagenet import Features, Split
from test_wrong_use import files, refused, truncate, write


def settings(**changes):
    args = argparse.Namespace(ways=4, dim=4, context=20, queries=20, steps=2, eval_tasks=40, device="cpu", data_dir=os.environ["IAI_DATA"], features="mobilenet_v2")
    vars(args).update(changes)
    return args


def marked(classes, train=5, test=3):
    """Features that are unit vectors: which row it was can be read off. Training rows first, then held-out ones."""
    eye, n = torch.eye(classes * (train + test)), classes * train
    split = lambda x, per: Split(x, torch.arange(classes) * per, torch.full((classes,), per))
    return Features("imagenet", "marked", split(eye[:n], train), split(eye[n:], test))


# ---------------------------------------------------------------- the task


def test_a_task_is_a_random_function_from_some_classes_to_labels():
    """Per task: at most `ways` classes, one label each, merges as often as under a random function; all labels equally often."""
    classes, B = 10, 600
    task = imagenet.sample_tasks(marked(classes), B, 3, settings(ways=4, context=40))
    rows = torch.cat([task.query_x.argmax(-1), *task.context_x.argmax(-1)], 1)
    c = torch.where(rows < 50, rows // 5, (rows - 50) // 3)  # the class, off the row
    y = torch.cat([task.query_y, *task.context_y], 1).argmax(-1)
    maps, kept, labels = [], [], []
    for b in range(B):
        pairs = set(zip(c[b].tolist(), y[b].tolist()))
        assert len(pairs) == len({k for k, _ in pairs}) == 4, "each of the four classes has one label"
        maps.append(dict(pairs))
        kept.append(len(set(maps[-1].values())) / 4)
        labels += maps[-1].values()
    assert np.mean(kept) == pytest.approx(1 - 0.75**4, abs=0.03)
    assert abs(np.bincount(labels) / len(labels) - 0.25).max() < 0.04
    often = np.bincount([k for m in maps for k in m], minlength=classes) / B
    assert abs(often - 0.4).max() < 0.08, "every class is as likely as any other"
    same = [m[k] == n[k] for m, n in zip(maps, maps[1:]) for k in m.keys() & n.keys()]
    assert np.mean(same) == pytest.approx(0.25, abs=0.06), "what a class is called in one task says nothing about the next"


def test_context_from_training_and_queries_from_held_out_rows_and_labels_of_order_one():
    task = imagenet.sample_tasks(marked(6), 50, 3, settings(ways=4))
    assert task.context_x.argmax(-1).max() < 30 <= task.query_x.argmax(-1).min()
    assert task.query_y.unique().tolist() == [0, 1] and task.context_y.unique().tolist() == [0, 2]
    assert (task.query_y.sum(-1) == 1).all() and (task.context_y.sum(-1) == 2).all()
    assert len({tuple(row) for row in task.context_x[:, 0].argmax(-1).tolist()}) == 3, "mini-batches are different draws"


def test_rows_of_classes_of_different_sizes_are_drawn_evenly():
    count = torch.tensor([1, 7, 2])
    split = Split(torch.eye(10), count.cumsum(0) - count, count)
    task = imagenet.sample_tasks(Features("imagenet", "", split, split), 2000, 1, settings(ways=3))
    share = task.query_x.mean((0, 1))
    assert torch.allclose(share, torch.tensor([1.0] + [1 / 7] * 7 + [1 / 2] * 2) / 3, atol=0.01)


def test_with_fewer_classes_than_ways_all_are_used_and_labels_keep_their_number():
    task = imagenet.sample_tasks(marked(3), 200, 1, settings(ways=8, context=50))
    assert task.context_y.shape[-1] == 8 and (task.context_y.sum((0, 1, 2)) > 0).all()
    assert task.context_y.sum((0, 2)).gt(0).sum(-1).max() == 3


def test_the_first_mini_batches_and_the_queries_of_the_evaluation_do_not_depend_on_k_or_seed():
    def tasks(K, seed):
        common.seed_all(common.TRAINING, seed)
        return list(common.evaluation_tasks(lambda B: imagenet.sample_tasks(marked(8), B, K, settings()), 40, stream=3))

    for few, many in zip(tasks(2, 0), tasks(5, 1), strict=True):
        assert all(map(torch.equal, few, (many.context_x[:2], many.context_y[:2], many.query_x, many.query_y)))


# ---------------------------------------------------------------- standardising, the files


def test_principal_components_with_one_unit_from_the_training_split():
    random = np.random.default_rng(0)
    x = (random.normal(size=(400, 6)) @ random.normal(size=(6, 6)) + 3).astype(np.float32)
    y = random.integers(0, 5, 400)
    new, new_y = random.normal(size=(60, 6)).astype(np.float32), random.integers(0, 5, 60)
    statistics = imagenet.principal([(x[:150], y[:150]), (x[150:], y[150:])], 3)
    found, labels = imagenet.standardise([(x[:150], y[:150]), (x[150:], y[150:])], statistics, "cpu")
    u, s, vt = np.linalg.svd(x.astype(np.float64) - x.mean(0), full_matrices=False)
    expected = (x - x.mean(0)) @ vt[:3].T
    unit = expected.std() if abs(expected.mean()) < 1e-3 else None
    order = np.argsort(y, kind="stable")
    assert torch.equal(labels, torch.tensor(y[order])) and found.dtype == torch.float16
    signs = np.sign((found.numpy() * expected[order]).sum(0))
    np.testing.assert_allclose(found.numpy(), expected[order] * signs / unit, atol=0.01)
    assert found.float().square().mean().item() == pytest.approx(1, abs=0.01)
    held_out, _ = imagenet.standardise([(new, new_y)], statistics, "cpu")
    np.testing.assert_allclose(held_out.numpy(), ((new - x.mean(0)) @ vt[:3].T * signs / unit)[np.argsort(new_y, kind="stable")], atol=0.01)


def test_features_of_the_stand_in_keep_their_labels_and_classes_of_one_split_only_are_left_out():
    path = Path("data/features/tiny_imagenet.npz")
    write_features(path, 5, seed=3)
    content = dict(np.load(path))
    keep = content["y_test"] != 2
    np.savez(path, **content | {"x_test": content["x_test"][keep], "y_test": content["y_test"][keep]})
    features = imagenet.load_images(settings(data_dir="data", dim=6))["id"]
    statistics = imagenet.principal([(content["x_train"] * content["scale"], content["y_train"])], 6)
    for name in ("train", "test"):
        split = getattr(features, name)
        for i, c in enumerate((0, 1, 3, 4)):
            raw = torch.tensor((content[f"x_{name}"] * content["scale"])[content[f"y_{name}"] == c])
            rows = split.x[split.start[i] : split.start[i] + split.count[i]].float()
            torch.testing.assert_close(rows, (raw - statistics[0]) @ statistics[1] / statistics[2], atol=4e-3, rtol=2e-3)
        assert len(split.count) == 4


DAMAGE = {
    "empty": lambda path: write(path, b""),
    "truncated": truncate,
    "text": lambda path: write(path, b"features\n" * 99),
    "one array": lambda path: np.save(open(path, "wb"), np.zeros(3)),
    "no labels": lambda path: np.savez(path, x_train=np.zeros((3, 2)), x_test=np.zeros((3, 2)), scale=np.ones(2)),
    "fewer labels": lambda path: np.savez(path, **dict(np.load(path)) | {"y_test": np.zeros(2, np.int16)}),
    "another scale": lambda path: np.savez(path, **dict(np.load(path)) | {"scale": np.ones(5, np.float32)}),
    "negative labels": lambda path: np.savez(path, **dict(np.load(path)) | {"y_train": -dict(np.load(path))["y_train"]}),
    "labels out of all proportion": lambda path: np.savez(path, **dict(np.load(path)) | {"y_test": 10**12 + dict(np.load(path))["y_test"].astype(np.int64)}),
    "one number that is none": lambda path: spoil(path, "x_test"),
    "widths that differ": lambda path: np.savez(path, **dict(np.load(path)) | {"x_test": np.load(path)["x_test"][:, :-1], "scale": np.ones(1, np.float32)}),
    "a folder": lambda path: [path.unlink(), path.mkdir()],
}


def spoil(path, name):
    content = dict(np.load(path))
    x = content[name] * content["scale"]
    x[-1, 0] = np.nan
    np.savez(path, **content | {name: x, "scale": np.ones(1, np.float32)})


@pytest.mark.parametrize("name", ("tiny_imagenet", "cifar100"))
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_refused_before_any_training(damage, name, small_data, monkeypatch, capsys):
    shutil.copytree(small_data / "features", "copy/features")
    DAMAGE[damage](Path(f"copy/features/{name}.npz"))
    monkeypatch.setattr(imagenet, "train", None)
    refused(capsys, f"copy/features/{name}.npz", "imagenet", "--data-dir copy")


@pytest.mark.parametrize(
    "flags,culprit",
    (
        ("--ways 1", "--ways"),
        ("--ways 8", "--ways 8 is more than the 7 classes"),
        ("--dim 0", "--dim"),
        ("--features dinov2_vits14", "dinov2_vits14"),
        ("--features mobilenet_v2 --data-dir nothing", "nothing"),
        ("--features=", "--features"),
        ("--source here", "--source"),
    ),
)
def test_flags_of_imagenet(flags, culprit, capsys):
    refused(capsys, culprit, "imagenet", flags)


def test_the_stand_in_is_named_as_what_it_is_everywhere(finished):
    results = json.load(open(finished("imagenet") / "results.json"))
    names = [results["data"]] + [m["data"] for m in results["metrics"].values()]
    assert [name.split(",")[0] for name in names] == ["Tiny ImageNet", "Tiny ImageNet", "CIFAR-10", "CIFAR-100"]
    assert all("MobileNetV2 features (4 of 1,280 dimensions by PCA)" in name for name in names)
    assert [name.endswith("2 ways") for name in names] == [False, False, True, False], "fewer ways are said"
    assert list(results["metrics"]) == ["id", "ood_cifar10", "ood_cifar100"] and results["args"]["features"] == "mobilenet_v2"


def test_without_features_synthetic_ones_are_announced_and_named_in_everything(small_data, capsys):
    call("imagenet", "--data-dir nothing")
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "SYNTHETIC" in printed and "Bayes error" in printed
    (folder,) = os.listdir("out")
    results = json.load(open(f"out/{folder}/results.json"))
    assert folder.endswith("-synthetic") and "synthetic" in results["data"] and results["args"]["features"] == "synthetic"
    assert all("synthetic" in m["data"] for m in results["metrics"].values())
    call("imagenet", "--resume", f"out/{folder}", "--data-dir", small_data, tiny=False)  # stays on them when features turn up
    after = json.load(open(f"out/{folder}/results.json"))
    assert after["metrics"] == results["metrics"] and after["data"] == results["data"]


def test_without_cifar_the_run_ends_well_and_says_what_it_left_out(small_data, capsys):
    os.makedirs("some/features")
    shutil.copy(small_data / "features/tiny_imagenet.npz", "some/features")
    call("imagenet", "--data-dir some --out run")
    assert list(json.load(open("run/results.json"))["metrics"]) == ["id"]
    assert "ood_cifar10 will not run" in capsys.readouterr().out


def test_features_out_of_distribution_are_standardised_as_those_of_training(small_data):
    args = settings(dim=3)
    content = {name: dict(np.load(small_data / f"features/{name}.npz")) for name in ("tiny_imagenet", "cifar10")}
    raw = lambda name, part: content[name][f"x_{part}"] * content[name]["scale"]
    mean, directions, unit = imagenet.principal([(raw("tiny_imagenet", "train"), content["tiny_imagenet"]["y_train"])], 3)
    found = imagenet.load_images(args)["ood_cifar10"]
    for part in ("train", "test"):
        order = np.argsort(content["cifar10"][f"y_{part}"], kind="stable")
        expected = (torch.tensor(raw("cifar10", part)[order]).float() - mean) @ directions / unit
        torch.testing.assert_close(getattr(found, part).x.float(), expected, atol=4e-3, rtol=2e-3)


# ---------------------------------------------------------------- rivals and the synthetic oracle


def test_nearest_mean_equals_a_loop():
    torch.manual_seed(0)
    x, query_x, label = torch.randn(3, 12, 5), torch.randn(3, 9, 5), torch.randint(6, (3, 12))
    found = imagenet.nearest_mean(x, F.one_hot(label, 6).float(), query_x).argmax(-1)
    for b, q in np.ndindex(3, 9):
        distance = {c: (x[b, label[b] == c].mean(0) - query_x[b, q]).norm().item() for c in set(label[b].tolist())}
        assert found[b, q] == min(distance, key=distance.get)


def test_rivals_are_given_exactly_the_data_that_the_model_has_seen(finished):
    """Recomputed in loops from the evaluation's own tasks."""
    results = json.load(open(finished("imagenet") / "results.json"))
    args = settings(**{key: results["args"][key] for key in ("dim", "ways", "context", "queries")})
    for split, features in imagenet.load_images(args).items():
        (task,) = common.evaluation_tasks(lambda B: imagenet.sample_tasks(features, B, 4, args), 4, stream=list(imagenet.NAMES).index(features.key))
        for k in (1, 2, 4):
            wrong = dict.fromkeys(("nearest class mean", "nearest neighbour", "majority label", "kernel ridge"), 0)
            for b, q in np.ndindex(4, 4):
                x, y = torch.cat(list(task.context_x[:k, b])), torch.cat(list(task.context_y[:k, b])).argmax(-1)
                query, label = task.query_x[b, q], int(task.query_y[b, q].argmax())
                means = {c: (x[y == c].mean(0) - query).norm().item() for c in set(y.tolist())}
                wrong["nearest class mean"] += min(means, key=means.get) != label
                wrong["nearest neighbour"] += int(y[(x - query).norm(dim=-1).argmin()]) != label
                wrong["majority label"] += int(np.bincount(y).argmax()) != label
                apart = lambda u, v: np.exp(-((u[:, None] - v) ** 2).sum(-1) / u.shape[1])
                points, asked, targets = x.double().numpy(), query[None].double().numpy(), np.eye(task.query_y.shape[-1])[y] - 1 / task.query_y.shape[-1]
                answer = apart(asked, points) @ np.linalg.inv(apart(points, points) + 0.1 * np.eye(len(y))) @ targets
                wrong["kernel ridge"] += int(answer.argmax()) != label
            for name, count in wrong.items():
                rival = results["baselines"][split][name]
                assert rival["mean"][rival["steps"].index(k)] == pytest.approx(100 * count / 16), (split, name, k)


def test_priors_are_picked_on_tasks_that_are_not_evaluated():
    features, streams = imagenet.draw_synthetic("synthetic", 1, settings(dim=8)), []
    sample = lambda B: streams.append(imagenet.sample_tasks(features, B, 2, settings())) or streams[-1]
    imagenet.best_priors(sample, [1])
    for stream in range(len(imagenet.NAMES)):
        list(common.evaluation_tasks(sample, 40, stream=stream))
    assert not any(torch.equal(streams[0].query_x, task.query_x) for task in streams[1:])


def test_the_bayes_error_of_two_classes_is_known_in_closed_form():
    distance = 1.3
    means = torch.tensor([[0.0, 0.0], [distance, 0.0]])
    found = imagenet.bayes_error(Features("synthetic", "", None, None, means), settings(ways=2), tasks=4000)
    apart = 50 * (1 - erf(distance / 2 / imagenet.NOISE_STD / 2**0.5))  # Phi(-distance / 2 sigma) in %
    assert found.mean().item() == pytest.approx(apart / 2, abs=0.4), "half of the tasks merge both classes and cost nothing"


def test_the_bayes_error_equals_that_of_a_classifier_run_on_drawn_features():
    """By brute force: draw points, add up densities of each label's classes, count mistakes. And the features are what it thinks."""
    args = settings(ways=5, dim=8)
    features = imagenet.draw_synthetic("synthetic", 1, args)
    random, wrong = np.random.default_rng(0), []
    means, noise = features.means.double().numpy(), imagenet.NOISE_STD
    for _ in range(1500):
        chosen, relabel = random.permutation(len(means))[:5], random.integers(0, 5, 5)
        slot = random.integers(0, 5, 20)
        x = means[chosen[slot]] + noise * random.normal(size=(20, 8))
        density = np.exp(-((x[:, None] - means[chosen]) ** 2).sum(-1) / (2 * noise**2))
        of_label = np.stack([density[:, relabel == c].sum(1) for c in range(5)], 1)
        wrong.append(100 * np.mean(of_label.argmax(1) != relabel[slot]))
    found = imagenet.bayes_error(features, args, tasks=2000)
    spread = (np.var(wrong) / len(wrong) + found.var().item() / len(found)) ** 0.5
    assert abs(found.mean().item() - np.mean(wrong)) < 4 * spread and spread < 0.5
    for split in (features.train, features.test):
        around = split.x - features.means.repeat_interleave(split.count, 0)
        assert around.std().item() == pytest.approx(noise, rel=0.02) and abs(around.mean().item()) < 0.01
        assert split.x.var().item() == pytest.approx(1, abs=0.25)


def test_the_prior_with_the_fewest_errors_is_picked_for_each_step(monkeypatch):
    features, args = imagenet.draw_synthetic("synthetic", 1, settings(dim=8)), settings()
    sample = lambda B: imagenet.sample_tasks(features, B, 2, args)
    common.seed_all(common.EVALUATION, 1000)
    truth, best = sample(32).query_y, {20: 300.0, 40: 3.0}  # by how many observations it is given
    monkeypatch.setattr(imagenet, "fitted", lambda x, y, query_x, prior: truth * (1 if prior == best[x.shape[1]] else -1))
    assert imagenet.best_priors(sample, [1, 2]) == [300.0, 3.0]


def test_synthetic_strangers_are_other_classes():
    data = imagenet.load(settings(features="synthetic", dim=8, description={"args": {}}))
    assert not torch.equal(data["id"].means, data["ood"].means)


@pytest.mark.parametrize("script", ("mnist", "imagenet"))
def test_logistic_regression_is_given_all_data_seen(script, finished):
    """From zero, a thousand iterations."""
    results, module = json.load(open(finished(script) / "results.json")), importlib.import_module(script)
    args = settings(**{key: results["args"][key] for key in results["args"].keys() & {"dim", "ways", "context", "queries", "images"}})
    splits = imagenet.load_images(args) if script == "imagenet" else {"id": "mnist", "ood": "fmnist"}
    for split, data in splits.items():
        key, data = (data.key, data) if script == "imagenet" else (data, mnist.load_images(data, args))
        sample = lambda B: module.sample_tasks(data, B, 4, args)
        priors = imagenet.best_priors(sample, [1, 2, 4]) if script == "imagenet" else [10.0] * 3
        (task,) = common.evaluation_tasks(sample, 4, stream=list(module.NAMES).index(key))
        for k, prior in zip((1, 2, 4), priors):
            x, y = torch.cat(list(task.context_x[:k]), 1), (torch.cat(list(task.context_y[:k]), 1) > 0).float()
            w = mnist.logistic_regression(x, y, torch.zeros(4, args.dim + 1, y.shape[-1]), prior, 1000)
            error = 100 * ((task.query_x @ w[:, :-1] + w[:, -1:]).argmax(-1) != task.query_y.argmax(-1)).float().mean().item()
            rival = results["baselines"][split]["logistic regression"]
            assert rival["mean"][rival["steps"].index(k)] == pytest.approx(error), (split, k)


# ---------------------------------------------------------------- extraction


COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)]
HUB = """
import torch
dependencies = ["torch"]

class Colour(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)
        torch.nn.init.constant_(self.linear.bias, 0.5)
        torch.nn.init.eye_(self.linear.weight)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.linear(x.mean((2, 3)))

def dinov2_vits14(pretrained=True):
    return Colour()
"""


def expected_feature(color):
    """What the backbone of HUB makes of an image of one colour, under DINOv2's preprocessing."""
    normal = (np.array(color) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return np.concatenate([normal, [0, 0]]) + 0.5


@pytest.fixture
def source(monkeypatch):
    """A tree of train/ and val/ with 12 and 8 images of four classes, each of its class's colour; a hub; shards of five images."""
    for part, n in (("train", 3), ("val", 2)):
        for c, color in enumerate(COLORS):
            os.makedirs(f"images/{part}/class{c}")
            for i in range(n):
                Image.new("RGB", (40 + 20 * i, 50), color).save(f"images/{part}/class{c}/{i}.png")
    os.makedirs("hub")
    Path("hub/hubconf.py").write_text(HUB)
    monkeypatch.setattr(imagenet, "SHARD", 5)


FLAGS = "--extract imagenet --source images --hub-dir hub --data-dir data --batch 2 --workers 0 --device cpu"
FOLDER = Path("data/features/dinov2_vits14/imagenet")


def run_extraction(*more):
    call("imagenet", FLAGS, *more, tiny=False)


def test_extraction_through_a_local_hub_and_back(source, capsys):
    run_extraction("--workers 2")
    facts = json.load(open(FOLDER / "features.json"))
    assert sorted(p.name for p in FOLDER.iterdir()) == ["features.json", "test-00000.npy", "test-00001.npy", *(f"train-0000{i}.npy" for i in range(3))]
    assert facts["count"] == {"train": 12, "test": 8} and facts["skipped"] == {"train": [], "test": []} and facts["size"] == 5
    assert facts["backbone"] == "dinov2_vits14" and len(facts["weights_sha256"]) == 64 and facts["date"].startswith("20")
    parts, _ = imagenet.read_features(FOLDER)
    for split, n in (("train", 3), ("test", 2)):
        x, y = (np.concatenate(c) for c in zip(*parts[split]))
        assert all(isinstance(x, np.memmap) or isinstance(x.base, np.memmap) for x, _ in parts[split]), "memory-mapped"
        assert y.tolist() == np.repeat(range(4), n).tolist() and x.dtype == np.float16
        np.testing.assert_allclose(x, np.repeat([expected_feature(c) for c in COLORS], n, 0), rtol=2e-3, atol=2e-3)
    assert "% of the" in capsys.readouterr().out
    before = files()
    run_extraction()
    assert files() == before and "nothing to do" in capsys.readouterr().out


def test_a_run_on_extracted_features_names_them(source, capsys):
    run_extraction()
    call("imagenet", "--data-dir data --out run")
    results = json.load(open("run/results.json"))
    assert results["data"] == "ImageNet, dinov2_vits14 features (4 of 5 dimensions by PCA)" and list(results["metrics"]) == ["id"]
    shutil.copytree("data/features/dinov2_vits14", "data/features/torchvision-resnet50")
    refused(capsys, "dinov2_vits14|torchvision-resnet50", "imagenet", "--data-dir data --out other")
    call("imagenet", "--features torchvision:resnet50 --data-dir data --out other")


def in_a_process(change, *more):
    """An extraction in a fork that leads a session of its own, after change() -> its exit code, and what it said on stderr."""

    def main():
        os.setsid()
        sys.stdout, sys.stderr = open(os.devnull, "w"), open("stderr", "w", 1)
        change()
        imagenet.main([*FLAGS.split(), *more])

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(120)
    return process.exitcode, Path("stderr").read_text()


def between_two_shards(number):
    forward, images = imagenet.forward, []

    def dies(model, x, args):
        images.extend(x)
        if len(images) > 8:
            os.killpg(0, number)
        return forward(model, x, args)

    imagenet.forward = dies


def within_the_file_of_a_shard(number):
    whole = np.save

    def dies(f, rows):
        whole(f, rows)
        if "-00001" in f.name:
            f.truncate(f.tell() // 2)
            os.killpg(0, number)

    imagenet.np.save = dies


@pytest.mark.parametrize("moment", (between_two_shards, within_the_file_of_a_shard))
def test_killed_and_resumed_it_does_no_finished_shard_again_and_ends_the_same(moment, source, monkeypatch, capsys):
    run_extraction("--data-dir straight")
    assert in_a_process(lambda: moment(signal.SIGKILL))[0] == -signal.SIGKILL
    assert [p.name for p in FOLDER.glob("*.npy")] == ["train-00000.npy"]
    refused(capsys, "did not finish", "imagenet", "--data-dir data")
    first, seen, decode = (FOLDER / "train-00000.npy").stat(), [], imagenet.Decoded.__getitem__
    monkeypatch.setattr(imagenet.Decoded, "__getitem__", lambda self, index: seen.append(index) or decode(self, index))
    run_extraction()
    assert seen == [*range(5, 12), *range(8)] and (FOLDER / "train-00000.npy").stat().st_mtime_ns == first.st_mtime_ns
    for path in Path("straight/features/dinov2_vits14/imagenet").glob("*.npy"):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()
    assert not list(FOLDER.glob("*.tmp"))


def test_ctrl_c_with_worker_processes_is_one_line_and_keeps_what_is_finished(source):
    code, err = in_a_process(lambda: between_two_shards(signal.SIGINT), "--workers=1")
    assert code == 130 and err.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in err, err
    assert [p.name for p in FOLDER.glob("*.npy")] == ["train-00000.npy"]


def test_a_worker_that_is_killed_is_one_line(source):
    """As by a system that runs out of memory."""
    code, err = in_a_process(lambda: setattr(imagenet.Decoded, "__getitem__", lambda *_: os.kill(os.getpid(), 9)), "--workers=1")
    assert code == 2 and "Traceback" not in err and "worker" in err.splitlines()[-1], err


def test_a_backbone_is_timed_on_no_more_images_than_there_are(source, monkeypatch):
    forward, sizes = imagenet.forward, []
    monkeypatch.setattr(imagenet, "forward", lambda model, pixels, args: (sizes.append(len(pixels)), forward(model, pixels, args))[1])
    run_extraction("--batch 4")
    assert max(sizes) == 4
    shutil.rmtree(FOLDER)
    run_extraction("--batch 64")  # of shards of five images
    assert max(sizes) == 5


def test_images_that_cannot_be_decoded_are_named_counted_and_skipped(source, capsys):
    damaged = ["train/class0/1.png", "train/class2/0.png", "val/class3/1.png"]
    truncate(f"images/{damaged[0]}")
    Path("images", damaged[1]).write_bytes(b"")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # of an image too large to be one
    Path("images", damaged[2]).write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    run_extraction("--batch 1")
    facts, printed = json.load(open(FOLDER / "features.json")), capsys.readouterr().out
    assert facts["skipped"] == {"train": damaged[:2], "test": damaged[2:]} and facts["count"] == {"train": 10, "test": 7}
    assert "3 skipped" in printed and all(name in printed for name in damaged)
    parts, _ = imagenet.read_features(FOLDER)
    x, y = (np.concatenate(c) for c in zip(*parts["train"]))
    assert y.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    np.testing.assert_allclose(x, [expected_feature(COLORS[c]) for c in y], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("workers", (0, 1))
def test_images_that_cannot_be_reached_are_no_damaged_images(workers, source, capsys):
    """A disk that goes away in the middle ends the extraction, which goes on when it is back."""
    replace = common.replace_file
    gone = lambda path, write: (replace(path, write), os.path.exists("images/val") and "train-" in path and os.rename("images/val", "gone"))
    code, err = in_a_process(lambda: setattr(common, "replace_file", gone), f"--workers={workers}")
    assert code == 2 and "Traceback" not in err and "No such file" in err.splitlines()[-1], err
    os.rename("gone", "images/val")
    run_extraction()
    assert "0 skipped" in capsys.readouterr().out


def test_a_shard_of_nothing_but_damaged_images(source):
    for c, i in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        Path(f"images/train/class{c}/{i}.png").write_bytes(b"")
    run_extraction()
    call("imagenet", "--data-dir data --out run")
    assert json.load(open(FOLDER / "features.json"))["count"]["train"] == 7


def test_all_shards_of_imagenet_can_be_mapped_at_once():
    """Each holds its file open, of which a process may have 1,024 on many machines."""
    resource = pytest.importorskip("resource")
    np.save("shard.npy", np.zeros(5, imagenet.row_type(3)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        maps = [imagenet.read_shard("shard.npy", 3) for _ in range(0, 1_281_167 + 50_000, imagenet.SHARD)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(rows is not None for rows in maps)


@pytest.mark.parametrize("damage", ("truncated", "removed", "another size"))
def test_a_damaged_shard_is_refused_in_training_and_made_again_by_extraction(damage, source, capsys):
    run_extraction()
    path = FOLDER / "train-00001.npy"
    good = path.read_bytes()
    {"truncated": truncate, "removed": os.remove, "another size": lambda path: np.save(path, np.zeros(5, imagenet.row_type(3)))}[damage](path)
    refused(capsys, "dinov2_vits14", "imagenet", "--data-dir data")
    run_extraction()
    assert path.read_bytes() == good


def test_the_layer_before_the_last_of_a_torchvision_classifier_with_weights_from_a_file(source):
    from torchvision import models

    network = models.mobilenet_v3_small(weights=None).eval()
    torch.save(network.state_dict(), "random.pt")
    run_extraction("--backbone torchvision:mobilenet_v3_small --weights random.pt")
    parts, facts = imagenet.read_features("data/features/torchvision-mobilenet_v3_small/imagenet")
    assert facts["backbone"] == "torchvision:mobilenet_v3_small with random.pt" and facts["size"] == 1024
    seen = []
    network.classifier[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    preprocess = models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    with torch.no_grad():
        network(torch.stack([preprocess(Image.new("RGB", (60, 50), color)) for color in COLORS]))
    first = [parts["train"][i // 5][0][i % 5] for i in (1, 4, 7, 10)]
    np.testing.assert_allclose(np.stack(first), seen[0].numpy(), rtol=5e-3, atol=2e-3)


def test_shards_of_another_extraction_are_told_by_their_number_of_images(source, capsys):
    run_extraction()
    shutil.copy(FOLDER / "test-00001.npy", FOLDER / "train-00001.npy")
    refused(capsys, "12 images of train", "imagenet", "--data-dir data")
    run_extraction()  # which does not count them anew
    refused(capsys, "12 images of train", "imagenet", "--data-dir data")


@pytest.mark.parametrize("lost", ("backbone", "weights_sha256", "size", "count", "skipped"))
def test_facts_that_were_edited(lost, source, capsys):
    run_extraction()
    path = FOLDER / "features.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != lost}))
    if lost != "skipped":  # which training does not read
        refused(capsys, "dinov2_vits14", "imagenet", "--data-dir data")
    if lost in ("count", "skipped"):  # which are the extraction's to find
        run_extraction()
        assert json.loads(path.read_text()) == whole


def test_features_of_other_weights_are_never_mixed(source, capsys):
    run_extraction()
    shutil.copy("hub/hubconf.py", "hub/before.py")
    Path("hub/hubconf.py").write_text(HUB.replace("0.5", "0.25"))
    refused(capsys, "weights_sha256", "imagenet", FLAGS, tiny=False)
    Path("images/val/class0/new.png").write_bytes(Path("images/val/class0/0.png").read_bytes())
    Path("hub/hubconf.py").write_text(HUB)
    refused(capsys, "listing_sha256", "imagenet", FLAGS, tiny=False)
    shutil.copytree(FOLDER, FOLDER.parent / "cifar10")
    facts = json.load(open(FOLDER / "features.json"))
    json.dump(facts | {"weights_sha256": "0" * 64}, open(FOLDER.parent / "cifar10" / "features.json", "w"))
    refused(capsys, "different weights", "imagenet", "--data-dir data")
    os.remove(FOLDER / "features.json")
    refused(capsys, "no features.json", "imagenet", FLAGS, tiny=False)


@pytest.mark.parametrize(
    "flags,culprit",
    (
        ("--source nothing", "nothing"),
        ("--source hub", "hub"),
        ("--extract cifar10", "CIFAR-10"),
        ("--extract faces", "faces"),
        ("--backbone dinov2_vitg14", "dinov2_vitg14"),
        ("--backbone torchvision:nothing", "torchvision:nothing"),
        ("--backbone dinov2_vitb14", "dinov2_vitb14"),  # not in this hub
        ("--hub-dir nothing", "nothing"),
        ("--weights nothing.pt", "nothing.pt"),
        ("--weights hub/hubconf.py", "hub/hubconf.py"),
        ("--backbone torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_small"),  # cannot be downloaded
        ("--backbone torchvision:squeezenet1_0 --weights squeeze.pt", "squeezenet1_0"),  # has no linear layer
        ("--batch 0", "--batch"),
        ("--workers -1", "--workers"),
        ("--device gpu", "gpu"),
        ("--data-dir hub/hubconf.py", "hubconf.py"),
        ("--steps 3", "--steps"),
    ),
)
def test_what_cannot_be_extracted_is_one_clear_line(flags, culprit, source, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", os.path.abspath("images"))
    os.makedirs("images/hub/checkpoints")
    if "squeeze" in flags:
        from torchvision import models

        torch.save(models.squeezenet1_0(weights=None).state_dict(), "squeeze.pt")
    refused(capsys, culprit, "imagenet", FLAGS, flags, tiny=False)


def test_cifar_through_torchvision(source, monkeypatch):
    """A small archive in CIFAR-10's format; torchvision reads it, checksums aside."""
    import pickle

    from torchvision import datasets

    os.makedirs("pictures/cifar-10-batches-py")
    random = np.random.default_rng(0)
    for name, n in [(f"data_batch_{i}", 2) for i in range(1, 6)] + [("test_batch", 4)]:
        content = {"data": random.integers(0, 256, (n, 3072)).astype(np.uint8), "labels": [i % 10 for i in range(n)]}
        pickle.dump(content, open(f"pictures/cifar-10-batches-py/{name}", "wb"))
    pickle.dump({"label_names": [f"c{i}" for i in range(10)]}, open("pictures/cifar-10-batches-py/batches.meta", "wb"))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    run_extraction("--extract cifar10 --source pictures")
    parts, facts = imagenet.read_features("data/features/dinov2_vits14/cifar10")
    assert facts["count"] == {"train": 10, "test": 4}
    image, label = datasets.CIFAR10("pictures", train=False)[3]
    assert parts["test"][0][1][3] == label
    _, preprocess, _ = imagenet.load_backbone(argparse.Namespace(backbone="dinov2_vits14", hub_dir="hub", weights=None, device="cpu"))
    pixels = preprocess(image).mean((1, 2))
    np.testing.assert_allclose(parts["test"][0][0][3][:3], pixels + 0.5, rtol=5e-3, atol=5e-3)


def test_pictures_are_resized_and_cropped_as_dinov2_evaluates(source):
    _, preprocess, _ = imagenet.load_backbone(argparse.Namespace(backbone="dinov2_vits14", hub_dir="hub", weights=None, device="cpu"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8))
    middle = np.asarray(picture.resize((341, 256), Image.BICUBIC))[16:240, 58:282] / 255
    expected = (middle - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(preprocess(picture).permute(1, 2, 0), expected, atol=1e-5)


def test_features_of_pictures_prepared_otherwise_are_never_mixed(source, capsys):
    run_extraction()
    facts = json.loads((FOLDER / "features.json").read_text())
    (FOLDER / "features.json").write_text(json.dumps(facts | {"preprocessing": "none"}))
    refused(capsys, "preprocessing", "imagenet", FLAGS, tiny=False)


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize("name,classes,train", (("tiny_imagenet", 200, 100_000), ("cifar10", 10, 20_000), ("cifar100", 100, 20_000)))
def test_the_real_features(name, classes, train):
    path = Path(REAL_DATA) / "features" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there (set IAI_DATA)")
    parts, _ = imagenet.read_npz(path)
    ((x, y),), ((new, new_y),) = parts["train"], parts["test"]
    assert x.shape == (train, 256) and np.bincount(y).tolist() == [train // classes] * classes and len(new) == 10_000
    means = np.stack([x[y == c].astype(np.float32).mean(0) for c in range(classes)])
    guesses = ((new[:500, None].astype(np.float32) - means) ** 2).sum(2).argmin(1)
    assert (guesses == new_y[:500]).mean() > 0.2, "labels belong to their features"
