"""Ablations: the variants of one published table, trained on one data set with several seeds.

`python -m bench.ablate NAME`, which is what ``tmask ablate`` runs. A table is data, a file of `tables`; each of its
runs is an ordinary ``tmask train`` of a written config. What has been done is read off the folder alone, so whatever
stops the table, a kill among it, the same command goes on from there.
"""
