"""README and CONTRIBUTING against the code: every command parses, every list is complete, the example method runs."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from sslpre import encoder, methods, recipe
from sslpre.cli import program
from sslpre.objective import Batch, Setup
from sslpre.shelf import names, shipped, text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROGRAM = program()
SET_UP = ("pip install . && sslpre pretrain simclr", "pip install '.[test]' && pytest")


def command_lines(document: str) -> list[str]:
    """Every `sslpre …` on a line of a code block, on its own or after another command."""
    fenced = re.findall(r"^```sh\n(.*?)^```", document, re.M | re.S)
    indented = re.findall(r"^    (\S.*)$", document, re.M)
    lines = [line.strip() for block in fenced for line in block.splitlines()] + [line.strip() for line in indented]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"sslpre( |$)", part)]


def examples_in_help() -> list[str]:
    return [line for command in PROGRAM.commands.values() for line in command_lines("\n".join(indented(command.help)))]


def indented(help_text: str) -> list[str]:
    return [f"    {line.strip()}" if line.startswith("  ") else line for line in help_text.splitlines()]


def parse(line: str) -> dict:
    """Parse a command line with the program's own parser, running nothing. Raises what the parser raises."""
    words = shlex.split(line.partition(" > ")[0])[1:]
    context = PROGRAM.make_context("sslpre", list(words))
    verb = PROGRAM.commands[words[0]]
    inner = verb.make_context(words[0], words[1:], parent=context)
    return {"verb": words[0], **inner.params}


@pytest.mark.parametrize("line", [*command_lines(README), *command_lines(CONTRIBUTING), *examples_in_help()])
def test_every_command_parses(line):
    given = parse(line)
    if given["verb"] == "pretrain" and given["recipe"] is not None:
        assert given["recipe"] in names() or given["recipe"].endswith(".toml")
    for setting in given.get("settings") or ():
        recipe.load(given["recipe"], [setting])


def test_the_parser_would_tell():
    for wrong in ("sslpre pretrain simclr --batchsize 3", "sslpre export a b", "sslpre export --run"):
        with pytest.raises(Exception, match=r"(?i)option|argument"):
            parse(wrong)


def test_what_a_user_types_stands_in_the_readme():
    for line in SET_UP:
        assert f"\n    {line}\n" in README
    lines = set(command_lines(README))
    assert lines >= {
        "sslpre pretrain simclr",
        "sslpre pretrain simclr ./images",
        "sslpre pretrain simclr ./images --backbone resnet50 --epochs 20 --batch-size 256 --set method.temperature=0.2",
        "sslpre probe --linear",
        "sslpre probe --knn",
        "sslpre probe runs/simclr-1 --data ./labelled --linear --json",
        "sslpre export encoder.safetensors",
        "sslpre export enc/",
        "sslpre recipes",
        "sslpre recipes simclr",
    }


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert SET_UP[1] in script.splitlines()
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("fails", "code", "after"),
    [
        ("pip 7", 7, ["pip install .[test]"]),
        ("pytest 5", 5, ["pip install .[test]", "pytest"]),
        ("mypy 3", 3, ["pip install .[test]", "pytest", "pip install --quiet .[dev]", "ruff check .", "mypy sslpre"]),
    ],
)
def test_ci_stops_where_something_fails(tmp_path, fails, code, after):
    """The script with commands that only say what they were called with, one of which fails."""
    failing, _, status = fails.partition(" ")
    for name in ("pip", "pytest", "ruff", "mypy", "python", "chromium", "chromedriver"):
        lines = ["#!/bin/sh", f'echo "$(basename "$0") $*" | sed "s/ *$//" >> "{tmp_path}/calls"']
        if name == "python":  # stands for `python -m venv FOLDER`
            lines = ["#!/bin/sh", 'mkdir -p "$3/bin" && : > "$3/bin/activate"']
        (tmp_path / name).write_text("\n".join([*lines, f"exit {status if name == failing else 0}", ""]))
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHON": str(tmp_path / "python"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == after


def rows(mark: str) -> list[str]:
    """First cells of the table between two marks, without backticks."""
    (part,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, re.S)
    return [line.split("|")[1].strip(" `") for line in part.strip().splitlines()[2:]]


def test_lists_are_those_of_the_code():
    assert rows("commands") == [f"sslpre {name}" for name in PROGRAM.commands]
    assert rows("recipes") == shipped()
    assert rows("methods") == sorted(methods.table)


SIGNAL = "128 + n"


