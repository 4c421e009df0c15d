r"""Source lines that travel beside the functions that go by value, so that tracebacks have them.

A traceback takes the text of its lines from `linecache`, which reads files. For what was typed
into a notebook or given to ``python -c``, and for a script on another host, a worker has no file,
or a wrong one. So the client collects the lines of what it sends, and the worker shows them to
linecache while a traceback is formatted. They are plain dicts, and load anywhere::

    {"/tmp/ipykernel_1/123.py": {7: "def f(x):\n    return 1 / x\n"}}     # first line -> text
"""

from __future__ import annotations

import functools
import io
import itertools
import linecache
import operator
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import CodeType, TracebackType
from typing import Any, Final, NamedTuple, TypeAlias

__all__ = ["Lines", "collect", "keep", "of_bundles", "show"]

Lines: TypeAlias = dict[str, dict[int, str]]
"""File name -> number of a first line -> the text of that and the following lines."""

FUNCTION_NBYTES: Final = 64 * 1024
"""Of a longer function only its first lines go along."""
ALL_NBYTES: Final = 2**20
"""Of all functions together, in the order in which they are given."""
MAX_ERRORS: Final = 64
"""So many exceptions of one chain or group are looked through for local modules."""
STDIN_NBYTES: Final = 16 * 2**20


def collect(codes: Iterable[CodeType]) -> Lines:
    """Return the source lines of functions, as far as they can be had.

    Args:
        codes: Their code; what is nested in it is included.

    Returns:
        The lines of just these functions, in order, at most `FUNCTION_NBYTES` of each and
        `ALL_NBYTES` of all, as UTF-8.
    """
    room = ALL_NBYTES
    found: dict[str, dict[int, str]] = {}  # file name -> number -> line
    fresh: dict[str, Sequence[str]] = {}  # file name -> its lines
    for code in codes:
        own_room = FUNCTION_NBYTES
        lines = found.setdefault(code.co_filename, {})
        for number, line in _lines_of(code, fresh):
            nbytes = len(line.encode(errors="surrogatepass"))
            own_room -= nbytes
            if own_room < 0:
                break
            if number not in lines:
                if nbytes > room:
                    return _in_runs(found)
                room -= nbytes
                lines[number] = line
    return _in_runs(found)


@contextmanager
def show(lines: Mapping[str, Mapping[int, str]]) -> Iterator[None]:
    """Have linecache know these lines, whatever is on the disk, until the block is left."""
    before = {filename: linecache.cache.get(filename) for filename in lines}
    try:
        keep(lines)
        yield
    finally:
        for filename, entry in before.items():
            if entry is None:
                linecache.cache.pop(filename, None)
            else:
                linecache.cache[filename] = entry


def keep(lines: Mapping[str, Mapping[int, str]]) -> None:
    """Have linecache know these lines until others of these files take their place.

    For what asks for them while their functions run: a job that maps, a log with a traceback.
    """
    for filename, texts in lines.items():
        linecache.cache[filename] = _entry(filename, texts)


def of_bundles(error: BaseException) -> Lines:
    """Return the sources of the local modules through which an exception, or what it has, came.

    Their loader would give them to linecache anyhow, but not if this host has a file of that name.
    """
    if "dmap.namespaces" not in sys.modules:
        return {}
    found: Lines = {}
    for one in _with_all_behind(error):
        traceback: TracebackType | None = one.__traceback__
        while traceback is not None:
            frame, traceback = traceback.tb_frame, traceback.tb_next
            filename = frame.f_code.co_filename
            loader: Any = frame.f_globals.get("__loader__")
            if type(loader).__module__ == "dmap.namespaces" and filename not in found:
                with suppress(Exception):
                    found[filename] = {1: loader.get_source(frame.f_globals["__name__"]) or ""}
    return found


