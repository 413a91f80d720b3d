"""Every op and the model beside their peers: the same work, the same inputs, a gate before each clock.

`cases/` has a file an op, `model/` the whole model; `contest` gates and times; `process` and `report` survive what
breaks and write one `result`; `tables` and `charts` show it. docs/performance.md explains the figures.
"""
