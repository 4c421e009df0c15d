"""Arrays and data frames taken apart for `dmap.canonical`: what they say, not how it is laid out.

Nothing is imported here: whoever holds an array has imported its library.

An array is its type, shape and contents in C order, whatever its strides and flags. Its memory is
hashed as it lies if it is contiguous. What is not contents does not count: the bytes between the
fields of a structured type, those that pad a long double, and which of the many NaNs one is.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from dmap.canonical import Part, solid, text

if TYPE_CHECKING:
    from dmap.values import Encoder, Made, Walk

ARRAY: Final = b"\xb0"
NUMBER: Final = b"\xb1"
DTYPE: Final = b"\xb2"
MASKED: Final = b"\xb3"
SUBCLASS: Final = b"\xb4"
FIELDS: Final = b"\xb5"
ELEMENTS: Final = b"\xb6"
FRAME: Final = b"\xb7"
SERIES: Final = b"\xb8"
INDEX: Final = b"\xb9"
COLUMN: Final = b"\xba"

_PLAIN_KINDS: Final = frozenset("biufcmMSU")


def encoder_of(kind: type) -> Encoder | None:
    """Return how instances of a type are taken apart, None if it is no type of these libraries."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "ndarray"):
        if kind is numpy.ndarray:
            return _array
        if issubclass(kind, numpy.generic):
            return _number
        if issubclass(kind, numpy.dtype):
            return _dtype
        if issubclass(kind, numpy.ndarray):
            return _array_subclass(kind, numpy)
    pandas = sys.modules.get("pandas")
    if pandas is not None and hasattr(pandas, "api"):
        if issubclass(kind, pandas.DataFrame):
            return _frame
        if issubclass(kind, pandas.Series):
            return _series
        if issubclass(kind, pandas.Index):
            return _index
        if issubclass(kind, pandas.api.extensions.ExtensionArray):
            return _extension_array
    return None


# --- numpy ------------------------------------------------------------------------------------


def _array_subclass(kind: Any, numpy: Any) -> Encoder | None:
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    if masked is not None and issubclass(kind, masked):
        return None if kind is type(sys.modules["numpy.ma"].masked) else _masked_array
    if kind.__reduce__ is numpy.ndarray.__reduce__ and kind.__reduce_ex__ is (
        numpy.ndarray.__reduce_ex__
    ):
        return _other_array
    return None


def _array(walk: Walk, value: Any) -> Made:
    parts = [walk.token(value.dtype), walk.token(value.shape), _contents(walk, value)]
    return ARRAY, parts, 0


def _other_array(walk: Walk, value: Any) -> Made:
    """An array of a class that adds nothing to what is pickled."""
    numpy = sys.modules["numpy"]
    return SUBCLASS, [walk.define(type(value)), walk.token(value.view(numpy.ndarray))], 0


def _masked_array(walk: Walk, value: Any) -> Made:
    numpy = sys.modules["numpy"]
    return (
        MASKED,
        [
            walk.define(type(value)),
            walk.token(value.data.view(numpy.ndarray)),
            walk.token(sys.modules["numpy.ma"].getmaskarray(value)),
            walk.token(value.fill_value),
        ],
        0,
    )


def _number(walk: Walk, value: Any) -> Made:
    dtype = value.dtype
    if dtype.kind in "biuf" and dtype.itemsize <= 8 and value == value:
        return NUMBER, [_plain_dtype(dtype) or walk.token(dtype), value.tobytes()], 0
    array = sys.modules["numpy"].asarray(value)
    return NUMBER, [walk.token(array.dtype), _contents(walk, array)], 0


def _dtype(walk: Walk, value: Any) -> Part | Made:
    return _plain_dtype(value) or walk.reduced(value)


def _plain_dtype(value: Any) -> bytes | None:
    if value.kind in _PLAIN_KINDS and value.metadata is None and value.isbuiltin != 2:
        return solid(DTYPE, [text(value.str)])
    return None


