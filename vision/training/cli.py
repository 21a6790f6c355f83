"""The command line of `train.py`: its help, messages and exit codes.

0 done, or stopped by SIGUSR1 and requeued by Slurm · 1 failed · 2 the settings cannot be used · 130 stopped by Ctrl-C ·
138 stopped by SIGUSR1 without being requeued · 143 stopped by SIGTERM

Unusual: an unexpected error is one line on the terminal; its traceback is written to error.txt in the run folder, where
it is still found when the terminal is closed. `--debug` prints it as well.
"""

from __future__ import annotations

import dis
import logging
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from .._messages import did_you_mean
from . import sweep
from .config import Config, Key, keys
from .folder import folder_by_time
from .launch import check_processes, end_with_parent, is_first, launch, python, rank, started_by
from .settings import ConfigError, choices, load, to_yaml

_USAGE = """\
Train an image classifier or a segmenter on any timm backbone.

  python train.py [key=value …]        train; files in configs/ give the values that are not given here
  python train.py [key=one,two …]      train once for every combination, one after the other
  python train.py --cfg [key=value …]  print all settings of the run and stop
  python train.py --help [optim …]     this text, or the settings of a section alone
  python train.py --debug [key=…]      show the traceback of a failure, which is otherwise written to error.txt

  python train.py                                    a small NAT on Fashion-MNIST, in five minutes on two CPU cores
  python train.py model=convnext_atto optim.lr=2e-3  any timm model
  python train.py data=path/to/pictures model=nat_mini model.pretrained=true
  python train.py recipe=segmentation
  python train.py model=nat_mini,van_b0 optim.lr=1e-3,2e-3 out=runs/sweep
  python train.py train.devices=4                    four devices, or processes on a CPU; docs/distributed.md
  python train.py resume=last                        go on after Ctrl-C, with the same numbers as without it

exit codes: 0 done (or queued again by Slurm), 1 failed, 2 the settings cannot be used, 130 Ctrl-C, 143 SIGTERM,
138 SIGUSR1 where nothing queues the run again
"""
_FLAGS = ("--help", "-h", "--cfg", "--debug")


def main(arguments: Sequence[str], *, configs: Path) -> int:
    """Run the command and return its exit code."""
    level = logging.INFO if is_first() else logging.WARNING
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(level)
    end_with_parent()
    flags = {argument for argument in arguments if argument.startswith("-")}
    given = [argument for argument in arguments if argument not in flags]
    try:
        if unknown := flags - set(_FLAGS):
            raise ConfigError(f"there is no option {min(unknown)}; settings are written key=value, see --help")
        if flags & {"--help", "-h"}:
            _say(help_text(configs, given))
            return 0
        plan = sweep.plan(given)
        if plan is None:
            config = load(given, configs)
            if "--cfg" in flags:
                _say(to_yaml(config))
                return 0
            return _start(config, given, configs, debug="--debug" in flags)
        checked = [(run.name, _checked(run.arguments, configs)) for run in plan.runs]
        if "--cfg" in flags:
            _say("".join(f"--- # {name}\n{to_yaml(config)}" for name, config in checked))
            return 0
        extra = ["--debug"] if "--debug" in flags else []
        return sweep.run(plan, [*python(), str(configs), *extra], _say, _complain)
    except ConfigError as error:
        return _fail(error)


def _checked(arguments: Sequence[str], configs: Path) -> Config:
    """Return the settings of a run of a sweep after all checks that need no data."""
    from .build import check_before_data

    config = load(arguments, configs)
    check_before_data(config)
    check_processes(config.train, "named by the sweep")
    return config


def _start(config: Config, given: Sequence[str], configs: Path, *, debug: bool) -> int:
    """Train in this process, or start several processes if the settings ask for them; return the exit code."""
    check_processes(config.train, config.out)
    if config.out is None:
        config.out = str(folder_by_time(config))
    if config.train.processes > 1 and started_by() is None:
        # The processes must agree on these two settings.
        settled = [f"out={config.out}", *([f"resume={config.resume}"] if config.resume else [])]
        command = [*python(), str(configs), *(["--debug"] if debug else []), *given, *settled]
        return launch(command, config.train.processes, _complain)
    try:
        return _train(config)
    except Exception as error:
        return _unexpected(error, Path(config.out), debug=debug)


