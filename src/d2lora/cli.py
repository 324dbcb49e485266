"""The command line: a thin layer over the functions of the same names.

Nothing heavy is imported before a command is known, so `d2lora --help` answers in a blink.
"""

import errno
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from d2lora.commands import COMMANDS
from d2lora.errors import (
    D2LoraError,
    SettingsError,
    did_you_mean,
    disk_errors,
    disk_fault,
    printable,
)
from d2lora.runtime.signals import TerminatedError, raised

if TYPE_CHECKING:
    from d2lora.settings import Settings

INTERRUPTED = 129
"""From this exit code on a signal ended the command: 128 and its number."""
_OF_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
"""What a system says of a name that no file can have."""
_SHOWN = 400
HELP = """usage: d2lora COMMAND [SETTINGS.yaml] [--setting value ...]

Data-driven LoRA initialization for scarce tasks: warm an adapter up once on
general data, then start every scarce task from it.

commands:
{commands}

Settings come from a YAML file, from options, or both; options win.
`d2lora COMMAND --help` lists the settings of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    0: done; 2: a mistake of the user's; 71: not enough memory; 74: a disk that is full or fails;
    130: interrupted; 129 and 143: ended by SIGHUP and SIGTERM; 141: the output's reader is gone.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"d2lora {version('d2lora')}\n")
        return 0
    return _exit_code(words)


def _exit_code(words: list[str]) -> int:
    """Run a command; say on stderr what went wrong, if anything."""
    try:
        _check_text(words)
        with raised():
            _run(words[0], words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `d2lora ... | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except D2LoraError as error:
        sys.stderr.write(f"d2lora: {printable(str(error))}\n")
        return 2
    except (KeyboardInterrupt, TerminatedError) as end:
        asked = isinstance(end, TerminatedError)
        sys.stderr.write(f"d2lora: ended by {end}\n" if asked else "d2lora: interrupted\n")
        return end.code if asked else 130
    except (*disk_errors(), MemoryError, RuntimeError) as error:
        code, reason = _of_machine(error)
        if not code:
            raise
        sys.stderr.write(f"d2lora: {printable(reason)}\n")
        return code
    return 0


def _of_machine(error: Exception) -> tuple[int, str]:
    """Return the exit code of what the machine did not do, and why; 0 for other errors."""
    if getattr(error, "errno", None) in _OF_NAMES:
        return 2, str(error)[:_SHOWN]
    if fault := disk_fault(error):
        return 74, fault
    if isinstance(error, MemoryError | RuntimeError):
        from d2lora.runtime.attempts import is_out_of_memory

        if is_out_of_memory(error):
            return 71, (
                "there is not enough memory. Nothing that was finished is lost: give smaller "
                "batches, shorter rows, fewer --workers, --quantization nf4 or another --device"
            )
    return 0, ""


def help_text() -> str:
    """Return the help of the program."""
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return HELP.format(commands="\n".join(lines))


def _run(name: str, words: list[str]) -> None:
    from d2lora.runtime.console import quiet_libraries
    from d2lora.runtime.loading import loading

    if name not in COMMANDS:
        raise SettingsError(
            f"unknown command `{name}`.{did_you_mean(name, COMMANDS)} "
            "`d2lora --help` lists the commands"
        )
    chosen = _parse(COMMANDS[name].kind, name, words)
    chosen.check_effect(_on_line(type(chosen), words))
    quiet_libraries()
    with loading():
        run = COMMANDS[name].load()
    run(chosen)


def _on_line(kind: "type[Settings]", words: list[str]) -> set[str]:
    """Return the settings that are given as options, at their defaults or not."""
    options = (word.partition("=")[0] for word in words if word.startswith("-"))
    return {kind.aliases.get(name, name)[2:].replace("-", "_") for name in options}


def _check_text(words: list[str]) -> None:
    """Check that all words can be written to the files that a run leaves.

    Raises:
        SettingsError: With the first that is not UTF-8, such as a file named in Latin-1.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise SettingsError(
                f"{word!a} is not UTF-8 text: rename the file, or put the text into one"
            ) from None


def _parse(kind: "type[Settings]", command: str, words: list[str]) -> "Settings":
    from pathlib import Path

    import tyro

    from d2lora.settings.file import read_settings_file

    given: dict[str, Any] = {}
    words = _spelt_out(kind, words)
    if words and not words[0].startswith("-"):
        given = read_settings_file(kind, Path(words.pop(0)))
    defaults: dict[str, Any] = {
        name: given.get(name, tyro.MISSING if field.is_required() else field.default)
        for name, field in kind.model_fields.items()
    }
    return tyro.cli(
        kind,
        prog=f"d2lora {command} [{_first_word(kind)}]",
        args=words,
        default=kind.model_construct(**defaults),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _spelt_out(kind: "type[Settings]", words: list[str]) -> list[str]:
    """Return the words with short options written out, and words before them as an option."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    alone, options = words[:first], words[first:]
    for place, word in enumerate(options):
        name, equals, value = word.partition("=")
        options[place] = kind.aliases.get(name, name) + equals + value
    _refuse_twice(options)
    named = kind.settings_file and bool(alone) and alone[0].endswith((".yaml", ".yml"))
    if not kind.positional or not alone or named:
        return [*alone, *options]
    if len(kind.positional) == 1:
        return [*options, f"--{kind.positional[0]}", *alone]
    if len(alone) > len(kind.positional):
        raise SettingsError(f"expected {_first_word(kind)}, found {' '.join(alone)}")
    pairs = zip(kind.positional, alone, strict=False)
    return [*options, *(word for name, value in pairs for word in (f"--{name}", value))]


def _refuse_twice(options: list[str]) -> None:
    """Check that no option is repeated, as the parser would keep its last values alone.

    Raises:
        SettingsError: With the option.
    """
    names = [word.partition("=")[0].replace("_", "-") for word in options if word[:2] == "--"]
    for name, n_times in Counter(names).items():
        if n_times > 1:
            raise SettingsError(
                f"{name} is given {n_times} times; give it once, with all its values"
            )


def _first_word(kind: "type[Settings]") -> str:
    """Return what the first word of a command line may be, for its help."""
    words = [" ".join(kind.positional).upper()] if kind.positional else []
    return "|".join([*words, "SETTINGS.yaml"] if kind.settings_file else words)
