"""Ablations: the variants of one published table, trained on one data set with several seeds (``tmask ablate NAME``).

`tables.yaml` holds the tables. `runs` turns a table into training configs and reads a folder of runs back, `runner`
trains one run after another, `report` writes the table and the chart, `publish` the page of the docs.
"""
