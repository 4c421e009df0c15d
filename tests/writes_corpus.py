"""Functions whose writes would vanish, and functions that look like it.

Each function here whose name begins with ``warns_`` or ``silent_`` makes one that is to be mapped,
or None where it cannot. A line that ends with ``# lost: n`` is to be warned of, for the variable
``n``, by the last ``warns_`` before it. Run as a program, this says as JSON what `lost_writes`
finds in each. It needs the standard library only, so that any Python can run it, without dmap::

    python3.13 tests/writes_corpus.py dmap/writes.py
"""

# What people write, not what they should.
# ruff: noqa: B007, B018, B023, C416, F841, RET501, RET504, RUF005, RUF012

import argparse
import atexit
import collections
import contextlib
import copy
import csv
import dataclasses
import enum
import fractions
import functools
import heapq
import importlib.util
import io
import itertools
import json
import logging
import operator
import os
import random
import re
import string
import sys
import tempfile
import threading
import types
import typing
import warnings

try:
    import numpy as np
except ImportError:
    np = None
try:
    import hypothesis
except ImportError:
    hypothesis = None

# Globals: the program's own if this runs as ``__main__``, else a module's, which is let alone.

total = 0
count = 0
number = 1.5
text = ""
last = None
rows = []
names = set()
table = {}
groups = collections.defaultdict(list)
tally = collections.Counter()
recent = collections.deque()
buffer = bytearray()
ordered = collections.OrderedDict()
log = logging.getLogger("corpus")


def warns_global_added_to():
    def f(x):
        global total
        total += x  # lost: total

    return f


def warns_global_added_to_and_read():
    def f(x):
        global count
        count += 1  # lost: count
        return x, count

    return f


def warns_global_sum_written_out():
    def f(x):
        global number
        number = number + x  # lost: number

    return f


def warns_global_sum_from_the_right():
    def f(x):
        global text
        text = str(x) + text  # lost: text

    return f


def warns_global_sum_of_several():
    def f(x):
        global number
        number = number + x * 2 + 1  # lost: number

    return f


def warns_global_taken_from():
    def f(x):
        global total
        total -= 1 if x else 2  # lost: total

    return f


def warns_global_set():
    def f(x):
        global last
        last = x  # lost: last
        return x

    return f


def warns_global_set_by_a_loop():
    def f(xs):
        global last
        for last in xs:  # lost: last
            pass

    return f


def warns_global_that_was_not_there():
    def f(x):
        global never_before
        never_before = x  # lost: never_before

    return f


def warns_global_set_in_a_class_body():
    def f(x):
        class Inner:
            global last
            last = x  # lost: last

        return Inner

    return f


def warns_global_list():
    return lambda x: rows.append(x)  # lost: rows


def warns_global_list_added_to():
    def f(x):
        global rows
        rows += [x]  # lost: rows

    return f


def warns_global_list_made_anew():
    def f(x):
        global rows
        rows = rows + [x]  # lost: rows

    return f


def warns_global_set_type():
    def f(x):
        names.add(x)  # lost: names
        return x

    return f


def warns_global_dict():
    def f(x):
        table[x] = x * x  # lost: table

    return f


def warns_global_dict_of_lists():
    def f(x):
        groups[x % 3].append(x)  # lost: groups

    return f


def warns_global_in_a_helper():
    return lambda x: helper(x)


def helper(x):
    tally[x] += 1  # lost: tally
    return x


def warns_global_two_calls_down():
    def f(x):
        return outer(x)

    return f


def outer(x):
    return inner(x) + 1


def inner(x):
    recent.append(x)  # lost: recent
    return x


def warns_global_in_a_helper_that_is_passed_on():
    def f(xs):
        return list(map(into_buffer, xs))

    return f


def into_buffer(x):
    buffer.extend(x)  # lost: buffer
    return len(x)


def warns_global_in_a_function_that_calls_itself():
    return recursive


def recursive(n):
    global total
    total += n  # lost: total
    return n and recursive(n - 1)


def warns_global_in_a_wrapped_function():
    return decorated


def decorator(func):
    @functools.wraps(func)
    def wrapper(*args):
        return func(*args)

    return wrapper


@decorator
def decorated(x):
    ordered[x] = x  # lost: ordered
    return x


def warns_global_in_a_second_function_of_a_decorator():
    return decorated_too


@decorator
def decorated_too(x):
    ordered[x] = -x  # lost: ordered
    return x


def warns_global_in_a_cached_function():
    return cached


@functools.lru_cache
def cached(x):
    rows.append(x)  # lost: rows
    return x


def warns_global_in_a_partial():
    return functools.partial(two_arguments, 1)


def two_arguments(a, b):
    table[a] = b  # lost: table


def warns_global_in_a_bound_method():
    return Tool().method


class Tool:
    def method(self, x):
        rows.append(x)  # lost: rows


def warns_global_in_a_callable_object():
    return Callable()


class Callable:
    def __call__(self, x):
        global count
        count += 1  # lost: count


