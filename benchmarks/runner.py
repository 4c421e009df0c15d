"""One way of one question, in a process of its own; ``rounds`` starts it and gives it orders.

    python -m benchmarks.runner QUESTION WAY READ_FD WRITE_FD N SECONDS

It writes a JSON line when its peer is up. At the first line that it reads it finds its sizes, at
each further one it runs a round; what came of it is a JSON line. At the end of its input it closes
its peer and ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

from benchmarks import questions
from benchmarks.harness import settle
from benchmarks.processes import adopt_orphans


def main(argv: list[str]) -> int:
    """Run the command."""
    name, number, read_fd, write_fd, n, seconds = argv
    adopt_orphans()
    # What the peer starts must not hold these open.
    os.set_inheritable(int(read_fd), False)
    os.set_inheritable(int(write_fd), False)
    orders = os.fdopen(int(read_fd))
    answers = os.fdopen(int(write_fd), "w")

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        question = questions.load(name)
        way = question.ways[int(number)]
        limit = float(seconds) if seconds else None
        with way.open() as opened:
            say(is_up=True)
            orders.readline()
            settled = settle(question, way, opened, int(n), limit)
            say(rows=[{"who": one.who, "n": one.n} for one in settled])
            for _ in orders:
                values = []
                for one in settled:
                    gc.collect()
                    values.append(question.take(one.call, one.n))
                say(values=values)
    except BaseException as error:
        say(failed=f"{type(error).__name__}: {str(error).strip() or 'no word'}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
