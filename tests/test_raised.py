import asyncio
import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmap import raised
from dmap.errors import DmapError, RemoteError, WorkerLost

ROOT = Path(__file__).parent.parent


def caught(error: BaseException) -> BaseException:
    """Return an exception with the traceback of having been raised."""
    try:
        raise error
    except BaseException as error:
        return error


def home(error: BaseException) -> Any:
    """Return what arrives at the client when a function raises this."""
    return raised.restore(*raised.describe(caught(error)))


class TwoArguments(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class WithSlots(Exception):
    __slots__ = ("__hidden", "code", "unset")

    def __init__(self, code: int | None) -> None:
        super().__init__()
        self.code = code
        self.__hidden = "under a mangled name"

    def hidden(self) -> str:
        return self.__hidden


class Mended(WithSlots):
    """Its pickle says on purpose what its slot holds where it arrives."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return Mended, (self.code + 1,)


class Lacks(AttributeError):
    def __init__(self, owner: object, name: str) -> None:
        super().__init__(name, name=name, obj=owner)


class LoadsNowhere:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int
    text: str


class FileTrouble(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such thing", path)


class BadBytes(UnicodeDecodeError):
    def __reduce__(self) -> str:
        raise self


class OtherNew(ValueError):
    def __new__(cls, *, code: int) -> "OtherNew":
        return super().__new__(cls, code)

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class ReduceRaises(Exception):
    def __reduce__(self) -> str:
        raise self.args[0]


class BecomesOther(Exception):
    def __reduce__(self) -> Any:
        return ValueError, self.args


class BecomesNothing(Exception):
    def __reduce__(self) -> Any:
        return str, ("not an exception",)


class ForgetsNotes(Exception):
    def __reduce__(self) -> Any:
        return ForgetsNotes, ()


class InitExits(Exception):
    armed = False

    def __init__(self, *args: object) -> None:
        if InitExits.armed:
            raise SystemExit(3)
        super().__init__(*args)
        InitExits.armed = True


class Locked(LookupError):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({code})", threading.Lock())
        self.lock = threading.Lock()
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message}: {self.lock.locked()}"


class StrRaises(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


class Mixin:
    pass


class NotSubclassed(Mixin, ValueError):
    """It cannot travel, and no class can be both it and another."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, threading.Lock())

    def __init_subclass__(cls) -> None:
        raise TypeError("final")


# What arrives whole


@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain", 3),
        KeyError("key"),
        FileNotFoundError(2, "no such file", "/nowhere"),
        WorkerLost(17, "papag", 3, "SIGKILL"),
        TwoArguments(3, "text"),
        Frozen(3, "text"),
        FileTrouble("/nowhere"),
        BadBytes("utf-8", b"\xff", 0, 1, "invalid start byte"),
        OtherNew(code=3),
        ReduceRaises(ValueError("at no time")),
        ReduceRaises(SystemExit(3)),
        BecomesOther("text"),
        BecomesNothing("text"),
        RemoteError("pkg.Odd", "text", "Traceback ..."),
    ],
    ids=repr,
)
def test_an_exception_arrives_as_its_own_type_with_all_it_has(error: Exception) -> None:
    back = home(error)
    assert type(back) is type(error)
    assert repr(back.args) == repr(error.args)
    assert vars(back) == vars(error)
    assert str(back) == str(error)


def test_slots_arrive() -> None:
    back = home(WithSlots(None))
    assert (type(back), back.code, back.hidden()) == (WithSlots, None, "under a mangled name")
    assert not hasattr(back, "unset")


def test_a_slot_that_its_own_pickle_fills_is_left_to_it() -> None:
    assert home(Mended(3)).code == 4


def test_the_object_that_lacked_an_attribute_stays_behind() -> None:
    back = home(Lacks(Frozen, "colour"))
    assert (type(back), back.name, back.obj) == (Lacks, "colour", None)


@pytest.mark.parametrize(
    "error", [ValueError(), TwoArguments(1, "a"), ForgetsNotes(), Frozen(1, "")]
)
def test_notes_are_kept(error: Exception) -> None:
    object.__setattr__(error, "__notes__", ["mind the gap"])
    assert home(error).__notes__ == ["mind the gap"]


def test_an_exception_group_arrives_with_what_is_in_it() -> None:
    group = ExceptionGroup("both", [ValueError("a"), ExceptionGroup("c", [KeyError("b")])])
    back = home(group)
    assert type(back) is ExceptionGroup
    assert back.subgroup(KeyError).exceptions[0].exceptions[0].args == ("b",)


