"""Other processes of a benchmark: a peer that is asked line by line, and a measurement that has one to itself."""

import json
import os
import subprocess
import sys


class Peer:
    """A program that reads a job in JSON from each line, and answers each with a line of JSON.

    Args:
      command: the Python, the program and its arguments.
      environment: what is set besides the environment of this process.
    """

    def __init__(self, *command, environment=()):
        given = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=os.environ | dict(environment), **given)

    def ask(self, job):
        """The answer to a job; raises `RuntimeError` if the program has ended."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the PyTorch side ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def alone(program, setting, *flags):
    """The last line that `program --one SETTING FLAGS` prints, from JSON; an error where it fails, as for memory."""
    command = [sys.executable, program, "--one", json.dumps(setting), *flags]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "RESOURCE" in line] or ["no output"]
        return {"error": lines[-1][:300]}
