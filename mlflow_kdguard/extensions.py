"""Named, lazy extension tables: what a configuration may call by name.

A table maps a name to `module:attribute`, imported on first use only. Other packages add rows
through the entry-point group `mlflow_kdguard.<table>`; a name that two of them claim is an error,
since the later one would silently replace the earlier.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mlflow_kdguard.errors import ConfigError

BUILT_IN: dict[str, dict[str, str]] = {
    "attack": {
        "badnets": "mlflow_kdguard.redteam.badnets:attack",
        "blended": "mlflow_kdguard.redteam.blended:attack",
        "sig": "mlflow_kdguard.redteam.sig:attack",
        "wanet": "mlflow_kdguard.redteam.wanet:attack",
        "ckd": "mlflow_kdguard.redteam.ckd:attack",
        "lba": "mlflow_kdguard.redteam.lba:attack",
        "backweak": "mlflow_kdguard.redteam.backweak:attack",
        "adba": "mlflow_kdguard.redteam.adba:attack",
        "input_aware": "mlflow_kdguard.redteam.input_aware:attack",
        "adaptive": "mlflow_kdguard.redteam.adaptive:attack",
    },
    "detector": {
        "variance": "mlflow_kdguard.audit.variance:examine",
        "inversion": "mlflow_kdguard.audit.inversion:examine",
        "profile": "mlflow_kdguard.audit.profile:examine",
    },
    "detox": {
        "variance_mask": "mlflow_kdguard.detox.variance_mask:cleanse",
        "unlearn": "mlflow_kdguard.detox.unlearn:cleanse",
        "margin_cap": "mlflow_kdguard.detox.margin_cap:cleanse",
        "margin_swap": "mlflow_kdguard.detox.margin_swap:cleanse",
        "fine_tune": "mlflow_kdguard.detox.fine_tune:cleanse",
        "fine_prune": "mlflow_kdguard.detox.fine_prune:cleanse",
        "ft_sam": "mlflow_kdguard.detox.ft_sam:cleanse",
        "nad": "mlflow_kdguard.detox.nad:cleanse",
        "clp": "mlflow_kdguard.detox.clp:cleanse",
        "anp": "mlflow_kdguard.detox.anp:cleanse",
        "ibau": "mlflow_kdguard.detox.ibau:cleanse",
    },
    "loss": {
        "sd": "mlflow_kdguard.distill.logits:sd",
        "fd": "mlflow_kdguard.distill.logits:fd",
        "adaad": "mlflow_kdguard.distill.logits:fd",
        "ard": "mlflow_kdguard.distill.robust:ard",
        "rslad": "mlflow_kdguard.distill.robust:rslad",
        "ofd": "mlflow_kdguard.distill.features:ofd",
        "none": "mlflow_kdguard.distill.labels:none",
    },
    "bound": {
        "interval": "mlflow_kdguard.certify.relax:interval",
        "crown": "mlflow_kdguard.certify.relax:crown",
        "branch": "mlflow_kdguard.certify.relax:branch",
        "lp": "mlflow_kdguard.certify.milp:lp",
        "milp": "mlflow_kdguard.certify.milp:milp",
    },
    "solver": {
        "highs": "mlflow_kdguard.solvers.highs:ADAPTER",
        "scip": "mlflow_kdguard.solvers.scip:ADAPTER",
        "gurobi": "mlflow_kdguard.solvers.gurobi:ADAPTER",
    },
}


@cache
def table(kind: str) -> dict[str, str]:
    """All rows of one table, built in and installed; ConfigError where two claim one name."""
    rows = dict(BUILT_IN[kind])
    for point in entry_points(group=f"mlflow_kdguard.{kind}"):
        if rows.get(point.name, point.value) != point.value:
            raise ConfigError(
                f"two packages provide the {kind} {point.name!r}: {rows[point.name]} and "
                f"{point.value}.",
                remedy="Uninstall one of them.",
            )
        rows[point.name] = point.value
    return rows


def names(kind: str) -> tuple[str, ...]:
    """The names that a table knows, sorted."""
    return tuple(sorted(table(kind)))


def load(kind: str, name: str) -> Any:
    """Import what `name` stands for in the table; ConfigError lists the names that exist."""
    rows = table(kind)
    if name not in rows:
        raise ConfigError(
            f"there is no {kind} called {name!r}.", remedy=f"Known: {', '.join(names(kind))}."
        )
    module, _, attribute = rows[name].partition(":")
    return getattr(import_module(module), attribute)
