"""Local modules on a worker: imported from what the client sent, each closure's apart from others'.

A *bundle* is the text of modules (``local_code`` makes it), and a `Namespace` holds the module
objects that come of it. Modules are found by name in ``sys.modules``, and there is one of those in
a process. So while a namespace is *active* its modules are there, under its bundle's names, and
what else had these names is set aside: the worker's own modules, or another namespace's::

    sys.modules        worker's own  ->  active(one)  ->  active(other)  ->  worker's own
      numpy            numpy             numpy            numpy              numpy
      helper           -                 helper of one    helper of other    -
      settings         its own           settings of one  its own            its own

Module objects stay in their namespace between activations: state that a module made is there for
the next job, and classes stay the same. Nothing is shared between namespaces but what is not in
their bundles.

**What a namespace owns** are its bundle's names, and all that lies in a package of it that has an
``__init__``. A package that came whole is searched on this host's disk no more: what is not in the
bundle is missing, as it is at the client. One of which something was left out (too large, or a
namespace package that has installed parts, too) is also searched where this host has it.

**Threads.** Which namespace is active holds for the whole process. A job may import in as many
threads as it likes, as long as it runs. A thread that outlives its job imports from whatever is
active then; what it has imported before stays what it was. Two namespaces cannot be active in two
threads at once: the second sets the first aside for as long as it runs.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any, Final, NamedTuple, cast

__all__ = [
    "Loader",
    "Namespace",
    "Text",
    "active",
    "become",
    "compile_text",
    "current",
    "freeze",
    "missing",
    "pack",
    "thaw",
]

MAX_DEPTH: Final = 8
MAX_ELEMENTS: Final = 1000
MAX_NBYTES: Final = 2**20
"""What is nested more deeply, has more elements or longer text is not *plain*."""

_SCALARS: Final = (type(None), bool, int, float, complex, str, bytes)


class Text(NamedTuple):
    """A module as it lies in a bundle.

    Attributes:
        filename: Where the client has it; empty for a namespace package.
        text: Its source as it is in the file; None for a namespace package.
        is_package: Whether it may have submodules.
    """

    filename: str
    text: bytes | None
    is_package: bool


# --- bundles as bytes -------------------------------------------------------------------------


def pack(
    texts: Mapping[str, Text],
    constants: Mapping[str, Mapping[str, object]],
    partial: Collection[str],
) -> bytes:
    """Return a bundle: equal bytes for equal contents, in all processes.

    Args:
        texts: Module name -> its text.
        constants: Module name -> name -> plain value that is set in it once its code has run.
        partial: Packages among them of which something was left out.
    """
    frozen = {
        module: [(name, bare) for name in sorted(values) if (bare := freeze(values[name]))]
        for module, values in sorted(constants.items())
        if module in texts
    }
    bare_texts = [(name, *texts[name]) for name in sorted(texts)]
    return _to_bytes((bare_texts, list(frozen.items()), sorted(partial)))


def freeze(value: object) -> bytes | None:
    """Return plain data as bytes, or None if it is none, or too much of it.

    Equal bytes mean equal in all depths: in types, in signs of zeros and in the order of dicts,
    but not in the order of sets, which is another in each process.
    """
    try:
        return _to_bytes(_tag(value, [MAX_ELEMENTS, MAX_NBYTES], MAX_DEPTH))
    except _NotPlainError:
        return None


def thaw(frozen: bytes) -> Any:
    """Return a new value like the one that was frozen."""
    return _untag(pickle.loads(frozen))


class _NotPlainError(Exception):
    pass


def _tag(value: object, room: list[int], depth: int) -> object:
    """Put a mark before each tuple and set, and sets in an order."""
    kind = type(value)
    if kind in _SCALARS:
        if kind is str or kind is bytes:
            room[1] -= len(cast("str | bytes", value))
        elif kind is int:
            room[1] -= cast("int", value).bit_length() // 8
        if room[1] < 0:
            raise _NotPlainError
        return value
    if kind not in (tuple, list, dict, set, frozenset) or depth == 0:
        raise _NotPlainError
    elements = cast("Collection[object]", value)
    room[0] -= len(elements)
    if room[0] < 0:
        raise _NotPlainError
    if kind is dict:
        items = cast("dict[object, object]", value).items()
        return {_tag(key, room, depth - 1): _tag(each, room, depth - 1) for key, each in items}
    tagged = [_tag(each, room, depth - 1) for each in elements]
    if kind is list:
        return tagged
    if kind is not tuple:
        tagged.sort(key=_to_bytes)
    return (kind.__name__, *tagged)


_UNTAG: Final[dict[str, Callable[[Iterator[object]], object]]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


def _untag(value: Any) -> Any:
    kind = type(value)
    if kind is list:
        return [_untag(each) for each in value]
    if kind is dict:
        return {_untag(key): _untag(each) for key, each in value.items()}
    if kind is tuple:
        return _UNTAG[value[0]](_untag(each) for each in value[1:])
    return value


def _to_bytes(value: object) -> bytes:
    # Without a memo, which would tell equal strings that are one object from those that are two.
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()


# --- namespaces -------------------------------------------------------------------------------


class Namespace:
    """The modules of one bundle, loaded at their first import while it is `active`.

    Args:
        blob: What `pack` made. Nothing of it is run yet.

    Attributes:
        texts: module name -> its text
        partial: Packages of which something was left out.
    """

    def __init__(self, blob: bytes | memoryview) -> None:
        texts, constants, partial = pickle.loads(blob)
        self.texts: dict[str, Text] = {name: Text(*text) for name, *text in texts}
        self.partial: frozenset[str] = frozenset(partial)
        # module -> name and frozen value of what is set in it
        self._constants: dict[str, list[tuple[str, bytes]]] = dict(constants)
        # Outermost packages with an __init__, each with a dot behind.
        self._roots = tuple(
            f"{name}." for name in self.texts if self._is_regular(name) and not self._is_inner(name)
        )
        self._modules: dict[str, ModuleType] = {}  # what is loaded, as of the last activation
        self._aside: dict[str, ModuleType] = {}  # what else has these names, while it is active
        # filename -> what linecache wants to know: lines of this text, whatever the disk has
        self._lines: dict[str, tuple[int, None, list[str], str]] = {}
        self._is_in = False  # ``_modules`` are in sys.modules, which has the newest of them
        self._has_grown = False  # since it was entered
        self._has_foreign = False  # a module beside ours was imported in a package of ours

    def owns(self, name: str) -> bool:
        """Return whether a module of that name is this namespace's own, if there is one."""
        return name in self.texts or name.startswith(self._roots)

    def find(self, name: str) -> ModuleSpec | None:
        """Return how to load a module of the bundle."""
        text = self.texts.get(name)
        if text is None:
            if self.owns(name):
                self._has_grown = True
            elif name.rpartition(".")[0] in self.texts:
                self._has_foreign = True
            return None
        self._has_grown = True
        loader = Loader(self, name, text)
        spec = ModuleSpec(name, loader, origin=text.filename or None, is_package=text.is_package)
        spec.has_location = text.text is not None
        if name in self.partial:
            spec.submodule_search_locations = _own_folders(name)
        return spec

    def fill(self, module: ModuleType, loader: Loader) -> None:
        """Run a module's code and set what the client had set in it."""
        name, scope = loader.name, vars(module)
        if loader.text.text is None:
            # An installed part may have been imported before, as a child of the worker's own.
            scope["__getattr__"] = functools.partial(_get_child, name)
            return
        code = loader.get_code(name)
        self._remember_lines(loader)
        inside = f"{name}."
        before = set(sys.modules) if loader.text.is_package else set()
        try:
            exec(code, scope)
        except BaseException:
            # importlib takes the module itself out; what it had imported of itself goes with it.
            if loader.text.is_package:
                for each in [each for each in list(sys.modules) if each.startswith(inside)]:
                    if each not in before:
                        del sys.modules[each]
            raise
        for constant, frozen in self._constants.get(name, ()):
            scope[constant] = thaw(frozen)

    def _enter(self) -> None:
        # A cancelled job may be interrupted here, between any two lines: `_leave` then puts back
        # what is set aside, whether it is all out of the way yet or not.
        modules = sys.modules
        if any(root[:-1] in modules for root in self._roots):
            names = [name for name in list(modules) if self.owns(name)]
        else:
            names = list(self.texts.keys() & modules.keys())
        self._aside = {name: modules[name] for name in names}
        for name in names:
            modules.pop(name, None)
        modules.update(self._modules)
        self._is_in = True
        if self._lines:
            _linecache().update(self._lines)

    def _leave(self) -> None:
        # Interrupted, it is done again from the start.
        modules = sys.modules
        if self._is_in:
            if self._has_grown:
                names = [name for name in list(modules) if self.owns(name)]
            else:
                names = list((self.texts.keys() | self._modules.keys()) & modules.keys())
            self._modules = {name: modules[name] for name in names}
            self._is_in = False
        for name, module in self._modules.items():
            if modules.get(name) is module:
                modules.pop(name, None)
        modules.update(self._aside)
        self._aside = {}
        if self._lines:
            cache = _linecache()
            for filename, entry in self._lines.items():
                if cache.get(filename) is entry:
                    cache.pop(filename, None)
        self._has_grown = False

    def _return_children(self) -> None:
        """Hang modules beside ours, imported meanwhile, where the worker's own code looks."""
        if not self._has_foreign:
            return
        self._has_foreign = False
        for parent, module in self._modules.items():
            if parent not in self.texts or self._is_regular(parent):
                continue
            for name, child in list(vars(module).items()):
                full = f"{parent}.{name}"
                if self.owns(full) or sys.modules.get(full) is not child:
                    continue
                try:
                    own = import_module(parent)
                except ImportError:
                    break
                setattr(own, name, child)

    def _remember_lines(self, loader: Loader) -> None:
        source = loader.get_source(loader.name)
        lines = io.StringIO(source).readlines()  # str.splitlines() would split at form feeds, too
        # Without a time it is not compared with the file, which may be another version's.
        entry = len(source), None, lines, loader.path
        self._lines[loader.path] = entry
        if _current is self:
            _linecache()[loader.path] = entry

    def _is_regular(self, name: str) -> bool:
        text = self.texts[name]
        return text.is_package and text.text is not None

    def _is_inner(self, name: str) -> bool:
        parent = name.rpartition(".")[0]
        return bool(parent) and (self._is_regular(parent) or self._is_inner(parent))


