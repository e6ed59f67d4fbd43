"""A page about a training: curves, settings, samples and how it ended, in one file."""

import base64
import html
import io
import os
import pathlib
from typing import Any

from kerasllm.files import write_text

Curve = list[tuple[int, float]]

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
tr { border-bottom: 1px solid #ddd; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
th { font-weight: 600; }
"""


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    facts: dict[str, str],
    curves: dict[str, Curve],
    validation_losses: Curve = (),
    baselines: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
    samples: list[tuple[int, str, str]] = (),
) -> pathlib.Path:
    """Writes a report of a training: one HTML file that needs no other and no network.

    Args:
        path: The file; it is there whole or not at all.
        title: Its heading.
        facts: What is said first, by name.
        curves: Step and value of each update by name: `loss`, `learning_rate`, `gradient_norm`,
            `tokens_per_second`, `mfu`. What has no points is not drawn.
        validation_losses: Step and loss in nats per token.
        baselines: Names to losses, drawn beside them.
        settings: By name; dictionaries in it are sections.
        samples: Step, prompt, text.

    Returns:
        The file.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        _table(facts.items()),
    ]
    picture = base64.b64encode(_draw(curves, validation_losses, baselines or {})).decode("ascii")
    parts.append(f'<img alt="Curves of the training" src="data:image/png;base64,{picture}">')
    if samples:
        rows = "".join(
            f'<tr><td>{step:,}</td><td class="text">{html.escape(prompt)}</td>'
            f'<td class="text">{html.escape(text)}</td></tr>'
            for step, prompt, text in samples
        )
        parts.append(
            f"<h2>Samples</h2><table><tr><th>step</th><th>prompt</th><th>text</th></tr>{rows}</table>"
        )
    if settings:
        parts.append("<h2>Settings</h2>")
        parts.append(_table(_flatten(settings)))
    parts.append("</body></html>")
    write_text(path, "\n".join(parts) + "\n")
    return pathlib.Path(path)


def _table(rows) -> str:
    cells = (
        f'<tr><th>{html.escape(str(name))}</th><td class="text">{html.escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _flatten(settings: dict[str, Any], prefix: str = ""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def draw_losses(axes, losses: Curve, validation_losses: Curve, baselines: dict[str, float]) -> None:
    """Draws the losses of a training.

    Args:
        axes: Matplotlib's, to draw on.
        losses: Step and loss of each update.
        validation_losses: Step and loss of each validation.
        baselines: Names to losses, drawn as level lines.
    """
    if losses:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.35, label="training")
    if validation_losses:
        steps, values = zip(*validation_losses, strict=True)
        axes.plot(steps, values, color="tab:blue", marker="o", label="validation")
    for (name, loss), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(loss, color="tab:gray", linestyle=style, label=f"{name} baseline")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _draw(curves: dict[str, Curve], validation_losses: Curve, baselines: dict[str, float]) -> bytes:
    """A PNG of all curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    draw_losses(next(panels), curves.get("loss", ()), validation_losses, baselines)
    labels = {
        "learning_rate": "learning rate",
        "gradient_norm": "norm of the gradients, before clipping",
        "tokens_per_second": "tokens per second",
    }
    for (name, label), axes in zip(labels.items(), panels, strict=True):
        if curve := curves.get(name):
            axes.plot(*zip(*curve, strict=True), color="tab:blue")
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
        if name == "gradient_norm" and any(value > 0 for _, value in curve or ()):
            axes.set_yscale("log")
        if name == "tokens_per_second":
            axes.set_ylim(bottom=0)
            if curves.get("mfu"):
                share = axes.twinx()
                share.plot(*zip(*curves["mfu"], strict=True), color="tab:orange", alpha=0.6)
                share.set_ylabel("share of the stated peak", color="tab:orange")
                share.set_ylim(bottom=0)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
