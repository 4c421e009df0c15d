"""What makes two arrays or data frames the same item: what they say, not how it is laid out."""

import copy
import pathlib
import pickle
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap.identity import Unidentifiable, item_id

numpy = pytest.importorskip("numpy")


def refusal(value: object) -> str:
    """Return why a value has no id."""
    with pytest.raises(Unidentifiable) as caught:
        item_id(value)
    return str(caught.value)


def test_strides_flags_and_owners_of_arrays_do_not_count() -> None:
    plain = numpy.arange(12.0).reshape(3, 4)
    frozen = plain.copy()
    frozen.flags.writeable = False
    wide = numpy.zeros((3, 8))
    wide[:, ::2] = plain
    same = [
        numpy.asfortranarray(plain),
        frozen,
        wide[:, ::2],
        plain[::-1][::-1],
        plain.T.copy().T,
        pickle.loads(pickle.dumps(plain)),
    ]
    assert {item_id(each) for each in same} == {item_id(plain)}


def test_type_shape_and_contents_of_arrays_count() -> None:
    zeros = numpy.zeros
    distinct = [
        *(zeros(4, kind) for kind in ("f8", "f4", ">f8", "i8", "u8", "c16", "M8[s]", "M8[ms]")),
        *(zeros(shape) for shape in ((2, 2), (4, 1), (1, 4), (), 0, (0, 2), (2, 0), 5)),
        *(zeros(4, kind) for kind in ("S8", "U2", "V8", "?", "m8[s]", "O", "f2", "g", "G")),
        zeros(4, [("a", "f8")]),
        zeros(4, [("b", "f8")]),
        numpy.array([0, 0, 0, 1.0]),
        numpy.array([0, 0, 0, -0.0]),
        numpy.float64(0),
        numpy.float32(0),
        numpy.int64(0),
        numpy.bool_(0),
        numpy.str_("a"),
        numpy.str_("b"),
        numpy.datetime64(0, "s"),
        numpy.datetime64("NaT", "s"),
        [0.0] * 4,
        0.0,
        "a",
    ]
    assert len({item_id(each) for each in distinct}) == len(distinct)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f8", "g", "c8", "c16", "G"])
def test_all_nans_in_arrays_are_one(kind: str) -> None:
    one = numpy.array([1, numpy.nan, 2], kind)
    other = numpy.array([1, -numpy.nan, 2], kind)
    assert item_id(one) == item_id(other) != item_id(numpy.array([1, 2, numpy.nan], kind))
    assert item_id(one[1]) == item_id(other[1])
    assert numpy.signbit(other.real[1])  # the array is as it was


def test_what_pads_a_long_double_does_not_count() -> None:
    numbers = numpy.array([1.5, -2.5], numpy.longdouble)
    padded = numbers.copy()
    if numpy.finfo(numpy.longdouble).nmant != 63:
        pytest.skip("a long double has no padding here")
    padded.view("u1").reshape(2, -1)[:, 10:] = 0xFF
    assert item_id(padded) == item_id(numbers) != item_id(-numbers)


def test_what_lies_between_fields_does_not_count() -> None:
    dtype = numpy.dtype([("a", "i1"), ("b", "f8"), ("c", object)], align=True)
    one, other = numpy.zeros(3, dtype), numpy.zeros(3, dtype)
    plain = numpy.dtype([("a", "i1"), ("b", "f8")], align=True)
    padded = numpy.full(3 * plain.itemsize, 7, "u1").view(plain)
    padded["a"], padded["b"] = 1, 2
    clean = numpy.zeros(3, plain)
    clean["a"], clean["b"] = 1, 2
    assert item_id(padded) == item_id(clean)
    one["c"] = other["c"] = "text"
    assert item_id(one) == item_id(other)
    other["c"][2] = "texts"
    assert item_id(one) != item_id(other)


def test_arrays_of_objects_go_element_by_element() -> None:
    one = numpy.array([{"a", "b", "c"}, 1, "x"], object)
    other = numpy.array([{"c", "b", "a"}, 1, "".join("x")], object)
    assert item_id(one) == item_id(other) != item_id(one[::-1])
    assert item_id(one) != item_id(numpy.array([{"a", "b", "c"}, 1.0, "x"], object))
    one[1] = one
    other[1] = other
    assert item_id(one) == item_id(other)
    one[1] = threading.Lock()
    assert "[1] is a _thread.lock" in refusal(one)


def test_masked_arrays_go_by_contents_mask_and_fill_value() -> None:
    make = numpy.ma.masked_array
    base = item_id(make([[1, 2], [3, 4]], [[0, 1], [0, 0]]))
    assert item_id(make(numpy.asfortranarray([[1, 2], [3, 4]]), [[0, 1], [0, 0]])) == base
    assert item_id(make([[1, 2], [3, 4]], [[0, 0], [0, 0]])) != base
    assert item_id(make([[1, 2], [3, 5]], [[0, 1], [0, 0]])) != base
    assert item_id(make([[1, 2], [3, 4]], [[0, 1], [0, 0]], fill_value=7)) != base
    assert item_id(numpy.ma.masked) == item_id(numpy.ma.masked)


