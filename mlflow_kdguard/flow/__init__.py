"""The bodies of the pipeline's stages: what each reads, runs, writes and logs.

`work` keeps the ledger and the MLflow runs, `given` reads images and teacher, `making` holds the
stages up to the exported student, `judging` those that look at the bytes that ship, `verification`
what a verifier does in another place (`verifying`: as a stage), `measuring` what both share.
`pipeline.py` puts them in order.
"""
