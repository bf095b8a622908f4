"""The command line: one file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from sslpre import __version__, signals
from sslpre.cli import (
    bench,
    check,
    embed,
    export,
    hearers,
    import_,
    near,
    pack,
    pretrain,
    preview,
    probe,
    processes,
    recipes,
    replay,
    report,
)
from sslpre.cli.mistakes import UsageError, first_plain, in_our_words, interrupted, surprise
from sslpre.cli.words import Command, Group
from sslpre.errors import SslpreError

PIPE = 13  # SIGPIPE, which some systems have not

verbs = (
    pretrain.pretrain,
    probe.probe,
    export.export,
    embed.embed,
    near.near,
    import_.import_,
    pack.pack,
    preview.preview,
    report.report,
    replay.replay,
    bench.bench,
    check.check,
    recipes.recipes,
)


def program(words: Sequence[str] | None = None) -> Any:
    """The program, whole or for these words: of verbs that are not among them only what they are for is known, because
    reading what all of them take is half the time until help comes."""
    app = typer.Typer(
        cls=Group,
        add_completion=False,
        rich_markup_mode=None,  # plain help: half the start-up time, one screen, nothing to switch off for NO_COLOR
        pretty_exceptions_enable=False,
    )
    app.callback()(sslpre)
    for verb in verbs:
        name = verb.__name__.removesuffix("_")  # `import` is a word of Python's own
        app.command(name, cls=Command)(verb if words is None or name in words else outline(verb))
    return typer.main.get_command(app)


def outline(verb: Callable[..., None]) -> Callable[[], None]:
    """A verb that takes nothing, for the list in help."""

    def nothing() -> None:
        raise RuntimeError(f"{verb.__name__} was not built")

    nothing.__doc__ = verb.__doc__
    return nothing


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"sslpre {__version__}")
        raise typer.Exit()


def sslpre(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,  # an error without a hint names it
) -> None:
    """Pretrain an image encoder without labels, and see how good it is.

    \b
      sslpre pretrain simclr ./images      any folder of images
      sslpre probe --linear                is the newest run any good?
      sslpre export encoder.safetensors    loads in timm
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program `sslpre`. Ends in SystemExit, with the codes that SslpreError lists, or 1 for a mistake of ours."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(words: list[str]) -> int:
    """Run one command line and return its exit code; an error is one `error:` and one `hint:` line on stderr."""
    with hearers.minded(), signals.tidy() as met:
        ending = understood(words, met)
    processes.end(ending)
    return ending


def understood(words: list[str], met: list[int]) -> int:
    """The same, with signals looked after: `met` has those that came."""
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for i, word in enumerate(words) if word != "--debug" or i > end]
    command = program(words)
    cause: BaseException
    try:
        code = command.main(words or ["--help"], prog_name="sslpre", standalone_mode=False)
        sys.stdout.flush()
        if code == 130 or met:
            raise KeyboardInterrupt  # Typer makes an exit code of it
        return int(code or 0)
    except UsageError as error:
        told, cause = in_our_words(error, words, command), error
    except SslpreError as error:
        told, cause = error, error
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # else Typer has caught it
        hearers.give_up(sys.stdout)  # the reader went away (`| head`); nobody is left to tell
        return signals.code(PIPE)
    except (KeyboardInterrupt, typer.Abort) as error:
        told, cause = interrupted(first_plain(words), met[0] if met else signal.SIGINT), error
    except Exception as error:
        told, cause = surprise(error, first_plain(words)), error
        if isinstance(error, OSError) and error.filename is None:  # it may be stdout that cannot be written: give it up
            hearers.give_up(sys.stdout)
    if debug:
        import traceback

        traceback.print_exception(cause)
    told.everywhere = getattr(cause, "everywhere", False) or told.code > 128  # a terminal's Ctrl-C goes to all
    return processes.in_turn(told, tell)


def tell(told: SslpreError) -> None:
    print(f"error: {told.message}", file=sys.stderr)
    print(f"hint: {told.hint or 'add --debug to see where it happened'}", file=sys.stderr)
