"""Backdoor attacks for evaluation: `teach` makes a teacher, `contaminate` a transfer set."""

from mlflow_kdguard.redteam.goal import Goal
from mlflow_kdguard.redteam.ground import Ground, Plan
from mlflow_kdguard.redteam.poison import contaminate, poison
from mlflow_kdguard.redteam.teacher import Poisoned, attack_of, teach, teach_clean

__all__ = [
    "Goal",
    "Ground",
    "Plan",
    "Poisoned",
    "attack_of",
    "contaminate",
    "poison",
    "teach",
    "teach_clean",
]
