"""The policy as it is read, named, and tightened."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlflow_kdguard.errors import ConfigError, UsageError
from mlflow_kdguard.policy import (
    Patch,
    Policy,
    blocks,
    guarded_name,
    load,
    merged,
    narrow,
    parse,
    tighten,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64


def policy(**values: Any) -> Policy:
    return parse(merged(load().model_dump(mode="json"), values), where="test")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(text, "utf-8")
    return path


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


def test_the_packaged_policy_has_the_designs_values() -> None:
    assert load().model_dump(mode="json") == {
        "guarded": {"aliases": ["champion", "production"], "stages": ["Production"]},
        "data": {"sha256": [], "allow_unpinned": False},
        "accuracy": {"drop_upper_at_most": 0.03},
        "asr": {
            "triggers": "recovered-or-supplied", "panel": [], "upper_at_most": 0.05,
            "lift_at_most": None, "changed_at_least": 0.95,
        },
        "reference": {"gap_mean_at_most": 0.15, "distinct_from_student": True},
        "faithful": {
            "any_of": [
                {
                    "method": "certified", "norm": "linf", "eps": 0.01, "classes": "all",
                    "delta": 0.2, "share_lower_at_least": 0.8, "samples_at_least": 100,
                    "selection": "uniform-seeded", "below_constant_control": True,
                },
                {
                    "method": "smoothed", "norm": "l2", "sigma": 0.25, "radius": 0.25,
                    "classes": "all", "delta": 0.3, "share_lower_at_least": 0.8,
                    "samples_at_least": 100, "selection": "uniform-seeded",
                    "below_constant_control": True,
                },
            ]
        },
        "patch": None,
        "audit": {"teacher": "ran", "student": "ran"},
        "export": {"parity_at_most": 1e-4},
        "certificate": {
            "figures_from": "recomputed", "signers_at_least": 1, "expires_after_days": 90.0
        },
    }  # fmt: skip


def test_a_file_is_read_over_the_packaged_policy(tmp_path: Path) -> None:
    """What is left out keeps its value; only null waives."""
    path = written(tmp_path, "asr: {upper_at_most: 0.01}\nexport: null\n")
    assert load(path) == policy(asr={"upper_at_most": 0.01}, export=None)
    assert load(path).faithful == load().faithful


def test_a_manifest_is_read_for_its_policy(tmp_path: Path) -> None:
    path = written(
        tmp_path, "name: mine\nstages: []\npolicy: {accuracy: {drop_upper_at_most: 0.01}}"
    )
    assert load(path) == policy(accuracy={"drop_upper_at_most": 0.01})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("asr: {upper: 0.1}", r"asr\.upper: unknown key"),
        ("triggers: {}", "triggers: unknown key"),
        ("asr: {upper_at_most: -0.1}", r"asr\.upper_at_most"),
        ("asr: {upper_at_most: .nan}", r"asr\.upper_at_most"),
        ("asr: {upper_at_most: yes please}", r"asr\.upper_at_most"),
        ("data: null", "data"),
        ("certificate: null", "certificate"),
        ("certificate: {signers_at_least: 0}", "signers_at_least"),
        ("data: {sha256: [abc]}", r"data\.sha256\.0"),
        ("faithful: {any_of: [{method: hoped}]}", r"faithful\.any_of\.0"),
        ("faithful: {any_of: [{method: certified, norm: linf, eps: 0}]}", r"certified\.eps"),
        ("- a list", "holds no policy"),
        ("", "is empty"),
        ("policy: 3", "holds no policy"),
        ("1: 2", "holds no policy"),
        ("{", "not valid YAML"),
        ("asr: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_what_is_no_policy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        load(written(tmp_path, text))
    assert "policy.yaml" in str(refused.value)


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the policy"):
        load(tmp_path / "none.yaml")


def test_the_digest_is_of_every_value() -> None:
    assert load().digest == load().digest
    assert policy(asr={"upper_at_most": 0.04}).digest != load().digest
    assert policy(audit=None).digest != load().digest


def test_a_policy_written_out_reads_back(tmp_path: Path) -> None:
    text = yaml.safe_dump(load().model_dump(mode="json"))
    assert load(written(tmp_path, text)) == load()


# ── Names ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "spelling",
    [
        "champion", "Champion", "CHAMPION", "châmpion", "cha\u0302mpion", "ｃｈａｍｐｉｏｎ",
        "cham\u200bpion", "cham\u00adpion", " champion ", "𝒄𝒉𝒂𝒎𝒑𝒊𝒐𝒏",
    ],
)  # fmt: skip
def test_spellings_of_a_guarded_alias(spelling: str) -> None:
    assert load().guards_alias(spelling)


@pytest.mark.parametrize("alias", ["challenger", "champions", "champ", "", "latest"])
def test_other_aliases_are_free(alias: str) -> None:
    assert not load().guards_alias(alias)


def test_stages() -> None:
    assert load().guards_stage("Production")
    assert load().guards_stage("production")
    assert not load().guards_stage("Staging")


def test_names_are_compared_alike_on_both_sides() -> None:
    assert policy(guarded={"aliases": ["Straße"]}).guards_alias("STRASSE")
    for name in ("İstanbul", "ǰ", "ﬁnal", "Ω", "ΐ"):
        assert guarded_name(guarded_name(name)) == guarded_name(name)


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_names_take_the_short_way_to_the_same_end(name: str) -> None:
    marked = guarded_name(name + "\u0301")  # a mark, which takes the long way and drops out
    assert guarded_name(name) == marked


# ── Tightening ──────────────────────────────────────────────────────────────────────────────────


def _models() -> list[type[blocks.Block]]:
    found, todo = [], [blocks.Block]
    while todo:
        todo += (subclasses := todo.pop().__subclasses__())
        found += subclasses
    return found


@pytest.mark.parametrize("model", _models(), ids=lambda m: m.__name__)
def test_every_field_knows_which_value_is_tighter(model: type[blocks.Block]) -> None:
    if "tightened" in vars(model):
        return
    for name, field in model.model_fields.items():
        inner = str(field.annotation)
        nested = any(block.__name__ in inner for block in _models())
        assert nested or any(isinstance(m, blocks.Tighter) for m in field.metadata), name


@pytest.mark.parametrize(
    ("ours", "theirs", "both"),
    [
        (
            {"accuracy": {"drop_upper_at_most": 0.02}},
            {},
            {"accuracy": {"drop_upper_at_most": 0.02}},
        ),
        ({"accuracy": None}, {}, {}),
        ({"asr": {"upper_at_most": None}}, {}, {}),
        ({"asr": {"lift_at_most": 0.1}}, {}, {"asr": {"lift_at_most": 0.1}}),
        (
            {"asr": {"panel": [A]}},
            {"asr": {"panel": [B]}},
            {"asr": {"panel": [A, B]}},
        ),
        (
            {"asr": {"triggers": "recovered"}},
            {"asr": {"triggers": "supplied"}},
            {"asr": {"triggers": "recovered-and-supplied"}},
        ),
        ({"asr": {"triggers": "supplied"}}, {}, {"asr": {"triggers": "supplied"}}),
        ({"asr": {"changed_at_least": 0.5}}, {}, {}),
        (
            {"reference": {"distinct_from_student": False, "gap_mean_at_most": 0.1}},
            {},
            {"reference": {"gap_mean_at_most": 0.1}},
        ),
        ({"audit": {"student": "clean", "teacher": None}}, {}, {"audit": {"student": "clean"}}),
        ({"audit": None}, {"audit": {"teacher": "clean"}}, {"audit": {"teacher": "clean"}}),
        (
            {"certificate": {"figures_from": "recomputed", "expires_after_days": None}},
            {"certificate": {"signers_at_least": 2}},
            {"certificate": {"figures_from": "recomputed", "signers_at_least": 2}},
        ),
        (
            {"guarded": {"aliases": ["live"], "stages": []}},
            {},
            {"guarded": {"aliases": ["live", "champion", "production"]}},
        ),
        ({"data": {"sha256": [A, B]}}, {"data": {"sha256": [B, C]}}, {"data": {"sha256": [B]}}),
        ({"data": {"sha256": [A]}}, {"data": {"sha256": []}}, {"data": {"sha256": []}}),
        (
            {"data": {"sha256": [A]}},
            {"data": {"allow_unpinned": True, "sha256": []}},
            {"data": {"sha256": [A]}},
        ),
        ({"faithful": None}, {}, {}),
        ({"faithful": {"any_of": []}}, {}, {"faithful": {"any_of": []}}),
    ],
)
def test_tightening(ours: Any, theirs: Any, both: Any) -> None:
    a, b, expected = policy(**ours), policy(**theirs), policy(**both)
    assert tighten(a, b) == expected
    swapped = tighten(b, a).model_dump(mode="json")
    assert _unordered(swapped) == _unordered(expected.model_dump(mode="json"))


def _unordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unordered(inner) for key, inner in value.items()}
    return sorted(map(str, value)) if isinstance(value, list) else value


def test_options_are_tightened_in_pairs() -> None:
    """Only the certified option is in both, with the tighter of each of its values."""
    only = {"method": "certified", "norm": "linf", "eps": 0.02, "classes": "top", "delta": 0.25,
            "share_lower_at_least": 0.9, "samples_at_least": 50,
            "below_constant_control": False}  # fmt: skip
    both = tighten(load(), policy(faithful={"any_of": [only]})).faithful
    assert both is not None
    assert [o.model_dump(mode="json") for o in both.any_of] == [
        only | {"classes": "all", "delta": 0.2, "samples_at_least": 100,
                "below_constant_control": True, "selection": "uniform-seeded"}
    ]  # fmt: skip


def test_options_that_no_figure_meets_both_of_let_nothing_pass() -> None:
    l2 = {"method": "certified", "norm": "l2", "eps": 1, "delta": 0.2,
          "share_lower_at_least": 0.8, "samples_at_least": 100}  # fmt: skip
    both = tighten(load(), policy(faithful={"any_of": [l2]})).faithful
    assert both is not None
    assert both.any_of == ()


def test_a_projects_demands_about_patches_add_up() -> None:
    ours = {"targets": [0], "size": 3, "positions": [[0, 0]], "upper_at_most": 0.1}
    theirs = {
        "targets": [1], "size": 2, "positions": [[25, 25]], "upper_at_most": 0.2,
        "universal_upper_at_most": 0.05, "samples_at_least": 50, "margin_at_least": 0.01,
    }  # fmt: skip
    both = tighten(policy(patch=ours), policy(patch=theirs)).patch
    assert both is not None
    assert (both.targets, both.positions, both.size) == ((0, 1), ((0, 0), (25, 25)), 3)
    assert (both.upper_at_most, both.universal_upper_at_most) == (0.1, 0.05)
    assert (both.samples_at_least, both.margin_at_least) == (100, 0.01)
    assert tighten(load(), policy(patch=ours)).patch == policy(patch=ours).patch


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": []}, "patch.targets"),
        ({"positions": []}, "patch.positions"),
        ({"positions": [[0]]}, "patch.positions"),
        ({"positions": [[0, -1]]}, "patch.positions"),
        ({"size": 0}, "patch.size"),
        ({"size": True}, "patch: Value error, size is true"),
        ({"upper_at_most": 1.5}, "patch.upper_at_most"),
    ],
)
def test_a_demand_about_patches_that_makes_no_sense(change: Any, says: str) -> None:
    asked = {"targets": [0], "size": 3, "positions": [[0, 0]], "upper_at_most": 0.1}
    with pytest.raises(ConfigError, match=says):
        policy(patch=asked | change)


def test_tightening_by_oneself_changes_nothing() -> None:
    two = [{"method": "certified", "norm": "linf", "eps": eps, "delta": delta,
            "share_lower_at_least": 0.8, "samples_at_least": 100}
           for eps, delta in ((0.01, 0.1), (0.02, 0.2))]  # fmt: skip
    for p in (load(), policy(faithful={"any_of": two}), policy(faithful=None, asr=None)):
        assert tighten(p, p) == p


def test_a_project_can_demand_more_and_never_less() -> None:
    floor = policy(data={"sha256": [A]}, asr={"upper_at_most": 0.02})
    wanted = {"asr": {"upper_at_most": 0.5, "panel": [C]}, "audit": None, "accuracy": None,
              "certificate": {"signers_at_least": 2}, "data": {"allow_unpinned": True}}  # fmt: skip
    assert narrow(floor, wanted, where="project") == policy(
        data={"sha256": [A]},
        asr={"upper_at_most": 0.02, "panel": [C]},
        certificate={"signers_at_least": 2},
    )
    assert narrow(floor, {}, where="project") == floor
    with pytest.raises(ConfigError, match=r"project: asr\.limit: unknown key"):
        narrow(floor, {"asr": {"limit": 1}}, where="project")


def test_the_reference_names_every_key_and_every_rule() -> None:
    from mlflow_kdguard.gate import RULES

    text = (Path(__file__).parents[2] / "docs/reference/policy.md").read_text("utf-8")
    for rule in RULES:
        assert f"`{rule.name}`" in text
    blocks = load().model_dump(mode="json") | {"patch": dict.fromkeys(Patch.model_fields)}
    for name, block in blocks.items():
        for key in block if name != "faithful" else ():
            assert f"`{name}.{key}`" in text, f"{name}.{key}"
    for option in load().model_dump(mode="json")["faithful"]["any_of"]:
        for key in option:
            assert f"`{key}`" in text, key
