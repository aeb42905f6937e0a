"""Asks a server a question every 50 ms until its standard input ends; prints what it got.

It is a process of its own, since it measures how long a client has to wait.
"""

import json
import sys
import threading
import time
from itertools import count

from hostile_request_kinds import CHAT, Target, chat

from tests.serving.web.raw_http import request


class GoodClient:
    """Counts its answers, which have to be `expected`, or like the first one without that."""

    def __init__(self, target: Target, expected: str | None) -> None:
        self.target, self.expected = target, expected
        self.answers, self.full, self.longest = 0, 0, 0.0
        self.faults: list[str] = []

    def ask(self, number: int) -> None:
        start = time.monotonic()
        try:
            response = self.target.send(
                request(CHAT, chat("say:well", max_tokens=8, temperature=0))
            )
        except OSError as error:
            self.faults.append(f"the good client, question {number}: {error!r}")
            return
        self.longest = max(self.longest, time.monotonic() - start)
        if response.status == 429:
            self.full += 1
            time.sleep(0.5)
            return
        got = response.json["choices"][0]["message"]["content"] if response.status == 200 else None
        self.expected = self.expected or got
        self.answers += 1
        if got is None or got != self.expected:
            self.faults.append(f"the good client, question {number}: {response}")


def main() -> None:
    client = GoodClient(Target(int(sys.argv[1])), (sys.argv[2:] or [None])[0])
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    for number in count():
        client.ask(number)
        if over.wait(0.05):  # without a pause, it would take the cores from what is tried
            break
    results = {"answers": client.answers, "refused with 429": client.full}
    results["longest wait, seconds"] = round(client.longest, 2)
    print(json.dumps({"results": results, "faults": client.faults}))


if __name__ == "__main__":
    main()
