"""Life after promotion: load what was certified, sweep what serves, take over a registry.

`evidence` is what all of it rests on: everything that speaks against a version's bytes and its
certificate, in one list. `verified` loads a model or raises, `sweep` lists, `adopt` takes stock.
Nothing here needs torch, changes a registry, or reads a model through an MLflow flavour.
"""