def _train(config: Config) -> int:
    # Imported here so that help and errors about settings do not wait for Lightning.
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ..data.pictures import DataError
    from ..data.workers import WorkerError
    from .failures import TrainingError
    from .run import run
    from .signals import Interrupted, exit_code

    _quiet_lightning()
    try:
        results = run(config)
    except Interrupted as stop:
        if is_first():
            _complain(str(stop))
        return exit_code(stop, first=is_first())
    except (KeyboardInterrupt, SystemExit):  # Lightning converts KeyboardInterrupt to SystemExit
        return 130
    except MisconfigurationException as error:
        return _fail(error)
    except (TrainingError, DataError, WorkerError) as error:
        return _fail(error, code=1)
    except ValueError as error:
        if not _is_refusal(error):
            raise
        return _fail(error)
    if is_first():
        test = ", ".join(f"{name} {value:.4f}" for name, value in results["test"].items())
        _say(f"test: {test} (epoch {results['best_epoch']} of {results['epochs']}, {results['seconds']:.0f} s)")
        _say(f"everything is in {results['folder']}")
    return 0


def _is_refusal(error: BaseException) -> bool:
    """Return whether a `raise` statement of this library raised the error, whose message then says what to change.

    An error that the interpreter or a C function raises in one of our frames (unpacking, int(), a strict zip) is a bug
    of ours and needs its traceback. The two differ in the instruction at which the innermost frame stopped.
    """
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    frame = innermost.tb_frame
    instruction = dis.opname[frame.f_code.co_code[innermost.tb_lasti]]
    return str(frame.f_globals.get("__name__", "")).startswith("mixerzoo.") and instruction == "RAISE_VARARGS"


def _unexpected(error: Exception, folder: Path, *, debug: bool) -> int:
    """Report an unexpected error in one line; write its traceback to the run folder, or print it if there is none."""
    trace = "".join(traceback.format_exception(error))
    first_line = (str(error).strip().splitlines() or [""])[0]
    line = f"error: {type(error).__name__}: {first_line}" if first_line else f"error: {type(error).__name__}"
    path = folder / ("error.txt" if is_first() else f"error-{rank()}.txt")
    try:
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        path.write_text(trace)
        line += f" (traceback in {path})"
    except OSError:
        debug = True
    if debug:
        _complain(trace)
    _complain(line)
    return 1


def help_text(configs: Path, topics: Sequence[str] = ()) -> str:
    """Return the whole help text, or that of the given sections (`optim`) and keys (`optim.lr`)."""
    known = list(keys())
    if not topics:
        names = ["recipe=  ", choices(configs, "recipes")], ["data=    ", choices(configs, "data")]
        head = [_USAGE, *(line for name in names for line in _wrapped(*name))]
        return "\n".join([*head, *_sections(known)]) + "\n"
    found = []
    for topic in topics:
        name = topic.partition("=")[0]
        some = [key for key in known if key.name == name or key.name.startswith(f"{name}.")]
        some = some or [key for key in known if key.name.rsplit(".", 1)[-1] == name]
        if not some:
            sections = {key.name.split(".")[0] for key in known}
            hint = did_you_mean(name, sections | {key.name for key in known})
            raise ConfigError(f"--help {name}: there is no such section or key{hint}")
        found += [key for key in some if key not in found]
    return "\n".join(_sections(found)).lstrip("\n") + "\n"


def _sections(chosen: Sequence[Key]) -> list[str]:
    """Return the lines that describe the keys, with an empty line between sections."""
    lines, section = [], None
    for key in chosen:
        head = key.name.rpartition(".")[0]
        if head != section:
            lines.append("")
            section = head
        lines += _describe(key)
    return lines


def _wrapped(head: str, words: Sequence[str]) -> list[str]:
    return textwrap.wrap(", ".join(words), 116, initial_indent=head, subsequent_indent=" " * len(head))


def _describe(key: Key) -> list[str]:
    default = "null" if key.default is None else str(key.default).lower() if key.base is bool else key.default
    facts = [f"default {default}", key.describe_type(), key.describe_range()]
    head = f"{key.name:24}  {'; '.join(fact for fact in facts if fact)}"
    return [head, *textwrap.wrap(key.doc, 116, initial_indent=" " * 26, subsequent_indent=" " * 26)]


def _quiet_lightning() -> None:
    """Silence Lightning's announcements and its warnings about deliberate choices of this library."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*tensorboardX.*",
        ".*exists and is not empty.*",
        ".*sync_dist=True.*",  # logged values are reduced over all processes already
        ".*method of metric .* was called before the ``update``.*",  # from a process without pictures
    ):
        warnings.filterwarnings("ignore", message)


def _fail(error: Exception, code: int = 2) -> int:
    _complain(f"error: {error}")
    return code


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    where = f"process {rank()}: " if started_by() in ("torchrun", "slurm") and not is_first() else ""
    sys.stderr.write(where + text.rstrip() + "\n")


if __name__ == "__main__":  # as launch.python() starts it
    _, folder, *sys.argv[1:] = sys.argv
    sys.argv[0] = "train.py"  # so that the command in env.json can be typed
    sys.exit(main(sys.argv[1:], configs=Path(folder)))