class Loader(SourceFileLoader):
    """Loads one module of a namespace from its text.

    Data beside it is read from where the client has it, which may be here as well.
    """

    def __init__(self, namespace: Namespace, name: str, text: Text) -> None:
        super().__init__(name, text.filename)
        self.namespace = namespace
        self.text = text

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code."""
        self.namespace.fill(module, self)

    def get_code(self, fullname: str) -> CodeType:
        """Return the text compiled, with the client's filename."""
        return compile_text(self.text.text or b"", self.path)

    def get_source(self, fullname: str) -> str:
        """Return the text decoded."""
        from importlib.util import decode_source

        return decode_source(self.text.text or b"")

    def is_package(self, fullname: str) -> bool:
        """Return whether it may have submodules."""
        return self.text.is_package


@functools.lru_cache(maxsize=1024)
def compile_text(text: bytes, filename: str) -> CodeType:
    """Compile a module's text, once for all namespaces: most of two bundles is the same.

    Raises:
        SyntaxError, ValueError: it does not compile.
    """
    return compile(text, filename, "exec", dont_inherit=True)


def _get_child(package: str, name: str) -> object:
    child = sys.modules.get(f"{package}.{name}")
    if child is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return child


def _own_folders(package: str) -> list[str]:
    """Return where this host has a package, besides what a bundle has of it."""
    parent = package.rpartition(".")[0]
    path = _own_folders(parent) if parent else None
    if path == []:
        return []
    spec = PathFinder.find_spec(package, path)
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def _linecache() -> dict[str, Any]:
    import linecache  # where no local module was loaded, nobody needs it

    return cast("dict[str, Any]", linecache.cache)


