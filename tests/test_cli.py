"""What a user types and reads: help, usage errors, what goes to which stream, and how fast the first word comes."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sslpre import __version__
from sslpre.cli import verbs
from sslpre.cli.pretrain import look
from sslpre.cli.words import number, one_of, whole
from sslpre.errors import SslpreError
from sslpre.shelf import names

VERBS = ("pretrain probe export embed near import pack bench check preview report replay recipes").split()
NEAR = "sslpre pretrain simclr ./images"


def told(done, code=2):
    """The two lines of an error: what is wrong, and what to type."""
    lines = done.err.splitlines()
    assert done.code == code, done.err
    assert done.out == ""
    assert len(lines) == 2, done.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


def test_help(run_cli):
    done = run_cli("--help")
    assert done.code == 0
    assert done.err == ""
    assert run_cli() == done, "no word at all is a call for help"
    for verb in VERBS:
        assert f"\n  {verb} " in done.out
    assert "..." not in done.out.partition("Commands:")[2], "a summary is cut short"


@pytest.mark.parametrize(
    ("verb", "most"),
    [("", 26), *((verb, {"pretrain": 30, "probe": 30, "bench": 26}.get(verb, 24)) for verb in VERBS)],
)
def test_help_fits_one_screen_and_shows_an_example(run_cli, verb, most):
    done = run_cli(*filter(None, [verb]), "--help")
    lines = done.out.splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 80
    assert f"  sslpre {verb}" in done.out
    assert not {"│", "╭", "\x1b"} & set(done.out), "Typer's panels"


def test_help_names_every_flag_of_pretrain(run_cli):
    text = run_cli("pretrain", "--help").out
    flags = "set backbone init image-size epochs batch-size lr seed precision compile max-bad out resume device"
    for flag in [*flags.split(), "workers", "json"]:
        assert f"  --{flag} " in text
    assert "auto|cpu|cuda|mps" in text
    assert "auto|bf16|fp32" in text


def test_version(run_cli):
    assert run_cli("--version").out == f"sslpre {__version__}\n"


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("pretain simclr", "no command `pretain`", "did you mean sslpre pretrain?"),
        ("xyzzy", "no command `xyzzy`", "sslpre --help"),
        ("simclr ./images", "no command `simclr`", "sslpre pretrain simclr ./images"),
        ("--vresion", "no option `--vresion` in `sslpre`", "did you mean --version?"),
        ("pretrain", "RECIPE is missing", NEAR),
        ("pretrain simclrr", "no recipe `simclrr`", NEAR),
        ("pretrain simclr-imagnet", "no recipe `simclr-imagnet`", "sslpre pretrain simclr-imagenet ./images"),
        (
            "pretrain missing.toml",
            "no recipe file `missing.toml`",
            "sslpre recipes lists the recipes that are built in",
        ),
        ("pretrain simclr a b", "too many words for `sslpre pretrain`: `b`", "sslpre pretrain --help"),
        ("pretrain simclr --batchsize 3", "no option `--batchsize` in `sslpre pretrain`", "did you mean --batch-size?"),
        ("pretrain simclr --batchsize=3", "no option `--batchsize` in `sslpre pretrain`", "did you mean --batch-size?"),
        ("pretrain simclr -epochs 3", "no option `-epochs` in `sslpre pretrain`", "did you mean --epochs?"),
        ("pretrain simclr --zzz", "no option `--zzz` in `sslpre pretrain`", "sslpre pretrain --help"),
        ("pretrain simclr --epochs", "`--epochs` needs a value", "sslpre pretrain --help shows what it takes"),
        ("pretrain simclr --json=1", "`--json` takes no value", "write --json alone"),
        (
            "pretrain simclr --epochs x",
            "`--epochs x` is not a whole number from 1 on",
            "write --epochs 20, or --epochs auto",
        ),
        (
            "pretrain simclr --epochs 0",
            "`--epochs 0` is not a whole number from 1 on",
            "write --epochs 20, or --epochs auto",
        ),
        (
            "pretrain simclr --epochs 1.5",
            "`--epochs 1.5` is not a whole number from 1 on",
            "write --epochs 20, or --epochs auto",
        ),
        ("pretrain simclr --seed auto", "`--seed auto` is not a whole number from 0 on", "write --seed 0"),
        (
            "pretrain simclr --seed 99999999999",
            "`--seed 99999999999` is not a whole number from 0 to 2147483647",
            "write --seed 0",
        ),
        ("pretrain simclr --workers -1", "`--workers -1` is not a whole number from 0 on", "write --workers 4"),
        ("pretrain simclr --lr 0", "`--lr 0` is not a number above 0", "write --lr 0.1, or --lr auto"),
        ("pretrain simclr --lr nan", "`--lr nan` is not a number above 0", "write --lr 0.1, or --lr auto"),
        ("pretrain simclr --max-bad 3", "`--max-bad 3` is not a number between 0 and 1", "write --max-bad 0.01"),
        (
            "pretrain simclr --device gpu",
            "`--device gpu` is not one of auto, cpu, cuda, mps",
            "did you mean --device cpu?",
        ),
        (
            "pretrain simclr --precision fp16",
            "`--precision fp16` is not one of auto, bf16, fp32",
            "did you mean --precision bf16?",
        ),
        (
            "pretrain simclr --set a",
            "cannot read `--set a`",
            "write it as --set table.key=value, e.g. --set method.temperature=0.2",
        ),
        (
            "pretrain simclr ./images --resume last --epochs 3 --set a.b=1",
            "`--resume last` goes on with a run as it was begun, so `RECIPE`, `IMAGES`, `--set`, `--epochs` "
            "cannot be given",
            "sslpre pretrain --resume last",
        ),
        (
            "pretrain --resume simclr-1 --backbone resnet18 --image-size 64 --batch-size 8 --lr 1 --seed 1 "
            "--precision fp32 --compile --out x",
            "`--resume simclr-1` goes on with a run as it was begun, so `--out`, `--backbone`, `--image-size`, "
            "`--batch-size`, `--lr`, `--seed`, `--precision`, `--compile` cannot be given",
            "sslpre pretrain --resume simclr-1",
        ),
        ("pretrain --resume last", "no run in `runs/`", NEAR),
        ("pretrain --resume last --max-bad 0.1", "no run in `runs/`", NEAR),
        ("pretrain --resume simclr-7", "no run `simclr-7`", NEAR),
        ("probe", "no run in `runs/`", NEAR),
        ("probe simclr-7 --linear", "no run `simclr-7`", NEAR),
        ("probe m.safetensors", "there is no file `m.safetensors`", "sslpre export encoder.safetensors writes one"),
        ("probe model.pth", "there is no file `model.pth`", "sslpre export encoder.safetensors writes one"),
        ("probe --max-bad 3", "`--max-bad 3` is not a number between 0 and 1", "write --max-bad 0.01"),
        ("probe --lineer", "no option `--lineer` in `sslpre probe`", "did you mean --linear?"),
        ("probe --device tpu", "`--device tpu` is not one of auto, cpu, cuda, mps", "did you mean --device cpu?"),
        ("export", "OUT is missing", "sslpre export --help shows an example"),
        ("export encoder.safetensors", "no run in `runs/`", NEAR),
        ("export encoder.safetensors --run simclr-7", "no run `simclr-7`", NEAR),
        ("export a b", "too many words for `sslpre export`: `b`", "sslpre export --help"),
        ("recipes simclrr", "no recipe `simclrr`", "did you mean sslpre recipes simclr?"),
        ("recipes zzz", "no recipe `zzz`", "sslpre recipes"),
        ("pretrain simclr --init", "`--init` needs a value", "sslpre pretrain --help shows what it takes"),
        (
            "pretrain simclr --init pretraned",
            "`--init pretraned`: there is no such file or run",
            "did you mean --init pretrained?",
        ),
        (
            "pretrain simclr --init x.pth",
            "`--init x.pth`: there is no such file or run",
            "write --init pretrained, or --init PATH of a run, an export or a .safetensors file",
        ),
        (
            "pretrain --resume last --init pretrained",
            "`--resume last` goes on with a run as it was begun, so `--init` cannot be given",
            "sslpre pretrain --resume last",
        ),
        ("import", "OLD is missing", "sslpre import --help shows an example"),
        (
            "import a/old.pth.tar",
            "`-o` is missing: the file to write",
            "sslpre import a/old.pth.tar -o old.safetensors",
        ),
        ("import old.pth -o new.safetensors", "there is no file `old.pth`", "name the file to import"),
        (
            "import old.pth new.safetensors",
            "`sslpre import` takes one word, and the file to write after -o",
            "sslpre import old.pth -o new.safetensors",
        ),
        ("recipes simclr more", "too many words for `sslpre recipes`: `more`", "sslpre recipes --help"),
    ],
)
def test_usage_errors(run_cli, words, error, hint, tmp_path):
    assert told(run_cli(*words.split())) == (error, hint)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_the_folder_in_the_recipes_place(run_cli, photos):
    assert told(run_cli("pretrain", photos)) == (
        f"`{photos}` is a folder, and RECIPE comes first",
        f"sslpre pretrain simclr {photos}",
    )


def test_hints_can_be_pasted(run_cli, tmp_path):
    (tmp_path / "my photos").mkdir()
    assert told(run_cli("pretrain", "my photos"))[1] == "sslpre pretrain simclr 'my photos'"
    assert told(run_cli("simclr", "my photos"))[1] == "sslpre pretrain simclr 'my photos'"
    assert told(run_cli("pretrain", "--resume", "my run", "--lr", "1"))[1] == "sslpre pretrain --resume 'my run'"
    (tmp_path / "e $x.safetensors").write_bytes(b"")
    assert told(run_cli("probe", "e $x.safetensors"))[1] == "sslpre probe 'e $x.safetensors' --data ./labelled"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["pretrain", ""], "RECIPE"),
        (["pretrain", "simclr", ""], "IMAGES"),
        (["pretrain", "simclr", "--out", ""], "--out"),
        (["pretrain", "--resume", ""], "--resume"),
        (["probe", ""], "RUN"),
        (["probe", "--data", ""], "--data"),
        (["pretrain", "simclr", "--init", ""], "--init"),
        (["export", ""], "OUT"),
        (["import", ""], "OLD"),
        (["import", "x.pth", "-o", ""], "-o"),
        (["export", "e.safetensors", "--run", ""], "--run"),
    ],
)
def test_an_unset_variable_is_not_the_current_folder(run_cli, words, name):
    assert told(run_cli(*words))[0] == f"{name} is an empty word"


def test_output_that_exists_is_left_alone(run_cli, tmp_path):
    for name in ("encoder.safetensors", "enc"):
        path = tmp_path / name
        path.mkdir() if name == "enc" else path.write_text("mine")
        assert told(run_cli("export", name)) == (
            f"`{name}` exists",
            "name another OUT, or remove it first",
        )
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    assert told(run_cli("export", "link.safetensors"))[0] == "`link.safetensors` exists"
    assert (tmp_path / "encoder.safetensors").read_text() == "mine"


def test_an_encoder_file_needs_data(run_cli, tmp_path):
    (tmp_path / "e.safetensors").write_bytes(b"")
    (tmp_path / "enc").mkdir()
    (tmp_path / "enc" / "config.json").write_text("{}")
    for name in ("e.safetensors", "enc"):
        assert told(run_cli("probe", name, "--linear")) == (
            f"`{name}` does not say which images to probe with",
            f"sslpre probe {name} --data ./labelled",
        )


def test_file_names_cannot_speak_to_the_terminal(run_cli):
    error, _ = told(run_cli("pretrain", "sim\x1b[31mclr\nerror: x"))
    assert error == "no recipe `sim\\x1b[31mclr\\nerror: x`"
    error, _ = told(run_cli("recipes", "sim\udcffclr"))
    assert error == "no recipe `sim\\udcffclr`"


def test_recipes(run_cli):
    done = run_cli("recipes")
    assert done.code == 0
    assert done.err == ""
    assert [line.split()[0] for line in done.out.splitlines()] == sorted(names())
    assert "simclr" in names()
    assert max(map(len, done.out.splitlines())) < 120
    one = run_cli("recipes", "simclr").out
    assert one.startswith("# SimCLR on any folder")
    assert '[method]\nname = "simclr"\n' in one


def broken(monkeypatch, error):
    """Make `sslpre recipes` raise `error`."""

    def boom():
        raise error

    monkeypatch.setattr("sslpre.cli.recipes.names", boom)


def test_a_mistake_of_ours_is_told_as_one(run_cli, monkeypatch):
    broken(monkeypatch, ValueError("two\nlines"))
    error, hint = told(run_cli("recipes"), code=1)
    assert error == "internal: ValueError: two\\nlines"
    assert "--debug" in hint


@pytest.mark.parametrize("words", [["--debug", "recipes"], ["recipes", "--debug"]])
def test_debug_shows_where(run_cli, monkeypatch, words):
    broken(monkeypatch, ValueError("deep inside"))
    done = run_cli(*words)
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert "in boom" in done.err
    assert done.err.splitlines()[-2] == "error: internal: ValueError: deep inside"


def test_debug_of_a_users_error(run_cli):
    done = run_cli("pretrain", "simclrr", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-2:] == ["error: no recipe `simclrr`", f"hint: {NEAR}"]


@pytest.mark.parametrize("verb", ["pretrain", "probe", "export"])
def test_ctrl_c(run_cli, monkeypatch, verb):
    def stop(*arguments):
        raise KeyboardInterrupt

    for where in ("pretrain.look", "probe.locate", "export.find_run"):
        monkeypatch.setattr(f"sslpre.cli.{where}", stop)
    error, hint = told(run_cli(verb, "simclr"), code=130)
    assert error == "interrupted"
    assert hint.endswith("type it again") and ("run" in hint) == (verb == "pretrain")


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (OSError(28, "No space left on device", "runs/a b"), "no space left on device: `runs/a b`", "free some space"),
        (OSError(122, "Disk quota exceeded"), "disk quota exceeded", "free some space"),
        (PermissionError(13, "Permission denied", b"r\xff"), "permission denied: `r\\udcff`", "permissions"),
        (MemoryError(), "out of memory", "free some memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
            "free some memory",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\n"), "out of memory", "free some memory"),
    ],
)
def test_what_the_machine_lacks_is_no_mistake_of_ours(run_cli, monkeypatch, error, message, hint):
    broken(monkeypatch, error)
    monkeypatch.setattr("sslpre.cli.hearers.give_up", lambda stream: None)  # stdout is pytest's
    code = 12 if message == "out of memory" else 13 if "free" in hint else 3
    told_error, told_hint = told(run_cli("recipes"), code=code)
    assert told_error == message
    assert hint in told_hint


def test_out_of_memory_while_pretraining_asks_for_a_smaller_batch(run_cli, monkeypatch):
    def full(*arguments):
        raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")

    monkeypatch.setattr("sslpre.cli.pretrain.look", full)
    _, hint = told(run_cli("pretrain", "simclr"), code=12)
    assert "--batch-size" in hint
    assert "--set train.micro_batch=" in hint


def test_an_error_of_a_library_is_not_called_the_machines(run_cli, monkeypatch):
    broken(monkeypatch, OSError("a library says something"))
    monkeypatch.setattr("sslpre.cli.hearers.give_up", lambda stream: None)
    assert told(run_cli("recipes"), code=1)[0] == "internal: OSError: a library says something"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout(child, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sslpre", "recipes", "simclr"]
        done = subprocess.run(command, cwd=tmp_path, env=child, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 13
    assert done.stderr.splitlines() == [
        "error: no space left on device",
        "hint: free some space there, or write to another disk",
    ]


def test_an_error_without_a_hint_still_has_two_lines(run_cli, monkeypatch):
    broken(monkeypatch, SslpreError("checkpoint `x` is damaged", code=5))
    assert told(run_cli("recipes"), code=5) == ("checkpoint `x` is damaged", "add --debug to see where it happened")


def test_a_reader_that_goes_away(child, tmp_path):
    """`sslpre recipes simclr | head -1`: no traceback, not even from the interpreter's last flush."""
    command = [sys.executable, "-m", "sslpre", "recipes", "simclr"]
    process = subprocess.Popen(command, cwd=tmp_path, env=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_names_that_are_not_the_terminals_encoding(run_process):
    done = run_process("recipes", "é\u20ac", PYTHONIOENCODING="ascii")
    assert done.code == 2
    assert done.err == "error: no recipe `\\xe9\\u20ac`\nhint: sslpre recipes\n"


def test_words():
    assert whole("--epochs", "007", 20) == 7
    assert whole("--epochs", "auto", 20, auto=True) == "auto"
    assert number("--lr", "1e-3", 0.1) == 0.001
    assert number("--max-bad", "0", 0.01, most=1) == 0
    assert whole("--epochs", None, 20) is number("--lr", None, 1) is None
    assert one_of("--device", "cpu", ("auto", "cpu")) == "cpu"
    for bad in ("", "-1", "٣", "1e3", "99999999999"):
        with pytest.raises(SslpreError):
            whole("--epochs", bad, 20)


def test_every_command_has_a_runnable_example():
    commands = {verb.__name__.removesuffix("_"): verb for verb in verbs}
    assert set(commands) == set(VERBS)
    for name, callback in commands.items():
        assert f"sslpre {name}" in callback.__doc__


def test_a_pickle_is_not_started_from(run_cli, tmp_path):
    (tmp_path / "my net.pth.tar").write_bytes(b"")
    assert told(run_cli("pretrain", "simclr", "--init", "my net.pth.tar"), code=5) == (
        "`--init my net.pth.tar` is not opened as it is: such files can run any code",
        "sslpre import 'my net.pth.tar' -o 'my net.safetensors'",
    )


def test_a_start_is_kept_under_its_whole_path(run_cli, tmp_path, monkeypatch):
    """So that the run's recipe finds it from anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.safetensors").write_bytes(b"")
    (tmp_path / "runs" / "simclr-1").mkdir(parents=True)
    (tmp_path / "runs" / "simclr-1" / "recipe.toml").write_text("")
    for word, kept in {
        "e.safetensors": tmp_path / "e.safetensors",
        "simclr-1": tmp_path / "runs" / "simclr-1",
        "last": tmp_path / "runs" / "simclr-1",
        "pretrained": "pretrained",
        "timm:resnet18.a1_in1k": "timm:resnet18.a1_in1k",
    }.items():
        keys = {"encoder.init": word}
        look({"RECIPE": "simclr", "IMAGES": None, "--set": None}, keys, None)
        assert keys == {"encoder.init": str(kept)}


BARE = """
import typer
app = typer.Typer(rich_markup_mode=None, add_completion=False)
@app.command()
def pretrain(name: str = "x"):
    print(name)
@app.command()
def recipes():
    print("x")
app()
"""


def seconds(words, **options):
    """Processor time of a child process: unlike the clock, it does not count what else the machine is doing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, check=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_first_word_comes_as_fast_as_from_a_bare_typer_app(child, tmp_path):
    """Help and recipes within 1.5 times of a Typer app that does nothing, with plain help too, measured in turns."""
    (tmp_path / "bare.py").write_text(BARE)
    commands = {
        "bare help": ["bare.py", "--help"],
        "help": ["-m", "sslpre", "--help"],
        "bare list": ["bare.py", "recipes"],
        "list": ["-m", "sslpre", "recipes"],
        "one": ["-m", "sslpre", "recipes", "simclr"],
    }
    turns = [{name: seconds(words, cwd=tmp_path, env=child) for name, words in commands.items()} for _ in range(9)]
    least = {name: round(min(turn[name] for turn in turns), 3) for name in commands}
    print(least)
    assert least["help"] < 1.5 * least["bare help"], least
    assert least["list"] < 1.5 * least["bare list"], least
    assert least["one"] < 1.5 * least["bare list"], least