def warns_global_in_a_partial_of_a_callable_object():
    return functools.partial(AlsoCallable(), x=1)


class AlsoCallable:
    def __call__(self, x, y):
        names.update([x, y])  # lost: names


def warns_global_two_variables():
    def f(x):
        global total, count
        total += x  # lost: total
        count += 1  # lost: count

    return f


def warns_global_with_the_logging_of_it():
    def f(x):
        log.info("now %s", x)
        rows.append(x)  # lost: rows

    return f


def warns_global_beside_methods_that_read_others():
    def f(x):
        rows.append(Reader().of_table(x))  # lost: rows

    return f


class Reader:
    def of_table(self, x):
        return table.get(x)


# Cells: the program's own wherever it is


def warns_nonlocal_added_to():
    n = 0

    def f(x):
        nonlocal n
        n += 1  # lost: n

    return f


def warns_nonlocal_set():
    last = None

    def f(x):
        nonlocal last
        last = x  # lost: last

    return f


def warns_nonlocal_in_an_inner_function():
    n = 0

    def f(x):
        def g():
            nonlocal n
            n += x  # lost: n

        g()

    return f


def warns_nonlocal_in_another_closure():
    n = 0

    def add(x):
        nonlocal n
        n += x  # lost: n

    def f(x):
        add(x)
        return x

    return f


def warns_nonlocal_with_a_branch_in_the_sum():
    n = 0

    def f(x):
        nonlocal n
        n += x if x > 0 else -x  # lost: n

    return f


def warns_nonlocal_with_a_call_in_the_sum():
    n = 0

    def f(x):
        nonlocal n
        n += max(x, key=lambda y: -y)  # lost: n

    return f


def warns_nonlocal_set_and_never_read():
    n = 0

    def f(x):
        nonlocal n
        n = 0  # lost: n
        n += x

    return f


def warns_nonlocal_set_to_the_sum_of_another():
    n, m = 0, 1

    def f(x):
        nonlocal n
        n = m + x  # lost: n

    return f


def warns_append():
    seen = []

    def f(x):
        seen.append(x)  # lost: seen

    return f


def warns_append_in_a_lambda():
    seen = []
    return lambda x: seen.append(x)  # lost: seen


def warns_append_or():
    seen = []
    return lambda x: seen.append(x) or x  # lost: seen


def warns_append_in_a_tuple():
    seen = []
    return lambda x: (seen.append(x), x)[1]  # lost: seen


def warns_append_over_lines():
    seen = []

    def f(x):
        seen.append(  # lost: seen
            {
                "x": x,
                "twice": [x, x],
            }
        )

    return f


def warns_append_of_a_comprehension():
    seen = []

    def f(xs):
        seen.append([x + 1 for x in xs if x])  # lost: seen

    return f


def warns_append_of_a_comparison():
    seen = []

    def f(x):
        seen.append(0 < x < 9 and not x % 2)  # lost: seen

    return f


def warns_append_of_a_formatted_text():
    seen = []

    def f(x):
        seen.append(f"{x!r:>9} of {x:.3f}")  # lost: seen

    return f


def warns_append_of_either():
    seen = []
    return lambda x: seen.append(x if x else -1)  # lost: seen


def warns_append_to_either():
    first, second = [], []
    return lambda x: (first if x else second).append(x)  # lost: first # lost: second


def warns_append_in_a_comprehension():
    seen = []
    return lambda xs: [seen.append(x) for x in xs]  # lost: seen


def warns_append_in_a_generator():
    seen = []

    def f(xs):
        return sum(1 for x in xs if not seen.append(x))  # lost: seen

    return f


def warns_append_under_try_and_with():
    seen = []

    def f(x):
        try:
            with open(x) as file:
                seen.append(file.read())  # lost: seen
        except OSError:
            return None
        finally:
            print(x)

    return f


def warns_append_in_a_loop():
    seen = []

    def f(xs):
        for x in xs:
            while x:
                seen.append(x)  # lost: seen
                x -= 1

    return f


def warns_extend():
    seen = []

    def f(x):
        seen.extend(y for y in x)  # lost: seen

    return f


def warns_insert():
    seen = []

    def f(x):
        seen.insert(0, x)  # lost: seen

    return f


def warns_sort():
    seen = [3, 1, 2]

    def f(x):
        seen.sort(key=lambda y: -y, reverse=True)  # lost: seen

    return f


def warns_clear_and_reverse():
    seen = [3, 1, 2]

    def f(x):
        seen.reverse()  # lost: seen
        seen.clear()

    return f


def warns_pop_that_is_dropped():
    seen = [3, 1, 2]

    def f(x):
        seen.pop()  # lost: seen

    return f


def warns_setdefault_that_is_dropped():
    known = {}

    def f(x):
        known.setdefault(x, 1)  # lost: known

    return f


def warns_setdefault_and_append():
    known = {}

    def f(x):
        known.setdefault(x % 2, []).append(x)  # lost: known

    return f


def warns_list_added_to():
    seen = []

    def f(x):
        nonlocal seen
        seen += [x]  # lost: seen

    return f


