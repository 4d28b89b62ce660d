"""Names against the log, formats by file names, roots by places: without any registry."""

import itertools
from typing import Any

import pytest
import yaml

import certificates as c
from mlflow_kdguard.promoted import draft, stock
from mlflow_kdguard.promoted.history import History, Key
from mlflow_kdguard.promoted.moved import moved
from mlflow_kdguard.promoted.report import Holding

RUN, MODEL = "ab" * 16, "m-" + "cd" * 16
KEY: Key = ("default", "m", "champion")


def entry(seq: int, action: str, version: str, **changes: Any) -> dict[str, Any]:
    told = {"seq": seq, "time": "t", "actor": "a", "action": action, "workspace": "default",
            "model": "m", "version": version, "alias": "champion", "reasons": "[]"}  # fmt: skip
    return told | changes


def holding(version: str, kind: Any = "alias", name: str = "champion") -> Holding:
    return Holding(workspace="default", model="m", kind=kind, name=name, version=version)


def odd(holdings: list[Holding], rows: list[dict[str, Any]], now: str | None) -> list[str]:
    """Versions of the findings, where log and alias stay as they are."""
    _, findings = moved(holdings, {"default"}, lambda: History.of(rows), lambda _key: now)
    return [finding.version for finding in findings]


@pytest.mark.parametrize("action", ["promote", "override", "would-refuse"])
def test_an_alias_stands_for_the_version_of_its_last_entry(action: str) -> None:
    rows = [entry(1, "promote", "1"), entry(2, action, "2"), entry(3, "refuse", "3")]
    assert odd([holding("2")], rows, "2") == []
    assert odd([holding("1")], rows, "1") == ["1"]
    assert odd([holding("3")], rows, "3") == ["3"]
    assert odd([], rows, None) == [""]


def test_what_was_taken_is_not_held() -> None:
    rows = [entry(1, "promote", "1"), entry(2, "demote", "1")]
    assert odd([], rows, None) == []
    assert odd([holding("1")], rows, "1") == ["1"]
    assert odd([holding("1")], [], "1") == ["1"]


def test_a_model_that_audit_mode_let_go_is_not_missed() -> None:
    rows = [entry(1, "promote", "1"), entry(2, "would-delete-refused", "1")]
    assert odd([], rows, None) == []
    assert [e.seq for e in History.of(rows).would_refuse] == [2]


def test_a_stage_is_held_by_versions_that_were_given_it() -> None:
    rows = [entry(1, "stage", "1", alias="Production"), entry(2, "stage", "2", alias="Production")]
    for version in "12":
        assert odd([holding(version, "stage", "Production")], rows, None) == []
    assert odd([holding("3", "stage", "Production")], rows, None) == ["3"]
    left = [*rows, entry(3, "demote", "1", alias="Production")]
    assert odd([holding("1", "stage", "Production")], left, None) == ["1"]


def test_other_workspaces_are_not_asked() -> None:
    rows = [entry(1, "promote", "1", workspace="elsewhere")]
    _, findings = moved(
        [], {"default"}, lambda: History.of(rows), lambda _key: pytest.fail("asked")
    )
    assert findings == []


def test_a_promotion_during_the_sweep_is_no_finding() -> None:
    """Seen at version 1; by the time of the log it is at 2, and a moment later at 3."""
    rows = [entry(n, "promote", str(n)) for n in (1, 2, 3)]
    logs = iter([rows[:2], rows])
    _, findings = moved([holding("1")], {"default"}, lambda: History.of(next(logs)), lambda _k: "3")
    assert findings == []
    taken = [rows[0], entry(2, "demote", "1")]
    assert odd([holding("1")], taken, None) == []


def test_a_name_that_never_settles_is_a_finding() -> None:
    versions = (str(n) for n in itertools.count(2))
    rows = [entry(1, "promote", "1")]
    _, findings = moved(
        [holding("2")], {"default"}, lambda: History.of(rows), lambda _k: next(versions)
    )
    assert [finding.kind for finding in findings] == ["moved"]


@pytest.mark.parametrize("reasons", ["[", '"x"', '["x"]', ["x"]])
def test_reasons_are_read_however_they_come(reasons: Any) -> None:
    (told,) = History.of([entry(1, "would-refuse", "1", reasons=reasons)]).would_refuse
    assert "".join(told.reasons) in ("x", "[", '"x"')


# ── What adopt tells from names ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("files", "kinds", "verdict"),
    [
        (["MLmodel", "model.onnx"], ("onnx",), "certifiable"),
        (["MLmodel", "model.onnx", "requirements.txt", "conda.yaml"], ("onnx",), "certifiable"),
        (["MLmodel", "model.onnx", "registered_model_meta"], ("onnx",), "other-bundle"),
        (["MLmodel", "net.onnx"], ("onnx",), "other-bundle"),
        (["model.onnx"], ("onnx",), "other-bundle"),
        (["MLmodel", "data/model.PTH"], ("torch (pickle)",), "not-onnx"),
        (["a.pkl", "b.joblib", "code/x.py"], ("code", "pickle"), "not-onnx"),
        (["README"], ("other",), "not-onnx"),
        ([], (), "empty"),
    ],
)
def test_formats_and_verdicts_by_file_names(
    files: list[str], kinds: tuple[str, ...], verdict: str
) -> None:
    assert stock.formats(files) == kinds
    assert stock.verdict(files, certified=False) == verdict
    assert stock.verdict(files, certified=True) == "certified"
    assert stock.verdict(None, certified=False) == "unreadable"


@pytest.mark.parametrize(
    ("location", "root"),
    [
        (f"mlflow-artifacts:/3/{RUN}/artifacts/model", "mlflow-artifacts:/"),
        (f"mlflow-artifacts:/3/models/{MODEL}/artifacts", "mlflow-artifacts:/"),
        (f"s3://bucket/a/b/3/{RUN}/artifacts/model", "s3://bucket/a/b"),
        (f"/srv/mlruns/3/models/{MODEL}/artifacts/", "file:/srv/mlruns"),
        (f"file:///srv/my%20runs/exp/{RUN}/artifacts", "file:/srv/my runs"),
        ("s3://bucket/models/mine", None),
        (f"s3://bucket/3/{RUN}/model", None),
        (f"s3://bucket/3/{RUN}/../../artifacts", None),
        (f"s3://user@bucket/3/{RUN}/artifacts", None),
        ("artifacts", None),
        ("", None),
        ("s3://[", None),
    ],
)
def test_only_what_mlflow_wrote_has_a_root(location: str, root: str | None) -> None:
    assert stock.root(location) == root


def test_a_draft_is_plain_yaml_whatever_it_quotes() -> None:
    evil = ['s3://b/"]\nmode: enforce\nallow: ["x', "s3://b/# c\u2028mode: enforce"]
    text = draft.settings(
        "http://r\nmode: enforce",
        policy=c.packaged(),
        roots=[(e, 1) for e in evil],
        strange=evil * 11,
    )
    stated = yaml.safe_load(text)
    assert stated["allow"] == evil
    assert stated["mode"] == "audit"
    assert stated["registry"] == ["http://r\nmode: enforce"]
    assert text.count("mode: audit") == 1
    assert "and 2 more" in text
    assert yaml.safe_load(draft.settings("http://r", policy=c.packaged(), roots=[], strange=[]))[
        "allow"
    ] == ["mlflow-artifacts:/"]
