"""Attempts with names: aliases, versions and stages that look like others."""

from typing import Any

from flows.attacks.table import Attempt, Scene, attack
from flows.attacks.world import World

LOOK_ALIKES = {
    "upper": "CHAMPION",
    "title": "Champion",
    "mixed": "chaMpion",
    "other-guarded": "Production",
    "accent": "ch\u00e2mpion",
    "accent-apart": "cha\u0302mpion",
    "many-marks": "c\u0301h\u0302a\u0303mpion",
    "full-width": "\uff43\uff48\uff41\uff4d\uff50\uff49\uff4f\uff4e",
    "bold": "\U0001d41c\U0001d421\U0001d41a\U0001d426\U0001d429\U0001d422\U0001d428\U0001d427",
    "superscript": "champ\u2071on",
    "long-s": "\u017ftaging",
    "newline": "champion\n",
    "space": "champion ",
    "tab": "\tchampion",
    "no-break-space": "champion\u00a0",
    "zero-width-space": "champ\u200bion",
    "zero-width-joiner": "champ\u200dion",
    "word-joiner": "\u2060champion",
    "soft-hyphen": "cham\u00adpion",
    "byte-order-mark": "\ufeffchampion",
    "right-to-left": "\u202echampion",
    "variation-selector": "champion\ufe0f",
    "null": "champion\x00",
    "percent": "champ%69on",
    "cyrillic": "\u0441hampion",
    "cyrillic-a": "ch\u0430mpion",
    "greek": "champi\u03bfn",
    "dotless": "champ\u0131on",
    "mongolian": "champion\u180e",
    "hangul-filler": "champion\u3164",
    "tag-characters": "champion\U000e0061",
    "production-cyrillic": "pr\u043eduction",
    "production-ligature": "produ\ua733ction",
    "sql": "champion'--",
    "slash": "champion/1",
    "at": "x@champion",
}


@attack(15, variants={k: v for k, v in LOOK_ALIKES.items() if k != "long-s"})
def look_alike_on_a_guarded_model(w: World, alias: str) -> Scene:
    good, bad = w.standing(), w.rival()
    # MLflow itself answers 400 to what is no word at all.
    yield Attempt(lambda: w.alias(bad, alias), status=(400, 403), logged=None, serves=(good,))


FOLDED = {
    key: LOOK_ALIKES[key]
    for key in (
        "upper", "title", "other-guarded", "accent", "accent-apart", "full-width", "bold",
        "superscript", "newline", "variation-selector",
    )
}  # fmt: skip


@attack(15, variants=FOLDED)
def folded_spelling_on_a_new_model(w: World, alias: str) -> Scene:
    """A spelling that is only equal after folding is refused, whatever certificate there is."""
    version = w.version()
    yield Attempt(lambda: w.alias(version, alias), status=(400, 403), logged=None)


NUMBERS = {
    "leading-zero": "0{n}",
    "space": " {n}",
    "newline": "{n}\n",
    "plus": "+{n}",
    "full-width": "{wide}",
    "arabic": "{arabic}",
    "underscore": "0_{n}",
    "point": "{n}.0",
    "hexadecimal": "0x{n}",
    "minus": "-{n}",
    "exponent": "{n}e0",
    "superscript": "\u00b2",
    "empty": "",
    "word": "latest",
    "alias": "champion",
    "nothing": "0",
    "beyond": "999999",
    "64-bit": "9223372036854775808",
    "null": "{n}\x00",
    "list": "[{n}]",
    "true": "true",
}


@attack(15, variants=NUMBERS)
def odd_number_of_a_version(w: World, template: str) -> Scene:
    """However a number is written, it names one version for the check and for the alias."""
    good, bad = w.standing(), w.rival()
    number = template.format(
        n=bad.number, wide=chr(0xFF10 + int(bad.number)), arabic=chr(0x660 + int(bad.number))
    )
    plain = w.alias(bad, "shadow-of-nothing", version=number).status_code
    yield Attempt(
        lambda: w.alias(bad, version=number),
        status=(400, 403, 404, plain) if plain >= 400 else (403,),
        logged=None,
        serves=(good,),
    )


TYPES: dict[str, Any] = {
    "number": 2,
    "float": 2.0,
    "list": ["2"],
    "object": {"version": "2"},
    "null": None,
    "true": True,
}


@attack(15, variants=TYPES)
def number_of_another_type(w: World, value: Any) -> Scene:
    good, bad = w.standing(), w.rival()
    yield Attempt(
        lambda: w.alias(bad, version=value), status=(400, 403, 404), logged=None, serves=(good,)
    )


MODELS = {
    "upper": str.upper,
    "space": lambda n: f"{n} ",
    "zero-width": lambda n: f"{n}\u200b",
    "full-width": lambda n: n.replace("s", "\uff53", 1),
    "newline": lambda n: f"{n}\n",
    "null": lambda n: f"{n}\x00",
    "percent": lambda n: n.replace("-", "%2d"),
    "long": lambda n: n + "x" * 300,
    "like": lambda n: "%",
    "empty": lambda n: "",
}


@attack(15, variants=MODELS)
def model_of_a_similar_name(w: World, spell: Any) -> Scene:
    """A model whose name only looks the same is another model."""
    good = w.standing()
    plain = w.alias(good, "shadow", name=spell(good.name)).status_code
    assert plain >= 400
    yield Attempt(
        lambda: w.alias(good, name=spell(good.name)),
        status=(400, 403, 404, plain),
        logged=None,
        serves=(good,),
    )
