"""Local code: modules that only this machine can be expected to have, and what travels of them.

A module is *local* if its source lies outside of the standard library and of ``site-packages``:
next to the script, under the working directory, on ``PYTHONPATH``, in an editable install. Its
functions and classes are pickled by reference; its text, and that of all local modules that it
needs, goes along in a bundle, from which ``namespaces`` imports it where the function runs.

What travels is what *this process runs*: the text of a loaded module is read when the module is
first seen and kept until it is loaded anew. What is not loaded is read when its file changes.

Which modules are needed is read from the ``import`` statements in compiled code, also of those that
have never run here. Nothing is imported to find out. Two things no statement tells, so they are
taken in by rule: a package may import its parts by computed names, so all of it goes; and a script
may have set a module's globals (``helper.RATE = 3``), so those that the function reads go too, if
they are plain data and not what the source says anyway: the *constants*.

Not for several threads at once: they would do the same work twice, with the same outcome.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import struct
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

from dmap import bytecode, namespaces
from dmap.namespaces import Loader, Namespace, Text

if TYPE_CHECKING:
    import ast

__all__ = ["Import", "Search", "Source", "bundle", "digest", "is_local", "needed"]

MAX_FILES: Final = 2000
MAX_NBYTES: Final = 8 * 2**20
"""What a package may have to travel whole."""
MAX_ENTRIES: Final = 20_000
"""A folder that has more is full of data, and is searched by name only. A package that has more in
its folders does not travel whole."""
SETTLING: Final = 0.05
"""Seconds: a file that is as young when it is read may change again and have the same time."""

_NEVER: Final = frozenset(("__main__", "dmap", "jobserver"))
_SYSTEM_FOLDERS: Final = frozenset(("site-packages", "dist-packages"))

_IMPORTING: Final = re.compile(rb"\b(?:from|import)\b((?:[^\n;#\\]|\\\r?\n)*)")
_NAMES: Final = re.compile(r"[^\W\d]\w*")

_Stamp: TypeAlias = tuple[int, int, int]
"""Of a file: its time in ns, size and number."""


# --- what a module is -------------------------------------------------------------------------


class Source:
    """A local module: its text, and what can be read from it.

    Attributes:
        name: Its full name.
        text: As it lies in a bundle.
        folders: Where its submodules are on this disk, if it is a package.
        stamp: What the file was like when it was read; None if a later change may look the same.
        is_partial: Whether some of a package is not to travel, being installed or left out before.
    """

    def __init__(
        self,
        name: str,
        text: Text,
        folders: tuple[str, ...] = (),
        stamp: _Stamp | None = None,
        is_partial: bool = False,
    ) -> None:
        self.name = name
        self.text = text
        self.folders = folders
        self.stamp = stamp
        self.is_partial = is_partial

    @property
    def is_regular(self) -> bool:
        """Whether it is a package with an ``__init__``."""
        return self.text.is_package and self.text.text is not None

    @functools.cached_property
    def code(self) -> CodeType | None:
        """The text compiled; None if there is none, or it does not compile."""
        if self.text.text is None:
            return None
        if self.stamp is not None and (cached := _read_cached(self.text.filename, self.stamp)):
            return cached
        import warnings

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those that its import gives
                return namespaces.compile_text(self.text.text, self.text.filename)
        except (SyntaxError, ValueError, RecursionError, OverflowError):
            return None

    @functools.cached_property
    def package(self) -> str:
        """What its relative imports start from."""
        return self.name if self.text.is_package else _parent_of(self.name)

    @functools.cached_property
    def imports(self) -> tuple[str, ...]:
        """Names of modules that it may import, and of their packages, which come after them."""
        if self.code is None:
            return ()
        names = set(bytecode.imports(self.code, self.package))
        if self.text.is_package and b"__all__" in (self.text.text or b""):
            # ``from package import *`` imports the submodules among these.
            for frozen in self.assigned.get("__all__", ()):
                public = namespaces.thaw(frozen) if isinstance(frozen, bytes) else ()
                if isinstance(public, (list, tuple)):
                    names.update(f"{self.name}.{part}" for part in public)
        for name in list(names):
            while (name := _parent_of(name)) and name not in names:
                names.add(name)
        return tuple(sorted(names, reverse=True))

    @functools.cached_property
    def mentions(self) -> frozenset[str]:
        """Names in its import statements, and perhaps some others; without compiling it."""
        found: set[str] = set()
        for match in _IMPORTING.finditer(self.text.text or b""):
            found.update(_NAMES.findall(match[1].decode(errors="replace")))
        return frozenset(found)

    @functools.cached_property
    def assigned(self) -> dict[str, tuple[bytes | Import, ...]]:
        """Module-level names -> what the source itself gives them, as far as it can be told.

        A frozen literal, or where it is imported from; several if a ``try`` chooses one where the
        module is imported. Under ``*``: where all names are imported from.
        """
        import ast
        import warnings

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(self.text.text or b"")
        except (SyntaxError, ValueError, RecursionError, OverflowError):
            return {}
        assigned: dict[str, tuple[bytes | Import, ...]] = {}
        _read_statements(tree.body, self.package, assigned, False)
        return assigned

    @functools.cached_property
    def codes(self) -> dict[str, list[CodeType]]:
        """Qualified name -> what is compiled under it."""
        codes: dict[str, list[CodeType]] = {}
        for code in bytecode.all_codes(self.code) if self.code is not None else ():
            codes.setdefault(code.co_qualname, []).append(code)
        return codes

    @functools.cached_property
    def text_digest(self) -> bytes:
        """What tells its text from others'."""
        text = self.text.text
        kind = b"p" if self.text.is_package else b"m"
        return hashlib.sha256(b"n" if text is None else kind + text).digest()


