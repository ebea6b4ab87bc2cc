"""The report's figures: plotly.js descriptions without colours of paper and ink, which the page sets for its theme."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.corruptions import CORRUPTIONS, SEVERITIES
from evaluation.evaluate import Evaluation
from evaluation.study import Study

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["MOST_ON_MAP", "figures", "on_map"]

# Told apart in light and dark, and by those who see no red or green (Okabe & Ito).
BLUE, ORANGE, GREEN, PINK, GREY = "#2f7fd1", "#e08a00", "#159f76", "#c766a0", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#56b4e9", "#d55e00", "#b59f00", "#7b61c9", "#5a8f29", "#b5495b")
HEAT = [[0, "rgba(47,127,209,0)"], [1, "rgba(47,127,209,.9)"]]
RISK = [[0, "rgba(224,138,0,0)"], [1, "rgba(224,90,0,.95)"]]
# So many points carry a picture each: about 1.5 kB of the file.
MOST_ON_MAP = 1000
FEW_FOR_TSNE = 10
# Axes of shares show at least so much, so that all may be equal.
LEAST_SPAN = 0.02
# So near each other, similarities differ by less than a millionth, and scikit-learn's t-SNE dies of equal rows.
HARDLY_APART = 1e-3
MOST_CLASSES = 60
GROUPS = {"held_out": "of classes taken from the gallery"}


def figures(study: Study) -> dict[str, "Figure"]:
    """All figures that this study has numbers for, by the id of their place in the page."""
    first = study.first
    found = {
        "confusion": _confusion(first) if len(first.classes) <= MOST_CLASSES else None,
        "reliability": _reliability(first),
        "coverage": _coverage(study),
        "similarities": _similarities(first),
        "knn": _knn(study),
        "map": _map(study),
        "corruptions": _corruptions(study) if study.robustness else None,
        "severity": _severity(study) if study.robustness else None,
        "shots": _shots(study) if study.few_shot else None,
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _figure(height: int = 360, **layout: Any) -> "Figure":
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 16, "t": 16, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        **layout,
    )
    figure.update_xaxes(automargin=True, title_standoff=10)
    figure.update_yaxes(automargin=True, title_standoff=10)
    return figure


def _confusion(result: Evaluation) -> "Figure":
    table = np.asarray(result.confusion, dtype=np.float64)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = max(320, min(760, 36 * len(result.classes) + 120))
    figure = _figure(side, xaxis={"title": "label given", "type": "category"})
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(title="true label", type="category", autorange="reversed", showgrid=False)
    figure.add_heatmap(
        z=shares.tolist(),
        x=list(result.classes),
        y=list(result.classes),
        text=[[str(count) if count else "" for count in row] for row in result.confusion],
        texttemplate="%{text}" if len(result.classes) <= 25 else None,
        customdata=result.confusion,
        hovertemplate="%{y} taken for %{x}: %{customdata} (%{z:.1%})<extra></extra>",
        colorscale=HEAT,
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    return figure


def _reliability(result: Evaluation) -> "Figure":
    figure = _figure(
        xaxis={"title": "stated probability", "range": [0, 1]}, yaxis={"title": "share right", "range": [0, 1]}
    )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": GREY}, hoverinfo="skip", name="ideal"
    )
    for name, shown, colour in (("vote", "plain vote, before", ORANGE), ("classifier", "as served", BLUE)):
        bins = result.reliability[name]
        some = bins.counts > 0
        figure.add_scatter(
            x=bins.confidence[some].tolist(),
            y=bins.accuracy[some].tolist(),
            error_y=_bars(bins.accuracy[some], bins.accuracy_intervals[some]),
            mode="lines+markers",
            marker={"size": (6 + 14 * np.sqrt(bins.counts[some] / bins.counts.max())).tolist(), "color": colour},
            line={"color": colour},
            customdata=bins.counts[some].tolist(),
            cliponaxis=False,
            hovertemplate="stated %{x:.1%}, right %{y:.1%}, %{customdata} images<extra></extra>",
            name=f"{shown} (ECE {result.ece if name == 'classifier' else result.ece_of_vote:.3f})",
        )
    return figure


def _coverage(study: Study) -> "Figure":
    figure = _figure(xaxis={"title": "share of images answered", "range": [0, 1.01]})
    highest = max(high for result in study.evaluations for _, high in result.risk_intervals)
    figure.update_yaxes(title="share of them wrong", range=[0, _shares(0, highest)[1]])
    shares = [percent / 100 for percent in range(1, 101)]
    for name, result, colour in zip(study.names, study.evaluations, COLOURS, strict=False):
        low, high = zip(*result.risk_intervals, strict=True)
        figure.add_scatter(
            x=shares + shares[::-1],
            y=[*high, *low[::-1]],
            mode="none",
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
        figure.add_scatter(
            x=shares,
            y=list(result.risks),
            legendgroup=name,
            mode="lines",
            line={"color": colour},
            name=f"{name} (AURC {result.aurc:.4f})",
            hovertemplate="%{x:.1%} answered, %{y:.2%} of them wrong<extra></extra>",
        )
    figure.update_layout(showlegend=True)
    return figure


def _similarities(result: Evaluation) -> "Figure":
    found, edges = result.similarities, result.similarities.edges
    figure = _figure(barmode="overlay", xaxis={"title": "similarity to the most probable class"})
    figure.update_yaxes(title="share of the group")
    for (name, counts), colour in zip(found.counts.items(), (BLUE, ORANGE, PINK, GREEN), strict=False):
        if not (images := int(counts.sum())):
            continue
        figure.add_bar(
            x=((edges[1:] + edges[:-1]) / 2).tolist(),
            y=(counts / images).tolist(),
            width=float(edges[1] - edges[0]),
            marker={"color": colour, "opacity": 0.6},
            name=f"{GROUPS.get(name, name)} ({images:,})",
            hovertemplate="similarity %{x:.3f}: %{y:.1%}<extra></extra>",
        )
    figure.update_layout(showlegend=True)
    return figure


def _knn(study: Study) -> "Figure":
    figure = _figure(300, xaxis={"title": "k", "type": "log"}, yaxis={"title": "top-1", "tickformat": ".1%"})
    for name, result, colour in zip(study.names, study.evaluations, COLOURS, strict=False):
        top1 = [one.top1 for one in result.knn]
        figure.add_scatter(
            x=[one.k for one in result.knn],
            y=top1,
            error_y=_bars(top1, [one.top1_interval for one in result.knn]),
            mode="lines+markers",
            line={"color": colour},
            name=name,
            hovertemplate="k = %{x}: %{y:.2%}<extra></extra>",
        )
    figure.update_xaxes(tickvals=[one.k for one in study.first.knn], ticktext=[str(one.k) for one in study.first.knn])
    bounds = [bound for result in study.evaluations for one in result.knn for bound in one.top1_interval]
    figure.update_yaxes(range=_shares(min(bounds), max(bounds)))
    figure.update_layout(showlegend=True)
    return figure


def _shares(low: float, high: float) -> list[float]:
    """The part of an axis that shows shares from `low` to `high`, however near each other, and none beyond all."""
    room = max(0.1 * (high - low), LEAST_SPAN / 2)
    return [max(low - room, -0.004), min(high + room, 1.004)]


def _bars(values: ArrayLike, bounds: ArrayLike) -> dict[str, Any]:
    """Error bars of n values to the ends of their intervals (n, 2); none downwards where a value lies below its own, as
    a small calibration error does."""
    low, high = np.asarray(bounds, dtype=np.float64).T
    above, below = np.maximum(high - values, 0), np.maximum(np.asarray(values) - low, 0)
    return {"array": above.tolist(), "arrayminus": below.tolist(), "thickness": 1, "width": 2}


def on_map(study: Study) -> NDArray[np.int64]:
    """The queries that the map shows, evenly chosen."""
    n = len(study.queries)
    return np.unique(np.linspace(0, n - 1, min(n, MOST_ON_MAP)).astype(np.int64))


def _map(study: Study) -> "Figure":
    """The queries by t-SNE; wrong ones are crosses."""
    rows, answers, labels = on_map(study), study.first.answers, study.queries.labels
    plane = _plane(study.queries.embeddings[rows])
    figure = _figure(560, xaxis={"visible": False}, yaxis={"visible": False, "scaleanchor": "x"}, hovermode="closest")
    for number, label in enumerate(study.first.classes):
        own = np.flatnonzero(labels[rows] == label)
        if not len(own):
            continue
        own = own[np.argsort(~answers.right[rows[own]], kind="stable")]  # the legend shows the first one's symbol
        right = answers.right[rows[own]]
        figure.add_scatter(
            x=plane[own, 0].tolist(),
            y=plane[own, 1].tolist(),
            mode="markers",
            marker={
                "color": COLOURS[number % len(COLOURS)],
                "size": np.where(right, 6, 10).tolist(),
                "symbol": np.where(right, "circle", "x").tolist(),
                "opacity": 0.8,
            },
            customdata=own.tolist(),
            text=[_described(study, row) for row in rows[own]],
            hovertemplate="%{text}<extra></extra>",
            name=label,
        )
    figure.update_layout(showlegend=len(study.first.classes) <= MOST_CLASSES)
    return figure


def _described(study: Study, row: int) -> str:
    answers, truth = study.first.answers, study.queries.labels[row]
    given = answers.predicted[row]
    text = truth if given == truth else f"{truth}, taken for {given}"
    return f"{_escaped(text)} ({answers.confidence[row]:.0%})"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _plane(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """t-SNE (van der Maaten & Hinton, JMLR 9, 2008) of rows (n, d), (n, 2); the principal components of a few rows, or
    of rows that hardly differ."""
    centred = embeddings - embeddings.mean(axis=0)
    if len(embeddings) < FEW_FOR_TSNE or np.linalg.norm(centred, axis=1).max() < HARDLY_APART:
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        plane = np.zeros((len(embeddings), 2))
        plane[:, : len(s)] = (u * s)[:, :2]
        return plane
    from sklearn.manifold import TSNE

    neighbours = min(30.0, (len(embeddings) - 1) / 3)
    return np.asarray(
        TSNE(perplexity=neighbours, metric="cosine", init="pca", random_state=0).fit_transform(embeddings)
    )


def _corruptions(study: Study) -> "Figure":
    found = study.robustness[0]
    names = [name.replace("_", " ") for name in CORRUPTIONS]
    figure = _figure(520, xaxis={"title": "severity", "type": "category", "side": "top"})
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(margin={"t": 56, "b": 16})
    errors = list(found.errors.values())
    figure.add_heatmap(
        z=errors,
        x=[str(severity) for severity in SEVERITIES],
        y=names,
        text=[[f"{error:.0%}" for error in row] for row in errors],
        texttemplate="%{text}",
        customdata=[
            [[*bounds, ece, *of_ece] for bounds, ece, of_ece in zip(*rows, strict=True)]
            for rows in zip(
                found.error_intervals.values(), found.eces.values(), found.ece_intervals.values(), strict=True
            )
        ],
        hovertemplate="%{y}, severity %{x}: %{z:.1%} wrong (%{customdata[0]:.1%} … %{customdata[1]:.1%})<br>"
        "ECE %{customdata[2]:.3f} (%{customdata[3]:.3f} … %{customdata[4]:.3f})<extra></extra>",
        colorscale=RISK,
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    return figure


def _severity(study: Study) -> "Figure":
    figure = _figure(xaxis={"title": "severity (0: images as they are)", "dtick": 1})
    figure.update_yaxes(title="share wrong; dotted: ECE", rangemode="tozero")
    for name, found, result, colour in zip(study.names, study.robustness, study.evaluations, COLOURS, strict=False):
        errors = found.clean_error, *found.error_by_severity
        eces = result.ece, *found.ece_by_severity
        for values, bounds, dash, shown in (
            (errors, (found.clean_error_interval, *found.error_by_severity_intervals), "solid", name),
            (eces, (result.intervals["ece"], *found.ece_by_severity_intervals), "dot", f"{name}, ECE"),
        ):
            figure.add_scatter(
                x=[0, *SEVERITIES],
                y=list(values),
                error_y=_bars(values, bounds),
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                name=shown,
                hovertemplate="severity %{x}: %{y:.3f}<extra></extra>",
            )
    return figure


def _shots(study: Study) -> "Figure":
    figure = _figure(300, xaxis={"title": "gallery images of each class", "type": "log"})
    figure.update_yaxes(title="top-1", tickformat=".1%")
    for name, found, colour in zip(study.names, study.few_shot, COLOURS, strict=False):
        figure.add_scatter(
            x=[few.shots for few in found],
            y=[few.classifier for few in found],
            error_y={"array": [few.classifier_deviation for few in found], "thickness": 1},
            mode="lines+markers",
            line={"color": colour},
            name=name,
            hovertemplate="%{x} of each: %{y:.2%}<extra></extra>",
        )
    shots = [few.shots for few in study.few_shot[0]]
    figure.update_xaxes(tickvals=shots, ticktext=[str(count) for count in shots])
    low = min(few.classifier - few.classifier_deviation for found in study.few_shot for few in found)
    high = max(few.classifier + few.classifier_deviation for found in study.few_shot for few in found)
    figure.update_yaxes(range=_shares(low, high))
    figure.update_layout(showlegend=True)
    return figure
