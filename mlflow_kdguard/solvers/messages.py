"""Programs and answers as bytes between two processes: a length, then arrays without pickles."""

import io
import json
import struct
from dataclasses import asdict
from typing import IO

import numpy as np
from scipy.sparse import csr_array

from mlflow_kdguard.solvers.adapter import Answer, Limits
from mlflow_kdguard.solvers.model import Floats, Model

_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], arrays: dict[str, object]) -> None:
    """Write one message."""
    body = io.BytesIO()
    np.savez(body, **arrays)  # type: ignore[arg-type]
    stream.write(_LENGTH.pack(body.tell()))
    stream.write(body.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, np.ndarray]:
    """Read one message; EOFError where the other end is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    if len(body) < length:
        raise EOFError
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return dict(arrays)


def of_model(model: Model, limits: Limits, start: Floats) -> dict[str, object]:
    """A program and what may be used for it."""
    return {
        "cost": model.cost, "data": model.matrix.data, "indices": model.matrix.indices,
        "indptr": model.matrix.indptr, "row_lo": model.row_lo, "row_hi": model.row_hi,
        "lo": model.lo, "hi": model.hi, "integer": model.integer,
        "limits": json.dumps(asdict(limits)), "start": start,
    }  # fmt: skip


def to_model(m: dict[str, np.ndarray]) -> tuple[Model, Limits, Floats]:
    """What `of_model` wrote."""
    shape = (len(m["row_lo"]), len(m["lo"]))
    matrix = csr_array((m["data"], m["indices"], m["indptr"]), shape=shape)
    ends = (m["row_lo"], m["row_hi"], m["lo"], m["hi"])
    model = Model(m["cost"], matrix, *ends, m["integer"])
    return model, Limits(**json.loads(str(m["limits"]))), m["start"]


def of_answer(answer: Answer) -> dict[str, object]:
    """An answer."""
    said = (answer.status, answer.message)
    return {
        "x": answer.x, "y": answer.y, "basis": answer.basis, "said": json.dumps(said),
        "figures": np.array([answer.objective, answer.bound], dtype=float),
    }  # fmt: skip


def to_answer(m: dict[str, np.ndarray]) -> Answer:
    """What `of_answer` wrote."""
    status, message = json.loads(str(m["said"]))
    objective, bound = m["figures"].tolist()
    return Answer(status, m["x"], m["y"], objective, bound, message, m["basis"])