def warns_list_repeated():
    seen = [0]

    def f(x):
        nonlocal seen
        seen *= 2  # lost: seen

    return f


def warns_object_added_to():
    amount = fractions.Fraction(1, 2)

    def f(x):
        nonlocal amount
        amount += x  # lost: amount

    return f


def warns_tuple_added_to_and_read():
    seen = ()

    def f(x):
        nonlocal seen
        seen += (x,)  # lost: seen
        return len(seen)

    return f


def warns_list_item():
    seen = [0] * 9

    def f(x):
        seen[x] = 1  # lost: seen

    return f


def warns_list_item_added_to():
    seen = [0] * 9

    def f(x):
        seen[x] += 1  # lost: seen

    return f


def warns_list_slice():
    seen = [0] * 9

    def f(x):
        seen[1:x] = [x]  # lost: seen

    return f


def warns_list_slice_added_to():
    seen = [0] * 9

    def f(x):
        seen[1:x] += [x]  # lost: seen

    return f


def warns_list_item_deleted():
    seen = [0] * 9

    def f(x):
        del seen[x]  # lost: seen

    return f


def warns_list_slice_deleted():
    seen = [0] * 9

    def f(x):
        del seen[:x]  # lost: seen

    return f


def warns_items_set_by_unpacking():
    first, second = [0], {}

    def f(x):
        first[0], second[x] = x, x  # lost: first # lost: second

    return f


def warns_item_set_by_a_loop():
    seen = {}

    def f(xs):
        for seen["x"] in xs:  # lost: seen
            pass

    return f


def warns_dict_item():
    found = {}

    def f(x):
        found[x] = x + 1  # lost: found
        return x

    return f


def warns_dict_item_with_a_long_key():
    found = {}

    def f(x):
        found[str(x), x or 1] = {y: y for y in x}  # lost: found

    return f


def warns_dict_update():
    found = {}

    def f(x):
        found.update({x: 1})  # lost: found
        found.update(x=x)

    return f


def warns_set_discard():
    found = {1, 2}

    def f(x):
        found.discard(x)  # lost: found
        found.remove(x + 1)

    return f


def warns_set_united():
    found = {1, 2}

    def f(x):
        nonlocal found
        found |= {x}  # lost: found

    return f


def warns_bytearray():
    written = bytearray()

    def f(x):
        written.extend(x)  # lost: written

    return f


def warns_deque():
    latest = collections.deque(maxlen=3)

    def f(x):
        latest.appendleft(x)  # lost: latest

    return f


def warns_counter():
    words = collections.Counter()

    def f(line):
        for word in line.split():
            words[word] += 1  # lost: words

    return f


def warns_counter_update():
    words = collections.Counter()
    return lambda line: words.update(line.split())  # lost: words


def warns_defaultdict_of_int():
    words = collections.defaultdict(int)

    def f(word):
        words[word] += 1  # lost: words

    return f


def warns_defaultdict_of_sets():
    where = collections.defaultdict(set)

    def f(pair):
        word, line = pair
        where[word].add(line)  # lost: where

    return f


def warns_defaultdict_of_dicts():
    where = collections.defaultdict(dict)

    def f(pair):
        word, line = pair
        where[word][line] = 1  # lost: where

    return f


def warns_defaultdict_of_counters():
    where = collections.defaultdict(collections.Counter)

    def f(pair):
        word, line = pair
        where[word][line] += 1  # lost: where

    return f


def warns_array_item():
    if np is None:
        return None
    out = np.zeros(9)

    def f(x):
        out[x] = x * x  # lost: out

    return f


def warns_array_item_added_to():
    if np is None:
        return None
    out = np.zeros((9, 9))

    def f(x):
        out[x, :] += x  # lost: out

    return f


def warns_array_filled():
    if np is None:
        return None
    out = np.zeros(9)
    return lambda x: out.fill(x)  # lost: out


def warns_array_added_to():
    if np is None:
        return None
    out = np.zeros(9)

    def f(x):
        nonlocal out
        out += x  # lost: out

    return f


def warns_one_container_by_two_names():
    first = second = []

    def f(x):
        first.append(x)  # lost: first
        second.append(x)

    return f


def warns_beside_a_memo():
    seen, memo = [], {}

    def f(x):
        seen.append(x)  # lost: seen
        if x not in memo:
            memo[x] = x * x
        return memo[x]

    return f


def warns_beside_a_local_of_another_function():
    seen = []

    def f(x):
        seen.append(x)  # lost: seen
        return [g(y) for y in x]

    def g(x):
        seen = [x]
        return len(seen)

    return f


def warns_beside_large_values():
    seen, numbers = [], list(range(10_000))
    matrix = [[float(n)] * 50 for n in range(200)]

    def f(x):
        seen.append(numbers[x] + matrix[x][0])  # lost: seen

    return f


