"""The command line: one file per verb, each with `main(argv)`; imports everything, and nothing imports it.

`winnow VERB`, `python -m jobs VERB` and `spark-submit --py-files code.zip jobs/FILE.py` run the same main
(`python -m jobs zip code.zip` makes the zip).  A job parses, calls, and prints a table; the work is in the packages.
Flags name places (--pool, --out); a recipe (recipes/*.yaml, or your own file) and `a.b=value` overrides name choices.
"""

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("jobs.run_demo", "embedded pool through the whole line; report at the end"),
    "run": ("jobs.run_recipe", "every stage of a recipe, resumable"),
    "ingest": ("jobs.ingest_urls", "tables of urls and captions -> pool (img2dataset)"),
    "import": ("jobs.import_pool", "webdataset tars or a folder of images -> pool, bytes untouched"),
    "import-datacomp": ("jobs.import_datacomp", "DataComp's folders and subset files -> what is wrong, sound subsets"),
    "fit": ("jobs.fit_centroids", "stored embeddings -> centroids and target clusters (k-means)"),
    "score": ("jobs.score_pool", "pool -> scores (Spark)"),
    "select": ("jobs.select_subset", "scores -> subset files (Spark for where rules and joins)"),
    "shards": ("jobs.write_shards", "pool + subset -> webdataset shards (Spark)"),
    "status": ("jobs.show_status", "what is done, what failed and what is left in a run folder"),
    "retry": ("jobs.retry_rows", "score again only the rows that failed for one reason (Spark)"),
    "train": ("jobs.train_clip", "shards -> CLIP checkpoint"),
    "eval": ("jobs.eval_tasks", "checkpoint -> zero-shot results"),
    "report": ("jobs.make_report", "everything in a run folder -> one HTML page"),
    "dfn train": ("jobs.train_dfn", "clean pairs -> data filtering network"),
    "dfn calibrate": ("jobs.calibrate_dfn", "stored scores -> exact threshold for a fraction or count"),
    "recipes": ("jobs.list_recipes", "built-in recipes, with sources"),
    "filters": ("jobs.list_filters", "filters a recipe can name, with sources"),
    "tasks": ("jobs.list_tasks", "the 40 evaluation tasks, 38 of them counted"),
    "doctor": ("jobs.doctor", "Java, GPUs, memory, models, versions: what works here"),
    "zip": ("jobs.zip_code", "code.zip for spark-submit --py-files"),
}
"""Verb -> (module with main(argv), one line of help)."""
