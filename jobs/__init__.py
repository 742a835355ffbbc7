"""The command line: one file per verb, each with `main(argv)`; imports everything, and nothing imports it.

`winnow VERB`, `python -m jobs VERB` and `spark-submit --py-files code.zip jobs/FILE.py` run the same main
(`python -m jobs zip code.zip` makes the zip).  A job parses, calls, and prints a table; the work is in the packages.
torch is imported in the functions that need it, so that --help, a typo and a metadata-only run do not wait for it.
Flags name places (--pool, --out); a recipe (recipes/*.yaml, or your own file) and `a.b=value` overrides name choices.
"""

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("jobs.run_demo", "embedded pool through the whole line; report at the end"),
    "run": ("jobs.run_recipe", "every stage of a recipe, resumable"),
    "ingest": ("jobs.ingest_urls", "tables of urls and captions -> pool (img2dataset)"),
    "import": ("jobs.import_pool", "webdataset tars or a folder of images -> pool, bytes untouched"),
    "import-datacomp": ("jobs.import_datacomp", "DataComp's folders and subset files -> what is wrong, sound subsets"),
    "fit": ("jobs.fit_pool", "stored embeddings of the whole pool -> clusters, duplicates, probes"),
    "score": ("jobs.score_pool", "pool -> scores (Spark)"),
    "select": ("jobs.select_subset", "scores -> subset files (Spark for where rules and joins)"),
    "shards": ("jobs.write_shards", "pool + subset -> webdataset shards (Spark)"),
    "status": ("jobs.show_status", "what is done, what failed and what is left in a run folder"),
    "retry": ("jobs.retry_rows", "score again only the rows that failed for one reason (Spark)"),
    "train": ("jobs.train_clip", "shards -> CLIP checkpoint"),
    "export": ("jobs.export_model", "run or checkpoint -> open_clip hub folder with a model card"),
    "eval": ("jobs.eval_tasks", "checkpoint -> zero-shot results"),
    "eval download": ("jobs.download_eval", "the hub's evaluation sets -> a local folder, hashes checked"),
    "eval compare": ("jobs.compare_evals", "results of several models side by side, with intervals and tests"),
    "eval submission": ("jobs.submit_eval", "results -> the files of a DataComp leaderboard entry; nothing is sent"),
    "report": ("jobs.make_report", "everything in a run folder -> one HTML page"),
    "dfn train": ("jobs.train_dfn", "clean pairs -> data filtering network"),
    "dfn calibrate": ("jobs.calibrate_dfn", "stored scores -> threshold for a fraction or count, filter card"),
    "dfn evaluate": ("jobs.evaluate_dfn", "scores and subsets -> precision, agreement, induced models"),
    "dfn list": ("jobs.list_networks", "released networks, with their licences"),
    "recipes": ("jobs.list_recipes", "built-in recipes, with sources"),
    "filters": ("jobs.list_filters", "filters a recipe can name, with sources"),
    "tasks": ("jobs.list_tasks", "the 40 evaluation tasks, 38 of them counted"),
    "doctor": ("jobs.doctor", "Java, GPUs, memory, models, versions: what works here"),
    "zip": ("jobs.zip_code", "code.zip for spark-submit --py-files"),
}
"""Verb -> (module with main(argv), one line of help)."""
