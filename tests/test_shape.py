"""The shape of the house: sizes, which room may know which, and what is never written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[1] / "sslpre"
FILES = sorted(ROOM.rglob("*.py"))
MODULES = {
    ".".join(("sslpre", *path.relative_to(ROOM).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
HEAVY = ("torch", "torchvision", "timm", "kornia", "numpy", "pydantic", "PIL", "safetensors", "sklearn")

# room → rooms that it must not import, at any depth of its functions
WALLS = {
    "methods": ("train", "recipe", "data", "cli", "probe", "export"),
    "views": ("train", "recipe", "data", "cli", "probe", "export", "methods", "objective", "encoder"),
    "data": ("train", "recipe", "cli", "probe", "export", "methods", "objective", "encoder", "views"),
    "probe": ("train", "recipe", "cli", "methods", "objective"),
    "train": ("cli", "report"),
    "export": ("cli", "train", "probe", "methods", "recipe"),
    "encoder": ("train", "recipe", "data", "cli", "probe", "export", "methods", "objective", "views"),
    "heads": ("train", "recipe", "data", "cli", "probe", "export", "methods", "objective", "views"),
    "objective": ("train", "recipe", "data", "cli", "probe", "export", "methods"),
    "timm": ("train", "recipe", "data", "cli", "probe", "export", "methods", "objective", "views", "encoder"),
    "recipe": ("train", "data", "cli", "probe", "export"),
    "shelf": ("train", "recipe", "data", "cli", "probe", "export", "methods"),
    "plugins": ("train", "recipe", "data", "cli", "probe", "export", "methods"),
    "contract": ("cli", "probe", "export"),
    "bench": ("cli", "probe", "export", "methods", "contract", "check"),
    "check": ("cli", "probe", "export", "methods", "contract", "preview"),
    "report": ("cli", "export", "bench", "contract", "embed", "foreign"),
    "preview": ("cli", "probe", "export", "bench", "contract"),
    "ops": ("train", "recipe", "data", "cli", "probe", "export", "methods", "objective", "encoder", "views"),
    "errors": ("train", "recipe", "data", "cli", "probe", "export", "methods"),
    "embed": ("train", "recipe", "cli", "methods", "objective", "views"),
    "foreign": ("train", "recipe", "data", "cli", "probe", "methods", "objective", "views"),
    "start": ("recipe", "data", "cli", "probe", "methods", "objective", "views"),  # of train only what opens a run
    "weights": ("recipe", "data", "cli", "probe", "export", "methods", "objective", "views", "encoder", "start"),
    "signals": ("train", "recipe", "data", "probe", "export", "methods"),
    "synced": ("train", "recipe", "data", "cli", "probe", "export", "methods"),
}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(tree: ast.Module, *, whole_file: bool) -> set[str]:
    """Names of imported modules; only those at the top level, or all but the ones under TYPE_CHECKING."""
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif whole_file or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines < (250 if module == "sslpre.train.loop" else 400), f"{module} has {lines} lines"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 60, f"{module}.{node.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    inside = {room(name) for name in imports(TREES[module], whole_file=True) if name.startswith("sslpre.")}
    assert not inside & set(WALLS.get(room(module), ()))
    if room(module) not in ("cli", "__main__"):
        assert "cli" not in inside
        assert "report" not in inside or room(module) == "report"


def test_every_room_has_its_walls():
    rooms = {room(module) for module in MODULES} - {"", "cli", "__main__"}
    assert rooms <= set(WALLS), "say in WALLS what the new room must not import"


def test_methods_do_not_inherit_from_methods():
    for module, tree in TREES.items():
        if room(module) == "methods":
            bases = [
                ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases
            ]
            assert set(bases) <= {"Objective", "nn.Module", "torch.autograd.Function"}, module


def test_the_loop_names_no_method():
    from sslpre.methods import methods

    code = MODULES["sslpre.train.loop"].read_text(encoding="utf-8").lower()
    assert not [name for name in methods() if re.search(rf"\b{re.escape(name)}\b", code)]
    assert "sslpre.methods" not in imports(TREES["sslpre.train.loop"], whole_file=True)


@pytest.mark.parametrize("module", MODULES)
def test_names(module):
    assert not set(module.split(".")) & {"utils", "util", "common", "helpers", "helper", "misc", "core", "base"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"^Base|Manager$|Helper$|Mixin$|Util", node.name), node.name


@pytest.mark.parametrize("module", MODULES)
def test_what_is_never_written(module):
    code = MODULES[module].read_text(encoding="utf-8")
    for word in (
        "weights_only=False",
        "torch.hub",
        "trust_remote_code",
        "TODO",
        "FIXME",
        "LOAD_TRUNCATED_IMAGES = True",
    ):
        assert word not in code
    assert not {"pickle", "dill", "joblib"} & {
        name.partition(".")[0] for name in imports(TREES[module], whole_file=True)
    }
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and module == "sslpre.foreign" and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)  # the one place that reads other programs' files
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
            assert "allow_pickle=False" in ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec"):
            pytest.fail(f"{module} line {node.lineno} calls {ast.unparse(node.func)}")
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "a bare except"
            swallowed = [s for s in node.body if not isinstance(s, ast.Pass)]
            assert swallowed or ast.unparse(node.type) not in ("Exception", "BaseException"), "a swallowed exception"


def test_the_command_line_imports_nothing_heavy_by_itself():
    """At module level; what this finds by reading, the next test finds by running."""
    todo, seen = ["sslpre.cli"] + [module for module in MODULES if room(module) == "cli"], set()
    while todo:
        module = todo.pop()
        if module in seen or module not in TREES:
            continue
        seen.add(module)
        names = imports(TREES[module], whole_file=False)
        assert not {name.partition(".")[0] for name in names} & set(HEAVY), module
        todo += [name for name in names if name.startswith("sslpre")]
        todo += [module.rpartition(".")[0]]
    assert "sslpre.errors" in seen


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["recipes"], ["recipes", "simclr"], ["pretrain", "--help"]]
)
def test_nothing_heavy_is_imported_when_it_runs(words, tmp_path, child):
    script = (
        "import sys\nfrom sslpre.cli import run\n"
        f"code = run({words!r})\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=child, capture_output=True, text=True)
    assert done.stderr.strip() == "[] 0"
