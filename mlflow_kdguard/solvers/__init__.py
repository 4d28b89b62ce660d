"""Linear and integer programs, and solvers that are asked about them but never believed.

`model` holds a program, one adapter a solver hands it over, `oracle` keeps the solver in a process
of its own, and `dual` recomputes what its multipliers prove. Nothing here knows networks or torch,
so that a solver's process starts quickly.
"""
