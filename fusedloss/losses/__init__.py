"""The losses, a file for each family: the native formula of each, and the public function that routes it.

:mod:`fusedloss.functional` has the public functions.
"""
