"""What DataComp's own tools left on disk, looked through and made usable: `winnow import-datacomp`.

findings.py   what is wrong: how badly, where, and what to do
uid_sets.py   many millions of uids, sorted and compared on disk
tables.py     one parquet: rows, types, nulls, uids
metadata.py   CommonPool's folder of parquet and npz
arrays.py     its npz files, which belong to the parquet row by row
shards.py     img2dataset's or the resharder's folder of tars
subsets.py    subset files, sorted or not -> ones that the resharder finds every row of
bring_in.py   all of it, with one manifest

Sources are file and line of mlfoundations/datacomp at 4a8df19.
"""
