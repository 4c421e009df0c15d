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


class Gathered(ExceptionGroup[Exception]):
    def __new__(cls, errors: list[Exception], code: int) -> "Gathered":
        made = super().__new__(cls, "gathered", errors)
        made.args = (errors, code)
        return made

    def __init__(self, errors: list[Exception], code: int) -> None:
        self.code = code


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


# What is behind it and in it


def chained(error: BaseException, *behind: BaseException) -> BaseException:
    """Return an exception whose causes are these, the nearest first."""
    first = error
    for cause in behind:
        error.__cause__ = cause
        error = cause
    return first


def behind(error: BaseException | None) -> BaseException:
    """Return the remote traceback of an exception that came home."""
    assert error is not None
    assert isinstance(error.__cause__, raised.RemoteTraceback)
    return error.__cause__


def test_a_cause_hangs_behind_the_remote_traceback_as_itself() -> None:
    cause = behind(home(chained(ValueError("outer"), TwoArguments(3, "inner")))).__cause__
    assert isinstance(cause, TwoArguments)
    assert (cause.code, str(cause)) == (3, "3: inner")


def test_the_cause_of_a_cause_hangs_behind_that() -> None:
    cause: Any = behind(home(chained(ValueError(1), KeyError(2), OSError(3)))).__cause__
    assert (repr(cause), repr(cause.__cause__)) == ("KeyError(2)", "OSError(3)")
    assert cause.__cause__.__cause__ is None


@pytest.mark.parametrize("is_suppressed", [True, False])
def test_a_context_hangs_there_too(is_suppressed: bool) -> None:
    error = ValueError("outer")
    error.__context__ = KeyError("inner")
    error.__suppress_context__ = is_suppressed
    text = behind(home(error))
    assert text.__cause__ is None
    assert repr(text.__context__) == "KeyError('inner')"
    assert text.__suppress_context__ is is_suppressed


def test_an_exception_without_a_chain_has_only_the_remote_traceback() -> None:
    text = behind(home(ValueError("text")))
    assert (text.__cause__, text.__context__) == (None, None)


def test_a_cause_keeps_its_notes() -> None:
    cause = KeyError(2)
    cause.add_note("mind the gap")
    back: Any = behind(home(chained(ValueError(1), cause))).__cause__
    assert back.__notes__ == ["mind the gap"]


def test_a_cause_that_will_not_travel_degrades_alone() -> None:
    error = chained(ValueError(1), NotSubclassed(1, 2), StrRaises(3), KeyError(4))
    first: Any = behind(home(error)).__cause__
    assert isinstance(first, RemoteError)
    assert isinstance(first, ValueError)
    assert first.type_name == "test_raised.NotSubclassed"
    assert type(first.__cause__) is StrRaises
    assert repr(first.__cause__.__cause__) == "KeyError(4)"


def test_a_cause_of_a_class_that_is_only_on_the_worker_degrades_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_over_there.py").write_text("class Odd(Exception): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_over_there  # type: ignore[import-not-found]

    error = chained(ValueError(1), only_over_there.Odd("text"), KeyError(2))
    sent = raised.describe(error)
    monkeypatch.undo()
    del sys.modules["only_over_there"]
    back: Any = raised.restore(*sent)
    cause = behind(back).__cause__
    assert type(back) is ValueError
    assert (type(cause), str(cause)) == (RemoteError, "only_over_there.Odd: text")
    assert repr(cause.__cause__) == "KeyError(2)"


def test_what_was_raised_may_degrade_and_keep_its_cause() -> None:
    back = home(chained(SystemExit(3), KeyError(2)))
    assert type(back) is RemoteError
    assert repr(behind(back).__cause__) == "KeyError(2)"


def test_an_order_behind_an_exception_is_what_it_was() -> None:
    error = ValueError("no more")
    error.__context__ = StopIteration(3)
    assert repr(behind(home(error)).__context__) == "StopIteration(3)"


def test_a_chain_that_ends_where_it_began_arrives_so() -> None:
    first, second = ValueError(1), KeyError(2)
    first.__cause__, second.__context__ = second, first
    back = home(first)
    cause = behind(back).__cause__
    assert repr(cause) == "KeyError(2)"
    assert cause is not None
    assert cause.__context__ is back


def test_one_exception_that_is_cause_and_context_arrives_as_one() -> None:
    error = chained(ValueError(1), KeyError(2))
    error.__context__ = error.__cause__
    text = behind(home(error))
    assert text.__cause__ is text.__context__ is not None


def test_sixteen_links_of_a_chain_arrive() -> None:
    error: BaseException | None = behind(home(chained(*map(ValueError, range(40)))))
    numbers = []
    while error is not None:
        numbers.append(error.args[0])
        error = error.__cause__
    assert numbers[1:] == list(range(1, 17))


