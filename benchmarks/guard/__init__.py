"""What survives distillation, and which guard removes it: floors, baselines, and ours."""
