"""A solver in a process of its own: python -m mlflow_kdguard.solvers.worker MODULE:ADAPTER.

Reads programs from standard input and writes answers to what was standard output, until either
ends. Whatever the solver prints goes to standard error.
"""

import os
import sys
from importlib import import_module

from mlflow_kdguard.solvers import messages
from mlflow_kdguard.solvers.adapter import Adapter, Answer


def main(place: str) -> None:
    """Answer programs with the adapter at `place`."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, _, attribute = place.partition(":")
    adapter: Adapter = getattr(import_module(module), attribute)
    while True:
        try:
            program = messages.to_model(messages.receive(sys.stdin.buffer))
        except EOFError:
            return
        try:
            answer = adapter.solve(*program)
        except Exception as error:
            answer = Answer("fault", message=f"{type(error).__name__}: {error}")
        messages.send(answers, messages.of_answer(answer))


if __name__ == "__main__":
    main(sys.argv[1])