def exit_codes() -> set[int | str]:
    """The codes of every `SslpreError(…)` in the code: numbers, or names like `CODE` and `memory.CODE` of numbers."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "sslpre").rglob("*.py")}
    named = {}
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                named |= {f"{path.stem}.{ast.unparse(target)}": node.value.value for target in node.targets}
    codes = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "SslpreError":
                given = [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "code")]
                for code in given or [ast.Constant(2)]:
                    name = f"{path.stem}.{code.id}" if isinstance(code, ast.Name) else ast.unparse(code)
                    if isinstance(code, ast.Call) and ast.unparse(code.func) == "disk_code":
                        codes |= {3, 13}
                        continue
                    if isinstance(code, ast.Call) and ast.unparse(code.func) == "signals.code":
                        codes.add(SIGNAL)
                        continue
                    either = [code.body, code.orelse] if isinstance(code, ast.IfExp) else []
                    codes |= {one.value for one in either}
                    if not either:
                        codes.add(code.value if isinstance(code, ast.Constant) else named[name])
    return codes


def test_exit_codes_are_those_of_the_code():
    (table,) = re.findall(r"\| exit code \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", README)
    told = {word if (word := line.split("|")[1].strip()) == SIGNAL else int(word) for line in table.splitlines()}
    assert exit_codes() | {0, 1} == told


def test_files_of_a_run_that_the_readme_names_are_written_by_the_code():
    (block,) = re.findall(r"^    runs/simclr-1/\n((?:      .*\n)+)", README, re.M)
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sslpre").rglob("*.py"))
    for line in block.splitlines():
        assert f'"{line.split()[0].rstrip("/")}"' in code, line


def unfounded(results: str) -> list[str]:
    """Rows of a table of results that do not name the commit and the hardware they were measured on."""
    lines = [line for line in results.strip().splitlines() if line.startswith("|")]
    if not lines:
        return [] if "not measured yet" in results.lower() else ["no table"]
    heads, *body = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    at = {name: heads.index(name) if name in heads else -1 for name in ("commit", "hardware")}
    return [
        " | ".join(row)
        for row in body[1:]
        if len(row) != len(heads)
        or -1 in at.values()
        or not re.fullmatch(r"[0-9a-f]{7,40}", row[at["commit"]])
        or not re.search(r"\w", row[at["hardware"]])
    ]


def test_nothing_is_claimed_that_was_not_measured():
    for mark in ("results", "speed"):
        (table,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, re.S)
        assert not unfounded(table)


@pytest.mark.parametrize(
    ("row", "founded"),
    [
        ("| 81.0 | `0123abc` | 2 cores |", True),
        ("| 81.0 | 0123abc | H200 |", True),
        ("| 81.0 | main | 2 cores |", False),
        ("| 81.0 | 0123ab | 2 cores |", False),
        ("| 81.0 | 0123abc | |", False),
        ("| 81.0 | 0123abc |", False),
    ],
)
def test_a_result_names_commit_and_hardware(row, founded):
    assert unfounded("Not measured yet.\n") == []
    assert unfounded("81 %\n") == ["no table"]
    assert bool(unfounded(f"| linear % | commit | hardware |\n|---|---|---|\n{row}\n")) is not founded
    assert unfounded("| linear % | commit |\n|---|---|\n| 81.0 | 0123abc |\n")


def example_method(tmp_path):
    """The method that CONTRIBUTING shows, imported from its text."""
    (block,) = re.findall(r"```python\n(# sslpre/methods/(\w+)\.py\n.*?)```", CONTRIBUTING, re.S)
    path = tmp_path / f"{block[1]}.py"
    path.write_text(block[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(block[1], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, block[0]


def tiny_setup(batch):
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)

    def build(colour, size):
        return encoder.build("test_resnet", image_size=size or 32, mean=mean.tolist(), std=std.tolist(), colour=colour)

    return Setup(64, None, batch, (32, 32), mean, std, build)


def batch_of(views):
    index = torch.arange(len(views[0]))
    return Batch(views, index, torch.full_like(index, -1), 0.0, seed=0, epoch=0)


def test_the_example_is_a_whole_method_in_42_lines(tmp_path, monkeypatch):
    module, source = example_method(tmp_path)
    assert len(source.splitlines()) <= 43  # the first says where the file goes
    assert max(map(len, source.splitlines())) <= 120
    monkeypatch.setattr(methods, "methods", lambda: {"align-uniform": module.AlignUniform})
    plain = {"method": {"name": "align-uniform", "weight": 2}, "views": [{"copies": 2}]}
    assert recipe.parse(plain, "example").method == {"name": "align-uniform", "weight": 2.0, "output": 128}
    with pytest.raises(recipe.SslpreError, match=r"method\.weight = -1"):
        recipe.parse({**plain, "method": {"name": "align-uniform", "weight": -1}}, "example")


def test_the_example_learns(tmp_path):
    module, _ = example_method(tmp_path)
    x = torch.rand(16, 3, 32, 32)
    batch = batch_of([x, (x + 0.1 * torch.rand_like(x)).clamp(0, 1)])
    objective = module.AlignUniform(tiny_setup(16), output=8)
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.05)
    values = []
    for _ in range(5):
        loss = objective.loss(batch)
        optimiser.zero_grad()
        loss.value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
        optimiser.step()
        values.append(loss.value.item())
    assert values[-1] < values[0] - 0.1
    assert objective.loss(batch_of([x, x])).terms["align"].item() == pytest.approx(0, abs=1e-9)


def test_the_examples_numbers(tmp_path):
    """Four points at the corners of a square on the circle: four sides of length √2, two diagonals of length 2."""
    module, _ = example_method(tmp_path)
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = torch.tensor((4 * torch.e**-4 + 2 * torch.e**-8) / 6).log()
    assert module.uniformity(square).item() == pytest.approx(expected.item(), abs=1e-6)


def test_recipes_name_commands_that_exist():
    for name in shipped():
        for flags in re.findall(r"For .*?: (--.*)", text(name)):
            parse(f"sslpre pretrain {name} {flags.rstrip('.')}")