def test_a_large_cause_leaves_what_was_raised_its_room() -> None:
    error: Any = chained(ValueError(bytes(3 * raised.PART_NBYTES)), KeyError(1), OSError("small"))
    error.__cause__.large = bytes(2 * raised.PART_NBYTES)
    summary, pickled = raised.describe(error)
    assert len(pickled) <= raised.PICKLED_NBYTES
    back: Any = raised.restore(summary, pickled)
    assert len(back.args[0]) == 3 * raised.PART_NBYTES
    cause: Any = behind(back).__cause__
    assert isinstance(cause, KeyError)
    assert not hasattr(cause, "large")
    assert repr(cause.__cause__) == "OSError('small')"


def test_a_cause_goes_without_what_is_large_on_it() -> None:
    cause: Any = KeyError(1)
    cause.large, cause.small = bytes(raised.PART_NBYTES), 3
    back: Any = behind(home(chained(ValueError(1), cause))).__cause__
    assert isinstance(back, KeyError)
    assert (back.small, hasattr(back, "large")) == (3, False)


def test_a_group_of_many_long_texts_is_bounded() -> None:
    members = [ReduceRaises(ValueError(), Mixin, "x" * 10_000, n) for n in range(1000)]
    group = ExceptionGroup("all", [chained(ValueError(1), *members[:1]), *members])  # type: ignore[list-item]
    assert len(raised.describe(group)[1]) <= raised.PICKLED_NBYTES


def test_a_chain_that_is_too_large_together_arrives_as_far_as_there_is_room() -> None:
    error = chained(*(ValueError(n, bytes(raised.PART_NBYTES - 1000)) for n in range(10)))
    summary, pickled = raised.describe(error)
    assert len(pickled) <= raised.PICKLED_NBYTES
    back: Any = raised.restore(summary, pickled)
    cause: Any = behind(back).__cause__
    assert [type(cause), type(cause.__cause__.__cause__.__cause__)] == [ValueError, RemoteError]


def test_what_comes_home_twice_has_one_remote_traceback_before_its_cause() -> None:
    once = home(chained(ValueError(1), KeyError(2)))
    text = behind(home(once))
    assert repr(text.__cause__) == "KeyError(2)"
    assert str(text).count("in caught") == 2


def test_members_of_a_group_keep_their_causes_and_notes() -> None:
    member = chained(LookupError(1), KeyError(2))
    member.add_note("mind the gap")
    group = ExceptionGroup("both", [ExceptionGroup("inner", [member])])  # type: ignore[list-item]
    group.add_note("of all")
    back = home(group)
    (inner,) = back.exceptions
    assert (type(back), type(inner)) == (ExceptionGroup, ExceptionGroup)
    assert inner.exceptions[0].__notes__ == ["mind the gap"]
    assert repr(inner.exceptions[0].__cause__) == "KeyError(2)"
    assert back.__notes__ == ["of all"]


def test_a_member_that_will_not_travel_degrades_alone() -> None:
    back = home(ExceptionGroup("all", [ValueError(1), NotSubclassed(1, 2), Locked(3, "shut")]))
    assert type(back) is ExceptionGroup
    assert [isinstance(member, RemoteError) for member in back.exceptions] == [False, True, True]
    assert [type(back.exceptions[0]), back.exceptions[2].code] == [ValueError, 3]


def test_what_arrives_can_be_split_by_except() -> None:
    group = ExceptionGroup("all", [ValueError(1), ExceptionGroup("in", [Locked(3, "shut")])])
    caught_here = []
    try:
        raise home(group)
    except* Locked as locked:
        caught_here.append(locked.exceptions[0].exceptions[0].code)  # type: ignore[union-attr]
    except* ValueError as other:
        caught_here.append(other.exceptions[0].args[0])
    assert caught_here == [3, 1]


def test_a_group_that_is_a_cause_arrives_whole() -> None:
    group = ExceptionGroup("both", [chained(ValueError(1), KeyError(2))])  # type: ignore[list-item]
    cause: Any = behind(home(chained(OSError(3), group))).__cause__
    assert type(cause) is ExceptionGroup
    assert repr(cause.exceptions[0].__cause__) == "KeyError(2)"


def test_a_group_whose_member_is_its_cause_has_it_once() -> None:
    member = ValueError(1)
    back = home(chained(ExceptionGroup("both", [member, KeyError(2)]), member))
    assert behind(back).__cause__ is back.exceptions[0]


def test_a_group_with_arguments_of_its_own_arrives() -> None:
    back = home(Gathered([ValueError(1), KeyError(2)], code=3))
    assert type(back) is Gathered
    assert (back.code, back.message, len(back.exceptions)) == (3, "gathered", 2)
    assert back.args == ([back.exceptions[0], back.exceptions[1]], 3)


def test_a_group_of_more_than_are_packed_together_arrives() -> None:
    back = home(ExceptionGroup("all", [ValueError(n) for n in range(2 * raised.MAX_ERRORS)]))
    assert [error.args[0] for error in back.exceptions] == list(range(2 * raised.MAX_ERRORS))