def test_a_group_with_a_lock_on_it_is_still_a_group() -> None:
    group = ExceptionGroup("both", [ValueError("a")])
    group.lock = threading.Lock()  # type: ignore[attr-defined]
    back = home(group)
    assert isinstance(back, RemoteError)
    assert repr(back.exceptions) == "(ValueError('a'),)"


def test_an_argument_that_loads_nowhere_stays_behind() -> None:
    error = Locked(3, "shut")
    error.args = (LoadsNowhere(),)
    back = home(error)
    assert isinstance(back, Locked)
    assert (back.code, back.args) == (3, ("shut: False",))


def test_an_array_on_an_exception_arrives() -> None:
    error = TwoArguments(1, "a")
    error.array = np.arange(10_000)  # type: ignore[attr-defined]
    assert np.array_equal(home(error).array, np.arange(10_000))


def test_an_exception_of_a_local_class_arrives_with_its_class() -> None:
    class Local(ValueError):
        code = 3

    back = home(Local("text"))
    assert (type(back).__name__, back.code, back.args) == ("Local", 3, ("text",))


# What arrives in part


def test_an_exception_with_a_lock_arrives_as_both_its_type_and_a_remote_error() -> None:
    back = home(Locked(3, "shut"))
    assert isinstance(back, Locked)
    assert isinstance(back, RemoteError)


def test_it_keeps_the_attributes_that_travel() -> None:
    back = home(Locked(3, "shut"))
    assert (back.code, back.message, hasattr(back, "lock")) == (3, "shut", False)


def test_it_reads_as_it_did_on_the_worker() -> None:
    assert str(home(Locked(3, "shut"))) == "shut: False"


def test_it_has_the_remote_facts() -> None:
    back = home(Locked(3, "shut"))
    assert back.type_name == "test_raised.Locked"
    assert "in caught" in back.traceback


def test_it_is_of_one_class_however_often_it_comes() -> None:
    assert type(home(Locked(3, "shut"))) is type(home(Locked(4, "open")))


@pytest.mark.parametrize(
    "again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error)), home]
)
def test_it_can_be_copied_pickled_and_sent_on(again: Callable[[Any], Any]) -> None:
    first = home(Locked(3, "shut"))
    back = again(first)
    assert type(back) is type(first)
    assert (str(back), back.args, back.code) == (str(first), first.args, 3)


def test_what_cannot_be_both_arrives_as_the_nearest_base_that_can() -> None:
    back = home(NotSubclassed(1, 2))
    assert isinstance(back, RemoteError)
    assert isinstance(back, ValueError)
    assert not isinstance(back, NotSubclassed)


def test_an_attribute_that_loads_only_on_the_worker_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_at_the_worker.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_at_the_worker  # type: ignore[import-not-found]

    error = TwoArguments(1, "a")
    error.thing = only_at_the_worker.Thing()  # type: ignore[attr-defined]
    sent = raised.describe(error)
    monkeypatch.undo()
    del sys.modules["only_at_the_worker"]
    back = raised.restore(*sent)
    assert isinstance(back, TwoArguments)
    assert isinstance(back, RemoteError)
    assert (back.code, hasattr(back, "thing")) == (1, False)


def test_a_class_that_is_only_on_the_worker_arrives_as_a_remote_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_there.py").write_text("class Odd(Exception): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_there  # type: ignore[import-not-found]

    sent = raised.describe(only_there.Odd("text"))
    monkeypatch.undo()
    del sys.modules["only_there"]
    back = raised.restore(*sent)
    assert (type(back), str(back)) == (RemoteError, "only_there.Odd: text")


def test_a_large_attribute_is_left_out() -> None:
    error = TwoArguments(1, "a")
    error.large = bytes(raised.PICKLED_NBYTES)  # type: ignore[attr-defined]
    back = home(error)
    assert isinstance(back, TwoArguments)
    assert (back.code, hasattr(back, "large")) == (1, False)


def test_the_smallest_attributes_arrive_as_far_as_there_is_room() -> None:
    error: Any = ValueError("text")
    all_room = raised.PART_NBYTES
    error.large, error.most, error.small = bytes(4 * all_room), bytes(all_room - 100), bytes(1000)
    summary, pickled = raised.describe(error)
    back = raised.restore(summary, pickled)
    assert isinstance(back, ValueError)
    assert vars(back).keys() & {"large", "most", "small"} == {"small"}
    assert len(pickled) <= raised.PICKLED_NBYTES


def test_large_args_stay_behind_and_leave_the_attributes_their_room() -> None:
    error: Any = ValueError(bytes(2 * raised.PART_NBYTES))
    error.large, error.most = bytes(raised.PICKLED_NBYTES), bytes(raised.PART_NBYTES - 100)
    back = home(error)
    assert isinstance(back, ValueError)
    assert (len(back.most), type(back.args[0])) == (raised.PART_NBYTES - 100, str)


