"""Parts of error messages: an exception in one line, and the known name closest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """Return the message of an error as a single line, shortened for a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


def closest(word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.5) -> list[str]:
    """Return up to `most` of the known names that resemble `word`, best first; case is ignored.

    Args:
        cutoff: the least similarity, from 0 (anything) to 1 (equal), as `difflib.get_close_matches` measures it.
    """
    names = {name.lower(): name for name in known}
    return [names[name] for name in difflib.get_close_matches(word.lower(), list(names), n=most, cutoff=cutoff)]


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.5) -> str:
    """Return the end of an error message, "; did you mean nat_mini?", or "" if no known name is close enough."""
    names = closest(word, known, most=most, cutoff=cutoff)
    return f"; did you mean {', '.join(names)}?" if names else ""