def test_subclasses_of_arrays_count(tmp_path: pathlib.Path) -> None:

    class Sub(numpy.ndarray):  # type: ignore[misc]
        pass

    plain = numpy.arange(6.0).reshape(2, 3)
    mapped = numpy.memmap(tmp_path / "file", float, "w+", shape=(2, 3))
    mapped[:] = plain
    views = [plain, plain.view(numpy.matrix), plain.view(Sub), mapped, plain.view(numpy.recarray)]
    assert len({item_id(each) for each in views}) == 5
    assert item_id(plain.view(Sub)) == item_id(numpy.asfortranarray(plain).view(Sub))


def test_types_of_arrays_have_ids() -> None:
    dtypes = ["f8", ">f8", "i8", [("a", "f8")], [("a", "f8", (2,))], [("b", "f8")], "M8[s]", "S3"]
    ids = {item_id(numpy.dtype(each)) for each in dtypes}
    assert len(ids) == len(dtypes)
    assert item_id(numpy.dtype("f8")) == item_id(numpy.dtype(float))
    assert item_id(numpy.dtype("f8", metadata={"unit": "m"})) not in ids
    assert item_id(numpy.sqrt) == item_id(numpy.sqrt) != item_id(numpy.add)
    assert item_id(numpy.add.reduce) != item_id(numpy.add.accumulate)


def test_strings_of_any_length_in_arrays_go_element_by_element() -> None:
    kind = getattr(getattr(numpy, "dtypes", None), "StringDType", None)
    if kind is None:
        pytest.skip("this numpy has no such strings")
    text = "long enough not to be in the array itself"
    one, other = numpy.array([text], kind()), numpy.array(["".join(text)], kind())
    assert item_id(one) == item_id(other) != item_id(numpy.array([text + "."], kind()))


@given(st.data())
def test_a_change_of_one_element_of_an_array_gives_another_id(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["f8", "i4", "U3", "c8", "O"]))
    array = numpy.zeros(data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), kind)
    other = array.copy()
    other.flat[data.draw(st.integers(0, array.size - 1))] = 1
    assert item_id(array) != item_id(other)
    assert item_id(other) == item_id(copy.deepcopy(other)) == item_id(other.T.copy().T)


# pandas ----------------------------------------------------------------------------------------


@pytest.fixture
def pd() -> Any:
    return pytest.importorskip("pandas")


def frame(pd: Any) -> Any:
    return pd.DataFrame(
        {
            "n": [1, 2, 3],
            "x": [0.5, None, 2.0],
            "s": ["a", None, "c"],
            "kind": pd.Categorical(["u", "v", "u"]),
            "at": pd.date_range("2024-01-01", periods=3, tz="UTC"),
            "on": pd.to_datetime(["2024-01-01", None, "2024-01-03"]),
            "opt": pd.array([1, None, 3], "Int64"),
            "o": [{1}, (2,), None],
        }
    )


def test_the_layout_of_a_frames_blocks_does_not_count(pd: Any) -> None:
    whole = frame(pd)
    parts = pd.DataFrame(index=whole.index)
    for name in whole.columns:
        parts[name] = whole[name]
    assert item_id(parts) == item_id(whole)
    assert item_id(whole[::-1][::-1]) == item_id(pickle.loads(pickle.dumps(whole)))
    assert item_id(whole.copy()) == item_id(copy.deepcopy(whole)) == item_id(whole)
    assert whole.index.is_unique  # fills a cache
    assert item_id(parts) == item_id(whole)


def test_columns_index_types_and_values_of_a_frame_count(pd: Any) -> None:
    base = frame(pd)
    others = [base]
    for column, value in [("n", 9), ("x", 9.0), ("s", "z"), ("kind", "v"), ("opt", 9), ("o", ())]:
        changed = base.copy()
        changed[column] = base[column].copy()
        changed.at[0, column] = value
        others.append(changed)
    others += [
        base.rename(columns={"n": "m"}),
        base.rename(index={0: 7}),
        base.astype({"n": "int32"}),
        base.astype({"n": float}),
        base.iloc[:2],
        base[[*base.columns[::-1]]],
        base.iloc[::-1],
        base.set_index("n"),
        base.set_index(["n", "s"]),
        base.rename_axis("name"),
        base.assign(at=base["at"].dt.tz_convert("Europe/Paris")),
        base.assign(kind=base["kind"].cat.as_ordered()),
        base.assign(kind=base["kind"].cat.add_categories("w")),
        base["n"],
        base["n"].rename("m"),
        base["n"].to_frame(),
        base["n"].array,
        base["opt"].array,
        base["kind"].array,
        base.index,
        pd.Index([0, 1, 2]),
        pd.Index([0, 1, 2], name="name"),
    ]
    assert len({item_id(each) for each in others}) == len(others)


def test_values_that_no_row_of_a_multiindex_has_do_not_count(pd: Any) -> None:
    index = pd.MultiIndex.from_product([["a", "b"], [1, 2]])
    cut = index[:2]
    assert item_id(cut) == item_id(cut.remove_unused_levels())
    assert item_id(cut) != item_id(index)


def test_what_pandas_is_told_beside_the_values_counts(pd: Any) -> None:
    plain, other = frame(pd), frame(pd)
    other.attrs["source"] = "here"
    assert item_id(plain) != item_id(other)
    assert item_id(pd.Timestamp("2024-01-01")) != item_id(pd.Timestamp("2024-01-02"))
    assert item_id(pd.NA) == item_id(pd.NA) != item_id(pd.NaT)


def test_a_lock_in_a_frame_is_found(pd: Any) -> None:
    assert "is a _thread.lock" in refusal(pd.DataFrame({"a": [threading.Lock()]}))