def test_a_huge_message_is_cut_in_the_middle() -> None:
    summary, pickled = raised.describe(caught(ValueError("a" * 20_000_000 + "z")))
    assert len(summary.message) <= raised.MESSAGE_NBYTES
    assert len(summary.traceback_text) <= raised.TRACEBACK_NBYTES
    assert len(pickled) <= raised.PICKLED_NBYTES
    back = raised.restore(summary, pickled)
    assert isinstance(back, ValueError)
    assert str(back).startswith("aaa")
    assert str(back).endswith("aaz")
    assert "bytes left out" in str(back)


def test_all_bytes_are_accounted_for_when_the_middle_is_cut() -> None:
    message = raised.describe(ValueError("x" * 100_000))[0].message
    left_out = int(message.split("(")[1].split()[0])
    assert left_out + message.count("x") == 100_000


def test_the_cut_never_splits_a_character() -> None:
    message = raised.describe(ValueError("é" * 100_000))[0].message
    assert set(message) <= set("é ... (0123456789 bytes left out)")
    assert len(message.encode()) <= raised.MESSAGE_NBYTES


def test_a_message_that_utf_8_cannot_say_is_escaped() -> None:
    assert raised.describe(ValueError("\udcff"))[0].message == "\\udcff"


# What arrives as text alone


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt("^C"),
        GeneratorExit(),
        asyncio.CancelledError(),
        StopIteration(3),
        StopAsyncIteration(),
        BaseExceptionGroup("all", [SystemExit(3)]),
        type("Abort", (BaseException,), {})(),
        type("Exit", (SystemExit,), {})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_order_to_the_worker_is_no_order_to_the_client(error: BaseException) -> None:
    back = home(error)
    assert type(back) is RemoteError
    assert type(error).__name__ in back.type_name
    assert "in caught" in back.traceback


def test_a_parcel_never_opens_as_an_order() -> None:
    parcel = raised._pack_whole(SystemExit(3))  # type: ignore[arg-type]
    back = raised.restore(raised.Summary("Odd", "text", ""), parcel)
    assert type(back) is RemoteError


@pytest.mark.parametrize(
    "pickled", [b"", b"junk", pickle.dumps(3), pickle.dumps(("whole", b"", {}))]
)
def test_a_parcel_that_does_not_open_is_a_remote_error(pickled: bytes) -> None:
    back = raised.restore(raised.Summary("pkg.Odd", "text", "Traceback ..."), pickled)
    assert type(back) is RemoteError
    assert (back.type_name, back.message, back.traceback) == ("pkg.Odd", "text", "Traceback ...")


