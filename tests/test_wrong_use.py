"""Wrong use: one line on stderr that names the culprit, exit code 2, before any work; nothing left behind, nothing lost."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch

import common
import linreg
from conftest import ROOT, SCRIPTS, TINY, call


def files(folder="."):
    """Every folder, and every file with its bytes."""
    paths = (os.path.join(top, name) for top, folders, names in os.walk(folder) for name in folders + names)
    return {path: os.path.isfile(path) and open(path, "rb").read() for path in paths}


def assert_refused(code, err, culprit, before):
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert culprit in lines[0], f"{lines[0]!r} does not name {culprit!r}"
    after = files()
    assert before.keys() <= after.keys() and all(after[path] == before[path] for path in before), "a file was changed or lost"
    assert after.keys() <= before.keys(), f"left behind: {sorted(after.keys() - before.keys())}"


def refused(capsys, culprit, script, *flags, tiny=True):
    before = files()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, *flags, tiny=tiny)
    printed = capsys.readouterr()
    assert_refused(stop.value.code, printed.err, culprit, before)
    return printed.out


# ---------------------------------------------------------------- flags


FLAGS = [  # flags, what the line must name
    ("--no-such-flag 3", "--no-such-flag"),
    ("--step 3", "--step"),  # no abbreviations
    ("stray", "stray"),
    ("--steps", "--steps"),
    ("--steps 0", "--steps"),
    ("--steps -3", "--steps"),
    ("--steps 1.5", "--steps"),
    ("--steps many", "--steps"),
    *((f"--{flag} 0", f"--{flag}") for flag in ("context", "queries", "tasks", "iters", "width", "depth", "heads", "history", "hidden")),
    ("--latent-tokens 0", "--latent-tokens"),
    ("--eval-tasks 0", "--eval-tasks"),
    ("--seed -1", "--seed"),
    ("--seed 1" + 310 * "0", "--seed"),
    ("--width 1" + 30 * "0", "--width"),
    ("--device hpu", "--device"),
    *((f"--eval-steps {number}", "--eval-steps") for number in (0, -1, "all")),
    ("--lr 0", "--lr"),
    ("--lr -1e-3", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr"),
    ("--regime magic", "--regime"),
    ("--signal sound", "--signal"),
    ("--mask lower", "--mask"),
    ("--state gas", "--state"),
    ("--preset huge", "--preset"),
    ("--method mine", "--method"),
    ("--method paper --decoder solve", "--update"),
    ("--device mps", "float64"),
    ("--dtype float8", "--dtype"),
    ("--width 9 --heads 2", "--heads"),
    ("--regime implicit --signal grad", "--signal"),
    ("--regime implicit --signal both", "--signal"),
    ("--regime parametric --state latent", "--state"),
    ("--regime parametric --state-scale 0.5", "--state-scale"),
    ("--regime explicit --init rotation", "--init"),
    ("--regime implicit --state-scale -1", "--state-scale"),
    ("--regime explicit --state latent", "--state"),
    ("--decoder convolution", "--decoder"),
    ("--regime implicit --decoder span", "--decoder"),
    ("--regime implicit --decoder solve --state latent", "--decoder linear"),
    ("--regime implicit --decoder solve --update direct", "--decoder linear"),
    ("--regime parametric --decoder solve --update direct", "--update"),
    ("--attention none", "--attention"),
    ("--clock hours", "--clock"),
    ("--regime implicit --basis fourier", "--basis"),
    ("--regime explicit --basis sines", "--basis"),
    ("--regime explicit --decoder linear --mask none --latent-tokens 7", "--latent-tokens"),
    ("--regime implicit --hidden 8", "--hidden"),
    ("--regime explicit --decoder solve --mask none --latent-tokens 2", "--decoder linear"),
    ("--regime explicit --decoder linear --mask causal --latent-tokens 2", "--latent-tokens"),
    ("--regime parametric --decoder linear --mask none --latent-tokens 2", "--latent-tokens"),
    ("--device cuda:99", "cuda:99"),
    ("--launch graph", "--launch eager"),
    ("--launch graph --device cpu:0", "--launch eager"),
    ("--device gpu", "gpu"),
    ("--device meta", "meta"),
    ("--device cpu:x", "cpu:x"),
    ("--resume run --eval run/checkpoint.pt", "--eval"),
]


@pytest.mark.parametrize("flags,culprit", FLAGS, ids=[flags for flags, _ in FLAGS])
@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_are_unknown_out_of_range_or_contradict_each_other(script, flags, culprit, capsys):
    assert not refused(capsys, culprit, script, flags), "it says nothing of a run that will not be"


@pytest.mark.parametrize(
    "flags,culprit", [("--dim 0", "--dim"), ("--noise -1", "--noise"), ("--noise 0", "--noise"), ("--noise nan", "--noise"), ("--regime implicit --state softmax", "--state softmax")]
)
def test_flags_of_linear_regression(flags, culprit, capsys):
    refused(capsys, culprit, "linreg", flags)


# ---------------------------------------------------------------- checkpoints and runs that are not what they should be


def checkpoint_with(path, **changes):
    """A good checkpoint with some entries replaced; None removes one."""
    content = torch.load(path, weights_only=True)
    content = {key: value for key, value in (content | changes).items() if value is not None}
    torch.save(content, path)


def change_args(path, **changes):
    args = torch.load(path, weights_only=True)["args"] | changes
    checkpoint_with(path, args={key: value for key, value in args.items() if value is not None})


def truncate(path):
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)


def write(path, content):
    with open(path, "wb") as f:
        f.write(content)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-checkpoint",)


CHECKPOINTS = {  # what is done to a good one
    "missing": os.remove,
    "empty": lambda path: write(path, b""),
    "truncated": truncate,
    "text": lambda path: write(path, b"weights\n"),
    "pickle with code": lambda path: write(path, pickle.dumps(Evil())),
    "torch file with code": lambda path: torch.save({"model": Evil()}, path),
    "foreign: a list": lambda path: torch.save([1, 2], path),
    "foreign: a state dict": lambda path: torch.save({"weight": torch.zeros(2)}, path),
    "another script's": lambda path: checkpoint_with(path, script="shapes"),
    "another width": lambda path: change_args(path, width=16),
    "no steps": lambda path: change_args(path, steps=0),
    "unknown regime": lambda path: change_args(path, regime="magic"),
    "an argument missing": lambda path: change_args(path, mask=None),
    "an argument too many": lambda path: change_args(path, flavour=3),
    "arguments are a list": lambda path: checkpoint_with(path, args=[1]),
    "no arguments": lambda path: checkpoint_with(path, args={}),
    "no weights": lambda path: checkpoint_with(path, model={}),
    "weights are a number": lambda path: checkpoint_with(path, model=3),
    "no train_seconds": lambda path: checkpoint_with(path, train_seconds=None),
    "iteration is text": lambda path: checkpoint_with(path, iteration="three"),
    "iteration is negative": lambda path: checkpoint_with(path, iteration=-1),
    "flags are numbers": lambda path: checkpoint_with(path, args={3: "three"}),
    "rows of other steps": lambda path: checkpoint_with(path, pending=[torch.zeros(9)], iteration=1),
}


@pytest.mark.parametrize("flag", ("--eval", "--resume"))
@pytest.mark.parametrize("damage", CHECKPOINTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_that_are_not_ours_or_do_not_fit(script, damage, flag, finished_copy, capsys):
    folder = os.path.relpath(finished_copy(script))
    path = os.path.join(folder, "checkpoint.pt")
    CHECKPOINTS[damage](path)
    refused(capsys, "checkpoint", script, flag, path if flag == "--eval" else folder, tiny=False)
    assert not os.path.exists("run-by-a-checkpoint")


@pytest.mark.parametrize("optimizer", ({}, {"state": {}, "param_groups": []}, 3), ids=("empty", "no-groups", "number"))
def test_an_optimizer_that_does_not_fit_is_refused_when_resuming(optimizer, finished_copy, capsys):
    folder = finished_copy("linreg")
    checkpoint_with(folder / "checkpoint.pt", optimizer=optimizer)
    refused(capsys, "checkpoint", "linreg", "--resume", folder, tiny=False)


@pytest.mark.parametrize("flags", ("--width 16", "--steps 3", "--seed 1", "--preset paper", "--method paper", "--regime implicit", "--iters 5", "--lr 1e-3"))
def test_flags_that_contradict_the_checkpoint(flags, finished_copy, capsys):
    folder = finished_copy("linreg")
    for source in (("--resume", folder), ("--eval", folder / "checkpoint.pt")):
        refused(capsys, flags.split()[0], "linreg", *source, flags, tiny=False)


def test_the_same_flags_as_the_checkpoint_are_no_contradiction(finished_copy):
    folder = finished_copy("linreg")
    call("linreg", "--eval", folder / "checkpoint.pt", "--width 8 --seed 0", tiny=False)


@pytest.mark.parametrize("flags,culprit", [("--out other", "--out"), ("--overwrite", "--overwrite")])
def test_resume_goes_on_in_its_own_folder(flags, culprit, finished_copy, capsys):
    refused(capsys, culprit, "linreg", "--resume", finished_copy("linreg"), flags, tiny=False)


@pytest.mark.parametrize("flags", ("--steps 3", "--out other", "--resume linreg-run", "--eval nothing.pt"))
def test_plot_only_does_nothing_else(flags, finished_copy, capsys):
    refused(capsys, "--plot-only", "linreg", "--plot-only", finished_copy("linreg"), flags, tiny=False)


@pytest.mark.parametrize("flag", ("--out", "--resume", "--eval", "--plot-only"))
def test_an_empty_path_as_from_an_unset_shell_variable(flag, finished_copy, monkeypatch, capsys):
    monkeypatch.chdir(finished_copy("linreg"))
    monkeypatch.setattr("linreg.train", None)
    refused(capsys, flag, "linreg", f"{flag}=", tiny=False)


RESULTS = {
    "missing": lambda folder: os.remove(folder / "results.json"),
    "empty": lambda folder: write(folder / "results.json", b""),
    "truncated": lambda folder: truncate(folder / "results.json"),
    "a list": lambda folder: write(folder / "results.json", b"[1]"),
    "another script's": lambda folder: write(folder / "results.json", b'{"script": "shapes"}'),
    "nothing in it": lambda folder: write(folder / "results.json", b'{"script": "linreg"}'),
    "a folder": lambda folder: os.remove(folder / "results.json") or os.mkdir(folder / "results.json"),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", RESULTS)
def test_results_that_cannot_be_redrawn(damage, finished_copy, capsys):
    folder = finished_copy("linreg")
    RESULTS[damage](folder)
    refused(capsys, folder.name, "linreg", "--plot-only", folder, tiny=False)


@pytest.mark.parametrize("change", (lambda r: r["args"].pop("steps"), lambda r: r.pop("data"), lambda r: r["args"].update(steps=9), lambda r: r["metrics"]["id"]["mean"].pop()))
def test_results_that_were_edited(change, finished_copy, capsys):
    folder = finished_copy("linreg")
    results = json.load(open(folder / "results.json"))
    change(results)
    write(folder / "results.json", json.dumps(results).encode())
    refused(capsys, "results.json", "linreg", "--plot-only", folder, tiny=False)


@pytest.mark.parametrize("content", (b"not json\n", b"[1]\n", b'{"iteration": 3}\n', b'{"iteration": "3", "loss": [1, 1], "metric": 1, "lr": 1, "seconds": 1}\n'))
@pytest.mark.parametrize("flag", ("--plot-only", "--resume"))
def test_a_damaged_log(flag, content, finished_copy, capsys):
    folder = finished_copy("linreg")
    write(folder / "log.jsonl", content)
    refused(capsys, "log.jsonl", "linreg", flag, folder, tiny=False)


# ---------------------------------------------------------------- --out


@pytest.mark.parametrize("out", ("afile", "afile/below", "afile/far/below", "/proc/here", "x" * 300))
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_out_that_cannot_be_written(script, out, capsys):
    write("afile", b"mine")
    refused(capsys, "--out", script, "--out", out)


@pytest.mark.parametrize("held", ("checkpoint.pt", "log.jsonl", "results.json"))
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_out_that_holds_another_run(script, held, capsys):
    os.mkdir("other")
    write(f"other/{held}", b"precious")
    refused(capsys, "other", script, "--out other")


def test_the_default_out_is_guarded_too(capsys):
    call("linreg")
    refused(capsys, "out/linreg", "linreg")
    refused(capsys, "--steps", "linreg", "--overwrite --steps 0")
    call("linreg", "--overwrite")


def test_an_evaluation_does_not_mix_with_another_run(finished_copy, capsys):
    folder = finished_copy("linreg")
    shutil.copytree(folder, "other")
    for rest in ((), ("checkpoint.pt", "results.json")):  # of a run, its losses are enough to be mixed up
        for name in rest:
            os.remove(folder / name)
        refused(capsys, "another run", "linreg", "--eval other/checkpoint.pt --overwrite --out", folder, tiny=False)


@pytest.mark.parametrize("problem", (PermissionError(13, "Permission denied", "x"), MemoryError("memory"), RuntimeError("not enough memory: you tried to allocate 8 bytes"), RuntimeError("Storage size calculation overflowed")), ids=repr)
def test_what_no_check_foresaw_is_one_line(problem, capsys):
    def main():
        raise problem

    with pytest.raises(SystemExit) as stop:
        common.run(main)
    assert_refused(stop.value.code, capsys.readouterr().err, "Permission denied" if isinstance(problem, OSError) else "memory", files())


def test_ctrl_c_in_an_evaluation_is_one_line_and_keeps_what_was_trained(monkeypatch, capsys):
    monkeypatch.setattr("linreg.evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # common.run has to take it over
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: linreg.main([*TINY["linreg"].split(), "--out", "run"]))
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "error: interrupted" and os.path.exists("run/checkpoint.pt")


def test_a_bug_is_no_wrong_use():
    with pytest.raises(RuntimeError, match="a bug"):
        common.run(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_overwrite_loses_nothing_when_the_run_is_refused_later(finished_copy, capsys):
    folder = finished_copy("linreg")
    shutil.move(folder / "checkpoint.pt", "bad.pt")
    os.remove(folder / "log.jsonl")  # what is left is as of an evaluation
    checkpoint_with("bad.pt", model={})
    refused(capsys, "checkpoint", "linreg", "--eval bad.pt --overwrite --out", folder, tiny=False)


def test_eval_never_overwrites_the_run_that_it_evaluates(finished_copy, capsys):
    folder = finished_copy("linreg")
    refused(capsys, "--out", "linreg", "--eval", folder / "checkpoint.pt", "--overwrite --out", folder, tiny=False)


def test_a_new_run_leaves_an_evaluation_in_its_folder_alone():
    call("linreg", "--out trained")
    call("linreg", "--eval trained/checkpoint.pt --out new/eval", tiny=False)
    before = open("new/eval/results.json").read()
    call("linreg", "--out new")
    assert open("new/eval/results.json").read() == before


def test_overwrite_leaves_no_trace_of_the_run_before(finished_copy):
    folder = finished_copy("linreg")
    call("linreg", "--overwrite --seed 1 --iters 4 --out", folder)
    assert [json.loads(row)["iteration"] for row in open(folder / "log.jsonl")] == [4]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["args"]["seed"] == 1
    assert json.load(open(folder / "results.json"))["seed"] == 1


def test_overwrite_leaves_no_picture_of_the_run_before(finished_copy, monkeypatch):
    """Nor an evaluation, where the new run is stopped before it draws any; files of others stay."""
    folder = finished_copy("toposort")
    os.makedirs(folder / "eval")
    for name in ("points_id.npz", "excess.png", "grid_id.png", "refinement_id.gif", "mine.png", "eval/results.json", "eval/mine.png"):
        write(folder / name, b"a run of mixtures")
    monkeypatch.setattr("toposort.evaluate", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        call("toposort", "--overwrite --out", folder)
    assert set(os.listdir(folder)) == {"checkpoint.pt", "log.jsonl", "mine.png", "eval"} and os.listdir(folder / "eval") == ["mine.png"]


@pytest.mark.parametrize("culprit,drawn", [("memory", mock.Mock(side_effect=MemoryError())), ("--lr", lambda *how, draw=linreg.sample_tasks: common.Task(*(torch.nan * part for part in draw(*how))))])
def test_overwrite_keeps_the_run_before_until_the_new_one_has_made_a_step(culprit, drawn, finished_copy, monkeypatch, capsys):
    folder = finished_copy("linreg")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("linreg.sample_tasks", drawn)
    with pytest.raises(SystemExit):
        common.run(lambda: call("linreg", "--seed 1 --overwrite --out", folder))
    message = capsys.readouterr().err.splitlines()[-1]
    assert culprit in message and "last good state" not in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_before_the_first_step_leaves_the_run_before(signum, finished_copy, monkeypatch, capsys):
    folder = finished_copy("linreg")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(common, "all_reduce", lambda x, kind="", left=[signum]: (left and signal.raise_signal(left.pop()), x)[1])  # as the ranks meet
    with pytest.raises(SystemExit) as stop:
        call("linreg", "--seed 1 --overwrite --out", folder)
    assert stop.value.code == 128 + signum and "before the first iteration" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_different_runs_have_different_folders_by_default():
    """Also where a flag is given that takes back what a preset or the paper's method asks for."""
    runs = ["", "--preset paper", "--preset paper --lr 3e-3", "--method paper", "--method paper --clock steps", "--lr 1e-3", "--seed 1"]
    get = lambda flags: linreg.get_args([*flags.split(), "--device", "cpu"])
    assert len({get(flags).out for flags in runs}) == len(runs)
    assert get("--lr 3e-3").out == get("").out and get("--preset paper --lr 1e-3").out == get("--preset paper").out


# ---------------------------------------------------------------- the same from a shell


@pytest.mark.parametrize("script", TINY)
def test_a_real_process_gives_one_line_and_exit_code_2(script):
    write("checkpoint.pt", pickle.dumps(Evil()))
    before = files()
    done = subprocess.run([sys.executable, os.path.join(ROOT, f"{script}.py"), "--resume=."], capture_output=True, text=True)
    assert_refused(done.returncode, done.stderr, "checkpoint", before)


def test_orders_of_results_that_were_edited_are_not_drawn(finished_copy, capsys, pictures):
    folder = finished_copy("toposort")
    results = json.load(open(folder / "results.json"))
    for metric in results["metrics"].values():
        del metric["orders"]
    write(folder / "results.json", json.dumps(results).encode())
    refused(capsys, "nothing is drawn", "toposort", "--plot-only", folder, tiny=False)
