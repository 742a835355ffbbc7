"""A checkpoint -> zero-shot scores on DataComp's evaluation tasks.  Imports pipeline only, and no pyspark.

The list has 40 tasks; 38 count.  FairFace and UTKFace have no main metric and stay outside the average, as in DataComp.
Each task has one main metric (acc1 unless the row says otherwise).  The average is the plain mean of the 38 main
metrics.  Four groups have a mean too: ImageNet (1 task), its distribution shifts (6), VTAB (13, SUN397 included) and
retrieval (3).  Where only some tasks have data, the average says so: "partial average over 3 of 38 tasks".
A user's own classification sets are evaluated beside the list and never counted.

Implemented kind: classify (30 tasks).  Tasks of the other kinds (wilds, geographic, retrieve, winogavil, fairness) are
reported as "not implemented yet" when their data is there.

Where the numbers differ from DataComp's own: prompts are encoded in float32 (DataComp: float16 autocast), and CLEVR
Distance has its six classes (DataComp's pinned CLIP_benchmark drops one).  Against CLIP_benchmark at 48de38c without
autocast the metrics are the same.

The map, in the order data flows:

    tasks.py     the 40 rows, and rows for a user's own sets
    config.py    EvalConfig: which tasks, batch size, number format
    rows.py      a set in the hub's layout -> labelled images, checked against its row
    embed.py     images and prompts -> unit vectors, decoding ahead of the model
    metrics.py   acc1, acc5, mean per class recall; pure
    classify.py  one set x one model -> metrics
    results.py   eval_results.jsonl: lines, provenance, what may be kept
    summary.py   lines -> task states, average, group means
    evaluate.py  one model x all sets -> results and manifest; `evaluate` is the way in
    table.py     the summary as plain text, for one model or several
"""
