"""What is written is read back as the same data set, under the same digest."""

from pathlib import Path

import numpy as np

from mlflow_kdguard import data


def test_a_saved_set_is_the_same_set(tmp_path: Path) -> None:
    some = data.load("digits#train[:40]").unlabelled()
    data.save(some, tmp_path / "a.npz")
    back = data.load(f"npz:{tmp_path / 'a.npz'}")
    assert back.sha256 == some.sha256
    assert back.classes == some.classes == 10
    assert (back.y == data.UNLABELLED).all()
    np.testing.assert_array_equal(back.x, some.x)


def test_the_same_set_is_the_same_bytes(tmp_path: Path) -> None:
    some = data.load("digits#test[:10]")
    for name in ("a", "b"):
        data.save(some, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