def warns_counter_of_a_decorator():
    def counted(func):
        calls = 0

        @functools.wraps(func)
        def wrapper(*args):
            nonlocal calls
            calls += 1  # lost: calls
            return func(*args)

        return wrapper

    return counted(lambda x: x)


def warns_under_a_decorator():
    seen = []

    @contextlib.contextmanager
    def f(x):
        seen.append(x)  # lost: seen
        yield x

    return f


def warns_under_a_single_dispatch():
    seen = []

    @functools.singledispatch
    def f(x):
        seen.append(x)  # lost: seen

    return f


def warns_in_a_partial_of_a_lambda():
    seen = []
    return functools.partial(lambda a, b: seen.append((a, b)), 1)  # lost: seen


def warns_in_a_callable_of_a_local_class():
    seen = []

    class Local:
        def __call__(self, x):
            seen.append(x)  # lost: seen

    return Local()


def warns_with_a_lock():
    seen, lock = [], threading.Lock()

    def f(x):
        with lock:
            seen.append(x)  # lost: seen

    return f


def warns_with_many_names():
    # More than 255 constants and names: instructions have arguments of two bytes.
    line = sys._getframe().f_lineno  # lost: seen
    lines = "".join(f"v{n} = {n}.5 + x.a{n};" for n in range(300))
    source = f"def make(seen):\n def f(x):\n  {lines}seen.append(v299)\n return f\n"
    scope = {}
    exec("\n" * (line - 3) + source, scope)
    return scope["make"]([])


# Not to be warned of


def silent_plain():
    return lambda x: x * x


def silent_captured_and_read():
    n, rate = 3, {"a": 1}
    return lambda x: x * n + rate["a"]


def silent_builtin():
    return len


def silent_bound_builtin():
    return [].append


def silent_class():
    return dict


def silent_no_callable():
    return 3


def silent_memo():
    memo = {}

    def f(x):
        if x not in memo:
            memo[x] = x * x
        return memo[x]

    return f


def silent_memo_with_get():
    memo = {}

    def f(x):
        value = memo.get(x)
        if value is None:
            value = memo[x] = x * x
        return value

    return f


def silent_memo_with_try():
    memo = {}

    def f(x):
        try:
            return memo[x]
        except KeyError:
            memo[x] = x * x
            return memo[x]

    return f


def silent_memo_with_setdefault():
    memo = {}
    return lambda x: memo.setdefault(x, x * x)


def silent_memo_with_setdefault_of_something_else():
    memo = {}

    def f(x):
        memo.setdefault(x, print).append(x)

    return f


def silent_list_added_to_and_read():
    seen = []

    def f(x):
        nonlocal seen
        seen += [x]
        return seen[-1]

    return f


def silent_object_added_to_and_read():
    class Constants:
        def __ior__(self, other):
            return self

    constants = Constants()

    def f(x):
        nonlocal constants
        constants |= x
        return constants

    return f


def silent_memo_of_a_global():
    def f(x):
        if x not in table:
            table[x] = x * x
        return table[x]

    return f


def silent_memo_that_another_function_reads():
    def f(x):
        fill_table(x)
        return from_table(x)

    return f


def fill_table(x):
    table[x] = x


def from_table(x):
    return table[x]


def silent_memo_that_a_method_reads():
    def f(x):
        rows.append(x)
        return ReadsRows().sum()

    return f


class ReadsRows:
    def sum(self):
        return sum(rows)


def silent_memo_that_a_property_reads():
    def f(x):
        rows.append(x)
        return HasProperty().sum

    return f


class HasProperty:
    @property
    def sum(self):
        return sum(rows)


def silent_memo_that_a_base_class_reads():
    def f(x):
        rows.append(x)
        return Derived().sum()

    return f


class Derived(ReadsRows):
    pass


def silent_memo_that_a_captured_object_reads():
    tool = ReadsRows()

    def f(x):
        rows.append(x)
        return tool.sum()

    return f


def silent_memo_that_an_object_without_attributes_reads():
    seen = []

    class Local:
        __slots__ = ()

        def sum(self):
            return sum(seen)

    tools = [Local()]

    def f(x):
        seen.append(x)
        return tools[0].sum()

    return f


def silent_memo_that_an_object_of_a_builtin_type_reads():
    seen = []

    class Local(dict):
        def sum(self):
            return sum(seen)

    tool = Local()

    def f(x):
        seen.append(x)
        return tool.sum()

    return f


def silent_memo_that_a_nested_function_reads():
    seen = []

    def f(x):
        seen.append(x)
        return sorted(x, key=lambda y: seen.index(y))

    return f


def silent_memo_in_a_table_of_functions():
    seen = []
    actions = {"put": seen.append, "sum": lambda: sum(seen)}

    def f(x):
        seen.append(x)
        return actions["sum"]()

    return f


def silent_memo_that_a_default_reads():
    seen = []

    def f(x, known=seen):
        seen.append(x)
        return len(known)

    return f


def silent_memo_that_a_keyword_default_reads():
    seen = []

    def f(x, *, known=seen):
        seen.append(x)
        return len(known)

    return f


