"""A configuration's files are found again from any folder."""

from pathlib import Path

import pytest

from mlflow_kdguard import config
from mlflow_kdguard.data.uri import parse
from mlflow_kdguard.flow.places import anchored


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "take #2?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_relative_paths_become_absolute(here: Path) -> None:
    given = config.parse(
        {
            "run": {"work_dir": "work"},
            "data": {
                "transfer": "imagefolder:photos?size=32#[:9]",
                "clean": "npz:a%23b.npz",
                "test": "digits#test",
                "root": "sets",
            },
            "teacher": {"model": "t.onnx"},
            "redteam": {"train": "npz:train.npz#[2:5]"},
            "audit": {"calibration": "c.json"},
            "measure": {"triggers": ["p.kdt:3", "q.kdt"]},
            "registry": {"tracking_uri": "sqlite:///m.db", "registry_uri": "http://host/"},
        },
        "test",
    )
    found = anchored(given)
    photos, clean = parse(found.data.transfer), parse(found.data.clean)
    assert (photos.path, photos.size, photos.stop) == (here / "photos", 32, 9)
    assert clean.path == here / "a#b.npz"
    assert found.data.test == "digits#test"
    assert found.redteam is not None
    assert parse(found.redteam.train).path == here / "train.npz"
    assert found.teacher.model == str(here / "t.onnx")
    assert found.measure.triggers == (f"{here / 'p.kdt'}:3", f"{here / 'q.kdt'}:0")
    assert found.registry.tracking_uri == f"sqlite:///{here / 'm.db'}"
    assert found.registry.registry_uri == "http://host/"
    assert found.audit.calibration == str(here / "c.json")
    assert found.digest != given.digest  # the calibration has no digest of its own
    assert anchored(found) == found


def test_what_is_no_path_stays(here: Path) -> None:
    given = config.parse({"teacher": {"model": "models:/x@y"}}, "test")
    assert anchored(given).teacher.model == "models:/x@y"
    assert anchored(given).registry == given.registry
