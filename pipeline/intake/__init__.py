"""What users bring -> a pool, bytes untouched and every row's fate known: `winnow ingest` and `winnow import`.

url_tables.py    url tables -> a pool: stage the tables, download, read the outcomes
download.py      staged tables -> shards, by img2dataset on its Spark or multiprocessing distributor
web.py           what img2dataset's workers may fetch
own_tars.py      webdataset tars without uids or parquet -> a pool
image_folder.py  loose images and captions -> a pool
tables.py        parquet, csv, tsv and jsonl tables, a few rows at a time
claim.py         a folder belongs to one request
"""
