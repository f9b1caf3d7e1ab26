"""Both README.md: their tables come from results/, their commands are understood, and their files are there."""

import importlib
import json
import os
import re
import shlex
import textwrap

import pytest
import torch

import common

from conftest import ROOT, SCRIPTS

import ablations
import tables

README, RESULTS_PAGE = (page.read_text() for page in tables.PAGES)
RESULTS = [name for name in sorted(os.listdir(os.path.join(ROOT, "results"))) if name.endswith(".json") and not name.startswith(("bench", "cost", "race", "sampler", "ablations"))]
COMMANDS = sorted(set(re.findall(r"python (\w+)\.py((?: --?[a-z0-9][^\s`|]*(?: [^\s`|#,-][^\s`|#,]*)?)*)", README + RESULTS_PAGE)))


def test_the_tables_are_those_of_the_results():
    assert (tables.fill(README), tables.fill(RESULTS_PAGE)) == (README, RESULTS_PAGE), "run: python results/tables.py"
    assert sorted(re.findall(r"<!-- table: (\w+) -->", README + RESULTS_PAGE)) == sorted(tables.TABLES), "each table is shown, and once"


def test_no_two_results_are_shown_with_the_same_command():
    commands = [tables.command(tables.read(name.removesuffix(".json"))) for name in RESULTS if ".seed" not in name]
    assert len(set(commands)) == len(commands)


def test_results_name_the_command_the_data_and_the_machine_they_are_from():
    for name in RESULTS:
        results = json.load(open(os.path.join(ROOT, "results", name)))
        script = shlex.split(results["command"])[1]
        assert script == results["script"] + ".py" and os.path.exists(os.path.join(ROOT, script)), name
        assert all(results[key] for key in ("data", "machine", "torch", "iterations", "train_seconds")) and results["seed"] >= 0, name


@pytest.mark.parametrize("script,flags", COMMANDS, ids=["".join(c) for c in COMMANDS])
def test_commands_are_understood(script, flags, monkeypatch):
    if script == "tables" or "--extract" in flags or re.search(r"(DIR|FILE|--help)\b", flags):
        pytest.skip("no training run")
    flags = re.sub(r"--eval \S+", "", flags)  # of a checkpoint that a test does not have
    if "graph" in flags:
        monkeypatch.setattr(common, "pick_device", lambda *_: ("cuda", "bfloat16", "as if there were one"))
    importlib.import_module(script).get_args(shlex.split(flags) + ["--device", "cpu"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_method_of_the_paper_is_what_the_page_says_and_gives_way_to_what_is_asked(script):
    get_args = importlib.import_module(script).get_args
    shown = re.search(r"`--method paper` stands for `(.+?)`", README.replace("\n", " "))[1].split(" --")
    wanted = dict(flag.removeprefix("--").replace("-", "_").split() for flag in shown)
    args = vars(get_args(["--method", "paper", "--device", "cpu"]))
    assert {flag: str(args[flag]) for flag in wanted} == wanted | {"state_scale": "1.0"}
    assert get_args(["--method", "paper", "--history", "2", "--device", "cpu"]).history == 2


def test_excerpts_are_in_the_source():
    """Line by line, wherever the source indents them."""
    found = re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", README, re.S)
    assert len(found) >= 3
    for file, excerpt in found:
        source = open(os.path.join(ROOT, file)).read()
        assert any(textwrap.indent(excerpt, " " * n) in source for n in (0, 4, 8, 12)), excerpt


def test_the_shapes_of_the_walk_through_are_those_of_the_defaults(monkeypatch):
    mnist = importlib.import_module("mnist")
    args = mnist.get_args(["--device", "cpu"])
    task = mnist.sample_tasks(mnist.load(args), args.tasks, args.steps, args)
    model = mnist.make_model(args).train()
    shapes = {f"`{name}` {tuple(part.shape)}" for name, part in task._asdict().items()}
    model.size = 40
    given, dual, encode = [], model.dual, model.encode
    model.dual = lambda x, wanted: given.append(wanted) or dual(x, wanted)
    model.encode = lambda x, y, step: given.extend((y, seen := torch.cat([x, y], -1), model.observation(seen))) or encode(x, y, step)
    next(common.mini_batches(model, task))
    shapes |= {str(tuple(part.shape)) for part in given}
    shapes |= {f"state ({', '.join(map(str, model.initial_state(task.query_x).shape))})".removeprefix("state "), f"prediction {tuple(next(common.refine(model, task)).shape)}"}
    walk = README[README.index("### One training step") : README.index("## Quick start")]
    for shape in shapes:
        assert shape in walk, shape


def test_linked_files_and_sections_exist():
    for page in tables.PAGES:
        for path, section in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), path
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if section else []
            assert not section or section in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], section


def test_commands_of_all_ablations_are_understood():
    for base, variants in ablations.GROUPS.values():
        script, *flags = base.split()
        for change in variants.values():
            importlib.import_module(script.removesuffix(".py")).get_args([*flags, *(change.split() if change not in ablations.EDITS else []), "--device", "cpu"])
