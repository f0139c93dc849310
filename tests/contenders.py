"""Processes that contend for a lease, to be stopped and killed by the tests that start them.

    python -m tests.contenders hold PLACE TTL_S              takes the lease, then does what its standard input says
    python -m tests.contenders rounds PLACE LOG TTL_S NAME N takes it N times, each time two entries in a fenced LOG
Every line of the output is one word and its value.
"""

import sys

from cluster.errors import LeaseLostError
from cluster.fencing import read_fenced, write_fenced
from cluster.lease import hold_lease

PATIENCE_S = 240.0


def hold(place: str, ttl_s: float) -> None:
    """Obey lines: `write URI VALUE`, `confirm`, `end`."""
    with hold_lease(place, "holder", ttl_s=ttl_s, wait_s=PATIENCE_S) as confirm:
        token = confirm().token
        say("holds", token)
        for line in sys.stdin:
            verb, *rest = line.split()
            if verb == "end":
                break
            try:
                if verb == "confirm":
                    confirm()
                else:
                    write_fenced(rest[0], rest[1], token)
                say("done", verb)
            except LeaseLostError:
                say("lost", verb)


def rounds(place: str, log: str, ttl_s: float, name: str, number: int) -> None:
    """Append [token, name, "begin"] and [token, name, "end"] in every round that is not lost on the way."""
    lost = 0
    for _ in range(number):
        try:
            with hold_lease(place, name, ttl_s=ttl_s, wait_s=PATIENCE_S) as confirm:
                token = confirm().token
                for event in ("begin", "end"):
                    entries = read_fenced(log, token) or []
                    write_fenced(log, [*entries, [token, name, event]], token)
                    confirm()
        except LeaseLostError:
            lost += 1
        say("round", lost)
    say("finished", lost)


def say(word: str, value: object) -> None:
    print(word, value, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(sys.argv[2], float(sys.argv[3]))
    else:
        rounds(sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
