"""What waits for company, in what order it goes, and how long it waits at most."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobserver.company import PATIENCE, Company
from jobserver.jobs import Send
from jobserver.protocol import NoJob, Range, WorkAccepted


def patient(peer: bytes, seq: int) -> Send:
    return Send(peer, WorkAccepted([Range(seq, 1)]), patient=True)


def test_what_is_patient_goes_ahead_of_what_comes_next_to_its_peer() -> None:
    company = Company()
    accepted, answer = patient(b"a", 1), Send(b"a", NoJob())
    assert company.take([accepted], 0.0) == []
    assert company.take([answer], 0.001) == [accepted, answer]
    assert company.overdue() == []


def test_what_goes_to_another_peer_is_no_company() -> None:
    company = Company()
    accepted, answer = patient(b"a", 1), Send(b"b", NoJob())
    assert company.take([accepted, answer], 0.0) == [answer]
    assert company.overdue() == [accepted]


def test_what_comes_behind_its_company_goes_with_it() -> None:
    accepted, answer = patient(b"a", 1), Send(b"a", NoJob())
    assert Company().take([answer, accepted], 0.0) == [answer, accepted]


def test_what_finds_no_company_goes_when_its_time_is_over() -> None:
    company = Company()
    first, second, other = patient(b"a", 1), patient(b"a", 2), patient(b"b", 1)
    company.take([first], 1.0)
    company.take([other], 1.001)
    company.take([second], 1.002)
    assert company.due == 1.0 + PATIENCE
    assert company.overdue(1.0 + PATIENCE) == [first, second]
    assert company.due == 1.001 + PATIENCE
    assert company.overdue() == [other]
    assert company.due == float("inf")


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.booleans()), max_size=4),
            st.sampled_from([0.0, PATIENCE / 2, PATIENCE]),
        )
    )
)
def test_each_peer_gets_everything_once_in_order_and_in_time(
    turns: list[tuple[list[tuple[bytes, bool]], float]],
) -> None:
    company, now, n = Company(), 0.0, 0
    said: dict[bytes, list[int]] = {b"a": [], b"b": []}
    got: dict[bytes, list[int]] = {b"a": [], b"b": []}
    since: dict[int, float] = {}

    def arrive(sends: list[Send]) -> None:
        for send in sends:
            assert isinstance(send.message, WorkAccepted)
            number = send.message.seqs[0].first
            assert now - since[number] < PATIENCE + 1e-9
            got[send.peer].append(number)

    for entries, seconds in turns:
        sends = []
        for peer, is_patient in entries:
            n += 1
            since[n] = now
            said[peer].append(n)
            sends.append(Send(peer, WorkAccepted([Range(n, 1)]), patient=is_patient))
        arrive(company.take(sends, now))
        until = now + seconds
        while company.due <= until:
            now = company.due
            arrive(company.overdue(now))
        now = until
    arrive(company.overdue())
    assert got == said
