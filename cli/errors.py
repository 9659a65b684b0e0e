"""Errors as people see them: one line (what was expected, what came, what to do), and an exit code.

0 done, 1 failed (absent or unreadable data, model or folder), 2 wrong use (an option or a name), 130
interrupted.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from etpo import EtpoError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Failed(click.ClickException):
    """A failure with its one line. Exit code 1."""

    exit_code = FAILED


def new_folder(out: Path) -> None:
    """Make the folder of `--out`: one that holds files is wrong use, one that cannot be made a failure."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        got = "one with files in it" if out.is_dir() else "a file"
        raise click.UsageError(f"--out {out}: expected a new or empty folder, got {got}; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(
            f"--out {out}: expected a folder that can be written, got: {error.strerror}; choose another"
        ) from error


def write_file(option: str, file: Path, text: str) -> None:
    """Write what an option asks for; a file that cannot be written is a failure in one line."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Failed(
            f"{option} {file}: expected a file that can be written, got: {error.strerror}; choose another"
        ) from error


class Group(click.Group):
    """A click group whose every error is one line, and whose exit codes are those of this module."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and leave the process with its exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        if not sys.platform.startswith("linux"):
            _leave(f"etpo runs on Linux only, this is {sys.platform}; use a Linux machine or WSL 2", FAILED)
        self.debug = False
        try:
            result = super().main(args, prog_name, complete_var, False, **extra)
        except (click.Abort, KeyboardInterrupt):
            _leave("interrupted", INTERRUPTED)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(USAGE)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(FAILED)
            if self.debug:
                traceback.print_exc()
            _leave(message_of(error), exit_code_of(error))
        sys.exit(result if isinstance(result, int) else DONE)

    def invoke(self, ctx: click.Context) -> Any:
        self.debug = bool(ctx.params.get("debug"))
        return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from etpo.engine.options import nearest

        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            raise click.UsageError(
                f"expected a command ({', '.join(known)}), got '{name}'{nearest(name, known)}"
            )
        return super().resolve_command(ctx, args)


def exit_code_of(error: BaseException) -> int:
    """The exit code that an exception ends a command with: its own, or by its kind."""
    if isinstance(error, click.ClickException | EtpoError):
        return error.exit_code
    return USAGE if isinstance(error, ValueError) else FAILED


def message_of(error: BaseException) -> str:
    """One line for an exception. One that nobody foresaw is named by its kind, and says how to see more."""
    if isinstance(error, click.UsageError):
        where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        return _one_line(error.format_message()).rstrip(".") + where
    if isinstance(error, click.ClickException):
        return _one_line(error.format_message())
    if isinstance(error, OSError) and error.errno is not None:
        what = f"{error.filename}: " if error.filename else ""
        return _one_line(f"{what}{error.strerror}")
    if isinstance(error, EtpoError | ValueError | OSError) and str(error):
        return _one_line(str(error))
    return _one_line(f"unexpected {type(error).__name__}: {error}") + "; `etpo --debug …` shows where"


def _nobody_reads() -> bool:
    """True where standard output is a pipe that nobody reads any more; what is left for it is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _leave(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}" if code != INTERRUPTED else message, err=True)
    sys.exit(code)
