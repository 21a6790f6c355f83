"""The command line of `train.py`: its help, its messages and its exit codes.

0 done · 1 failed · 2 the settings cannot be used · 130 stopped by Ctrl-C · 143 stopped by SIGTERM
"""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Key, keys
from .settings import ConfigError, choices, load, to_yaml

_USAGE = """\
Train an image classifier or a segmenter on any timm backbone.

  python train.py [key=value …]     train; files in configs/ give the values that are not given here
  python train.py --cfg [key=…]     print all settings of the run and stop
  python train.py --help            this text

  python train.py                                    a small NAT on Fashion-MNIST, in five minutes on two CPU cores
  python train.py model=convnext_atto optim.lr=2e-3  any timm model
  python train.py data=path/to/pictures model=nat_mini model.pretrained=true
  python train.py recipe=segmentation
  python train.py resume=last                        go on after Ctrl-C, with the same numbers as without it
"""


def main(arguments: Sequence[str], *, configs: Path) -> int:
    """Runs the command and returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    flags = {argument for argument in arguments if argument.startswith("-")}
    settings = [argument for argument in arguments if argument not in flags]
    try:
        if flags & {"--help", "-h"}:
            _say(help_text(configs))
            return 0
        if unknown := flags - {"--cfg"}:
            raise ConfigError(f"there is no option {min(unknown)}; settings are written key=value, see --help")
        config = load(settings, configs)
        if flags:
            _say(to_yaml(config))
            return 0
    except ConfigError as error:
        return _fail(error)
    return _train(config)


def _train(config: Any) -> int:
    # Imported late: help and errors about settings should not wait for Lightning.
    from .callbacks import Interrupted
    from .run import run
    from .tasks import NonFiniteLossError

    _quiet_lightning()
    try:
        results = run(config)
    except Interrupted as stop:
        _say(str(stop), sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        return 130
    except ValueError as error:  # ConfigError and every check of ours
        return _fail(error)
    except NonFiniteLossError as error:
        return _fail(error, code=1)
    test = ", ".join(f"{name} {value:.4f}" for name, value in results["test"].items())
    _say(f"test: {test} (epoch {results['best_epoch']} of {results['epochs']}, {results['seconds']:.0f} s)")
    _say(f"everything is in {results['folder']}")
    return 0


def help_text(configs: Path) -> str:
    lines = [
        _USAGE,
        *_wrapped("recipe=  ", choices(configs, "recipes")),
        f"data=    {', '.join(choices(configs, 'data'))}",
    ]
    section = None
    for key in keys():
        head = key.name.split(".")[0] if "." in key.name else ""
        if head != section:
            lines.append("")
            section = head
        lines += _describe(key)
    return "\n".join(lines) + "\n"


def _wrapped(head: str, words: Sequence[str]) -> list[str]:
    return textwrap.wrap(", ".join(words), 116, initial_indent=head, subsequent_indent=" " * len(head))


def _describe(key: Key) -> list[str]:
    default = "null" if key.default is None else str(key.default).lower() if key.base is bool else key.default
    facts = [f"default {default}", key.describe_type(), key.describe_range()]
    head = f"{key.name:24}  {'; '.join(fact for fact in facts if fact)}"
    return [head, *textwrap.wrap(key.doc, 116, initial_indent=" " * 26, subsequent_indent=" " * 26)]


def _quiet_lightning() -> None:
    """Lightning announces what was not asked for; its warnings about choices made on purpose are dropped too."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*tensorboardX.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)


def _fail(error: Exception, code: int = 2) -> int:
    _say(f"error: {error}", sys.stderr)
    return code


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(text.rstrip() + "\n")
