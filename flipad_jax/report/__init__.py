"""Figures, tables, a gallery and one self-contained HTML page of a run.

`write_page` puts text, tables, figures and galleries into a single file without scripts and without
a single outside resource, so that it can be mailed or archived; `write_verdict_page` composes the
page about a folder of suspicious images. Whatever comes from outside (file names, source names) is
escaped.

Throughout, a score is higher the less likely an image is ours, and an image is rejected when its
score exceeds the threshold.
"""

from flipad_jax.report.charts import (
    Panel,
    histograms,
    matrix_map,
    scatter_panels,
    signed_pictures,
)
from flipad_jax.report.figures import (
    accuracy_chart,
    average_activations,
    image_grid,
    roc_curves,
    save_figure,
    score_histograms,
)
from flipad_jax.report.gallery import Card, Gallery, departure_map
from flipad_jax.report.page import (
    KeyNumbers,
    Picture,
    Section,
    Table,
    page_html,
    table_text,
    write_page,
)
from flipad_jax.report.verdict_page import Averages, write_verdict_page

__all__ = [
    "Averages",
    "Card",
    "Gallery",
    "KeyNumbers",
    "Panel",
    "Picture",
    "Section",
    "Table",
    "accuracy_chart",
    "average_activations",
    "departure_map",
    "histograms",
    "image_grid",
    "matrix_map",
    "page_html",
    "roc_curves",
    "save_figure",
    "scatter_panels",
    "score_histograms",
    "signed_pictures",
    "table_text",
    "write_page",
    "write_verdict_page",
]