def test_a_group_with_a_lock_can_be_pickled_again() -> None:
    group = ExceptionGroup("both", [ValueError("a")])
    group.lock = threading.Lock()  # type: ignore[attr-defined]
    back = pickle.loads(pickle.dumps(home(group)))
    assert repr(back.exceptions) == "(ValueError('a'),)"


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
    parcel = raised._pack_whole(SystemExit(3))
    packed = pickle.dumps([(parcel, "", "", [], -1, -1, False)])
    back = raised.restore(raised.Summary("Odd", "text", ""), packed)
    assert type(back) is RemoteError


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"junk",
        pickle.dumps(3),
        pickle.dumps([]),
        pickle.dumps([(b"junk", "", "", [], -1, -1, False)]),
        pickle.dumps([(b"", "", "", [], 7, -1, False)]),
        pickle.dumps([(pickle.dumps(("whole", b"", {})), "", "", [0], 0, -1, False)]),
    ],
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
    raised.annotate(back, "on papag")


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


def test_of_a_group_nested_two_thousand_deep_the_outer_levels_arrive() -> None:
    error: Exception = ValueError("core")
    for n in range(2000):
        error = ExceptionGroup(f"level {n}", [error])
    back = home(error)
    assert "in caught" in str(back.__cause__)
    for _ in range(raised.MAX_NESTED):
        assert type(back) is ExceptionGroup
        (back,) = back.exceptions
    # Up to Python 3.12 pickle cannot go that deep; later ones bring all of it.
    assert isinstance(back, RemoteError if sys.version_info < (3, 13) else ExceptionGroup)


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


def test_a_printed_exception_shows_each_traceback_once(capfd: pytest.CaptureFixture[str]) -> None:
    cause = caught(KeyError("inner"))
    back = home(chained(ValueError("outer"), cause))
    sys.excepthook(type(back), back, None)
    assert capfd.readouterr().err.count("in caught") == 2


def test_a_traceback_has_the_lines_that_came_along() -> None:
    program = "def typed():\n    raise ValueError\n"
    namespace: dict[str, Any] = {}
    exec(compile(program, "/tmp/ipykernel_1/123.py", "exec"), namespace)
    lines = {"/tmp/ipykernel_1/123.py": {1: program}}
    try:
        namespace["typed"]()
    except ValueError as error:
        with_them = raised.describe(error, lines=lines)[0].traceback_text
        without = raised.describe(error)[0].traceback_text
    assert '123.py", line 2, in typed\n    raise ValueError\n' in with_them
    assert "    raise ValueError" not in without


def test_a_traceback_has_the_lines_of_local_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    number = caught.__code__.co_firstlineno + 3
    lines = {__file__: {number: "the true line\n"}}
    monkeypatch.setattr("dmap.sources.of_bundles", lambda error: lines)
    text = raised.describe(caught(ValueError("text")))[0].traceback_text
    assert "in caught\n    the true line\n" in text


def test_a_traceback_that_cannot_be_formatted_with_its_lines_is_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmap.sources.show", None)
    assert "in caught" in raised.describe(caught(ValueError("text")))[0].traceback_text


@pytest.mark.parametrize("write", ["a[0] = 1", "a += 1", "a.sort()"])
def test_writing_to_a_read_only_array_has_a_note_that_helps(write: str) -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    with pytest.raises(ValueError) as error:
        exec(write, {"a": array})
    raised.advise(error.value)
    assert error.value.__notes__ == [raised.READ_ONLY]


@pytest.mark.parametrize("error", [ValueError("text"), KeyError("read-only"), StrRaises()])
def test_other_errors_have_no_such_note(error: Exception) -> None:
    raised.advise(error)
    assert not hasattr(error, "__notes__")


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


def test_a_note_stands_behind_those_that_the_user_made() -> None:
    error = ValueError()
    error.add_note("mind the gap")
    raised.annotate(error, "on papag")
    assert error.__notes__ == ["mind the gap", "on papag"]


@pytest.mark.parametrize("notes", [("mind the gap",), ["mind the gap"]])
def test_a_note_fits_on_a_frozen_exception_that_has_one(notes: Any) -> None:
    error = Frozen(1, "a")
    object.__setattr__(error, "__notes__", notes)
    raised.annotate(error, "on papag")
    assert error.__notes__ == ["mind the gap", "on papag"]


def test_a_note_fits_on_a_frozen_exception() -> None:
    error = Frozen(1, "a")
    raised.annotate(error, "on papag")
    assert error.__notes__ == ["on papag"]


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
from dmap import functions, raised
func = functions.load_function([sys.stdin.buffer.read()]).call
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
    (blob,) = closures.Closure(func).blobs
    out = subprocess.run([sys.executable, "-c", code], input=blob.body, stdout=-1, check=True)
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
