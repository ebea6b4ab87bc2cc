"""A study as one HTML file that needs nothing else and loads nothing; plotly.js is part of it."""

import base64
import json
import math
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coterie.files import write_text
from evaluation.compare import Difference
from evaluation.figures import figures, on_map
from evaluation.study import Study

__all__ = ["write_report"]

NUMBERS = (
    ("top1", "Top-1", "the classifier's first label is right, rejection ignored"),
    ("top5", "Top-5", "the right label is among its first five"),
    ("accepted_top1", "Right and accepted", "what a client gets: right, and not called unknown"),
    ("false_rejected", "Called unknown", "though of a known class"),
    ("knn_top1", "k-NN top-1", "DINO's weighted vote, k = 20, T = 0.07"),
    ("cluster_top1", "Nearest-cluster top-1", "the most similar class cluster alone"),
    ("probe_top1", "Linear probe", "logistic regression on the gallery's embeddings"),
    ("balanced_accuracy", "Balanced accuracy", "mean recall of the classes"),
    ("macro_f1", "Macro F1", "mean F1 of the classes"),
    ("recall_at_1", "Recall@1", "the nearest gallery item is of the class"),
    ("recall_at_5", "Recall@5", "one of the nearest five is"),
    ("recall_at_10", "Recall@10", "one of the nearest ten is"),
    ("r_precision", "R-precision", "share of the R nearest, R being the class's items in the gallery"),
    ("map_at_r", "MAP@R", "the same, earlier ones weighing more"),
    ("silhouette", "Silhouette", "of the query embeddings, cosine; −1 to 1"),
    ("agreement", "Vote and clusters agree", "a drift alarm where it falls"),
    ("ece", "Calibration error", "ECE of the probabilities served, 15 bins, top label"),
    ("ece_of_vote", "The same before calibration", "of the plain vote"),
    ("aurc", "AURC", "mean share wrong over all shares answered, the most confident first"),
)
UNKNOWN = (
    ("auroc", "AUROC", "a known image scores above an unknown one"),
    ("aupr", "AUPR, known", "average precision with the known as positives"),
    ("aupr_unknown", "AUPR, unknown", "with the unknown as positives"),
    ("oscr", "OSCR", "AUROC that counts rightly labelled images only"),
    ("unknown_accepted_at_95", "FPR95, KNN-OOD's", "unknown accepted where 95% of the known are"),
    ("known_rejected_at_95", "FPR95, OpenOOD's", "known rejected where 95% of the unknown are"),
    ("accepted", "Given a label", "at the false-reject rate asked for"),
)


def write_report(study: Study, path: Path) -> None:
    """Write the report, and replace the one that is there.

    Raises:
        ModuleNotFoundError: plotly, the extra `report`, is not installed.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("evaluation", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "picture": _picture, "number": _number, "signed": _signed}
    drawn = {name: json.loads(figure.to_json()) for name, figure in figures(study).items()}
    thumbnails = [_picture(study.queries.images.thumbnails[row]) for row in on_map(study)]
    template = environment.get_template("report.html")
    text = template.render(
        study=study,
        e=study.first,
        summary=summary(study),
        numbers=NUMBERS,
        unknown_numbers=UNKNOWN,
        names_of_measures={name: shown for name, shown, _ in NUMBERS}
        | {
            "corruption_error": "Error under corruption",
            "unknown_auroc": "AUROC against the unknown",
            "held_out_auroc": "AUROC against classes taken from the gallery",
        },
        drawn=drawn,
        figures=_script(drawn),
        thumbnails=_script(thumbnails),
        plotly=Markup("<script>" + get_plotlyjs().replace("</script", "<\\/script") + "</script>"),
    )
    write_text(path, text)


def summary(study: Study) -> str:
    """What a person should know who reads one sentence or two."""
    result = study.first
    low, high = map(_percent, result.intervals["top1"])
    between = "" if low == high else f" ({low} to {high})"
    parts = [
        f"Of {result.images:,} images, {_percent(result.top1)} get the right label{between}; as served, with "
        f"{result.false_reject:.0%} false rejects asked for, {_percent(result.accepted_top1)} are right and accepted."
    ]
    if unknown := result.unknown:
        refused = _percent(1 - unknown.accepted)
        parts.append(f"Of {unknown.images:,} images of no known class, {refused} are called unknown.")
    parts += [_verdict(comparison["top1"], comparison.other) for comparison in study.comparisons]
    if study.robustness:
        parts.append(f"Under corruption {_percent(study.robustness[0].mean_error)} are labelled wrongly on average.")
    return " ".join(parts)


def _verdict(top1: Difference, other: str) -> str:
    points = f"{abs(top1.difference) * 100:.1f} points {'above' if top1.difference > 0 else 'below'} that of {other}"
    if not top1.difference:
        return f"{other} gets as many right."
    return f"Its top-1 is {points}, {'beyond' if top1.clear else 'within'} chance (p = {top1.p:.2g})."


def _script(value: object) -> Markup:
    """JSON that no content can end the script element of."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.1%}"


def _number(value: float) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.4f}"


def _picture(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()
