"""Every op and the model beside their peers: the same work, the same inputs, a gate before each clock.

`cases` names the work (W1 to W14), `ops/` and `model/` hold one file a subject, `contest` gates and times, `rows` is
what is written down, `run` survives what breaks, `report` makes tables and charts. docs/performance.md explains the
figures.
"""