def test_ctrl_c_while_a_parcel_opens_is_the_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = raised.describe(TwoArguments(1, "a"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(raised, "_put_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        raised.restore(*sent)


# Whatever its own code does


@pytest.mark.parametrize(
    "error",
    [StrRaises("text"), InitExits("text"), ReduceRaises(KeyboardInterrupt()), Frozen(1, "a")],
    ids=lambda error: type(error).__name__,
)
def test_code_that_raises_what_it_likes_hurts_nobody(error: Exception) -> None:
    back = home(error)
    assert isinstance(back, type(error))
    raised.annotate(back, 1, "papag")


def test_an_exception_without_a_text_says_so() -> None:
    assert raised.describe(StrRaises())[0].message == "<its __str__ raised>"


def test_a_class_that_lies_about_itself_hurts_nobody() -> None:
    class Meta(type):
        @property
        def __module__(cls) -> str:
            raise SystemExit(1)

    class Odd(Exception, metaclass=Meta):
        pass

    assert isinstance(home(Odd()), RemoteError)


def test_an_exception_that_hides_its_attributes_hurts_nobody() -> None:
    class Hidden(Exception):
        @property
        def __dict__(self) -> Any:
            raise SystemExit(1)

    assert isinstance(home(Hidden("text")), RemoteError)


def test_a_recursion_two_thousand_deep_arrives() -> None:
    def deep(n: int) -> int:
        return deep(n - 1) + 1

    try:
        deep(2000)
    except RecursionError as error:
        back = raised.restore(*raised.describe(error))
    assert type(back) is RecursionError
    assert "Previous line repeated" in str(back.__cause__)


def test_a_group_nested_two_thousand_deep_arrives_somehow() -> None:
    error: Exception = ValueError("core")
    for n in range(2000):
        error = ExceptionGroup(f"level {n}", [error])
    back = home(error)
    assert "ExceptionGroup" in raised.type_name(type(back)) or isinstance(back, RemoteError)
    assert "in caught" in str(back.__cause__)


def test_a_chain_two_thousand_long_arrives() -> None:
    error = ValueError("first")
    for n in range(2000):
        after = ValueError(f"after {n}")
        after.__cause__ = error
        error = after
    assert "after 1999" in str(home(error).__cause__)


# Where it comes from


def test_the_cause_is_the_remote_traceback() -> None:
    cause = home(ValueError("text")).__cause__
    assert type(cause) is raised.RemoteTraceback
    assert "in caught\n    raise error\nValueError: text\n" in str(cause)


def test_a_remote_traceback_can_be_pickled() -> None:
    cause = home(ValueError("text")).__cause__
    assert str(pickle.loads(pickle.dumps(cause))) == str(cause)


def test_a_printed_exception_shows_the_remote_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    back = home(ValueError("text"))
    sys.excepthook(type(back), back, None)
    err = capfd.readouterr().err
    assert err.index("in caught") < err.index("was the direct cause") < err.rindex("text")


def test_causes_contexts_groups_and_notes_are_in_the_text() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ExceptionGroup("group", [ValueError("member")]) from inner
    except ExceptionGroup as error:
        error.add_note("mind the gap")
        text = raised.describe(error)[0].traceback_text
    assert all(word in text for word in ("KeyError: 'inner'", "group", "member", "mind the gap"))


def test_the_frames_of_the_worker_are_left_out() -> None:
    def function() -> None:
        raise ValueError("text")

    try:
        function()
    except ValueError as error:
        text = raised.describe(error, tb_skip=1)[0].traceback_text
        nothing = raised.describe(error, tb_skip=99)[0].traceback_text
    assert "in function" in text
    assert "in test_the_frames" not in text
    assert nothing.endswith("ValueError: text\n")


def test_describing_changes_nothing_on_the_exception() -> None:
    error = caught(Locked(3, "shut"))
    before = (dict(vars(error)), error.__traceback__, error.__cause__)
    raised.describe(error)
    assert (vars(error), error.__traceback__, error.__cause__) == before


@pytest.mark.parametrize(
    ("index", "attempt", "note"),
    [
        (17, 2, "item 17, on papag (attempt 2)"),
        (0, 1, "item 0, on papag"),
        (None, 1, "on papag"),
    ],
)
def test_a_note_says_which_item_where_and_in_which_attempt(
    index: int | None, attempt: int, note: str
) -> None:
    error = ValueError()
    error.add_note("mind the gap")
    raised.annotate(error, index, "papag", attempt)
    assert error.__notes__ == ["mind the gap", note]


def test_a_note_fits_on_a_frozen_exception() -> None:
    error = Frozen(1, "a")
    raised.annotate(error, 1, "papag")
    assert error.__notes__ == ["item 1, on papag"]


@pytest.mark.parametrize("error", [ValueError(), Frozen(1, "a"), WithSlots(1)])
def test_finished_results_hang_on_any_exception(error: Any) -> None:
    raised.keep_results(error, {0: "a"})
    assert error.results == {0: "a"}


def test_a_dmap_error_is_no_remote_error() -> None:
    back = home(DmapError("text"))
    assert not isinstance(back, RemoteError)


MAIN = """
import pickle, subprocess, sys, threading
from dmap import closures, raised
from dmap.errors import RemoteError

class Odd(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code = code
class Locked(Odd):
    def __init__(self):
        super().__init__(5, "locked")
        self.lock = threading.Lock()

code = '''
import pickle, sys
from dmap import closures, raised
func = closures.load_function(sys.stdin.buffer.read())
try:
    func()
except BaseException as error:
    sys.stdout.buffer.write(pickle.dumps(raised.describe(error, tb_skip=1)))
'''
def odd():
    raise Odd(3, "odd")
def locked():
    raise Locked()
def leave():
    sys.exit("bye")
for func, wanted in (odd, Odd), (locked, Locked), (leave, RemoteError):
    blob = closures.dump_function(func)
    out = subprocess.run([sys.executable, "-c", code], input=blob, stdout=-1, check=True)
    try:
        raise raised.restore(*pickle.loads(out.stdout))
    except wanted as error:
        exact = type(error) is wanted
        print(exact, isinstance(error, RemoteError), error, getattr(error, "code", None))
"""


def test_an_exception_of_main_comes_back_from_another_process_as_itself() -> None:
    out = subprocess.run(
        [sys.executable, "-c", MAIN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.stderr == ""
    assert out.stdout.splitlines() == [
        "True False 3: odd 3",
        "False True 5: locked 5",
        "True True SystemExit: bye None",
    ]