class Import(NamedTuple):
    """Where a name comes from: ``from module import name``."""

    module: str
    name: str


def _read_cached(filename: str, stamp: _Stamp) -> CodeType | None:
    """Return what Python compiled when it imported a file, if the file is still the same."""
    import marshal
    from importlib.util import MAGIC_NUMBER, cache_from_source

    mtime, size, _ = stamp
    seconds = (mtime // 10**9) & 0xFFFFFFFF
    try:
        if _stamp_of(os.stat(filename)) != stamp:
            return None
        with open(cache_from_source(filename), "rb") as file:
            header = MAGIC_NUMBER + struct.pack("<III", 0, seconds, size & 0xFFFFFFFF)
            # Python itself would take it for that of a later edit in the same second.
            if file.read(len(header)) != header or os.fstat(file.fileno()).st_mtime_ns <= mtime:
                return None
            code = marshal.loads(file.read())
    except (OSError, NotImplementedError, EOFError, ValueError, TypeError):
        return None
    return code if isinstance(code, CodeType) else None


def _read_statements(
    statements: Iterable[ast.stmt],
    package: str,
    assigned: dict[str, tuple[bytes | Import, ...]],
    is_tried: bool,
) -> None:
    """Read what statements at module level give to names, in their order."""
    import ast

    def give(name: str, given: bytes | Import | None) -> None:
        before = assigned.pop(name, ()) if is_tried else ()
        assigned.pop(name, None)
        if given is not None:
            before += (given,)
        if before:
            assigned[name] = before

    for statement in statements:
        match statement:
            case ast.Assign(targets=targets, value=value) if all(
                isinstance(target, ast.Name) for target in targets
            ):
                for target in targets:
                    give(cast("ast.Name", target).id, _read_literal(value))
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                if value is not None:
                    give(name, _read_literal(value))
            case ast.ImportFrom(module=module, names=aliases, level=level):
                origin = bytecode.resolve(module or "", level, package)
                for alias in aliases:
                    imported = None if origin is None else Import(origin, alias.name)
                    if imported is not None and alias.name == "*":
                        assigned["*"] = (*assigned.get("*", ()), imported)
                    else:
                        give(alias.asname or alias.name, imported)
            case ast.Try() | ast.TryStar():
                _read_statements(statement.body, package, assigned, True)
                for handler in statement.handlers:
                    _read_statements(handler.body, package, assigned, True)
                _read_statements(statement.orelse, package, assigned, True)
                _read_statements(statement.finalbody, package, assigned, is_tried)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                give(statement.name, None)
            case _:
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                        assigned.pop(node.id, None)
                    elif isinstance(node, ast.alias):
                        assigned.pop((node.asname or node.name).partition(".")[0], None)


def _read_literal(expression: ast.expr) -> bytes | None:
    import ast

    try:
        return namespaces.freeze(ast.literal_eval(expression))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


# --- where modules are ------------------------------------------------------------------------


@functools.lru_cache(maxsize=16_384)
def _is_local_path(path: str) -> bool:
    """Return whether a file or folder is neither the standard library's nor installed."""
    real = os.path.realpath(path)
    if not _SYSTEM_FOLDERS.isdisjoint(real.split(os.sep)):
        return False
    return not f"{real}{os.sep}".startswith(_system_paths())


@functools.cache
def _system_paths() -> tuple[str, ...]:
    import site
    import sysconfig

    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += site.getsitepackages()
    paths.append(site.getusersitepackages())
    return tuple({os.path.join(os.path.realpath(path), "") for path in paths if path})


class _Folder:
    """What a folder has of a package.

    Attributes:
        stamp: Of the folder, if a later change would show in it.
        key: What tells it from other folders, by whichever path.
        files: child -> path of its ``.py``
        folders: child -> path of a folder with that name
        extensions: Children that are extension modules.
        nbytes: Of all files together.
        n_entries: All that is in it.
    """

    def __init__(self, path: str, stat: os.stat_result) -> None:
        self.stamp = _stamp_of(stat)
        self.key = stat.st_dev, stat.st_ino
        self.files: dict[str, str] = {}
        self.folders: dict[str, str] = {}
        self.extensions: set[str] = set()
        self.nbytes = 0
        with os.scandir(path) as entries:
            seen = list(itertools.islice(entries, MAX_ENTRIES + 1))
        # It is full of data, with a module among it perhaps: nothing is listed.
        self._unlisted = path if len(seen) > MAX_ENTRIES else ""
        self.n_entries = 0 if self._unlisted else len(seen)
        for entry in () if self._unlisted else seen:
            child, dot, suffix = entry.name.partition(".")
            if not child.isidentifier() or child == "__pycache__":
                continue
            if suffix == "py":
                self.files[child] = entry.path
                with suppress(OSError):  # a link to nowhere
                    self.nbytes += entry.stat().st_size
            elif suffix.endswith(("so", "pyd")):
                self.extensions.add(child)
            elif not dot and entry.is_dir():
                self.folders[child] = entry.path

    def look_for(self, child: str) -> None:
        """See to it that a child is listed if it is there."""
        if self._unlisted:
            path = os.path.join(self._unlisted, child)
            if os.path.isdir(path):
                self.folders[child] = path
            if os.path.isfile(f"{path}.py"):
                self.files[child] = f"{path}.py"


_Place: TypeAlias = tuple[str, tuple[str, ...]]
"""Where a module is: its filename, empty for a namespace package; a package's folders."""

# Module -> the spec that it was loaded with, and what it was when it was first seen.
_loaded: dict[str, tuple[object, Source | None]] = {}
# Module, filename and folders -> its text as of the file's last change.
_on_disk: dict[tuple[str, str, tuple[str, ...]], Source] = {}
_folders: dict[str, _Folder] = {}
# Top-level module that is not loaded -> its filename and folders, if it is found in ``_places``.
_tops: dict[str, _Place | None] = {}
_places: tuple[object, ...] = ()
_bundled: weakref.WeakKeyDictionary[Namespace, dict[str, Source]] = weakref.WeakKeyDictionary()


class Search:
    """One look at the modules of this process and its disks, between which nothing changes."""

    def __init__(self) -> None:
        self._found: dict[str, Source | None] = {}
        self._listed: dict[str, _Folder | None] = {}
        self._knows_places = False

    def find(self, name: str) -> Source | None:
        """Return a module if it is local."""
        if name in self._found:
            return self._found[name]
        self._found[name] = None  # for who asks for it meanwhile
        try:
            source = self._find(name)
        except Exception:  # a module, its spec and its finder may be of any kind
            source = None
        self._found[name] = source
        return source

    def reach(self, names: Iterable[str], reached: dict[str, Source]) -> None:
        """Add the local modules among these, and all that their import statements name."""
        seen = set(reached)
        waiting = [each for name in names for each in (name, _parent_of(name))]
        while waiting:
            name = waiting.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            parent = _parent_of(name)
            above = self._found.get(parent)
            if above is not None and not above.text.is_package and name not in sys.modules:
                continue  # of ten names that statements import, nine are no modules
            source = self.find(name)
            if source is not None:
                reached[name] = source
                waiting += [each for each in source.imports if each not in seen]
                if parent and self.find(parent) is None:
                    # It was loaded without: all that is known of it is its name.
                    self._found[parent] = Source(parent, Text("", None, True))
                    seen.discard(parent)
                waiting.append(parent)
            elif name in sys.modules:
                spec = spec_of(sys.modules[name])
                if spec is not None and spec.name != name:
                    waiting += spec.name, _parent_of(spec.name)

    def reach_all(self, top: str, names: Iterable[str], reached: dict[str, Source]) -> None:
        """Add these modules, which are all of a package, and what they import from elsewhere.

        What they import from the package itself is among them. So most need not be compiled, which
        for a thousand modules takes seconds.
        """
        waiting: list[str] = []
        for name in names:
            source = None if name in reached else self.find(name)
            if source is None:
                continue
            reached[name] = source
            waiting.append(_parent_of(name))
            for other in source.mentions:
                if other != top and self.find(other) is not None:
                    waiting += source.imports
                    break
        self.reach(waiting, reached)

    def tree(self, top: Source) -> set[str] | None:
        """Return the names of all modules of a package; None if that is too much to travel."""
        namespace = namespaces.current()
        if namespace is not None and namespace.owns(top.name):
            inside = f"{top.name}."
            return {name for name in namespace.texts if name.startswith(inside)}
        names: set[str] = set()
        n_files = nbytes = 0
        for package, folder in self._walk(top.name, top.folders):
            if folder is None:
                return None
            n_files += len(folder.files)
            nbytes += folder.nbytes
            if n_files > MAX_FILES or nbytes > MAX_NBYTES:
                return None
            # A folder without any module in it is no package.
            names.update(f"{package}.{child}" for child in folder.files if child != "__init__")
            if "__init__" in folder.files:
                names.add(package)
        return names

    def _find(self, name: str) -> Source | None:
        if name.partition(".")[0] in _NEVER:
            return None
        module = sys.modules.get(name)
        if module is not None:
            spec = spec_of(module)
            if spec is None or spec.name != name:
                return None
            known = _loaded.get(name)
            if known is None or known[0] is not spec:
                known = _loaded[name] = spec, self._find_loaded(name, spec)
            return known[1]
        namespace = namespaces.current()
        if namespace is not None and namespace.owns(name):
            return _find_bundled(namespace, name)
        parent, _, child = name.rpartition(".")
        if not parent:
            place = self._find_top(name)
        elif (package := self.find(parent)) is not None:
            place = self._find_child(package, child)
        else:
            return None
        return None if place is None else self._read(name, *place)

    def _find_loaded(self, name: str, spec: ModuleSpec) -> Source | None:
        if isinstance(spec.loader, Loader):
            return _find_bundled(spec.loader.namespace, name)
        if (parent := _parent_of(name)) and self._is_installed(parent):
            return None
        folders = tuple(spec.submodule_search_locations or ())
        if spec.origin is None and not folders:
            return None
        return self._read(name, spec.origin or "", folders)

    def _is_installed(self, package: str) -> bool:
        """Return whether a package is there and not local, or would be if it were loaded."""
        if self.find(package) is not None:
            return False
        if spec_of(sys.modules.get(package)) is not None:
            return True
        parent = _parent_of(package)
        return self._is_installed(parent) if parent else self._find_top(package) is not None

    def _find_top(self, name: str) -> _Place | None:
        global _places
        if not self._knows_places:
            self._knows_places = True
            places = _find_places()
            if places != _places or None in places:
                _tops.clear()
                _places = places
        if name not in _tops:
            _tops[name] = _place_of(name)
        return _tops[name]

    def _find_child(self, package: Source, child: str) -> _Place | None:
        """Find a submodule as Python would, from the lists of its package's folders."""
        portions = []
        for path in package.folders:
            folder = self._list(path)
            if folder is None:
                continue
            folder.look_for(child)
            if child in folder.folders:
                inner = self._list(folder.folders[child])
                if inner is not None:
                    inner.look_for("__init__")
                    if "__init__" in inner.files:
                        return inner.files["__init__"], (folder.folders[child],)
                portions.append(folder.folders[child])
            if child in folder.extensions:
                return None
            if child in folder.files:
                return folder.files[child], ()
        return ("", tuple(portions)) if portions else None

    def _read(self, name: str, filename: str, folders: tuple[str, ...]) -> Source | None:
        """Return the module that is there, if it is local, as its file is now."""
        known = _on_disk.get((name, filename, folders))
        if known is not None and not folders and _is_unchanged(known):
            return known
        own = tuple(folder for folder in folders if _is_local_path(folder))
        is_partial = own != folders
        if not filename:
            return Source(name, Text("", None, True), own, is_partial=is_partial) if own else None
        if not filename.endswith(".py") or not _is_local_path(filename):
            return None
        parent = _parent_of(name)
        if folders and not (parent and (above := self.find(parent)) and above.is_regular):
            for _, folder in self._walk(name, own):
                if folder is not None and folder.extensions:
                    return None
        if known is not None and _is_unchanged(known):
            return known
        with open(filename, "rb") as file:
            stamp = _stamp_of(os.fstat(file.fileno()))
            text = Text(filename, file.read(), bool(folders))
        if known is None or known.text != text:
            known = Source(name, text, own, is_partial=is_partial)
            _on_disk[name, filename, folders] = known
        known.stamp = stamp
        return known

    def _walk(self, name: str, folders: Iterable[str]) -> Iterator[tuple[str, _Folder | None]]:
        """Yield the folders of a package and the packages that they would be; None at a bound."""
        seen = set()
        n_entries = 0
        waiting = [(name, path) for path in folders]
        while waiting:
            package, path = waiting.pop()
            folder = self._list(path)
            if folder is None or folder.key in seen:  # a link may lead round in circles
                continue
            seen.add(folder.key)
            n_entries += folder.n_entries
            if n_entries > MAX_ENTRIES:
                yield package, None
                return
            yield package, folder
            waiting += [(f"{package}.{child}", inner) for child, inner in folder.folders.items()]

    def _list(self, path: str) -> _Folder | None:
        """Return what is in a folder, or None if it cannot be read."""
        if path in self._listed:
            return self._listed[path]
        folder = _folders.get(path)
        try:
            stat = os.stat(path)
            if folder is None or folder.stamp != (stat.st_mtime_ns, stat.st_size, stat.st_ino):
                folder = _folders[path] = _Folder(path, stat)
        except OSError:
            folder = None
        self._listed[path] = folder
        return folder


def _find_bundled(namespace: Namespace, name: str) -> Source | None:
    """Return a module that came to this process in a bundle, as it came."""
    sources = _bundled.setdefault(namespace, {})
    if name not in sources and name in namespace.texts:
        is_partial = name in namespace.partial
        sources[name] = Source(name, namespace.texts[name], is_partial=is_partial)
    return sources.get(name)


def _is_unchanged(source: Source) -> bool:
    if source.stamp is None:
        return False
    stat = os.stat(source.text.filename)
    return source.stamp == (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _find_places() -> tuple[object, ...]:
    """Return all on which it depends where new top-level modules are found; None: may be young."""
    places: list[object] = [*sys.path, *map(id, sys.meta_path)]
    for path in sys.path:
        path = path or os.getcwd()
        if _is_local_path(path):
            with suppress(OSError):
                places.append(_stamp_of(os.stat(path)))
    return tuple(places)


def _place_of(name: str) -> _Place | None:
    for finder in sys.meta_path:
        # Others may import something, or build it.
        is_editable = getattr(finder, "__module__", "").startswith("__editable__")
        if finder is not PathFinder and not is_editable:
            continue
        spec = finder.find_spec(name, None)
        if spec is not None:
            return spec.origin or "", tuple(spec.submodule_search_locations or ())
    return None


def spec_of(module: object) -> ModuleSpec | None:
    spec = scope_of(module).get("__spec__")
    return spec if isinstance(spec, ModuleSpec) else None


def _stamp_of(stat: os.stat_result) -> _Stamp | None:
    """Return what a file or folder is like, or None if it may change and look the same."""
    if time.time() - stat.st_mtime < SETTLING:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


# --- what travels -----------------------------------------------------------------------------


def is_local(name: str) -> bool:
    """Return whether a module, loaded or not, is local; nothing is imported to find out."""
    return Search().find(name) is not None


def needed(names: Iterable[str]) -> frozenset[str]:
    """Return the local modules among these names, and all those that they need.

    Those are the packages that they are in, what their import statements name, and of each package
    all the rest, if it has at most 2,000 files and 8 MiB of source.
    """
    search = Search()
    reached: dict[str, Source] = {}
    search.reach(names, reached)
    whole: set[str] = set()
    while tops := {name.partition(".")[0] for name in reached} - whole:
        whole |= tops
        for top in tops:
            if reached[top].text.is_package:
                search.reach_all(top, search.tree(reached[top]) or (), reached)
    return frozenset(reached)


def digest(name: str) -> bytes:
    """Return 32 bytes that say what a local module is, with all local modules that it imports.

    Equal for equal texts, in all processes and on all machines.

    Raises:
        ValueError: it is no local module.
    """
    reached: dict[str, Source] = {}
    Search().reach([name], reached)
    if name not in reached:
        raise ValueError(f"{name} is no local module")
    total = hashlib.sha256(name.encode())
    for each in sorted(reached):
        total.update(b"\0" + each.encode() + b"\0" + reached[each].text_digest)
    return total.digest()


def bundle(names: frozenset[str], constants: Mapping[str, Mapping[str, object]]) -> bytes:
    """Return the texts of local modules as one blob, for `namespaces.Namespace`.

    Args:
        names: What `needed` gave.
        constants: What `constants` gave.
    """
    search = Search()
    sources = {name: source for name in sorted(names) if (source := search.find(name))}
    for name in list(sources):
        while (name := _parent_of(name)) and name not in sources:
            sources[name] = Source(name, Text("", None, True))
    packages = [name for name in sources if sources[name].text.is_package]
    partial = {name for name in packages if sources[name].is_partial}
    for top in [name for name in packages if "." not in name]:
        tree = search.tree(sources[top])
        if tree is None or any(search.find(name) for name in tree - sources.keys()):
            partial.update(name for name in packages if f"{name}.".startswith(f"{top}."))
    texts = {name: source.text for name, source in sources.items()}
    return namespaces.pack(texts, constants, partial)


def _parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def scope_of(module: object) -> dict[str, Any]:
    """Return a module's globals, past any `__getattribute__`, which may import it."""
    try:
        return cast("dict[str, Any]", object.__getattribute__(module, "__dict__"))
    except AttributeError:
        return {}
