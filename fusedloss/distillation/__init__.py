"""The divergence of a student's rows from a teacher's: what it means, its ops, and when a call takes them.

- :mod:`._formula`: the native formula, over any two rows of log-probabilities.
- :mod:`._ops`: the ops and their derivatives.
- :mod:`._route`: which calls the ops own.
- :mod:`._top_k`: a teacher of a few classes.
- :mod:`._chunks`: from hidden states and a head, through the chunks of :mod:`fusedloss.linear`.
- :mod:`._linear`: which calls these own.
"""