def silent_memo_that_an_argument_of_a_partial_reads():
    seen = []

    def f(known, x):
        seen.append(x)
        return len(known)

    return functools.partial(f, seen)


def silent_memo_by_another_name():
    first = second = []

    def f(x):
        first.append(x)
        return len(second)

    return f


def silent_memo_inside_another_container():
    seen = []
    everything = {"seen": seen}

    def f(x):
        seen.append(x)
        return everything["seen"][-1]

    return f


def silent_memo_inside_a_namespace():
    seen = []
    state = types.SimpleNamespace(deep=types.SimpleNamespace(seen=seen))

    def f(x):
        seen.append(x)
        return len(state.deep.seen)

    return f


def silent_memo_inside_an_object():
    class Local:
        def __init__(self, known):
            self.known = known

    seen = []
    local = Local([seen])

    def f(x):
        seen.append(x)
        return local.known

    return f


def silent_memo_inside_an_iterator():
    seen = []
    iterator = iter(seen)

    def f(x):
        seen.append(x)
        return next(iterator)

    return f


def silent_memo_inside_an_object_of_a_library():
    seen = []
    options = argparse.Namespace(seen=seen)
    vars(options)["more"] = 1

    def f(x):
        seen.append(x)
        return options

    return f


def silent_memo_that_a_partial_reads():
    seen = []
    count = functools.partial(sum, seen)

    def f(x):
        seen.append(x)
        return count()

    return f


def silent_memo_that_a_closure_of_an_installed_package_reads():
    seen = []
    count = installed("def make(seen):\n return lambda: len(seen)\n")(seen)

    def f(x):
        seen.append(x)
        return count()

    return f


def silent_memo_of_a_decorator():
    def memoized(func):
        memo = {}

        @functools.wraps(func)
        def wrapper(*args):
            if args not in memo:
                memo[args] = func(*args)
            return memo[args]

        return wrapper

    return memoized(lambda x: x)


def silent_memo_kept_short():
    memo, order = {}, collections.deque()

    def f(x):
        if x not in memo:
            memo[x] = x
            order.append(x)
            if len(order) > 9:
                del memo[order.popleft()]
        return memo[x]

    return f


def silent_seen_before():
    seen = set()

    def f(x):
        if x in seen:
            return None
        seen.add(x)
        return x

    return f


def silent_seen_before_in_a_lambda():
    seen = set()
    return lambda x: x in seen or seen.add(x)


def silent_buffer():
    if np is None:
        return None
    buffer = np.zeros(9)

    def f(x):
        buffer[:] = x
        return buffer.sum()

    return f


def silent_stack():
    stack = []

    def f(x):
        stack.append(x)
        value = stack.pop()
        return value

    return f


def silent_popped():
    todo = [1, 2, 3]
    return lambda x: todo.pop()


def silent_swap():
    pair = [1, 2]

    def f(x):
        pair[0], pair[1] = pair[1], pair[0]

    return f


def silent_passed_on():
    heap = []

    def f(x):
        heap.append(x)
        heapq.heapify(heap)

    return f


def silent_returned():
    seen = []

    def f(x):
        seen.append(x)
        return seen

    return f


def silent_iterated():
    seen = []

    def f(x):
        seen.append(x)
        for y in seen:
            print(y)

    return f


def silent_aliased():
    seen = []

    def f(x):
        mine = seen
        seen.append(x)
        return len(mine)

    return f


def silent_method_taken():
    seen = []

    def f(x):
        put = seen.append
        put(x)

    return f


def silent_compared():
    seen = []

    def f(x):
        seen.append(x)
        return [] < seen < [9]

    return f


def silent_value_of_itself():
    seen = {}

    def f(x):
        seen[x] = seen

    return f


def silent_key_of_another():
    seen, other = [], {}

    def f(x):
        seen.append(x)
        other[tuple(seen)] = x
        return other

    return f


def silent_deep_member():
    nested = {"a": {"b": []}}

    def f(x):
        nested["a"]["b"].append(x)

    return f


def silent_member_of_unknown_type():
    queues = {"a": threading.local()}

    def f(x):
        queues["a"].append(x)

    return f


def silent_with_a_walrus():
    seen = []

    def f(x):
        (mine := seen).append(x)
        return mine

    return f


def silent_matched():
    seen = {}

    def f(x):
        seen[x] = 1
        match seen:
            case {"a": y}:
                return y
        return None

    return f


def silent_lazy():
    model = None

    def f(x):
        nonlocal model
        if model is None:
            model = object()
        return model, x

    return f


def silent_lazy_global():
    def f(x):
        global last
        if last is None:
            last = object()
        return last

    return f


def silent_lazy_with_or():
    def f(x):
        global last
        last = last or object()

    return f


def silent_lazy_with_either():
    def f(x):
        global number
        number = number + 1 if x else 0
        return number

    return f


def silent_lazy_with_try():
    def f(x):
        global not_there_yet
        try:
            not_there_yet
        except NameError:
            not_there_yet = object()

    return f


