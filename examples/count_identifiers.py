"""Count the identifiers in Python's whole standard library, on every core of this machine.

No server is needed: the first call of `dmap` starts a private cluster, which goes with the script.
To use the cores of other machines as well, name their job servers and change nothing here:

    DMAP_SERVERS=sammy,kenny python examples/count_identifiers.py
"""

import keyword
import os
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path

from dmap import dmap


def count_identifiers(path: Path) -> Counter[str] | None:
    """Return how often each identifier occurs in a file, or None if that is not valid Python.

    The library's own tests have some such files, to see what happens to them.
    """
    try:
        with tokenize.open(path) as lines:
            return Counter(
                token.string
                for token in tokenize.generate_tokens(lines.readline)
                if token.type == tokenize.NAME and not keyword.iskeyword(token.string)
            )
    except (OSError, SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return None


library = Path(sysconfig.get_path("stdlib"))
files = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]

start = time.perf_counter()
answers = dmap(lambda path: (count_identifiers(path), os.getpid()), files, desc="counting")
seconds = time.perf_counter() - start

counts = [count for count, _ in answers]
workers = {worker for _, worker in answers}

total: Counter[str] = Counter()
for count in filter(None, counts):
    total.update(count)
for identifier, n in total.most_common(20):
    print(f"{n:9,} {identifier}")
print(
    f"{total.total():9,} in {len(files):,} files ({counts.count(None)} of them not valid Python), "
    f"by {len(workers)} workers in {seconds:.1f} seconds"
)

print("The same with the builtin map ...", flush=True)
start = time.perf_counter()
expected = list(map(count_identifiers, files))
seconds = time.perf_counter() - start
if counts != expected:
    sys.exit("... gives another result: that is a bug of dmap")
print(f"... takes {seconds:.1f} seconds; the results are equal")
