"""The fault suite: real processes, killed, stopped, cut off and confused at random, by a seed.

`house.py` runs the deployed form, `faults.py` says what can befall it, `checks.py` what must hold
afterwards, `test_faults.py` puts them together. `make test-faults` is the long run.
"""
