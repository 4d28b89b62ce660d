"""The app of `mlflow server --app-name kdguard`; `entry` is what MLflow loads."""
