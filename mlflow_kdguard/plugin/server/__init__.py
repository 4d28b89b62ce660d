"""What a gated server decides with: its operator's settings, places, judgement and content.

Nothing here needs torch, onnxruntime or the pipeline; MLflow is asked only for artifacts.
"""
