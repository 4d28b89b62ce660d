"""What MLflow loads: store, app, backend and evaluator. Importing this brings in nothing."""
