"""Backdoor attacks for evaluation: `teach` makes a teacher, `contaminate` a transfer set."""

from mlflow_kdguard.redteam.poison import contaminate, poison
from mlflow_kdguard.redteam.teacher import Poisoned, make_trigger, teach

__all__ = ["Poisoned", "contaminate", "make_trigger", "poison", "teach"]
