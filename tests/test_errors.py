import copy
import pickle
import subprocess
import sys
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from dmap import errors
from jobserver import errors as server_errors

INSTANCES = [
    errors.NoServer("no job server at sammy:4731"),
    errors.NoWorker("no worker can do 'resize'"),
    errors.Busy("sammy has 1000000 jobs"),
    errors.AuthError("key refused"),
    errors.InsecureBind("tcp://0.0.0.0:4731"),
    errors.ProtocolError("unknown message"),
    errors.WorkerLost(17, "papag", 3, "SIGKILL"),
    errors.WorkerLost(None, "papag", 1, "exit code 3"),
    errors.RemoteError("pkg.Odd", "it is odd", "Traceback ..."),
    errors.ClosureError("item 3 (lock) cannot be pickled", index=3),
    errors.ClosureError("no item"),
    errors.JobTimeout("after 5 s"),
    errors.JobCancelled("by its caller"),
]


def everything(error: BaseException) -> tuple[object, ...]:
    return type(error), error.args, str(error), vars(error)


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
def test_pickling_keeps_everything(error: errors.DmapError) -> None:
    assert everything(pickle.loads(pickle.dumps(error))) == everything(error)


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
def test_copying_keeps_everything(error: errors.DmapError) -> None:
    assert everything(copy.copy(error)) == everything(error)
    assert everything(copy.deepcopy(error)) == everything(error)


def test_a_closure_error_knows_the_item() -> None:
    assert errors.ClosureError("item 3", index=3).index == 3


def test_results_and_notes_are_kept_too() -> None:
    error = errors.WorkerLost(17, "papag", 3, "SIGKILL")
    error.results = {0: "a"}  # type: ignore[attr-defined]
    error.add_note("item 17, on papag")
    loaded = pickle.loads(pickle.dumps(error))
    assert (loaded.results, loaded.__notes__) == ({0: "a"}, ["item 17, on papag"])


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "DmapWarning"])
def test_every_error_has_the_one_root(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.DmapError)


def test_the_root_of_the_server_is_the_same() -> None:
    assert errors.DmapError is server_errors.DmapError


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (errors.ClosureError, pickle.PicklingError),
        (errors.JobTimeout, TimeoutError),
        (errors.JobCancelled, CancelledError),
        (errors.DmapWarning, UserWarning),
    ],
)
def test_what_people_catch_already_catches_ours(
    ours: type[Exception], theirs: type[Exception]
) -> None:
    with pytest.raises(theirs):
        raise ours("caught")


def test_the_tree_in_the_docstring_names_every_class() -> None:
    drawn = {word for word in (errors.__doc__ or "").split() if word in errors.__all__}
    assert drawn == set(errors.__all__)


def test_a_lost_worker_says_where_how_often_and_how() -> None:
    text = str(errors.WorkerLost(17, "papag", 3, "exit code 3"))
    assert text == "item 17 lost its worker 3 times, the last time on papag (exit code 3)"


def test_a_job_that_is_no_item_lost_its_worker_once() -> None:
    text = str(errors.WorkerLost(None, "papag", 1, "SIGSEGV"))
    assert text == "the job lost its worker on papag (SIGSEGV)"


def test_a_sigkill_that_nobody_sent_is_explained() -> None:
    assert "ran out of memory" in str(errors.WorkerLost(1, "papag", 1, "SIGKILL"))


@pytest.mark.parametrize(
    ("message", "text"), [("it is odd", "pkg.Odd: it is odd"), ("", "pkg.Odd")]
)
def test_a_remote_error_reads_like_the_last_line_of_a_traceback(message: str, text: str) -> None:
    assert str(errors.RemoteError("pkg.Odd", message, "")) == text


def test_the_errors_load_neither_messages_nor_sockets_nor_closures() -> None:
    code = (
        "import sys; import jobserver.errors as e; assert 'pickle' not in sys.modules; "
        "import dmap.errors; print({'zmq', 'msgspec', 'cloudpickle', 'asyncio'} & {*sys.modules})"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (out.stdout, out.stderr) == ("set()\n", "")