def silent_lazy_by_name():
    def f(x):
        global not_there_yet
        if "not_there_yet" not in globals():
            not_there_yet = object()

    return f


def silent_lazy_in_a_helper():
    def f(x):
        set_up()
        return last

    return f


def set_up():
    global last
    last = object()


def silent_lazy_that_a_method_reads():
    def f(x):
        set_up()
        return ReadsLast().get()

    return f


class ReadsLast:
    def get(self):
        return last


def silent_lazy_import():
    def f(x):
        global random, path
        import os.path as path
        import random

    return f


def silent_flag():
    done = False

    def f(x):
        nonlocal done
        done = not done

    return f


def silent_largest():
    most = 0

    def f(x):
        nonlocal most
        most = max(most, x)

    return f


def silent_deleted():
    def f(x):
        global last
        last = x
        del last

    return f


def silent_scratch():
    n = 0

    def f(xs):
        nonlocal n
        n = 0
        for x in xs:
            n += x
        return n

    return f


def silent_depth():
    depth = 0

    def f(x):
        nonlocal depth
        depth += 1
        try:
            return f(x - 1) if depth < 9 else x
        finally:
            depth -= 1

    return f


def silent_global_of_main_by_its_module():
    def f(x):
        import __main__

        rows.append(x)
        return len(__main__.rows)

    return f


def silent_global_of_main_by_the_list_of_modules():
    def f(x):
        rows.append(x)
        return len(sys.modules[__name__].rows)

    return f


def silent_wrapped_in_itself():
    @functools.lru_cache
    def f(x):
        return x

    f.__wrapped__ = f
    return f


def silent_by_exec():
    def f(x):
        rows.append(x)
        return eval("len(rows)")

    return f


def silent_local_list():
    def f(x):
        seen = []
        seen.append(x)
        seen[0] += 1
        del seen[0]

    return f


def silent_local_of_an_inner_function():
    def f(xs):
        n = 0
        seen = []

        def g(x):
            nonlocal n
            n += x
            seen.append(x)

        for x in xs:
            g(x)
        return n

    return f


def silent_local_of_the_same_name():
    def f(x):
        total = 0
        rows = []
        total += x
        rows.append(x)
        return total

    return f


def silent_local_of_the_same_name_within():
    n, seen = 0, []

    def f(x):
        def g():
            n = 1
            seen = []

            def h():
                nonlocal n
                n += x
                seen.append(n)

            h()

        g()
        return n

    return f


def silent_parameter_of_the_same_name():
    def f(rows, total=0):
        total += 1
        rows.append(total)

    return f


def silent_parameter_within():
    seen = []

    def f(x):
        return (lambda seen: seen.append(x))([]), seen

    return f


def silent_comprehension_variable():
    rows_too = [[]]

    def f(x):
        return [rows.append(x) for rows in rows_too], [names for names in x]

    return f


def silent_comprehension_variable_in_a_closure():
    seen, lists = [], [[]]

    def f(x):
        made = [lambda: seen.append(1) for seen in lists]
        return made

    return f


def silent_comprehension_variable_and_a_capture():
    seen, lists = [], [[]]

    def f(x):
        made = [(lambda: seen.append(1)) for seen in lists]
        return made, seen

    return f


def silent_loop_variable():
    def f(x):
        for total in range(x):
            pass
        with open(x) as last:
            pass
        return total

    return f


def silent_class_body():
    def f(x):
        class Local:
            total = 0
            total += 1
            rows = []
            rows.append(x)

        return Local

    return f


def silent_class_body_with_a_cell():
    n = 1

    def f(x):
        class Local:
            n = 2
            n += 1

            def get(self):
                return n

        return Local().get()

    return f


def silent_attribute():
    state = types.SimpleNamespace(n=0, rows=[])

    def f(x):
        state.n += 1
        state.rows.append(x)

    return f


def silent_attribute_of_the_function():
    def f(x):
        f.calls = getattr(f, "calls", 0) + 1

    return f


def silent_method_that_writes_self():
    class Local:
        def __call__(self, x):
            self.n = x
            self.seen = [x]
            self.seen.append(x)

    return Local()


def silent_object_with_an_append():
    class Remote:
        def append(self, x):
            return x

        def __setitem__(self, key, value):
            pass

    remote = Remote()

    def f(x):
        remote.append(x)
        remote[x] = x

    return f


def silent_subclass_of_list():
    class Mine(list):
        def append(self, x):
            pass

    mine = Mine()
    return lambda x: mine.append(x)


def silent_environment():
    environ = os.environ

    def f(x):
        environ["DMAP_NOT_THERE"] = str(x)

    return f


def silent_generator():
    def f(x):
        n = 0
        for y in x:
            n += y
            yield n

    return f


def silent_generator_with_send():
    def f(x):
        seen = []
        while True:
            y = yield
            seen.append(y)
            yield from seen

    return f


def silent_read_only_methods():
    seen, words = [1], {}
    return lambda x: (seen.index(x), seen.copy(), words.items(), words.get(x))


