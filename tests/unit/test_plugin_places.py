"""Places: one normal form, whatever the spelling; nothing below a root that it leaves."""

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_kdguard.errors import KDGuardError, UnsafeModelError, UsageError
from mlflow_kdguard.plugin.server.places import LONGEST_CHAIN, Place, refuse_outside, resolve


@pytest.mark.parametrize(
    ("uri", "scheme", "authority", "parts"),
    [
        ("/srv/models", "file", "", ("srv", "models")),
        ("file:///srv//models/", "file", "", ("srv", "models")),
        ("file:/srv/models", "file", "", ("srv", "models")),
        ("FILE://localhost/srv/models", "file", "", ("srv", "models")),
        ("file:///srv/mod%65ls", "file", "", ("srv", "models")),
        ("file:///srv/mod%2565ls", "file", "", ("srv", "models")),
        ("s3://Bucket/prefix", "s3", "bucket", ("prefix",)),
        ("s3://bucket", "s3", "bucket", ()),
        ("mlflow-artifacts:/1/run/artifacts", "mlflow-artifacts", "", ("1", "run", "artifacts")),
    ],
)
def test_a_place_has_one_normal_form(
    uri: str, scheme: str, authority: str, parts: tuple[str, ...]
) -> None:
    assert Place.of(uri) == Place(scheme, authority, parts)
    assert Place.of(str(Place.of(uri))) == Place.of(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "", "relative/path", "./x", "file:relative", "dummy-source", "s3:", "http://[",
        "/srv/../etc", "/srv/%2e%2e/etc", "/srv/%252e%252e/etc", "/srv/a%2fb", "/srv/a\\b",
        "/srv/./x", "/srv/\x00", "/srv/a\nb", "/srv/%0a",
        "s3://user@bucket/x", "s3://bucket/x?versionId=1", "s3://bucket/x#y", "s3://bucket/x?",
        "3s://bucket/x", "://x",
    ],
)  # fmt: skip
def test_what_has_more_than_one_reading_is_no_place(uri: str) -> None:
    with pytest.raises(UsageError):
        Place.of(uri)


def test_within_compares_whole_parts_scheme_and_authority() -> None:
    root = Place.of("s3://bucket/prefix")
    assert Place.of("s3://bucket/prefix").within(root)
    assert Place.of("s3://bucket/prefix/x").within(root)
    for other in ("s3://bucket/prefix2", "s3://bucket2/prefix/x", "gs://bucket/prefix/x",
                  "s3://bucket", "s3://bucket/PREFIX/x"):  # fmt: skip
        assert not Place.of(other).within(root)


@given(st.lists(st.text("ab./%\\ e25", min_size=1, max_size=6), max_size=5), st.integers(0, 3))
def test_no_spelling_of_a_path_below_a_root_leads_out_of_it(parts: list[str], times: int) -> None:
    """As whoever opens the place reads it: unquoted any number of times, dots followed."""
    text = "/".join(parts)
    for _ in range(times):
        text = quote(text)
    try:
        place = Place.of(f"file:///stores/{text}")
    except UsageError:
        return
    assert place.within(Place.of("/stores"))
    assert Path("/", *place.parts).resolve().is_relative_to("/stores")
    assert ".." not in place.path.parts


def test_a_chain_is_followed_to_its_end_and_no_further() -> None:
    steps = {"models:/a/1": "runs:/r/model", "runs:/r/model": "s3://bucket/x"}
    assert resolve("models:/a/1", steps.__getitem__) == Place.of("s3://bucket/x")
    with pytest.raises(UnsafeModelError, match="does not end"):
        resolve("models:/a/1", lambda _: "models:/a/1")
    asked: list[str] = []

    def longer(uri: str) -> str:
        asked.append(uri)
        return f"models:/a/{len(asked)}"

    with pytest.raises(KDGuardError):
        resolve("models:/a/0", longer)
    assert len(asked) == LONGEST_CHAIN


def test_folders_are_compared_where_they_really_are(tmp_path: Path) -> None:
    (tmp_path / "root" / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "alias").symlink_to(tmp_path / "root")
    roots = [Place.of(str(tmp_path / "root")), Place.of(str(tmp_path / "alias"))]
    refuse_outside(Place.of(str(tmp_path / "root" / "inside")), roots)
    refuse_outside(Place.of(str(tmp_path / "alias" / "inside")), roots)
    for odd in ("root/link", "outside", "root/link/x"):
        with pytest.raises(UnsafeModelError, match="outside"):
            refuse_outside(Place.of(str(tmp_path / odd)), roots)
    with pytest.raises(UnsafeModelError):
        refuse_outside(Place.of("s3://bucket/x"), roots)
