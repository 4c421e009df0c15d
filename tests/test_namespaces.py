import enum
import importlib
import importlib.util
import linecache
import os
import pickle
import pkgutil
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap import namespaces
from dmap.namespaces import Namespace, Text, active

ROOT = Path(__file__).parent.parent

numbers = st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.tuples(st.text()), inner, max_size=4)
        | st.sets(st.integers() | st.frozensets(st.text(), max_size=3), max_size=4)
    ),
    max_leaves=10,
)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Have each test leave ``sys.modules`` and the finders as they were."""
    modules, finders = dict(sys.modules), list(sys.meta_path)
    lines = set(linecache.cache)
    yield
    assert namespaces.current() is None
    assert sys.meta_path == finders
    assert set(linecache.cache) - lines <= set(filter(os.path.exists, linecache.cache))
    for name in [name for name in sys.modules if name not in modules]:
        del sys.modules[name]
    for name, module in modules.items():
        assert sys.modules[name] is module


def bundle(
    texts: Mapping[str, str | None],
    constants: Mapping[str, Mapping[str, object]] | None = None,
    partial: tuple[str, ...] = (),
) -> bytes:
    """Return a bundle of these modules; with None for a namespace package.

    What has submodules is a package; its file is ``__init__.py``.
    """
    packed = {}
    for name, text in texts.items():
        is_package = text is None or any(other.startswith(f"{name}.") for other in texts)
        place = f"/client/{name.replace('.', '/')}" + ("/__init__.py" if is_package else ".py")
        source = None if text is None else textwrap.dedent(text).encode()
        packed[name] = Text("" if text is None else place, source, is_package)
    return namespaces.pack(packed, constants or {}, partial)


def namespace(texts: Mapping[str, str | None], *args: Any) -> Namespace:
    return Namespace(bundle(texts, *args))


def load(name: str) -> Any:
    return importlib.import_module(name)


# Plain data


@given(plain)
def test_plain_data_comes_back_equal(value: object) -> None:
    frozen = namespaces.freeze(value)
    assert frozen is not None
    back = namespaces.thaw(frozen)
    assert back == value
    assert type(back) is type(value)
    assert namespaces.freeze(back) == frozen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("a", b"a"),
        ((1, 2), [1, 2]),
        ({1}, frozenset({1})),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1], [True]),
        (("set", 1), {1}),
        ((), set()),
    ],
)
def test_what_differs_in_anything_is_frozen_differently(one: object, other: object) -> None:
    assert namespaces.freeze(one) != namespaces.freeze(other)


def test_one_text_twice_and_two_equal_texts_are_frozen_alike() -> None:
    text = "".join(["a", "b"])
    assert namespaces.freeze([text, text]) == namespaces.freeze(["ab", "".join(["a", "b"])])


class Number(int):
    pass


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Number(3),
        enum.Enum("Color", "RED").RED,  # type: ignore[attr-defined]
        [threading.Lock()],
        range(3),
        bytearray(b"a"),
        {"a": len},
        list(range(namespaces.MAX_ELEMENTS + 1)),
        [[0] * 600, [0] * 600],
        "a" * (namespaces.MAX_NBYTES + 1),
        1 << (8 * namespaces.MAX_NBYTES + 8),
        [[[[[[[[[1]]]]]]]]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_or_too_much_is_not_frozen(value: object) -> None:
    assert namespaces.freeze(value) is None


def test_data_that_holds_itself_is_not_plain() -> None:
    value: list[object] = []
    value.append(value)
    assert namespaces.freeze(value) is None


def test_a_bundle_is_the_same_bytes_in_processes_with_other_hash_seeds() -> None:
    text = (
        "from dmap.namespaces import Text, pack; import sys\n"
        "names = {'a', 'b', 'c', 'd', 'e'}\n"
        "texts = {name: Text(f'/{name}.py', b'x = 1', False) for name in names}\n"
        "constants = {name: {other: names for other in names} for name in names}\n"
        "sys.stdout.buffer.write(pack(texts, constants, names))"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", text],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outs) == 1
    assert len(outs.pop()) > 100


# What is imported, and from where


def test_modules_come_from_the_bundle() -> None:
    with active(namespace({"nshelper": "RATE = 3\ndef triple(x): return RATE * x"})):
        assert load("nshelper").triple(2) == 6


def test_they_are_gone_when_the_namespace_is_left() -> None:
    with active(namespace({"nshelper": "", "nspkg": "", "nspkg.sub": ""})):
        load("nshelper"), load("nspkg.sub")
    assert not {"nshelper", "nspkg", "nspkg.sub"} & sys.modules.keys()
    with pytest.raises(ModuleNotFoundError):
        load("nshelper")


def test_they_stay_loaded_in_it() -> None:
    own = namespace({"nshelper": "count = []"})
    with active(own):
        first = load("nshelper")
        first.count.append(1)
    with active(own):
        assert load("nshelper") is first
        assert load("nshelper").count == [1]


def test_two_versions_of_a_module_live_side_by_side() -> None:
    old, new = namespace({"nshelper": "V = 1"}), namespace({"nshelper": "V = 2"})
    seen = []
    for each in (old, new, old, new):
        with active(each):
            seen.append(load("nshelper").V)
    assert seen == [1, 2, 1, 2]


def test_a_namespace_in_another_sets_it_aside() -> None:
    old, new = namespace({"nshelper": "V = 1"}), namespace({"nshelper": "V = 2"})
    with active(old):
        first = load("nshelper")
        with active(new):
            assert load("nshelper").V == 2
            with active(old):
                assert load("nshelper") is first
        assert load("nshelper") is first


def test_no_namespace_in_one_is_the_workers_own_modules() -> None:
    own = sys.modules["nshelper"] = ModuleType("nshelper")
    with active(namespace({"nshelper": "V = 1"})):
        assert load("nshelper").V == 1
        with active(None):
            assert load("nshelper") is own
        assert load("nshelper").V == 1
    assert sys.modules["nshelper"] is own


def test_a_namespace_may_become_the_active_one_until_another_does() -> None:
    old, new = namespace({"nshelper": "V = 1"}), namespace({"nshelper": "V = 2"})
    try:
        namespaces.become(old)
        first = load("nshelper")
        namespaces.become(new)
        assert load("nshelper").V == 2
        namespaces.become(old)
        namespaces.become(old)
        assert load("nshelper") is first
        with active(new):
            assert load("nshelper").V == 2
        assert namespaces.current() is old
    finally:
        namespaces.become(None)
    assert "nshelper" not in sys.modules


def test_the_workers_own_modules_are_put_back_when_a_job_raises() -> None:
    own = sys.modules["nshelper"] = ModuleType("nshelper")
    with pytest.raises(ZeroDivisionError), active(namespace({"nshelper": "1 / 0"})):
        load("nshelper")
    assert sys.modules["nshelper"] is own


def test_the_workers_own_submodules_are_out_of_sight() -> None:
    package, sub = ModuleType("nspkg"), ModuleType("nspkg.old")
    package.__path__ = []
    sys.modules.update({"nspkg": package, "nspkg.old": sub})
    with active(namespace({"nspkg": "", "nspkg.new": ""})):
        with pytest.raises(ModuleNotFoundError):
            load("nspkg.old")
        load("nspkg.new")
    assert sys.modules["nspkg.old"] is sub
    assert "nspkg.new" not in sys.modules


def test_a_module_of_the_bundle_goes_before_an_installed_one() -> None:
    import colorsys

    with active(namespace({"colorsys": "V = 1"})):
        assert load("colorsys").V == 1
    assert load("colorsys") is colorsys


def test_what_is_not_in_the_bundle_is_shared() -> None:
    with active(namespace({"nshelper": "import json"})):
        assert load("nshelper").json is sys.modules["json"]


def test_what_another_module_put_under_a_name_of_the_bundle_does_not_stay() -> None:
    with active(namespace({"nshelper": ""})):
        sys.modules["nshelper"] = ModuleType("nshelper")
    assert "nshelper" not in sys.modules


def test_a_module_that_a_job_took_out_is_loaded_anew() -> None:
    own = namespace({"nshelper": ""})
    with active(own):
        first = load("nshelper")
    with active(own):
        del sys.modules["nshelper"]
    with active(own):
        assert load("nshelper") is not first


def test_a_module_can_be_reloaded_in_its_namespace() -> None:
    with active(namespace({"nshelper": "V = 1"}, {"nshelper": {"W": 2}})):
        module = load("nshelper")
        module.V = module.W = 5
        assert importlib.reload(module) is module
        assert (module.V, module.W) == (1, 2)


# Packages


PACKAGE: dict[str, str | None] = {
    "nspkg": "from .a import one\nfrom . import b",
    "nspkg.a": "from .inner.deep import two\none = two - 1",
    "nspkg.b": "from nspkg import a",
    "nspkg.inner": "",
    "nspkg.inner.deep": "two = 2",
    "nspkg.inner.lazy": "def f():\n    from ..a import one\n    return one",
}


def test_packages_import_their_parts_relatively_and_absolutely() -> None:
    with active(namespace(PACKAGE)):
        package = load("nspkg")
        assert (package.one, package.b.a.one) == (1, 1)
        assert load("nspkg.inner.lazy").f() == 1


def test_parts_hang_on_the_package_of_their_own_namespace() -> None:
    one, other = namespace(PACKAGE), namespace(PACKAGE)
    with active(one):
        first = load("nspkg")
    with active(other):
        second = load("nspkg")
    assert first.a is not second.a
    assert first.inner.deep is not second.inner.deep
    with active(one):
        assert load("nspkg.a") is first.a


def test_circular_imports_work() -> None:
    texts = {"nsa": "import nsb\ndef f(): return nsb.V", "nsb": "import nsa\nV = 3"}
    with active(namespace(texts)):
        assert load("nsa").f() == 3


def test_a_namespace_package_has_no_file() -> None:
    with active(namespace({"nsspace": None, "nsspace.sub": "V = 1"})):
        from nsspace import sub  # type: ignore[import-not-found]

        assert sub.V == 1
        assert getattr(load("nsspace"), "__file__", None) is None


def test_a_package_that_came_whole_is_not_searched_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nspkg").mkdir()
    (tmp_path / "nspkg" / "__init__.py").touch()
    (tmp_path / "nspkg" / "stale.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with active(namespace({"nspkg": "", "nspkg.sub": ""})):
        assert importlib.util.find_spec("nspkg.stale") is None
        with pytest.raises(ImportError, match="cannot import name 'stale'"):
            from nspkg import stale  # type: ignore[import-not-found] # noqa: F401


def test_what_was_left_out_is_found_where_this_host_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nspkg" / "inner").mkdir(parents=True)
    (tmp_path / "nspkg" / "__init__.py").write_text("raise SystemError")
    (tmp_path / "nspkg" / "rest.py").write_text("from . import V\nfrom .inner import more")
    (tmp_path / "nspkg" / "inner" / "__init__.py").write_text("raise SystemError")
    (tmp_path / "nspkg" / "inner" / "more.py").write_text("W = 2")
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"nspkg": "V = 1", "nspkg.inner": "", "nspkg.inner.x": ""}
    own = namespace(texts, {}, ("nspkg", "nspkg.inner"))
    with active(own):
        rest = load("nspkg.rest")
        assert (rest.V, rest.more.W) == (1, 2)
    assert not [name for name in sys.modules if name.startswith("nspkg")]
    with active(own):
        assert load("nspkg.rest") is rest


def test_installed_parts_of_a_namespace_package_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nsspace").mkdir()
    (tmp_path / "nsspace" / "installed.py").write_text("V = 1")
    (tmp_path / "nsspace" / "before.py").write_text("V = 2")
    monkeypatch.syspath_prepend(tmp_path)
    before = load("nsspace.before")
    texts = {"nsspace": None, "nsspace.local": "from nsspace import installed, before"}
    with active(namespace(texts, {}, ("nsspace",))):
        local = load("nsspace.local")
        assert local.before is before
        assert load("nsspace").before is before
    assert load("nsspace.installed") is local.installed
    assert load("nsspace").installed is local.installed
    assert not hasattr(load("nsspace"), "local")
    with active(namespace(texts, {}, ("nsspace",))):
        assert load("nsspace.local") is not local
        assert load("nsspace.local").installed is local.installed
        with pytest.raises(AttributeError, match="no attribute 'absent'"):
            _ = load("nsspace").absent


# What modules know of themselves


def test_a_module_knows_where_the_client_has_it() -> None:
    with active(namespace(PACKAGE)):
        package, sub = load("nspkg"), load("nspkg.a")
        assert (package.__file__, sub.__file__) == (
            "/client/nspkg/__init__.py",
            "/client/nspkg/a.py",
        )
        assert (package.__path__, package.__package__, sub.__package__) == ([], "nspkg", "nspkg")
        assert sub.__loader__.is_package("nspkg.a") is False
        assert package.__loader__.is_package("nspkg") is True
        assert "from '/client/nspkg/a.py'" in repr(sub)


def test_a_source_in_another_encoding_is_read_as_it_says() -> None:
    text = '# -*- coding: latin-1 -*-\nname = "Käse"\r\n'.encode("latin-1")
    blob = namespaces.pack({"nshelper": Text("/client/nshelper.py", text, False)}, {}, ())
    with active(Namespace(blob)):
        assert load("nshelper").name == "Käse"
        assert load("nshelper").__loader__.get_source("nshelper").endswith('"Käse"\n')


def test_future_statements_of_ours_are_not_theirs() -> None:
    with active(namespace({"nshelper": "def f(x: 1 + 1): ..."})):
        assert load("nshelper").f.__annotations__ == {"x": 2}


def test_a_traceback_shows_lines_of_files_that_are_not_here() -> None:
    with active(namespace({"nshelper": "def f(x):\n    return 1 / x  # this one"})):
        try:
            load("nshelper").f(0)
        except ZeroDivisionError:
            text = traceback.format_exc()
    assert 'File "/client/nshelper.py", line 2, in f\n    return 1 / x  # this one\n' in text


def test_a_traceback_shows_what_ran_and_not_what_the_disk_has_by_now(tmp_path: Path) -> None:
    path = tmp_path / "nshelper.py"
    path.write_text("# another line\n# and another\n")
    versions = []
    for comment in ("old", "new"):
        text = f"def f(x):\n    return 1 / x  # {comment}".encode()
        blob = namespaces.pack({"nshelper": Text(str(path), text, False)}, {}, ())
        versions.append(Namespace(blob))
    seen = []
    for each in (*versions, *versions):
        with active(each):
            try:
                load("nshelper").f(0)
            except ZeroDivisionError:
                seen.append(traceback.format_exc().split("# ")[1].split()[0])
    assert seen == ["old", "new", "old", "new"]
    assert linecache.getline(str(path), 1) == "# another line\n"


def test_lines_are_counted_as_python_counts_them() -> None:
    with active(namespace({"nshelper": "x = 1\n\f\ndef f(x):\n    return 1 / x  # this one\n"})):
        try:
            load("nshelper").f(0)
        except ZeroDivisionError:
            assert "# this one" in traceback.format_exc()


def test_data_beside_a_package_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "table.txt").write_text("some text")
    text = Text(str(tmp_path / "__init__.py"), b"", True)
    with active(Namespace(namespaces.pack({"nspkg": text}, {}, ()))):
        assert pkgutil.get_data("nspkg", "table.txt") == b"some text"
        assert resources.files("nspkg").joinpath("table.txt").read_text() == "some text"


def test_classes_and_enums_are_the_same_for_all_jobs_of_a_namespace() -> None:
    text = "import enum\nclass Color(enum.Enum):\n    RED = 1\nclass Point: pass"
    own = namespace({"nshelper": text})
    with active(own):
        red, point = load("nshelper").Color.RED, load("nshelper").Point()
        pickled = pickle.dumps((red, point))
    with active(own):
        again, other = pickle.loads(pickled)
        assert again is red is load("nshelper").Color(1)
        assert type(other) is type(point)
    with active(namespace({"nshelper": text})):
        assert pickle.loads(pickled)[0] is not red


def test_a_lock_at_the_top_of_a_module_is_made_there() -> None:
    with active(namespace({"nshelper": "import threading\nlock = threading.Lock()"})):
        lock = load("nshelper").lock
        assert lock.acquire(blocking=False)
        assert lock is load("nshelper").lock


# Constants


def test_what_the_client_had_set_is_set_after_the_code_ran() -> None:
    texts = {"nshelper": "RATE = 1\nTWICE = 2 * RATE", "nsuser": "from nshelper import RATE"}
    with active(namespace(texts, {"nshelper": {"RATE": 3, "NEW": ("a", {1})}})):
        assert load("nsuser").RATE == 3
        assert load("nshelper").TWICE == 2
        new = load("nshelper").NEW
        assert new == ("a", {1})


def test_each_namespace_has_constants_of_its_own() -> None:
    blob = bundle({"nshelper": "TABLE = {}"}, {"nshelper": {"TABLE": {"a": [1]}}})
    one, other = Namespace(blob), Namespace(blob)
    with active(one):
        load("nshelper").TABLE["a"].append(2)
    with active(other):
        assert load("nshelper").TABLE == {"a": [1]}


def test_constants_of_modules_that_are_not_in_the_bundle_are_left_out() -> None:
    assert bundle({"nsa": ""}, {"json": {"x": 1}}) == bundle({"nsa": ""})


# What goes wrong


def test_a_module_that_fails_leaves_nothing_of_itself() -> None:
    own = namespace(
        {
            "nspkg": "from . import a\nfrom nsother import V\n1 / V",
            "nspkg.a": "",
            "nsother": "V = 0",
        }
    )
    with active(own):
        with pytest.raises(ZeroDivisionError):
            load("nspkg")
        assert not {"nspkg", "nspkg.a"} & sys.modules.keys()
        load("nsother").V = 1
    with active(own):
        assert "nspkg" not in sys.modules
        assert load("nspkg").a is load("nspkg.a")


def test_a_module_that_fails_to_reload_stays() -> None:
    with active(
        namespace({"nspkg": "import nsother\n1 / nsother.V", "nspkg.a": "", "nsother": "V = 1"})
    ):
        package, part = load("nspkg"), load("nspkg.a")
        load("nsother").V = 0
        with pytest.raises(ZeroDivisionError):
            importlib.reload(package)
        assert (load("nspkg"), load("nspkg.a")) == (package, part)


def test_a_syntax_error_is_that_of_the_clients_file() -> None:
    with active(namespace({"nshelper": "x = 1\ndef f(:"})), pytest.raises(SyntaxError) as caught:
        load("nshelper")
    assert (caught.value.filename, caught.value.lineno) == ("/client/nshelper.py", 2)


def absence(name: str) -> ModuleNotFoundError:
    with pytest.raises(ModuleNotFoundError) as caught:
        load(name)
    return caught.value


def test_a_missing_module_is_told_with_the_ways_out() -> None:
    message = namespaces.missing(absence("nsabsent.sub"))
    python = ".".join(map(str, sys.version_info[:3]))
    assert message.startswith(
        f"there is no module nsabsent on {os.uname().nodename} (Python {python}); "
    )
    assert "(pip install nsabsent)" in message
    assert "next to the script" in message


def test_a_missing_part_of_a_package_that_came_is_told_as_such() -> None:
    with active(namespace({"nspkg": "", "nspkg.a": ""})):
        message = namespaces.missing(absence("nspkg.absent"))
    assert "the package nspkg came with the function, and has no such module" in message


def test_a_missing_part_of_a_package_too_large_is_told_as_such() -> None:
    own = namespace({"nspkg": "", "nspkg.a": ""}, {}, ("nspkg",))
    with active(own):
        error = absence("nspkg.absent")
    assert "but not all of it" in namespaces.missing(error, own)
    assert "came with the function" not in namespaces.missing(error)


def test_an_error_without_a_name_is_told_by_its_text() -> None:
    assert namespaces.missing(ModuleNotFoundError("no such thing")).endswith(": no such thing")


def interrupt_at(n: int) -> Any:
    """Return a trace function that raises at the n-th line of switching."""
    left = n

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != namespaces.__file__:
            return None
        if frame.f_code.co_name in ("__init__", "__enter__", "__exit__", "_switch"):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("way", ["in", "out"])
def test_an_interrupted_switch_leaves_what_was_before(way: str) -> None:
    outer = namespace({"nspkg": "", "nspkg.a": ""})
    inner = namespace({"nspkg": "", "nspkg.b": "", "nshelper": ""})
    own = sys.modules["nshelper"] = ModuleType("nshelper")
    with active(outer):
        first = load("nspkg.a")
    with active(inner):
        second = load("nspkg.b"), load("nshelper")
    finders = list(sys.meta_path)
    traced = sys.gettrace()
    for n in range(1, 1000):
        with active(outer):
            here = dict(sys.modules)
            switch = active(inner)
            try:
                if way == "out":
                    switch.__enter__()
                sys.settrace(interrupt_at(n))
                if way == "in":
                    switch.__enter__()
                else:
                    switch.__exit__(None, None, None)
            except KeyboardInterrupt:
                sys.settrace(traced)
            else:
                sys.settrace(traced)
                if way == "in":
                    switch.__exit__(None, None, None)
                break
            assert sys.modules == here
            assert namespaces.current() is outer
            assert sys.meta_path[1:] == finders
        with active(inner):
            assert (load("nspkg.b"), load("nshelper")) == second
        with active(outer):
            assert load("nspkg.a") is first
        assert sys.modules["nshelper"] is own
    assert 10 < n < 999
    assert sys.modules["nshelper"] is own


# Cost and threads


def test_entering_the_active_one_again_costs_next_to_nothing() -> None:
    own = namespace({f"nspkg{n}": "" for n in range(300)})
    with active(own):
        best = 1.0
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(100):
                with active(own):
                    pass
            best = min(best, (time.perf_counter() - started) / 100)
    assert best < 2e-6


def test_threads_of_a_job_import_from_its_namespace() -> None:
    seen = []
    with active(namespace({"nshelper": "V = 1"})):
        thread = threading.Thread(target=lambda: seen.append(load("nshelper").V))
        thread.start()
        thread.join()
    assert seen == [1]


def test_importing_it_imports_no_slow_modules() -> None:
    text = (
        "import sys; before = set(sys.modules); import dmap.namespaces, dmap.local_code;"
        "print({'dis', 'inspect', 'ast', 'linecache', 'cloudpickle', 'tokenize', 'platform'}"
        " & set(sys.modules) - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.stdout == "set()\n", out.stderr
