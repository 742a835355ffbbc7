"""A checkpoint -> zero-shot scores on DataComp's evaluation tasks.  Imports no pyspark: pipeline, and of training what
a run folder holds and which of torchrun's processes this is.

The list has 40 tasks; 38 count.  FairFace and UTKFace have no main metric and stay outside the average, as in DataComp.
Each task has one main metric (acc1 unless the row says otherwise).  The average is the plain mean of the 38 main
metrics.  Four groups have a mean too: ImageNet (1 task), its distribution shifts (6), VTAB (13, SUN397 included) and
retrieval (3).  Where only some tasks have data, the average says so: "partial average over 3 of 38 tasks".
A user's own classification sets are evaluated beside the list and never counted.

Every number stands in two columns: as DataComp computes it, mistakes included, and corrected.  docs/EVAL.md lists where
they differ, and what is the same as in CLIP_benchmark at 48de38c.

The map, in the order data flows:

    tasks.py       the 40 rows, and rows for a user's own sets
    config.py      EvalConfig: which tasks, batch size, number format
    rows.py        a set in the hub's layout -> labelled images, checked against its row
    class_folders.py  the same of a user's own folder of images per class
    metadata.py    the same with a row of metadata beside each image
    archives.py    the hub's other layout: a table and a zip, or parquet
    embed.py       images and prompts -> unit vectors, decoding ahead of the models, each image and prompt once
    ranks.py       the processes that torchrun started: shares of the work, and how they come together
    text.py        a prompt through the text tower, only as far as it reaches
    metrics.py     accuracies, recall, F1, worst groups; pure
    classify.py    one set x one model -> metrics; so for each kind: wilds.py, geographic.py, fairness.py,
                   retrieve.py, winogavil.py
    features.py    images' vectors kept on disk, found again for other words
    results.py     eval_results.jsonl: lines, provenance, what may be kept
    outcomes.py    what the model made of each image, in a file per task
    statistics.py  bootstrap intervals, paired tests; pure.  intervals.py: of a whole evaluation
    summary.py     lines -> task states, averages, group means
    plan.py        what is asked for and what is there; which functions evaluate each kind
    evaluate.py    models x all sets -> results and manifests; `evaluate` and `evaluate_models` are the ways in
    checkpoints.py a training run -> its kept checkpoints.  curve.py: all of them, evaluated together
    table.py       the summary as plain text, for one model or several

Beside the line: hub.py and download.py fetch sets (source.py: what was proven of them), compare.py sets models side by
side, submission.py writes DataComp's leaderboard files, python_model.py opens a model of the user's own.
"""