def silent_frozen():
    seen = frozenset()

    def f(x):
        return seen.union([x]), seen | {x}

    return f


def silent_never_called():
    def f(x):
        return x

    def g(x):
        rows.append(x)

    return f


def silent_passed_the_container():
    seen = []

    def f(x):
        add(seen, x)

    def add(where, x):
        where.append(x)

    return f


def silent_list_sort_of_a_copy():
    seen = [3, 1]

    def f(x):
        mine = list(seen)
        mine.sort()
        mine.append(x)
        return mine

    return f


def silent_set_to_itself():
    seen = [3, 1]

    def f(x):
        nonlocal seen
        seen = sorted(seen)

    return f


def silent_seed():
    return random.seed


def silent_random():
    def f(x):
        random.seed(x)
        return random.random()

    return f


def silent_regular_expression():
    pattern = re.compile("a+")

    def f(x):
        re.purge()
        return pattern.sub("b", re.compile("b" + x).pattern)

    return f


def silent_re_compile():
    return re.compile


def silent_single_dispatch():
    @functools.singledispatch
    def f(x):
        return x

    @f.register
    def _(x: int):
        return -x

    return f


def silent_cached():
    return functools.lru_cache(lambda x: x)


def silent_cached_with_a_size():
    @functools.lru_cache(maxsize=3)
    def f(x):
        return x

    return f


def silent_cached_property():
    class Local:
        @functools.cached_property
        def slow(self):
            return 3

        def __call__(self, x):
            return self.slow + x

    return Local()


def silent_total_ordering():
    @functools.total_ordering
    class Local:
        def __lt__(self, other):
            return True

        def __eq__(self, other):
            return True

        __hash__ = None

        def __call__(self, x):
            return self >= x

    return Local()


def silent_logging():
    def f(x):
        logging.getLogger("corpus").warning("%s", x)
        log.info("%s", x)

    return f


def silent_logging_method():
    return log.info


def silent_warning():
    return lambda x: warnings.warn(str(x), stacklevel=2)


