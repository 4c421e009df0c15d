"""One way of one question, in a process of its own; ``rounds`` starts it and gives it orders.

    python -m benchmarks.runner QUESTION WAY READ_FD WRITE_FD N SECONDS

It writes a JSON line when it is ready, and one after each round; each line it reads is a round. At
the end of its input it closes its peer and ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

from benchmarks import questions
from benchmarks.harness import settle
from benchmarks.processes import adopt_orphans, end_descendants


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
            who, call, size = settle(question, way, opened, int(n), limit)
            say(who=who, n=size)
            for _ in orders:
                gc.collect()
                say(values=question.take(call, size))
    except BaseException as error:
        say(failed=f"{type(error).__name__}: {str(error).strip() or 'no word'}")
        raise
    finally:
        end_descendants(os.getpid())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