def _contents(walk: Walk, array: Any) -> Part:
    dtype = array.dtype
    if dtype.names is not None:
        return walk.made(FIELDS, [_contents(walk, array[name]) for name in dtype.names])
    if dtype.hasobject or dtype.kind not in "biufcmMSUV":
        return walk.made(ELEMENTS, walk.tokens(array.ravel().tolist()))
    numpy = sys.modules["numpy"]
    flat = numpy.ascontiguousarray(array).reshape(-1)
    if not flat.nbytes:
        return b"#" + sha256().digest()
    if dtype.kind in "fc":
        flat = _numbers(flat, numpy)
    return b"#" + sha256(flat.view(numpy.uint8)).digest()


def _numbers(flat: Any, numpy: Any) -> Any:
    """Return the memory of floats in which equal ones are equal bytes, but for zeros."""
    if flat.dtype.kind == "c":
        flat = flat.view(flat.real.dtype)
    # The least of numbers among which is a NaN is a NaN, and found without memory for a mask.
    least = flat.min()
    if least != least:
        flat = flat.copy()
        flat[numpy.isnan(flat)] = numpy.nan
    if flat.dtype.char == "g" and numpy.finfo(flat.dtype).nmant == 63:
        # 80 bits of the processor's in 12 or 16 bytes, of which the rest may be anything.
        flat = numpy.ascontiguousarray(flat.view(numpy.uint8).reshape(len(flat), -1)[:, :10])
    return flat


# --- pandas -----------------------------------------------------------------------------------


def _frame(walk: Walk, value: Any) -> Made:
    parts = [*_common(walk, value), walk.attribute(value, "columns")]
    for n in range(value.shape[1]):
        parts.append(_column(walk, value.iloc[:, n].array))
    return FRAME, parts, 0


def _series(walk: Walk, value: Any) -> Made:
    parts = [walk.attribute(value, "name"), _column(walk, value.array)]
    return SERIES, [*_common(walk, value), *parts], 0


def _common(walk: Walk, value: Any) -> list[Part]:
    """Return what frames and series have beside their contents."""
    more = {name: getattr(value, name, None) for name in value._metadata}
    return [
        walk.define(type(value)),
        walk.attribute(value, "index"),
        walk.attributes({**value.attrs}),
        walk.attributes({**more, "allows_duplicate_labels": value.flags.allows_duplicate_labels}),
    ]


def _index(walk: Walk, value: Any) -> Made:
    pandas: Any = sys.modules["pandas"]
    parts = [walk.define(type(value)), walk.made(INDEX, walk.tokens(value.names))]
    if isinstance(value, pandas.RangeIndex):
        parts += walk.tokens((value.start, value.stop, value.step))
    elif isinstance(value, pandas.MultiIndex):
        # Its levels may have values that nothing has any more.
        parts += [_column(walk, value.get_level_values(n).array) for n in range(value.nlevels)]
    else:
        parts += [walk.token(getattr(value, "freqstr", None)), _column(walk, value.array)]
    return INDEX, parts, 0


def _extension_array(walk: Walk, value: Any) -> Made:
    return COLUMN, [walk.define(type(value)), _column(walk, value)], 0


def _column(walk: Walk, values: Any) -> Part:
    """Return the token of the values of a column: pandas keeps them in arrays of many kinds."""
    numpy: Any = sys.modules["numpy"]
    pandas: Any = sys.modules["pandas"]
    dtype = values.dtype
    if isinstance(dtype, numpy.dtype):
        return walk.made(*_array(walk, numpy.asarray(values)))
    parts: list[Part] = [walk.define(type(dtype)), walk.token(str(dtype))]
    if isinstance(dtype, pandas.CategoricalDtype):
        parts += walk.tokens((dtype.ordered, values.categories))
        parts.append(walk.made(*_array(walk, numpy.asarray(values.codes))))
    elif isinstance(dtype, pandas.DatetimeTZDtype):
        parts.append(walk.made(*_array(walk, numpy.asarray(values.asi8))))
    else:
        parts += walk.tokens(numpy.asarray(values, dtype=object).tolist())
    return walk.made(COLUMN, parts)
