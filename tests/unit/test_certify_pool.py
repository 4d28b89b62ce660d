"""The pool of open nodes, held against lists that are written anew each time."""

from dataclasses import fields

import torch
from hypothesis import given
from hypothesis import strategies as st

from mlflow_kdguard.certify.nodes import Nodes
from mlflow_kdguard.certify.pool import Pool

WIDE = {"high_lo", "high_hi", "low_lo", "low_hi", "where", "weights"}
SWITCHES = {"theta", "coef"}
WHOLE = {"image", "klass", "name"}


def made(start: int, count: int) -> Nodes:
    """Nodes of which every number tells when they were made."""
    one = torch.arange(start, start + count)
    values = {}
    for item in fields(Nodes):
        if item.name in WHOLE:
            values[item.name] = one.clone()
        elif item.name == "student_high":
            values[item.name] = one % 2 == 0
        elif item.name == "phase":
            values[item.name] = (one[:, None] + torch.arange(4)).remainder(3).to(torch.int8) - 1
        elif item.name in SWITCHES:
            values[item.name] = (one[:, None] + torch.arange(4) / 8).float()
        elif item.name in WIDE:
            values[item.name] = one[:, None] + torch.arange(3).double() / 8
        else:
            values[item.name] = one.double()
    return Nodes(**values)


def same(ours: Nodes, theirs: Nodes) -> bool:
    return all(
        torch.equal(getattr(ours, item.name), getattr(theirs, item.name)) for item in fields(Nodes)
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**20)), max_size=12))
def test_a_pool_is_a_list(rounds: list[tuple[int, int]]) -> None:
    """Whatever is taken out and put in, order and contents are those of plain concatenation."""
    plain, seen = made(0, 5), 5
    pool = Pool(plain)
    for count, mask in rounds:
        which = torch.tensor([bool(mask >> (i % 20) & 1) for i in range(len(plain))]).bool()
        assert same(pool.pop(which), plain.take(which))
        new = made(seen, count)
        pool.push(new)
        plain, seen = plain.take(~which).joined(new), seen + count
        assert len(pool) == len(plain)
        assert torch.equal(pool.bound, plain.bound)
        assert torch.equal(pool.image, plain.image)
    parts = list(pool.parts(4))
    assert all(len(part) <= 4 for part in parts)
    if parts:
        assert same(parts[0].joined(*parts[1:]), plain)
    else:
        assert len(plain) == 0


def test_what_a_pool_was_made_from_is_never_written() -> None:
    """A search's roots share memory with what they were made from."""
    roots, untouched = made(0, 3), made(0, 3)
    pool = Pool(roots)
    pool.pop(torch.tensor([True, True, False]))
    pool.push(made(7, 2))
    assert same(roots, untouched)