def _with_all_behind(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes and contexts, and what is in groups."""
    found = {id(error): error}
    left = [error]
    while left:
        one = left.pop()
        yield one
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (one.__cause__, one.__context__, *members):
            if other is not None and id(other) not in found and len(found) < MAX_ERRORS:
                found[id(other)] = other
                left.append(other)


def _entry(filename: str, texts: Mapping[int, str]) -> tuple[int, None, list[str], str]:
    """Make an entry of linecache; that it has no time keeps it from being compared with a file."""
    lines: list[str] = []
    for first, text in sorted(texts.items()):
        own = _split(text)
        lines += ["\n"] * (first - 1 - len(lines))
        lines[first - 1 : first - 1 + len(own)] = own
    return sum(map(len, texts.values())), None, lines, filename


def _in_runs(found: Mapping[str, Mapping[int, str]]) -> Lines:
    """Join lines that follow each other."""
    runs: Lines = {}
    for filename, lines in found.items():
        first = before = -1
        for number in sorted(lines):
            if number != before + 1:
                first = number
            texts = runs.setdefault(filename, {})
            texts[first] = texts.get(first, "") + lines[number]
            before = number
    return runs


def _lines_of(code: CodeType, fresh: dict[str, Sequence[str]]) -> Sequence[tuple[int, str]]:
    """Return the lines of a function with their numbers; none if they are not to be had.

    Args:
        code: That of the function.
        fresh: The lines of the files that were looked at for this call; is added to.
    """
    filename = code.co_filename
    try:
        first, last = _span(code)
        if filename.startswith("<"):
            typed = _typed_lines(code, first, last)
            # What linecache has under these names is the text of some other code.
            if typed or filename in ("<string>", "<stdin>"):
                return typed
        if filename not in fresh:
            fresh[filename] = _read(filename)
        return _numbered(fresh[filename], first, last)
    except Exception:  # code can be made of anything, and no job should fail for its looks
        return ()


def _span(code: CodeType) -> tuple[int, int]:
    """Return the first and the last line of code, with what is nested in it."""
    # In C, since there is a position for each instruction.
    starts, ends, _, _ = zip(*code.co_positions(), strict=True)
    numbers = {code.co_firstlineno, *starts, *ends} - {None, 0}
    first, last = min(numbers, default=1), max(numbers, default=1)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_first, inner_last = _span(constant)
            first, last = min(first, inner_first), max(last, inner_last)
    return first, last


def _typed_lines(code: CodeType, first: int, last: int) -> Sequence[tuple[int, str]]:
    """Return those lines of code that was given to this interpreter, and is in no file."""
    for program in (_command(), _standard_input()):
        if code in program.codes:
            return _numbered(program.lines, first, last)
    # From 3.13 on it has what was typed line by line, under the code that was made of it.
    getline: Any = getattr(linecache, "_getline_from_code", None)
    if getline is None:
        return ()
    found = ((number, getline(code, number)) for number in range(first, last + 1))
    return list(itertools.takewhile(operator.itemgetter(1), found))


def _numbered(lines: Sequence[str], first: int, last: int) -> Sequence[tuple[int, str]]:
    return [
        (number, line if line.endswith("\n") else f"{line}\n")
        for number, line in enumerate(lines[first - 1 : last], first)
    ]


def _read(filename: str) -> Sequence[str]:
    """Return the lines of a file as it is now; if it is there no more, as it was read before."""
    before = linecache.cache.get(filename)
    linecache.checkcache(filename)
    main = vars(sys.modules["__main__"]) if "__main__" in sys.modules else {}
    # A main module that was run from an archive is in no file; its loader has it.
    lines = linecache.getlines(filename, main if main.get("__file__") == filename else None)
    if lines or before is None or len(before) == 1:
        return lines
    linecache.cache[filename] = before
    return before[2]


class _Program(NamedTuple):
    """A program that is in no file.

    Attributes:
        lines: Its lines.
        codes: What compiling it makes: what ``exec`` makes has the same file name, and others.
    """

    lines: Sequence[str] = ()
    codes: frozenset[CodeType] = frozenset()


@functools.cache
def _command() -> _Program:
    """Return the program of ``python -c``."""
    return _compiled(_command_of(sys.orig_argv), "<string>")


@functools.cache
def _standard_input() -> _Program:
    """Return the program of ``python < file``."""
    try:
        known = os.fstat(0)
        if not stat.S_ISREG(known.st_mode) or known.st_size > STDIN_NBYTES:
            return _Program()
        # Read at a place, so that whoever reads on finds the file where it was.
        return _compiled(os.pread(0, known.st_size, 0).decode(), "<stdin>")
    except (OSError, ValueError):
        return _Program()


def _command_of(argv: Sequence[str]) -> str:
    """Return what stands behind ``-c`` among the arguments of an interpreter."""
    arguments = iter(argv[1:])
    for argument in arguments:
        if not argument.startswith("-") or argument == "-":
            break
        if argument == "--check-hash-based-pycs":
            next(arguments, "")
        if argument.startswith("--"):
            continue
        for n, letter in enumerate(argument[1:], 2):
            if letter == "c":
                return argument[n:] or next(arguments, "")
            if letter == "m":
                return ""
            if letter in "WX":
                if not argument[n:]:
                    next(arguments, "")
                break
    return ""


def _compiled(program: str, filename: str) -> _Program:
    import warnings

    if not program:
        return _Program()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were said when it was started
            code = compile(program, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return _Program()
    return _Program(_split(program), frozenset(_nested(code)))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _split(text: str) -> list[str]:
    """Split a program as Python does: `str.splitlines` knows ends of lines that it does not."""
    return io.StringIO(text, newline=None).readlines()
