"""The loss curve of a run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from m3jax.training.metrics import FILE, read_metrics

PICTURE = "loss.png"


def plot_loss_curve(workdir: Path) -> Path | None:
    """Draws training loss and held-out loss over steps from metrics.jsonl.

    Returns:
      The PNG's path, or None when there is nothing to draw.
    """
    records = read_metrics(workdir / FILE)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if not train:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=workdir.absolute().name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / PICTURE
    figure.savefig(path, dpi=150)
    return path
