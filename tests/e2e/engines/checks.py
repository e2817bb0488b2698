"""What the two drivers share: counted checks, and a second process of the same script whose checks count with the first's."""

import json
import os
import subprocess
import sys
import time
import traceback

TALLY = "TALLY "


class Checks:
    def __init__(self, engine):
        self.engine = engine
        self.passed = 0
        self.failed = []

    def equal(self, name, got, expected):
        if got == expected:
            self.passed += 1
        else:
            self.failed.append(name)
            print(f"FAILED {self.engine}: {name}: got {str(got)[:300]}, expected {str(expected)[:300]}", flush=True)

    def true(self, name, value):
        self.equal(name, bool(value), True)

    def part(self, part, *arguments):
        """Runs one part; what it raises is one failed check, so that the others still run."""
        try:
            return part(*arguments)
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            self.equal(part.__name__, f"raised {type(error).__name__}: {error}", "no exception")

    def absorb(self, child, name, timeout=300):
        """Waits for a second process made by `another` and counts its checks."""
        try:
            text, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
        lines = text.splitlines()
        tally = [line for line in lines if line.startswith(TALLY)]
        for line in lines:
            if line.startswith("FAILED"):
                print(line, flush=True)
        self.equal(f"{name} ends well", (child.returncode, len(tally)), (0, 1))
        if tally:
            told = json.loads(tally[0][len(TALLY) :])
            self.passed += told["passed"]
            self.failed += told["failed"]

    def tell(self):
        """The second process's last line: its part of the sum. A failed check is told, not an exit code."""
        print(TALLY + json.dumps({"passed": self.passed, "failed": self.failed}), flush=True)

    def finish(self):
        total = self.passed + len(self.failed)
        print(f"{self.engine}: {self.passed} checks of {total}", flush=True)
        # Threads and loops of the engine may still run; nothing of the outcome depends on them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if self.failed else 0)


def reply(child):
    """The next line of a second process; what failed there is shown on the way."""
    while (line := child.stdout.readline()).startswith("FAILED"):
        print(line, end="", flush=True)
    return line.strip()


def within(seconds, answer, wanted):
    """What `answer()` is as soon as it is `wanted`, or at last."""
    until = time.time() + seconds
    while (got := answer()) != wanted and time.time() < until:
        time.sleep(0.05)
    return got


class Command:
    """A command of our wheel (`mooncake ...`, `mooncake_client ...`), with the words of its first line that has `mark`."""

    def __init__(self, mark, name, *arguments):
        path = os.path.join(os.path.dirname(sys.executable), name)
        self.process = subprocess.Popen([path, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        self.line = ""
        for line in self.process.stdout:
            if mark in line:
                self.line = line
                break

    def kill(self):
        self.process.kill()
        self.process.wait()


class OwnMaster(Command):
    """A master of a driver's own, to be killed and started again at its port."""

    def __init__(self, port=0):
        super().__init__(
            "listening on", "mooncake", "master", "--port", port, "--memory", "64MiB", "--metrics-port", "off"
        )
        self.address = self.line.split("listening on ")[1].split()[0]

    def port(self):
        return int(self.address.rsplit(":", 1)[1])


def another(role, *arguments):
    """The same script in a second process: a second instance of the engine."""
    return subprocess.Popen(
        [sys.executable, sys.argv[0], role, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
