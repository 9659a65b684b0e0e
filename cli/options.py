"""The options of `etpo train`, made from the fields of the configuration; as a module, docs/options.md."""

from collections.abc import Callable
from typing import Any

import click

from etpo.engine.config import OPTIONS
from etpo.engine.options import Declared

Command = Callable[..., Any]
KINDS: dict[type, click.ParamType[Any]] = {
    int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL,
}  # fmt: skip


class GroupedOption(click.Option):
    """An option that knows the heading it stands under in the help."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options under their headings; those without one come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is not None:
                groups.setdefault(getattr(parameter, "group", ""), []).append(line)
        groups["Other options"] = groups.pop("", [])
        for group, lines in groups.items():
            with formatter.section(group):
                formatter.write_dl(lines)


def config_options(command: Command) -> Command:
    """Decorates a command with one option for each field of `Config`, in its order."""
    for one in reversed(OPTIONS.values()):
        command = click.option(
            _declaration(one), one.name, cls=GroupedOption, group=one.option.group, type=_click_type(one),
            default=one.default, help=_help(one),
        )(command)  # fmt: skip
    return command


def _declaration(one: Declared) -> str:
    return f"{one.flag}/--no-{one.flag.removeprefix('--')}" if one.kind is bool else one.flag


def _click_type(one: Declared) -> click.ParamType[Any]:
    return click.Choice(list(one.choices)) if one.choices else KINDS[one.kind]


def _help(one: Declared) -> str:
    """What the option is for, then in brackets its unit, bounds and default."""
    default = _default(one)
    notes = [one.option.unit, one.option.bounds(), f"default: {default}" if default else ""]
    inside = "; ".join(note for note in notes if note)
    return f"{one.option.help}  [{inside}]" if inside else one.option.help


def _default(one: Declared) -> str:
    """The default in words; empty where an option that is not given decides nothing."""
    if one.default is None:
        return one.option.unset
    return one.flag.removeprefix("--") if one.kind is bool else f"{one.default}"


def page() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Every option of `etpo train`. In a file for `--config`, and in Python's `etpo.Config`, it has the",
        "same name, with `_` for `-` and without the dashes in front. A flag goes before `--config`,",
        "`--config` before `--preset`, and `--preset` before the default.",
        "",
        "This page is written by `make docs/options.md`, from engine/config.py.",
    ]
    group = ""
    for one in OPTIONS.values():
        if one.option.group != group:
            group = one.option.group
            head = "| option | default | values | unit | |"
            lines += ["", f"## {group}", "", head, "|---|---|---|---|---|"]
        values = ", ".join(f"`{word}`" for word in one.choices) or one.option.bounds() or one.kind.__name__
        cells = [f"`{_declaration(one)}`", _default(one) or "–", values, one.option.unit, one.option.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    click.echo(page(), nl=False)