# --- which is active --------------------------------------------------------------------------


class _Finder:
    """Finds what is in the active namespace, before anything else does."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        namespace = _current
        return None if namespace is None else namespace.find(name)


_finder: Final = _Finder()
_lock: Final = threading.RLock()
_current: Namespace | None = None


def current() -> Namespace | None:
    """Return the active namespace; None: what is imported is the worker's own."""
    return _current


class active:  # noqa: N801 - read as the function that contextlib would make, at a third of its cost
    """Have a namespace's modules in ``sys.modules`` for as long as this is entered.

    It may be entered inside of itself and of others; what was before is put back on leaving. See
    the module's text for threads.

    Args:
        namespace: None is the worker itself, with its own modules.
    """

    __slots__ = ("_before", "_namespace")

    def __init__(self, namespace: Namespace | None) -> None:
        self._namespace = namespace
        self._before: Namespace | None = None

    def __enter__(self) -> None:
        self._before = _current
        if self._namespace is not _current:
            _switch(self._namespace, self._before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not _current:
            _switch(self._before, self._before)


def become(namespace: Namespace | None) -> None:
    """Make a namespace the active one until another is, which spares the way back and forth.

    Interrupted, it leaves the one that was active before.
    """
    if namespace is not _current:
        _switch(namespace, _current)


def _switch(namespace: Namespace | None, otherwise: Namespace | None) -> None:
    """Make a namespace the active one, or this other one if that is interrupted."""
    # Interrupted before this line, a switch has not begun. An inner namespace may then be active
    # for as long as the exception takes to leave the outer one, which sets all of it right.
    try:
        _switch_to(namespace)
    except BaseException:
        _switch_to(otherwise)
        raise


def _switch_to(namespace: Namespace | None) -> None:
    global _current
    with _lock:
        left = _current
        if left is not None:
            left._leave()
            if _finder in sys.meta_path:
                sys.meta_path.remove(_finder)
            _current = None
            left._return_children()
        if namespace is not None:
            _current = namespace
            sys.meta_path.insert(0, _finder)
            namespace._enter()


def missing(error: ModuleNotFoundError, namespace: Namespace | None = None) -> str:
    """Say which module is missing here, and what to do.

    Args:
        error: What an import raised.
        namespace: The one that was active then; None: the one that is now.
    """
    namespace = namespace or _current
    python = ".".join(map(str, sys.version_info[:3]))
    here = f"on {os.uname().nodename} (Python {python})"
    name = error.name
    if not name:
        return f"a module is missing {here}: {error}"
    top = name.partition(".")[0]
    parent = name.rpartition(".")[0]
    came = ""
    if namespace is not None and parent in namespace.texts:
        came = f"; the package {parent} came with the function, "
        if parent in namespace.partial:
            came += "but not all of it, and no import statement names this module"
        else:
            came += "and has no such module where it came from"
    return (
        f"there is no module {name} {here}{came}; install it there (pip install {top}), or make "
        "it local code: a module next to the script or under its working directory travels by "
        "itself"
    )