def silent_warnings_caught():
    def f(x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            caught.clear()
        return x

    return f


def silent_context_manager():
    @contextlib.contextmanager
    def changed(x):
        before = x
        yield before

    def f(x):
        with changed(x) as y:
            return y

    return f


def silent_context_manager_of_a_class():
    class Timer:
        def __enter__(self):
            self.start = 1
            self.laps = [1]
            return self

        def __exit__(self, *error):
            self.laps.append(2)
            self.took = self.start + 1

    def f(x):
        with Timer() as timer:
            timer.laps[0] = x
        return timer.took

    return f


def silent_exit_stack():
    def f(x):
        with contextlib.ExitStack() as stack, contextlib.suppress(ValueError):
            stack.callback(print, x)
            stack.pop_all()

    return f


def silent_redirected():
    def f(x):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            print(x)
        return out.getvalue()

    return f


def silent_itertools():
    counter = itertools.count()
    cycle = itertools.cycle([1, 2])
    return lambda x: (next(counter), next(cycle), x)


def silent_operator():
    return operator.itemgetter(1)


def silent_setitem():
    seen = {}
    return functools.partial(operator.setitem, seen)


def silent_named_tuple():
    pair = collections.namedtuple("pair", "a b")
    return lambda x: pair(x, x)._replace(a=1)


def silent_dataclass():
    @dataclasses.dataclass
    class Item:
        n: int = 0
        rows: list = dataclasses.field(default_factory=list)

        def add(self, x):
            self.n += 1
            self.rows.append(x)
            return self

    return lambda x: Item().add(x)


def silent_enum():
    class Colour(enum.Enum):
        RED = 1

    return lambda x: Colour(x)


def silent_atexit():
    return lambda x: atexit.register(print, x)


def silent_copy():
    seen = {"a": []}

    def f(x):
        mine = copy.deepcopy(seen)
        mine["a"].append(x)
        mine[x] = 1
        return mine

    return f


def silent_template():
    template = string.Template("$a")
    return lambda x: template.substitute(a=x)


def silent_csv():
    def f(path):
        with open(path) as file:
            lines = list(csv.reader(file))
        lines.pop(0)
        lines.sort()
        return lines

    return f


def silent_temporary_folder():
    return lambda x: tempfile.TemporaryDirectory().cleanup()


def silent_generic():
    T = typing.TypeVar("T")

    def f(x: T) -> "list[T]":
        kept: list[T] = []
        kept.append(x)
        return kept

    return f


def silent_json():
    return functools.partial(json.dumps, default=str)


def silent_thread_local():
    local = threading.local()

    def f(x):
        local.seen = []
        local.seen.append(x)

    return f


def silent_numpy():
    return None if np is None else np.vectorize(lambda x: x)


def silent_numpy_function():
    return None if np is None else np.mean


def silent_numpy_local():
    if np is None:
        return None

    def f(x):
        out = np.zeros(x)
        out[0] = 1
        out[1:] += x
        out.sort()
        return out

    return f


def silent_numpy_generator():
    if np is None:
        return None
    rng = np.random.default_rng(1)

    def f(x):
        np.random.seed(x)
        return rng.shuffle(x)

    return f


def silent_hypothesis():
    if hypothesis is None:
        return None

    @hypothesis.given(hypothesis.strategies.integers())
    def f(x):
        return x

    return f


def silent_hypothesis_strategy():
    if hypothesis is None:
        return None
    strategy = hypothesis.strategies.integers()

    @hypothesis.strategies.composite
    def f(draw):
        return draw(strategy)

    return f


def silent_state_of_another_module():
    module = types.ModuleType("another")
    source = "n, rows = 0, []\ndef f(x):\n    global n\n    n += 1\n    rows.append(x)\n"
    exec(source, module.__dict__)
    return lambda x: module.f(x)


def silent_function_of_another_module():
    module = types.ModuleType("another")
    source = "n, rows = 0, []\ndef f(x):\n    global n\n    n += 1\n    rows.append(x)\n"
    exec(source, module.__dict__)
    return module.f


def silent_function_of_another_module_with_its_closure():
    module = sys.modules["writes_another"] = types.ModuleType("writes_another")
    source = """
import functools
def counted(func):
    n = 0
    @functools.wraps(func)
    def wrapper(x):
        nonlocal n
        n += 1
        return func(x)
    return wrapper
@counted
def f(x):
    return x
"""
    exec(source, module.__dict__)
    return module.f


WRITER = """
def make(path):
    n, seen = 0, []
    def f(x):
        nonlocal n
        n += 1
        seen.append(x)
    return f
"""


def installed(source, filename="/usr/lib/python3/site-packages/installed/it.py"):
    """Return the function ``make`` of the source, which lies where nobody writes his own."""
    scope = {"__name__": "installed"}
    exec(compile(source, filename, "exec"), scope)
    return scope["make"]


def silent_closure_of_an_installed_package():
    return installed(WRITER)("")


def silent_closure_of_a_package_of_the_distribution():
    return installed(WRITER, "/usr/lib/python3/dist-packages/it.py")("")


def silent_closure_of_the_standard_library():
    return installed(WRITER, os.path.join(os.path.dirname(os.__file__), "it.py"))("")


def silent_closure_of_what_is_frozen():
    return installed(WRITER, "<frozen it>")("")


def silent_empty_cell():
    def f(x):
        later.append(x)

    if f is None:
        later = []
    return f


def silent_too_many_functions():
    scope = {"__name__": "__main__", "rows": []}
    calls = "".join(f"    f{n}(x)\n" for n in range(150))
    lines = "".join(f"def f{n}(x):\n    return {n}\n" for n in range(149))
    exec(f"{lines}def f149(x):\n    return rows\ndef f(x):\n    rows.append(x)\n{calls}", scope)
    return scope["f"]


def silent_too_many_functions_in_a_row():
    scope = {"__name__": "__main__", "rows": []}
    lines = "".join(f"def f{n}(x):\n    return f{n + 1}(x)\n" for n in range(150))
    exec(f"{lines}def f150(x):\n    return rows\ndef f(x):\n    rows.append(x)\n    f0(x)\n", scope)
    return scope["f"]


def silent_object_that_hurts():
    class Meta(type):
        def __hash__(cls):
            raise SystemExit(1)

        def __eq__(cls, other):
            raise SystemExit(2)

        def __getattribute__(cls, name):
            raise SystemExit(3)

        def __instancecheck__(cls, instance):
            raise SystemExit(4)

        def __subclasscheck__(cls, other):
            raise SystemExit(5)

    class Hurts(metaclass=Meta):
        def __getattribute__(self, name):
            raise SystemExit(6)

        def __eq__(self, other):
            raise SystemExit(7)

        def __hash__(self):
            raise SystemExit(8)

        def __len__(self):
            raise SystemExit(9)

        def __iter__(self):
            raise SystemExit(10)

        def __call__(self, x):
            return hurts, x

        def __bool__(self):
            raise SystemExit(11)

        __class__ = property(lambda self: sys.exit(12))

    hurts = Hurts()
    many = [hurts, {1: hurts}, (hurts, Hurts)]

    def f(x):
        many.append(hurts)
        many[0] = Hurts
        return hurts(x), many

    return functools.partial(f, hurts)


def silent_itself_hurts():
    class Hurts:
        def __getattribute__(self, name):
            raise SystemExit(1)

        __class__ = property(lambda self: sys.exit(2))

    return Hurts()


def main(path):
    """Print as JSON what is found: case -> pairs of variable and line, null if it is not made."""
    spec = importlib.util.spec_from_file_location("writes", path)
    writes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writes)
    found = {}
    for name, case in list(globals().items()):
        if name.startswith(("warns_", "silent_")):
            func = case()
            found[name] = None
            if func is not None:
                texts = writes.lost_writes(func)
                found[name] = [
                    (re.search(r"'(\w+)'", text)[1], int(re.search(r"line (\d+)", text)[1]))
                    for text in texts
                ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
