"""A run folder -> RUN/report.html: one self-contained page about where every row went and what came of it.

Of the folder of one training run the page shows that run alone.

    read.py           artifacts -> dataclasses
    distributions.py  stored scores -> histograms and rows to look at, streaming
    pictures.py       chosen rows -> thumbnails
    truth.py          subsets against a truth and each other
    accounts.py, curation.py, outcome.py, training.py, evaluation.py, published.py
                      sections of blocks (blocks.py), with charts.py and formats.py
    page.html.j2      blocks -> HTML

The page needs no network and no script, and holds no time or host: the same artifacts give the same bytes.  Captions
are hostile text and only ever reach the page through the template's escaping.
"""

import importlib.resources
from collections.abc import Mapping, Sequence

import jinja2
import pyarrow as pa

from pipeline.report.accounts import build_failures, build_funnel
from pipeline.report.blocks import Section
from pipeline.report.charts import PALETTE
from pipeline.report.curation import build_pictures, build_scores, build_truth_section
from pipeline.report.distributions import SURVEY_ROWS, Distributions, survey_scores
from pipeline.report.evaluation import build_evaluation
from pipeline.report.formats import format_hash
from pipeline.report.outcome import build_provenance, build_summary
from pipeline.report.pictures import Choice, choose_strips, load_pictures
from pipeline.report.read import SCORES, RunFolder, read_run
from pipeline.report.training import build_choices, build_training
from pipeline.report.truth import Truth, find_kinds, read_truth
from pipeline.schemas import FORMAT_VERSION, REPORT
from pipeline.storage import join, write_bytes
from pipeline.subset import read_subset
from pipeline.uid import parse_uids

TEMPLATE = "page.html.j2"


def write_report(
    run: str,
    *,
    pool: str | None = None,
    truth: str | None = None,
    right_kinds: tuple[str, ...] = (),
    title: str | None = None,
    max_rows: int = SURVEY_ROWS,
) -> str:
    """Write RUN/report.html about everything that is in the run folder, and return where it is.

    pool: for pictures and captions; truth: parquet with uid and kind, for precision and recall over `right_kinds`;
    max_rows: of scores, to draw histograms and choose pictures from (0: all).  Accounts are always of all rows.
    Raises StageError when the folder holds nothing, PoolError for a pool or truth that cannot be read, ConfigError
    for a right kind that the truth lacks.
    """
    folder = read_run(run)
    known = read_truth(truth, right_kinds) if truth else None
    sections = build_sections(folder, pool, known, max_rows)
    name = folder.runs[0].label if folder.is_lone_run else folder.recipe.get("name")
    kind = "Training report" if folder.is_lone_run else "Curation report"
    page = render_page(
        title=title or (f"{kind}: {name}" if name else kind),
        subtitle=str(folder.recipe.get("source") or ""),
        facts=list_identities(folder),
        sections=sections,
    )
    url = join(run, REPORT)
    write_bytes(url, page.encode())
    return url


def list_identities(run: RunFolder) -> str:
    """Return the line below the title that says which pool and scores the page is about."""
    pool = run.scores.parents.get("pool") if run.scores else None
    named = [("pool", pool), ("scores", run.scores.identity if run.scores else None)]
    found = [f"{what} {format_hash(identity)}" for what, identity in named if identity]
    return " · ".join([*found, f"format version {FORMAT_VERSION}"])


def build_sections(run: RunFolder, pool: str | None, truth: Truth | None, max_rows: int) -> list[Section]:
    """Return the page's sections in order."""
    if run.is_lone_run:
        results = [build_evaluation(run)] if run.evals or run.curves else []
        return [build_training(run), *results, build_choices(run.runs[0])]
    uids = {subset.name: read_subset(subset.url) for subset in run.subsets if subset.url}
    found = None
    if run.scores:
        found = survey_scores(join(run.url, SCORES), run.scores, run.subsets, uids, max_rows=max_rows)
    return [
        build_summary(run),
        build_funnel(run),
        build_scores(run, found),
        _show_pictures(run, found, pool, truth),
        build_failures(run),
        build_truth_section(run, uids, truth),
        build_training(run),
        build_evaluation(run),
        build_provenance(run, FORMAT_VERSION),
    ]


def _show_pictures(run: RunFolder, found: Distributions | None, pool: str | None, truth: Truth | None) -> Section:
    parts: Sequence[str] = run.scores.facts["parts"] if run.scores else ()
    ranked = found.ranked if found else {}
    strips = {name: choose_strips(subset, parts) for name, subset in ranked.items()}
    choices = [choice for chosen in strips.values() for strip in chosen.values() for choice in strip]
    pictures = load_pictures(pool, choices) if pool and choices else None
    kinds = _name_kinds(truth, choices)
    return build_pictures(run, strips, pictures, kinds, {name: subset.by for name, subset in ranked.items()})


def _name_kinds(truth: Truth | None, choices: Sequence[Choice]) -> Mapping[str, str]:
    if truth is None or not choices:
        return {}
    return find_kinds(truth, parse_uids(pa.array([c.uid for c in choices], pa.string())))


def render_page(*, title: str, subtitle: str, facts: str, sections: Sequence[Section]) -> str:
    """Return the HTML page; every text is escaped."""
    source = importlib.resources.files("pipeline.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(source).render(
        title=title, subtitle=subtitle, facts=facts, sections=sections, palette=PALETTE
    )
